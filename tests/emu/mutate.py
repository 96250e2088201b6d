#!/usr/bin/env python3
"""Breaks the real kernels, one text at a time, and requires that their emulated tests notice: ./dev test mutations.

Each mutation replaces a text that must occur exactly once in a header, so that none outlives the code that it is about.
A test is built against a copy of include/ with that header changed, with the emulator's checks, and run in two schedules.
Prints the table of docs/emulation.md: what was broken, and what noticed it first.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++20", "-O0", "-g1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", '-DLINATTN_TEST_DATA=""',
         f"-I{ROOT}/tests/emu", f"-I{ROOT}/tests"]


@dataclasses.dataclass(frozen=True)
class Mutation:
    what: str
    test: str  # tests/<test>_test.cpp
    cases: str  # which of its test cases
    header: str  # include/linattn/<header>
    old: str
    new: str


def of(test: str, cases: str, header: str):
    """Makes mutations of one kernel, unless they name another header or other cases of its test."""
    return lambda what, old, new, header=header, cases=cases: Mutation(what, test, cases, header, old, new)


flash = of("ops/softmax_attention_cuda", "*causal mask*,*tensor cores q*", "detail/flash_mma.cuh")
update = of("ops/ttt_mma_cuda", "tails*", "detail/ttt_mma_update.cuh")
apply = of("ops/ttt_mma_cuda", "tails*", "detail/ttt_mma_apply.cuh")
hidden = of("ops/softmax_attention_cuda", "on Cuda a hidden key*half*", "detail/flash_mma.cuh")
plain_softmax = of("ops/softmax_attention_cuda", "*for every length<float>", "detail/softmax_plain.cuh")
plain_ttt = of("ops/ttt_cuda", "*for other sizes*", "detail/ttt_plain.cuh")
step = of("ops/ttt_cuda", "many splits<float>", "ops/ttt_cuda.cuh")
statistics = of("ops/instance_norm_cuda", "*follows its formula*", "detail/token_stats.cuh")
rms_norm = of("ops/rms_norm_cuda", "*follows its formula*", "ops/rms_norm_cuda.cuh")
conv = of("ops/depthwise_conv_cuda", "*follows its formula: float", "ops/depthwise_conv_cuda.cuh")
linear = of("ops/linear_cuda", "*rounds as its sums do*", "ops/linear_cuda.cuh")

NEXT_STAGE = "    cp_async_wait<0>();\n    __syncthreads();\n    if (step + 1 < steps) load_stage(step + 1);\n"
MUTATIONS = [
    flash("softmax: no barrier before the queries are read", "  cp_async_wait<1>();\n  __syncthreads();\n", "  cp_async_wait<1>();\n"),
    flash("softmax: no wait for a stage", NEXT_STAGE, NEXT_STAGE.replace("    cp_async_wait<0>();\n", "")),
    flash("softmax: no barrier before a stage is read", NEXT_STAGE, NEXT_STAGE.replace("    __syncthreads();\n", "")),
    flash("softmax: the next stage is fetched before the barrier", NEXT_STAGE,
          "    cp_async_wait<0>();\n    if (step + 1 < steps) load_stage(step + 1);\n    __syncthreads();\n"),
    flash("softmax: results leave without __syncwarp", "  __syncwarp();\n  constexpr int row_chunks", "  constexpr int row_chunks"),
    flash("softmax: tokens beyond the last are fetched", "valid ? at : from, valid)", "at)"),
    flash("softmax: queries beyond the last are written", "if (query < p.queries && 8 * chunk", "if (8 * chunk"),
    flash("softmax: the blocks of V in the order of K", "row + keys + lane / 8 % 2 * 8, lane / 16)", "row + keys + lane / 16 * 8, lane / 8 % 2)"),
    flash("softmax: rows are not permuted", "(chunk ^ permutation)", "(chunk + 0 * permutation)", header="detail/mma_tiles.cuh"),
    hidden("softmax: a bias of -infinity meets any logit", "if (Guarded && added == -INFINITY) logit = 0.0f;", ""),
    hidden("softmax: hidden values stay in the product", "    store(at, uint4{finite", "    (uint4{finite"),
    hidden("softmax: values that are not finite reach all queries", "p.sees(query, row, key) ? 1.0f : 0.0f", "1.0f"),
    hidden("plain softmax: hidden values stay in the product", "Guarded && hidden[j] ? -1.0f : weight", "weight",
           header="detail/softmax_plain.cuh"),
    update("ttt update: no barrier behind the normalised keys",
        "    keys.prepare(shared.keys, token);\n    __syncthreads();\n", "    keys.prepare(shared.keys, token);\n"),
    update("ttt update: no wait for keys and values", "    cp_async_wait<0>();\n    __syncthreads();\n    keys", "    __syncthreads();\n    keys"),
    update("ttt update: one buffer of values for two", "shared.values[n % 2].chunk(row, chunk)", "shared.values[0].chunk(row, chunk)"),
    update("ttt update: all heads write one partial sum", "p.partials + blockIdx.x *", "p.partials + split *"),
    apply("ttt apply: outputs replace queries without __syncwarp",
        "    __syncwarp();\n#pragma unroll\n    for (int j = 0; j < steps; ++j)\n", "#pragma unroll\n    for (int j = 0; j < steps; ++j)\n"),
    apply("ttt apply: outputs leave without __syncwarp",
        "    __syncwarp();\n#pragma unroll\n    for (int i = 0; i < 16 * row", "#pragma unroll\n    for (int i = 0; i < 16 * row"),
    apply("ttt apply: tokens beyond the last are written", "if (token + t < end && 8 * chunk < d)", "if (8 * chunk < d)"),
    plain_softmax("plain softmax: no barrier before the tiles change", "      const int count = p.head_dim - channel;\n      __syncthreads();\n",
                  "      const int count = p.head_dim - channel;\n"),
    plain_softmax("plain softmax: no barrier before the values are read",
                  "                                    keys - key, values);\n      __syncthreads();\n",
                  "                                    keys - key, values);\n"),
    plain_softmax("plain softmax: queries beyond the last are written", "    if (query >= p.queries) continue;\n", ""),
    plain_ttt("plain ttt: no barrier behind the keys and values",
              "      }\n    });\n    __syncthreads();\n\n    // Forward.", "      }\n    });\n\n    // Forward."),
    plain_ttt("plain ttt: no barrier between two matrices", "      });\n      __syncthreads();\n      e = derivative(i, 0);",
              "      });\n      e = derivative(i, 0);"),
    plain_ttt("plain ttt: each tile's gradients replace the last ones", "is_first = first == begin;", "is_first = true;"),
    plain_ttt("plain ttt: outputs beyond the last are written", "t < min(to, count); ++t)", "t < to; ++t)"),
    step("ttt step: no barrier before the columns' squares are joined", "= squares;\n    __syncthreads();\n", "= squares;\n",
         cases="a column whose squares*"),
    step("ttt step: the last split is left out", "split < p.splits; ++split", "split < p.splits - 1; ++split"),
    statistics("token statistics: no barrier before the warps are joined", "  __syncthreads();\n", ""),
    statistics("token statistics: a mean of one float", "to[chunks] = all.delta;", "to[chunks] = 0.0f;", cases="*large common offset*"),
    statistics("token statistics: means compared by one float", "(b.shift - a.shift) + (b.delta - a.delta)", "b.shift - a.shift",
               cases="*large common offset*"),
    statistics("token statistics: a chunk takes a token of the next",
               "end = min(begin + p.chunk, p.tokens);", "end = min(begin + p.chunk + 1, p.tokens);"),
    rms_norm("rms_norm: lanes leave before the sum", "    for (int apart = p.lanes / 2;",
             "    if (row >= p.rows) continue;\n    for (int apart = p.lanes / 2;"),
    rms_norm("rms_norm: the sum of every other lane", "int apart = p.lanes / 2; apart > 0;", "int apart = p.lanes / 2; apart > 1;"),
    rms_norm("rms_norm: rows beyond the last are written", "if (row >= p.rows || first >= p.head_dim) continue;",
             "if (first >= p.head_dim) continue;"),
    conv("depthwise_conv: bands overlap", "min(first + conv_band, p.height) - 1", "min(first + conv_band + 1, p.height) - 1"),
    conv("depthwise_conv: columns beyond the last are written", "if (!inside || column >= p.width) return;", "if (!inside) return;"),
    conv("depthwise_conv: the last column is the first one's neighbour", "at >= 0 && at < width", "at >= -1 && at < width"),
    conv("depthwise_conv: text takes the place of the grid's tokens", "i < p.grid_begin ? i : i + p.on_grid", "i"),
    linear("linear: no barrier before the tiles are read", "    __syncthreads();\n    // Each stretch", "    // Each stretch"),
    linear("linear: no barrier before the tiles change", "sums[i][j] += part[i][j];\n    __syncthreads();\n",
           "sums[i][j] += part[i][j];\n"),
    linear("linear: rows beyond the last are written", "if (row >= p.rows || output >= p.outputs)", "if (output >= p.outputs)"),
    linear("linear: rows beyond the last are read", "row < rows && column < columns ? widen", "column < columns ? widen"),
    linear("linear: the last of a stretch is left out", "k < linear_depth; ++k", "k < linear_depth - 1; ++k"),
]


def run(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace", **options)


def compile(compiler: str, source: pathlib.Path, to: pathlib.Path, include: pathlib.Path, *flags: str) -> None:
    result = run([*compiler.split(), *FLAGS, f"-I{ROOT}/tests/emu/include", f"-I{include}", *flags, "-c", source, "-o", to])
    if result.returncode != 0:
        sys.exit(f"{source} does not compile:\n{result.stderr[-4000:]}")


def noticed(log: str) -> str:
    """The first that went wrong."""
    if fault := re.search(r"^emu: ([^:\n]+):", log, re.M):
        return fault[1]
    if failure := re.search(r"ERROR: \w+\((.*)", log):
        return "counters" if re.search(r"\b(count|line|counters|conflicts?|ratio|worst)\b", failure[1]) else "wrong result"
    return "crash"


class Builder:
    def __init__(self, compiler: str, folder: pathlib.Path):
        self.compiler, self.folder = compiler, folder
        self.objects = []
        for source in [*sorted((ROOT / "tests/emu").glob("*.cpp")), ROOT / "tests/main.cpp", ROOT / "tests/support.cpp"]:
            if not source.stem.endswith("_test"):
                self.objects.append(folder / f"{source.stem}.o")
                compile(compiler, source, self.objects[-1], ROOT / "include", "-O2")

    def build(self, name: str, test: str, include: pathlib.Path) -> pathlib.Path:
        kernels, program = self.folder / f"{name}.o", self.folder / name
        compile(self.compiler, ROOT / f"tests/{test}_test.cpp", kernels, include, "-fsanitize=thread")
        result = run([*self.compiler.split(), kernels, *self.objects, "-lboost_context", "-pthread", "-o", program])
        if result.returncode != 0:
            sys.exit(f"{test} does not link:\n{result.stderr[-4000:]}")
        return program

    def outcome(self, program: pathlib.Path, cases: str) -> str:
        """What noticed a fault, or nothing."""
        for schedule in ["in-order", "skew"]:
            try:
                result = run([program, f"--test-case={cases}", "--abort-after=1", "--no-colors"],
                             env={**os.environ, "EMU_SCHEDULE": schedule}, timeout=300)
            except subprocess.TimeoutExpired:
                return "no end"
            if result.returncode != 0:
                return noticed(result.stdout + result.stderr)
        return ""

    def mutant(self, index: int) -> str:
        mutation = MUTATIONS[index]
        include = self.folder / f"include{index}"
        shutil.copytree(ROOT / "include", include)
        header = include / "linattn" / mutation.header
        header.write_text(header.read_text().replace(mutation.old, mutation.new))
        return self.outcome(self.build(f"mutant{index}", mutation.test, include), mutation.cases)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="the mutations whose description contains this")
    arguments = parser.parse_args()

    for mutation in MUTATIONS:
        count = (ROOT / "include/linattn" / mutation.header).read_text().count(mutation.old)
        if count != 1:
            sys.exit(f"{mutation.what}: {mutation.header} has its text {count} times")
    chosen = [i for i, mutation in enumerate(MUTATIONS) if arguments.only in mutation.what]
    cases = collections.OrderedDict(((MUTATIONS[i].test, MUTATIONS[i].cases), None) for i in chosen)
    missed = 0
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        builder = Builder(arguments.compiler, pathlib.Path(folder))

        def unchanged(job) -> str:
            index, (test, filter) = job
            return builder.outcome(builder.build(f"unchanged{index}", test, ROOT / "include"), filter)

        for (test, filter), found in zip(cases, pool.map(unchanged, enumerate(cases))):
            if found:
                sys.exit(f"{test} fails without any mutation: {found}")
        print("| mutation | noticed by |\n|---|---|", flush=True)
        for index, found in zip(chosen, pool.map(builder.mutant, chosen)):
            missed += not found
            print(f"| {MUTATIONS[index].what} | {found or '**nothing**'} |", flush=True)
    print(f"\n{len(chosen) - missed} of {len(chosen)} mutations noticed", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
