#!/usr/bin/env python3
"""Parts of one program that are compiled for different machines (docs/design.md, "One program, several machines"): each
computes what it computes alone, to the last bit and to the byte of workspace, whichever part comes first, in one program
and as shared libraries; and no two parts define a function of one name, which the linker would keep once."""

import argparse
import concurrent.futures
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent / "targets"
MACHINES = {"sse2": [], "avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx512dq", "-mfma"]}
# -O1 leaves the most functions that the linker could mix up, so that all machines and both compilers meet there.
GROUPS = [("g++", "-O1", ["sse2", "avx2", "avx512"]), ("other", "-O1", ["sse2", "avx2"]),
          ("g++", "-O2", ["sse2", "avx2"]), ("g++", "-O3", ["sse2", "avx2"])]


def checked(*command, **options) -> str:
    result = subprocess.run([str(c) for c in command], text=True, capture_output=True, **options)
    if result.returncode != 0:
        sys.exit(f"FAIL {' '.join(map(str, command))}: exit {result.returncode}\n{(result.stdout + result.stderr)[-4000:]}")
    return result.stdout


def shared_names(objects: dict[str, pathlib.Path]) -> list[str]:
    """Weak and unique definitions that more than one object has, of whatever namespace."""
    defined = {part: {line.split()[-1] for line in checked("nm", "--defined-only", file).splitlines() if line.split()[-2] in "WVu"}
               for part, file in objects.items()}
    found = [f"{one}, {other}: {name}" for one, other in itertools.combinations(defined, 2)
             for name in sorted(defined[one] & defined[other])]
    return checked("c++filt", input="\n".join(found)).splitlines()


class Group:
    """The parts of one compiler and level."""

    def __init__(self, compiler: str, level: str, parts: list[str], scratch: pathlib.Path):
        self.compiler, self.scratch, self.failures = compiler, scratch, 0
        self.name = f"{pathlib.Path(compiler).name} {level}"
        self.main = scratch / "main.o"
        self.objects = {part: scratch / f"{part}.o" for part in parts}

    def report(self, what: str, wrong: str) -> None:
        print(f"{'FAIL' if wrong else 'ok  '} {self.name}: {what}" + (f"\n{wrong[:4000]}" if wrong else ""), flush=True)
        self.failures += bool(wrong)

    def output(self, *files: pathlib.Path) -> list[str]:
        program = self.scratch / "program"
        # The program refers to its parts weakly.
        checked(self.compiler, self.main, "-Wl,--no-as-needed", *files, f"-Wl,-rpath,{self.scratch}", "-o", program)
        result = subprocess.run([program], text=True, capture_output=True)
        return result.stdout.splitlines() + ([f"exit {result.returncode}"] if result.returncode != 0 else [])

    def check(self) -> int:
        names = shared_names(self.objects)
        self.report("no two parts define a function of one name", "\n".join(names))
        alone = [line for file in self.objects.values() for line in self.output(file)]
        skipped = [line for line in alone if line.startswith("skip")]
        for line in skipped:
            print(f"     {self.name}: {line}")
        wrong = [line for line in alone if line not in skipped and ": ok, " not in line]
        self.report(f"{len(alone) - len(skipped)} ops, each part alone", "\n".join(wrong))
        libraries = {part: self.scratch / f"lib{part}.so" for part in self.objects}
        for part, file in self.objects.items():
            checked(self.compiler, "-shared", file, "-o", libraries[part])
        for kind, files in (("one program", self.objects), ("shared libraries", libraries)):
            # Each part first once: the linker, and the loader, keep the first definition.
            for first in range(len(files)):
                order = list(files)[first:] + list(files)[:first]
                together = self.output(*(files[part] for part in order))
                wrong = "" if together == alone else "\n".join(["alone:", *alone, "together:", *together])
                self.report(f"{kind}, {', '.join(order)}: as alone", wrong)
        return self.failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("include", type=pathlib.Path)
    parser.add_argument("--compiler", action="append", required=True)
    parser.add_argument("--define", action="append", default=[], help="for every part: -D of this")
    arguments = parser.parse_args()
    if os.uname().machine != "x86_64":
        print("skip: the parts are for x86-64")
        return 77
    compilers = {"g++": arguments.compiler[0], "other": arguments.compiler[1] if len(arguments.compiler) > 1 else None}
    flags = ["-std=c++20", "-fPIC", f"-I{arguments.include.resolve()}", "-isystem/usr/include/eigen3",
             *(f"-D{define}" for define in arguments.define)]
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        groups, jobs = [], []
        for kind, level, parts in GROUPS:
            if compilers[kind] is None:
                print(f"skip {level} of another compiler: there is none")
                continue
            scratch = pathlib.Path(folder) / f"{kind}{level}"
            scratch.mkdir()
            group = Group(compilers[kind], level, parts, scratch)
            groups.append(group)
            for part, file in group.objects.items():
                jobs.append((group.compiler, *flags, level, *MACHINES[part], f"-DPART={part}", "-c", HERE / "part.cpp", "-o", file))
            jobs.append((group.compiler, *flags, "-c", HERE / "main.cpp", "-o", group.main))
        for job in [pool.submit(checked, *job) for job in jobs]:
            job.result()
        return 1 if sum(group.check() for group in groups) else 0


if __name__ == "__main__":
    sys.exit(main())
