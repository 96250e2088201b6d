#!/usr/bin/env python3
"""Checks on the public headers. What the linker and the preprocessor decide is asked of one compiler; what warnings say, of
each. A .cuh is compiled against the emulator's stand-ins for the toolkit's headers (tests/emu/include), and by nvcc where
there is one.

alone    each header compiles by itself, included twice, without exceptions and RTTI, strict warnings as errors
budget   and costs no more CPU time than its folder allows, in units of what <Eigen/Core> costs beside it
strict   every op, layer and diagnostic compiles under the warnings of strict users (every_op.cpp), by each compiler
strides  and forms no address along an axis of extent 1 or 0 (every_op.cpp under UBSan)
odr      no header defines what a second unit may not define again; nvcc: nor what a unit for another architecture names alike
macros   no header defines a macro that does not begin with LINATTN_
eigen    Eigen's own products keep their threads, and no op starts one; a .cuh does not include Eigen, which would triple
         what a device unit costs to compile
"""

import argparse
import concurrent.futures
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import typing

HERE = pathlib.Path(__file__).resolve().parent
COMMON = ["-std=c++20", "-Werror"]
STRICT = [f"-W{name}" for name in (
    "all extra pedantic conversion sign-conversion old-style-cast switch-enum shadow non-virtual-dtor overloaded-virtual "
    "double-promotion cast-qual format=2 undef redundant-decls null-dereference extra-semi zero-as-null-pointer-constant "
    "missing-declarations unused unused-macros float-conversion vla mismatched-tags").split()]
# Not for these headers: C++98, the layout of structs, and comparisons with the numbers meant.
CLANG = ["-Weverything", "-Wno-c++98-compat", "-Wno-c++98-compat-pedantic", "-Wno-padded", "-Wno-float-equal"]
GCC = [f"-W{name}" for name in (
    "useless-cast cast-align=strict logical-op duplicated-cond duplicated-branches arith-conversion suggest-override "
    "ctor-dtor-privacy strict-null-sentinel comma-subscript volatile deprecated-copy-dtor implicit-fallthrough=5 "
    "redundant-tags").split()]
# What nvcc's users hand to its host compiler at most.
DEVICE = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wpedantic", "-Wno-unknown-pragmas"]
BARE = ["-fno-exceptions", "-fno-rtti"]
# CPU time of the front end, as a multiple of <Eigen/Core>'s (0.8 to 1.0 s on a machine of 2022).
BUDGETS = {"core": 0.5, "contract": 0.5, "host": 2.0, "layers": 2.5, "weights": 5.5, "detail": 2.0, "": 3.0}
# They come precompiled to a header that includes them, directly or not: its includes precede its code, so all of theirs is
# there either way. Their cost is added to the header's.
LIBRARIES = ("Eigen/Core", "nlohmann/json.hpp")


def budget_key(header: pathlib.PurePath) -> str:
    folder = header.parts[1] if len(header.parts) > 2 else ""
    if folder not in ("ops", "diagnostics"):
        return folder
    return "host" if header.stem.endswith("_cpu") else "contract"


class Result(typing.NamedTuple):
    ok: bool
    output: str
    seconds: float  # of CPU


def run(*command, source: str = "", env: dict[str, str] | None = None) -> Result:
    with tempfile.TemporaryFile("w+") as text, tempfile.TemporaryFile("w+") as out:
        text.write(source)
        text.seek(0)
        process = subprocess.Popen([str(c) for c in command], stdin=text, stdout=out, stderr=subprocess.STDOUT,
                                   env={**os.environ, **(env or {})})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        return Result(status == 0, out.read(), usage.ru_utime + usage.ru_stime)


def is_clang(compiler: str) -> bool:
    return "clang" in run(compiler, "--version").output


