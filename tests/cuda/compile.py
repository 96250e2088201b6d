#!/usr/bin/env python3
"""Compiles every tests/cuda/*.cu with nvcc, warnings and spills as errors, and holds what ptxas says of each kernel against
the table in docs/cuda.md.

A figure that is worse than the table's fails, and so does one that is better: the table is the record, and it changes on
purpose, by --update, which compiles for all architectures. Figures depend on the compiler, so another version of nvcc
than the table's is held to the errors alone (warnings, spills, local memory, double arithmetic, blocks that do not fit).

Threads come from the kernels' __launch_bounds__, dynamic shared memory from what detail::dynamic_shared leaves in the PTX.
What a kernel keeps behind that struct depends on shapes; a unit says it for SD3.5's in a comment,
"// x_kernel keeps 1024 bytes more".
Exits with 77 where there is no nvcc."""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

# What the units may instantiate, so that the check stays within its time.
MOST_A_UNIT, MOST_IN_ALL = 10, 40

FLAGS = ["-std=c++20", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra",
         "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage,--warn-on-double-precision-use,--warning-as-error"]


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """Limits of one streaming multiprocessor: CUDA C++ programming guide, "Compute Capabilities"."""
    shared: int  # KB an SM
    shared_a_block: int  # KB
    threads: int
    blocks: int
    registers: int = 65536

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """Blocks that fit. Registers are given out to warps by 256, warps to the four quarters of an SM in turn; a block
        takes 1 KB of shared memory beside its own."""
        if shared > self.shared_a_block * 1024:
            return 0
        warps = -(-threads // 32)
        a_warp = -(-registers * 32 // 256) * 256
        by_registers = self.registers // a_warp // 4 * 4 // warps
        by_shared = self.shared * 1024 // (-(-shared // 128) * 128 + 1024)
        return min(by_registers, by_shared, self.threads // (warps * 32), self.blocks)


MULTIPROCESSORS = {
    80: Multiprocessor(164, 163, 2048, 32),
    86: Multiprocessor(100, 99, 1536, 16),
    89: Multiprocessor(100, 99, 1536, 24),
    90: Multiprocessor(228, 227, 2048, 32),
    100: Multiprocessor(228, 227, 2048, 32),
    120: Multiprocessor(100, 99, 1536, 24),
}


@dataclasses.dataclass
class Kernel:
    """One instantiation; registers by architecture."""
    threads: int = 0
    shared: int = 0  # bytes
    registers: dict = dataclasses.field(default_factory=dict)

    def blocks(self, arch: int) -> int:
        return MULTIPROCESSORS[arch].resident(self.threads, self.registers[arch], self.shared)


def readable(name: str) -> str:
    """A demangled kernel without what is the same for all: return type, namespaces, parameters."""
    name = re.sub(r"\(.*", "", name.replace("(anonymous namespace)::", "").replace("(bool)0", "false").replace("(bool)1", "true"))
    name = re.sub(r"\(\w+\)(?=\d)", "", name)
    return re.sub(r"\b(?:linattn|v\d+|detail|\w+_sm\d+)::", "", name.removeprefix("void "))


def demangle(names: list[str]) -> dict[str, str]:
    result = subprocess.run(["c++filt", *names], text=True, capture_output=True, check=True) if names else None
    return dict(zip(names, map(readable, result.stdout.splitlines()))) if result else {}


def parse(log: str, ptx: str) -> dict[str, Kernel]:
    """Kernels by mangled name: registers from ptxas -v, the rest from the PTX."""
    kernels: dict[str, Kernel] = {}
    for entry in re.finditer(r"^(?:\.visible |\.weak )?\.entry (\w+)\(.*?^\}", ptx, re.M | re.S):
        body, kernel = entry[0], kernels.setdefault(entry[1], Kernel())
        bounds = re.search(r"^\.maxntid (\d+)(?:, (\d+), (\d+))?", body, re.M)
        if bounds is None:
            raise ValueError(f"{entry[1]}: no __launch_bounds__")
        kernel.threads = int(bounds[1]) * int(bounds[2] or 1) * int(bounds[3] or 1)
        kernel.shared = max((int(n) for n in re.findall(r"// dynamic_shared (\d+)", body)), default=0)
    for name, arch, used in re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?: Used ([^\n]*)", log, re.S):
        if " bytes smem" in used:
            raise ValueError(f"{name}: static shared memory, which the table would not show")
        kernels[name].registers[int(arch)] = int(re.match(r"(\d+) registers", used)[1])
    return kernels


class Toolkit:
    def __init__(self, source: pathlib.Path, build: pathlib.Path, system: list[str]):
        self.nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        self.source, self.build, self.system = source, build, system
        self.version = ""
        if os.access(self.nvcc, os.X_OK):
            text = subprocess.run([self.nvcc, "--version"], text=True, capture_output=True).stdout
            self.version = (re.search(r"release [\d.]+, V([\d.]+)", text) or [None, ""])[1]

    def compile(self, unit: pathlib.Path, archs: list[int]) -> dict[str, Kernel]:
        """Of one unit, by readable name. A result is kept in the build folder as long as no file that it came from changes."""
        command = [self.nvcc, *FLAGS, f"-I{self.source / 'include'}", *(f"-isystem={path}" for path in self.system),
                   *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)]
        key = hashlib.sha256(json.dumps([self.version, *command, str(unit)]).encode()).hexdigest()[:16]
        kept = self.build / f"{unit.stem}-{key}.json"
        if kept.exists():
            record = json.loads(kept.read_text())
            if all(digest(path) == was for path, was in record["files"].items()):
                return {name: Kernel(k["threads"], k["shared"], {int(a): r for a, r in k["registers"].items()})
                        for name, k in record["kernels"].items()}
        with tempfile.TemporaryDirectory(dir=self.build) as folder:
            files = pathlib.Path(folder, "files")
            run = subprocess.run([*command, "-MD", "-MF", files, "--keep", f"--keep-dir={folder}", "-c", unit, "-o",
                                  pathlib.Path(folder, "unit.o")], text=True, capture_output=True)
            log = run.stdout + run.stderr
            if run.returncode != 0:
                raise ValueError(log)
            ptx = "".join(path.read_text() for path in pathlib.Path(folder).glob("*.ptx"))
            kernels = parse(log, ptx)
            depends = re.sub(r"\\\n", " ", files.read_text()).split(":", 1)[1].split()
        names = demangle(list(kernels))
        result = {names[mangled]: kernel for mangled, kernel in kernels.items() if "emu_" not in names[mangled]}
        for base, more in re.findall(r"^// (\w+) keeps (\d+) bytes more", unit.read_text(), re.M):
            for name, kernel in result.items():
                kernel.shared += int(more) if name.split("<")[0] == base else 0
        own = [str(pathlib.Path(p).resolve()) for p in depends if pathlib.Path(p).resolve().is_relative_to(self.source)]
        kept.write_text(json.dumps({"files": {path: digest(path) for path in own},
                                    "kernels": {name: dataclasses.asdict(k) for name, k in result.items()}}))
        return result


def digest(path: str) -> str:
    try:
        return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


class Table:
    """The table between its markers in docs/cuda.md."""
    BEGIN, END = "<!-- resources: written by tests/cuda/compile.py --update -->", "<!-- end of resources -->"

    def __init__(self, page: pathlib.Path):
        self.page = page
        before, _, rest = page.read_text().partition(self.BEGIN)
        text, _, self.after = rest.partition(self.END)
        self.before = before
        self.version = (re.search(r"nvcc ([\d.]+\d)", text) or [None, ""])[1]
        self.kernels: dict[str, Kernel] = {}
        for line in text.splitlines():
            if line.startswith("| `"):
                name, threads, shared, registers, _ = (cell.strip() for cell in line.strip("|").split(" | "))
                self.kernels[name.strip("` ")] = Kernel(
                    int(threads), int(shared), dict(zip(MULTIPROCESSORS, map(int, registers.split(" / ")))))

    def update(self, version: str, kernels: dict[str, Kernel]) -> None:
        archs = " / ".join(map(str, MULTIPROCESSORS))
        lines = [f"nvcc {version}; no kernel spills, has a stack, or computes in double.", "",
                 f"| kernel | threads | shared, bytes | registers, sm_{archs} | blocks an SM |", "|---|---|---|---|---|"]
        for name, kernel in sorted(kernels.items()):
            registers = " / ".join(str(kernel.registers[arch]) for arch in MULTIPROCESSORS)
            blocks = " / ".join(str(kernel.blocks(arch)) for arch in MULTIPROCESSORS)
            lines.append(f"| `{name}` | {kernel.threads} | {kernel.shared} | {registers} | {blocks} |")
        self.page.write_text("\n".join([self.before + self.BEGIN, *lines, self.END + self.after]))


def changes(name: str, was: Kernel, now: Kernel) -> list[str]:
    """What differs from the table, worse or better."""
    figures = [("threads", was.threads, now.threads, None), ("bytes of shared memory", was.shared, now.shared, +1)]
    for arch in now.registers:
        figures.append((f"registers, sm_{arch}", was.registers.get(arch, 0), now.registers[arch], +1))
        figures.append((f"blocks an SM, sm_{arch}", was.blocks(arch) if arch in was.registers else 0, now.blocks(arch), -1))
    words = lambda a, b, bad: "other" if bad is None else "worse" if (b - a) * bad > 0 else "better"
    return [f"{name}: {what}: {b}, the table says {a} ({words(a, b, bad)})" for what, a, b, bad in figures if a != b]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("build", type=pathlib.Path, help="where results are kept")
    parser.add_argument("--arch", type=int, action="append", choices=MULTIPROCESSORS)
    parser.add_argument("--system", action="append", default=[], help="folder of headers that the toolkit lacks")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--update", action="store_true", help="write the table, for all architectures")
    arguments = parser.parse_args()
    source, archs = arguments.source.resolve(), sorted(arguments.arch or [80, 90])
    if arguments.update:
        archs = list(MULTIPROCESSORS)
    arguments.build.mkdir(parents=True, exist_ok=True)
    toolkit = Toolkit(source, arguments.build.resolve(), arguments.system)
    if not toolkit.version:
        print("SKIP: no nvcc here")
        return 77
    units = sorted((source / "tests" / "cuda").glob("*.cu"))
    failures: list[str] = []
    kernels: dict[str, Kernel] = {}
    compiled = 0

    def one(unit: pathlib.Path):
        try:
            return unit, toolkit.compile(unit, archs), ""
        except ValueError as error:
            return unit, {}, subprocess.run(["c++filt"], input=str(error), text=True, capture_output=True).stdout[-6000:]

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for unit, found, error in pool.map(one, units):
            print(f"{'FAIL' if error else 'ok  '} {unit.name}: {len(found)} kernels\n{error}".rstrip(), flush=True)
            failures += [f"{unit.name} does not compile cleanly"] if error else []
            failures += [f"{unit.name}: more than {MOST_A_UNIT} kernels"] if len(found) > MOST_A_UNIT else []
            compiled += len(found)
            kernels |= found
    if compiled > MOST_IN_ALL:
        failures.append(f"{compiled} kernels, at most {MOST_IN_ALL} are compiled here")
    failures += [f"{name}: no block fits on sm_{arch}" for name, k in kernels.items() for arch in archs if k.blocks(arch) == 0]

    table = Table(source / "docs" / "cuda.md")
    if arguments.update and not failures:
        table.update(toolkit.version, kernels)
    elif toolkit.version != table.version:
        print(f"     the table is of nvcc {table.version}, this is {toolkit.version}: figures are not compared")
    else:
        for name in sorted(kernels.keys() | table.kernels.keys()):
            if name not in table.kernels or name not in kernels:
                failures.append(f"{name}: not in {'the table' if name in kernels else 'any tests/cuda/*.cu'}")
            else:
                failures += changes(name, table.kernels[name], kernels[name])
        if failures:
            failures.append("if this is meant: " + " ".join(sys.argv) + " --update")
    print("\n".join(f"FAIL {failure}" for failure in failures))
    print(f"{compiled} kernels for sm_{', '.join(map(str, archs))}, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
