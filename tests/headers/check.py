#!/usr/bin/env python3
"""Checks on every public header, one translation unit each, for every compiler given. A .cuh is compiled by them against
the emulator's stand-ins for the toolkit's headers (tests/emu/include), and by nvcc where there is one.

alone    compiles by itself, without exceptions and RTTI, warnings as errors
twice    includes twice in one unit
odr      two units that include all of the library link into one program (nvcc: what is for a device, too)
macros   defines no macro that does not begin with LINATTN_
eigen    a .cuh does not include Eigen, which would triple what a device unit costs to compile
budget   costs no more CPU time than its folder allows, in units of what <Eigen/Core> costs in the same run
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

STRICT = ["-std=c++20", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wpedantic", "-Werror"]
BARE = ["-fno-exceptions", "-fno-rtti"]
# CPU time of the front end, as a multiple of <Eigen/Core>'s (0.8 to 1.0 s on a machine of 2022).
BUDGETS = {"core": 0.5, "contract": 0.5, "host": 2.0, "layers": 2.5, "weights": 5.5, "detail": 2.0, "": 3.0}


def budget_key(header: pathlib.PurePath) -> str:
    folder = header.parts[1] if len(header.parts) > 2 else ""
    if folder not in ("ops", "diagnostics"):
        return folder
    return "host" if header.stem.endswith("_cpu") else "contract"


class Checker:
    def __init__(self, include: pathlib.Path, emulator: pathlib.Path, system: list[str]):
        self.include = include
        # The emulator's folder first: its ptx.cuh stands in for the library's.
        self.flags = [f"-I{emulator}", f"-I{include}"] + [f"-isystem{path}" for path in system]
        self.hosts = sorted(p.relative_to(include) for p in include.rglob("*.hpp"))
        self.devices = sorted(p.relative_to(include) for p in include.rglob("*.cuh"))
        self.headers = self.hosts + self.devices
        self.failures: list[str] = []

    def compile(self, compiler: str, source: str, *extra: str) -> subprocess.CompletedProcess:
        command = [compiler, *STRICT, *self.flags, *extra, "-x", "c++", "-"]
        return subprocess.run(command, input=source, text=True, capture_output=True)

    def report(self, what: str, ok: bool, detail: str = "") -> None:
        print(f"{'ok  ' if ok else 'FAIL'} {what}" + ("" if ok or not detail else "\n" + detail), flush=True)
        if not ok:
            self.failures.append(what)

    def alone_and_twice(self, compiler: str) -> None:
        def one(header):
            line = f"#include <{header}>\n"
            # nlohmann/json compiles without exceptions, so weights/ is held to the same flags as all else.
            nvcc_only = ["-Wno-unknown-pragmas", "-Wno-unneeded-internal-declaration"] if header in self.devices else []
            return header, self.compile(compiler, line + line + "int main() {}\n", "-fsyntax-only", *BARE, *nvcc_only)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for header, result in pool.map(one, self.headers):
                self.report(f"{compiler}: {header} alone, twice", result.returncode == 0, result.stderr[-4000:])

    def odr(self, compiler: str) -> None:
        lines = "".join(f"#include <{header}>\n" for header in self.hosts)
        with tempfile.TemporaryDirectory() as folder:
            objects = []
            for index, body in enumerate(["int other();\nint main() { return other(); }\n", "int other() { return 0; }\n"]):
                out = os.path.join(folder, f"{index}.o")
                result = self.compile(compiler, lines + body, "-c", "-o", out)
                if result.returncode != 0:
                    return self.report(f"{compiler}: all .hpp in two units", False, result.stderr[-4000:])
                objects.append(out)
            link = subprocess.run([compiler, *objects, "-o", os.path.join(folder, "program")], capture_output=True, text=True)
            self.report(f"{compiler}: all .hpp in two units link", link.returncode == 0, link.stderr[-4000:])

    def macros(self, compiler: str) -> None:
        """Macros left defined by files under include/, seen through the line markers of -dD."""
        for header in self.headers:
            text = self.compile(compiler, f"#include <{header}>\n", "-E", "-dD").stdout
            inside, left = False, set()
            for line in text.splitlines():
                if marker := re.match(r'# \d+ "([^"]*)"', line):
                    inside = marker[1].startswith(str(self.include))
                elif inside and (define := re.match(r"#define (\w+)", line)):
                    left.add(define[1])
                elif undef := re.match(r"#undef (\w+)", line):
                    left.discard(undef[1])
            if header in self.devices:
                self.report(f"{compiler}: {header} includes no Eigen", not re.search(r'^# \d+ "[^"]*/Eigen/', text, re.M))
            leaked = sorted(name for name in left if not name.startswith("LINATTN_"))
            self.report(f"{compiler}: {header} leaks no macro", not leaked, f"defines {', '.join(leaked)}")

    def seconds(self, compiler: str, header) -> float:
        """CPU seconds of the front end on one header."""
        command = [compiler, *STRICT, *self.flags, "-fsyntax-only", "-x", "c++", "-"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdin.write(f"#include <{header}>\n".encode())
        process.stdin.close()
        _, process.returncode, usage = os.wait4(process.pid, 0)
        return usage.ru_utime + usage.ru_stime

    def budget(self, compiler: str) -> None:
        """Load of the machine only ever adds to a cost, so one that is too high is taken twice more."""
        unit = min(self.seconds(compiler, "Eigen/Core") for _ in range(3))
        print(f"     {compiler}: <Eigen/Core> costs {unit:.2f} s")

        def one(header):
            cost, allowed = self.seconds(compiler, header) / unit, BUDGETS[budget_key(header)]
            for _ in range(2):
                if cost > allowed:
                    cost = min(cost, self.seconds(compiler, header) / unit)
            return header, cost, allowed

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for header, cost, allowed in pool.map(one, self.hosts):
                self.report(f"{compiler}: {header} costs {cost:.2f} of {allowed:.1f} <Eigen/Core>", cost <= allowed)

    def nvcc(self, program: str, system: list[str]) -> None:
        """All .cuh, each twice, beside the host's headers in two units of one program."""
        flags = ["-std=c++20", "-arch=sm_80", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-DEIGEN_NO_CUDA",
                 f"-I{self.include}", *(f"-isystem={path}" for path in system)]

        def compile(name: str, lines: str):
            source = pathlib.Path(folder, f"{name}.cu")
            source.write_text(lines)
            result = subprocess.run([program, *flags, "-c", source, "-o", source.with_suffix(".o")], text=True, capture_output=True)
            return source.with_suffix(".o"), result.returncode, (result.stdout + result.stderr)[-4000:]

        with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            lines = "".join(f"#include <{header}>\n" for header in ["linattn/cpu.hpp", *self.devices, *self.devices])
            bodies = ["int other();\nint main() { return other(); }\n", "int other() { return 0; }\n"]
            units = list(pool.map(lambda job: compile(f"unit{job[0]}", lines + job[1]), enumerate(bodies)))
            link = [subprocess.run([program, *(unit[0] for unit in units), "-o", pathlib.Path(folder, "program")],
                                   text=True, capture_output=True)] if all(unit[1] == 0 for unit in units) else []
            self.report("nvcc: all .cuh and cpu.hpp in two units link", bool(link) and link[0].returncode == 0,
                        link[0].stderr if link else "".join(unit[2] for unit in units))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("include", type=pathlib.Path)
    parser.add_argument("--compiler", action="append", required=True)
    parser.add_argument("--emulator", type=pathlib.Path, required=True, help="the stand-ins for the CUDA toolkit's headers")
    parser.add_argument("--system", action="append", default=["/usr/include/eigen3"])
    arguments = parser.parse_args()
    checker = Checker(arguments.include.resolve(), arguments.emulator.resolve(), arguments.system)
    if not checker.headers:
        sys.exit(f"no headers below {arguments.include}")
    for compiler in arguments.compiler:
        checker.alone_and_twice(compiler)
        checker.odr(compiler)
    checker.macros(arguments.compiler[0])
    checker.budget(arguments.compiler[0])
    if program := shutil.which("nvcc"):
        checker.nvcc(program, arguments.system)
    else:
        print("skip nvcc: it is not installed")
    print(f"{len(checker.headers)} headers, {len(checker.failures)} failures")
    return 1 if checker.failures else 0


if __name__ == "__main__":
    sys.exit(main())
