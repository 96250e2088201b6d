#!/usr/bin/env python3
"""Builds and runs users of the library as users do: from the installed tree with a bare compiler, by pkg-config and by
CMake's find_package, there and after the tree was moved; and as a Meson subproject of the source tree. The user's program
is examples/hello_cpu.cpp; a device's includes all of its headers."""

import argparse
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
STRICT = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]


def run(what: str, *command, cwd=None, fails_with: str = "") -> None:
    """Runs a command that succeeds, or one that fails with these words."""
    result = subprocess.run([str(c) for c in command], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    ok = result.returncode != 0 and fails_with in result.stdout if fails_with else result.returncode == 0
    print(f"{'ok  ' if ok else 'FAIL'} {what}", flush=True)
    if not ok:
        sys.exit(result.stdout[-8000:])


def readme(source: pathlib.Path) -> None:
    """The programs that README.md shows are examples/hello_*, word for word."""
    examples = {path.read_text(): path.name for path in (source / "examples").glob("hello_*")}
    shown = [block for block in re.findall(r"```\w+\n(.*?)```", (source / "README.md").read_text(), re.S) if "int main(" in block]
    if not shown:
        sys.exit("FAIL README.md shows no program")
    for block in shown:
        if block not in examples:
            sys.exit(f"FAIL README.md shows a program that is none of {', '.join(examples.values())}:\n{block}")
        print(f"ok   README.md shows {examples[block]}", flush=True)


def install(build: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
    """The prefix of an installed tree."""
    run("meson install", "meson", "install", "-C", build, "--no-rebuild", "--skip-subprojects", "--tags", "devel",
        "--destdir", scratch / "root")
    (header,) = (scratch / "root").rglob("include/linattn/cpu.hpp")
    return header.parents[2]


def bare(source: pathlib.Path, prefix: pathlib.Path, compilers: list[str], scratch: pathlib.Path) -> None:
    for compiler in compilers:
        for name, flags in {
            "-O2": ["-O2"],
            "-O2 -march=native": ["-O2", "-march=native"],
            "-O1 -fno-exceptions -fno-rtti": ["-O1", "-fno-exceptions", "-fno-rtti"],
        }.items():
            program = scratch / "hello"
            run(f"{compiler} {name} on the installed tree", compiler, "-std=c++20", *flags, *STRICT, f"-I{prefix}/include",
                "-isystem/usr/include/eigen3", source / "examples" / "hello_cpu.cpp", "-o", program)
            run("     runs", program)


def pkg_config(source: pathlib.Path, prefix: pathlib.Path, compiler: str, scratch: pathlib.Path) -> None:
    if shutil.which("pkg-config") is None:
        return print("skip pkg-config: it is not installed", flush=True)
    environment = {**os.environ, "PKG_CONFIG_PATH": str(prefix / "share" / "pkgconfig")}
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "linattn"], env=environment, text=True, capture_output=True)
    if flags.returncode != 0:
        sys.exit(f"FAIL pkg-config: {flags.stderr}")
    program = scratch / "hello"
    run(f"pkg-config, {prefix.name}", compiler, "-std=c++20", source / "examples" / "hello_cpu.cpp",
        *shlex.split(flags.stdout), "-o", program)
    run("     runs", program)


def cmake(source: pathlib.Path, prefix: pathlib.Path, compiler: str, scratch: pathlib.Path) -> None:
    if shutil.which("cmake") is None:
        return print("skip CMake: it is not installed", flush=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        project = pathlib.Path(folder)
        shutil.copytree(HERE / "cmake", project, dirs_exist_ok=True)
        shutil.copy(source / "examples" / "hello_cpu.cpp", project)
        configure = ["cmake", "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_CXX_COMPILER={compiler}"]
        run(f"CMake, {prefix.name}: configure", *configure, "-S", project, "-B", project / "build")
        run("     build", "cmake", "--build", project / "build")
        run("     runs", project / "build" / "hello")
        run("     a version to come is refused", *configure, "-DWANTED=999", "-S", project, "-B", project / "other",
            fails_with="not accepted")


def cuda(source: pathlib.Path, prefix: pathlib.Path, system: list[str], scratch: pathlib.Path) -> None:
    if shutil.which("nvcc") is None:
        return print("skip nvcc: it is not installed", flush=True)
    unit = scratch / "unit.cu"
    unit.write_text("#include <linattn/cuda.cuh>\n")
    run("nvcc on the installed tree", "nvcc", "-std=c++20", "-arch=sm_80", "-Werror=all-warnings", f"-I{prefix}/include",
        *(f"-isystem={path}" for path in system), "-c", unit, "-o", scratch / "unit.o")


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
    parser.add_argument("--system", action="append", default=[], help="folder of headers that the CUDA toolkit lacks")
    arguments = parser.parse_args()
    source, build = arguments.source.resolve(), arguments.build.resolve()
    readme(source)
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        prefix = install(build, scratch)
        bare(source, prefix, arguments.compiler, scratch)
        cuda(source, prefix, arguments.system, scratch)
        for place in (prefix, scratch / "moved elsewhere"):
            if place != prefix:
                prefix.rename(place)
            pkg_config(source, place, arguments.compiler[0], scratch)
            cmake(source, place, arguments.compiler[0], scratch)
        subproject(source, scratch)


if __name__ == "__main__":
    main()
