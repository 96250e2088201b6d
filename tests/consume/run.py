#!/usr/bin/env python3
"""Builds and runs users of the library as users do: from the installed tree with a bare compiler, and as a Meson
subproject of the source tree. The user's program is examples/hello_cpu.cpp, which is the README's example."""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
STRICT = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]


def run(what: str, *command, cwd=None) -> None:
    result = subprocess.run([str(c) for c in command], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(f"{'ok  ' if result.returncode == 0 else 'FAIL'} {what}", flush=True)
    if result.returncode != 0:
        sys.exit(result.stdout[-8000:])


def readme(source: pathlib.Path) -> None:
    blocks = re.findall(r"```cpp\n(.*?)```", (source / "README.md").read_text(), re.S)
    hello = (source / "examples" / "hello_cpu.cpp").read_text()
    if hello not in blocks:
        sys.exit("FAIL README.md's C++ example is not examples/hello_cpu.cpp")
    print("ok   README.md's C++ example is examples/hello_cpu.cpp", flush=True)


def installed(source: pathlib.Path, build: pathlib.Path, compilers: list[str], scratch: pathlib.Path) -> None:
    run("meson install", "meson", "install", "-C", build, "--no-rebuild", "--skip-subprojects", "--destdir", scratch / "root")
    (include,) = (p.parent.parent for p in (scratch / "root").rglob("linattn/cpu.hpp"))
    for compiler in compilers:
        for name, flags in {
            "-O2": ["-O2"],
            "-O2 -march=native": ["-O2", "-march=native"],
            "-O1 -fno-exceptions -fno-rtti": ["-O1", "-fno-exceptions", "-fno-rtti"],
        }.items():
            program = scratch / "hello"
            run(f"{compiler} {name} on the installed tree", compiler, "-std=c++20", *flags, *STRICT, f"-I{include}",
                "-isystem/usr/include/eigen3", source / "examples" / "hello_cpu.cpp", "-o", program)
            run("     runs", program)


def subproject(source: pathlib.Path, scratch: pathlib.Path) -> None:
    project = scratch / "consumer"
    shutil.copytree(HERE / "subproject", project)
    shutil.copy(source / "examples" / "hello_cpu.cpp", project)
    (project / "subprojects").mkdir()
    (project / "subprojects" / "linattn").symlink_to(source)
    run("subproject: meson setup", "meson", "setup", "build", cwd=project)
    targets = subprocess.run(["meson", "introspect", "build", "--targets"], cwd=project, text=True, capture_output=True).stdout
    if "linattn-sd35" in targets or "bench" in targets:
        sys.exit("FAIL subproject: the library's own programs came along")
    run("subproject: meson test builds and runs it", "meson", "test", "-C", "build", cwd=project)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--compiler", action="append", required=True)
    arguments = parser.parse_args()
    source, build = arguments.source.resolve(), arguments.build.resolve()
    readme(source)
    with tempfile.TemporaryDirectory() as folder:
        installed(source, build, arguments.compiler, pathlib.Path(folder))
        subproject(source, pathlib.Path(folder))


if __name__ == "__main__":
    main()