class Checker:
    def __init__(self, arguments: argparse.Namespace, scratch: pathlib.Path):
        self.include, self.scratch = arguments.include.resolve(), scratch
        # The emulator's folder first: its ptx.cuh stands in for the library's.
        self.folders = [f"-I{arguments.emulator.resolve()}", f"-I{self.include}", *(f"-isystem{path}" for path in arguments.system)]
        self.system = arguments.system
        self.hosts = sorted(p.relative_to(self.include) for p in self.include.rglob("*.hpp"))
        self.devices = sorted(p.relative_to(self.include) for p in self.include.rglob("*.cuh"))
        self.compilers = arguments.compiler
        self.failures = 0

    def report(self, what: str, wrong: str) -> None:
        print(f"{'FAIL' if wrong else 'ok  '} {what}" + (f"\n{wrong[-4000:]}" if wrong else ""), flush=True)
        self.failures += bool(wrong)

    def compile(self, compiler: str, *flags, source: str = "") -> Result:
        return run(compiler, *COMMON, *self.folders, *flags, *(["-x", "c++", "-"] if source else []), source=source)

    @functools.cache
    def reaches(self, header: pathlib.PurePath) -> frozenset[str]:
        """All that a header includes, directly and not."""
        found = re.findall(r"^#include <(.*)>", (self.include / header).read_text(), re.M)
        ours = [pathlib.PurePath(name) for name in found if (self.include / name).is_file()]
        return frozenset(found).union(*(self.reaches(name) for name in ours))

    def precompile(self, compiler: str) -> dict[str, float]:
        """Leaves LIBRARIES precompiled in the scratch folder, and says what each costs."""
        costs = {}
        for library in LIBRARIES:
            name = self.scratch / f"{library.split('/')[0]}.hpp"
            name.write_text(f"#include <{library}>\n")
            self.compile(compiler, *STRICT, *GCC, *BARE, "-x", "c++-header", name, "-o", f"{name}.gch")
            costs[library] = min(self.compile(compiler, "-fsyntax-only", *BARE, source=name.read_text()).seconds for _ in range(2))
        return costs

    def alone(self, compiler: str) -> None:
        clang = is_clang(compiler)
        costs = self.precompile(compiler)
        unit = costs["Eigen/Core"]
        print(f"     {compiler}: <Eigen/Core> costs {unit:.2f} s")

        def one(header):
            device = header in self.devices
            known = [] if clang else [name for name in LIBRARIES if name in self.reaches(header)]
            flags = [flag for name in known[:1] for flag in ("-include", self.scratch / f"{name.split('/')[0]}.hpp")]
            warnings = DEVICE if device else [*STRICT, *([] if clang else GCC)]
            line = f"#include <{header}>\n"
            allowed = None if device else BUDGETS[budget_key(header)]
            library = costs[known[0]] / unit if known else 0
            least, beside = float("inf"), unit
            for _ in range(4):
                result = self.compile(compiler, *warnings, *BARE, *flags, "-fsyntax-only", source=line + line + "int main() {}\n")
                least = min(least, result.seconds / beside + library)
                if not result.ok or allowed is None or least <= allowed:
                    break
                # What else runs on a core adds to CPU time: the next try is compared with the unit as it is now.
                beside = max(unit, self.compile(compiler, "-fsyntax-only", *BARE, source="#include <Eigen/Core>\n").seconds)
            return header, result, least, allowed

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for header, result, cost, allowed in pool.map(one, self.hosts + self.devices):
                self.report(f"{compiler}: {header} alone, twice", "" if result.ok else result.output or "no output")
                if allowed is not None:
                    self.report(f"{compiler}: {header} costs {cost:.2f} of {allowed:.1f} <Eigen/Core>",
                                "" if cost <= allowed else "more than its folder allows")

    def strong_names(self, file: pathlib.Path) -> str:
        """What an object defines that no other unit of the program may."""
        names = [line.split() for line in run("nm", "-C", "--defined-only", file).output.splitlines()]
        return "\n".join(" ".join(name[2:]) for name in names if name[1] in "TDBRC" and name[2] != "main")

    def every_op(self) -> None:
        program, unit = self.scratch / "every_op", self.scratch / "every_op.o"
        lines = "".join(f"#include <{header}>\n" for header in self.hosts)
        source = lines + (HERE / "every_op.cpp").read_text()
        for compiler in self.compilers:
            clang = is_clang(compiler)
            last = compiler == self.compilers[-1]
            flags = ["-O0", "-fsanitize=undefined", "-fno-sanitize-recover=undefined"] if last else ["-fsyntax-only"]
            result = self.compile(compiler, *STRICT, *(CLANG if clang else GCC), *flags, *(["-c", "-o", unit] if last else []), source=source)
            self.report(f"{compiler}: every op under strict warnings", "" if result.ok else result.output or "no output")
            if not last or not result.ok:
                continue
            self.report(f"{compiler}: all .hpp in one unit may be in another", self.strong_names(unit))
            link = run(compiler, "-fsanitize=undefined", unit, "-o", program)
            result = run(program) if link.ok else link
            self.report(f"{compiler}: every op on axes of extent 1 and 0 with huge strides", "" if result.ok else result.output or "it crashed")

    def macros(self, compiler: str) -> None:
        """Macros left defined by files under include/, seen through the line markers of -dD."""
        text = self.compile(compiler, "-E", "-dD", source="".join(f"#include <{header}>\n" for header in self.hosts + self.devices)).output
        file, left = "", {}
        for line in text.splitlines():
            if marker := re.match(r'# \d+ "([^"]*)"', line):
                file = marker[1]
            elif (define := re.match(r"#define (\w+)", line)) and file.startswith(str(self.include)):
                left[define[1]] = file
            elif undef := re.match(r"#undef (\w+)", line):
                left.pop(undef[1], None)
        leaked = [f"{file} defines {name}" for name, file in left.items() if not name.startswith("LINATTN_")]
        self.report(f"{compiler}: no header leaks a macro, of {len(left)}", "\n".join(leaked) if left else "no macro seen")
        text = self.compile(compiler, "-E", source="".join(f"#include <{header}>\n" for header in self.devices)).output
        found = re.search(r'^# \d+ "[^"]*/Eigen/.*', text, re.M)
        self.report(f"{compiler}: no .cuh includes Eigen", found[0] if found else "" if "linattn" in text else text)

    def eigen_threads(self, compiler: str) -> None:
        unit, program = self.scratch / "threads.o", self.scratch / "threads"
        result = self.compile(compiler, "-fopenmp", "-O1", "-c", HERE / "eigen_threads.cpp", "-o", unit)
        started = re.findall(r"\b(GOMP_parallel\w*|__kmpc_fork\w*)", run("nm", unit).output) if result.ok else []
        self.report(f"{compiler}: no op starts a thread of Eigen's", result.output if not result.ok else ", ".join(started))
        if result.ok:
            link = run(compiler, "-fopenmp", unit, "-o", program)
            result = run(program, env={"OMP_NUM_THREADS": "2"}) if link.ok else link
            self.report(f"{compiler}: Eigen keeps its threads behind linattn", "" if result.ok else result.output)

    def nvcc(self, program: str, example: pathlib.Path) -> None:
        """All .cuh, each twice, beside the host's headers, in a program that calls an op."""
        source, unit = self.scratch / "unit.cu", self.scratch / "unit.o"
        lines = "".join(f"#include <{header}>\n" for header in ["linattn/cpu.hpp", *self.devices, *self.devices])
        source.write_text(lines + example.read_text())
        result = run(program, "-std=c++20", "-arch=sm_80", "-Werror=all-warnings", "-Xcompiler=-O1,-Wall,-Wextra", "-DEIGEN_NO_CUDA",
                     f"-I{self.include}", *(f"-isystem={path}" for path in self.system), "-c", source, "-o", unit)
        self.report("nvcc: all .cuh and cpu.hpp in one unit may be in another",
                    self.strong_names(unit) if result.ok else result.output or "no output")
        if not result.ok:
            return
        names = re.findall(r" [WVu] (_ZZ?NK?7linattn\w*)", run("nm", "--defined-only", unit).output)
        self.report(f"nvcc: {len(names)} functions are named after the architecture",
                    "\n".join(name for name in names if "_sm800" not in name) if names else "no function seen")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("include", type=pathlib.Path)
    parser.add_argument("--compiler", action="append", required=True, help="the first, g++, checks each header; all check every op")
    parser.add_argument("--emulator", type=pathlib.Path, required=True, help="the stand-ins for the CUDA toolkit's headers")
    parser.add_argument("--system", action="append", default=["/usr/include/eigen3"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checker = Checker(arguments, pathlib.Path(folder))
        if not checker.hosts or not checker.devices:
            sys.exit(f"no headers below {arguments.include}")
        first = arguments.compiler[0]
        checker.alone(first)
        checker.every_op()
        checker.macros(first)
        checker.eigen_threads(first)
        if program := shutil.which("nvcc"):
            checker.nvcc(program, HERE.parents[1] / "examples" / "hello_cuda.cu")
        else:
            print("skip nvcc: it is not installed")
    print(f"{len(checker.hosts + checker.devices)} headers, {checker.failures} failures")
    return 1 if checker.failures else 0


if __name__ == "__main__":
    sys.exit(main())
