#!/usr/bin/env python3
"""What each CUDA kernel should cost at SD3.5 Medium's sizes: the largest of six bounds, on some GPUs. docs/cuda.md says
how they are meant.

  roofline.py                        prints the table; --update writes it into docs/cuda.md, --check fails if that changes it
  roofline.py --measured PROGRAM     runs cuda_bench on the GPU here and prints what it measured beside what is predicted"""

import argparse
import dataclasses
import json
import math
import pathlib
import re
import subprocess
import sys

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "cuda.md"
BEGIN, END = "<!-- roofline: written by bench/roofline.py --update -->", "<!-- end of roofline -->"

# Joint tokens of SD3.5 Medium at 1024 x 1024 and 2048 x 2048 pixels: 333 of text, a grid of image tokens.
SIZES = {4429: 64, 16717: 128}
BATCH, HEADS, D = 2, 24, 64
SETS = BATCH * HEADS  # (batch, head) pairs
STORED, FLOAT = 2, 4  # bytes: bf16 or f16 activations, statistics and weights

# The part of a floor that a kernel nobody has tuned on the GPU itself may be expected to reach.
REACHED = 0.75
LAUNCH = 1.5  # microseconds between two kernels of one stream


@dataclasses.dataclass(frozen=True)
class Gpu:
    name: str
    reported: str  # by the driver, as a pattern
    multiprocessors: int
    clock: float  # GHz under load
    memory: float  # GB/s
    l2: float  # GB/s, reads
    tensor: float  # TFLOP/s, 16-bit operands, fp32 accumulators, dense
    mma_sync: float  # the part of it that mma.sync reaches
    # A clock and multiprocessor:
    lanes: int = 128  # fp32 instructions
    special: int = 16  # ex2, rcp
    issued: int = 4  # instructions of a warp
    shared: int = 128  # bytes

    def a_microsecond(self, a_clock: float) -> float:
        return self.multiprocessors * self.clock * 1e3 * a_clock


# NVIDIA's data sheets, except L2, which is what microbenchmarks of others reach (H20: taken to be H100's). On Hopper all of
# the tensor rate is wgmma's; mma.sync, which runs from sm_80 on and is what the kernels use, was measured at 62 % of it
# (W. Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", 2024). H20's rate is
# cut below that.
GPUS = [
    Gpu("H100 SXM", r"H100 80GB HBM3", 132, 1.755, 3350, 5700, 989, 0.62),
    Gpu("H200", r"H200\b", 132, 1.755, 4800, 5700, 989, 0.62),
    Gpu("H20", r"H20\b", 78, 1.98, 4000, 5700, 148, 1.0),
    Gpu("RTX 4090", r"RTX 4090$", 128, 2.52, 1008, 5000, 165, 1.0),
]


@dataclasses.dataclass(frozen=True)
class Work:
    """What one launch asks for, all its blocks together."""
    kernel: str
    memory: float = 0  # bytes from and to DRAM
    l2: float = 0  # bytes that blocks read through L2
    flop: float = 0  # on tensor cores
    special: float = 0  # ex2, rcp
    shared: float = 0  # bytes read and written
    scalar: float = 0  # all other instructions, a thread's
    blocks: int = 0  # 0: so many that all multiprocessors have the same to do
    library: bool = False  # cuBLASLt, which uses wgmma where there is one

    def bounds(self, gpu: Gpu) -> dict[str, float]:
        """Microseconds, by what limits. An mma of a warp is 4096 FLOP, an instruction on shared memory moves 512 bytes. What a
        multiprocessor does itself takes as long as on the one that has the most blocks."""
        tensor = gpu.tensor * (1 if self.library else gpu.mma_sync)
        issued = self.flop / 4096 + self.shared / 512 + (self.special + self.scalar) / 32
        share = self.blocks / gpu.multiprocessors
        fullest = math.ceil(share) / share if self.blocks else 1
        return {
            "memory": self.memory / gpu.memory / 1e3,
            "L2": self.l2 / gpu.l2 / 1e3,
            "tensor": fullest * self.flop / tensor / 1e6,
            "special": fullest * self.special / gpu.a_microsecond(gpu.special),
            "shared": fullest * self.shared / gpu.a_microsecond(gpu.shared),
            "issue": fullest * max(issued / gpu.a_microsecond(gpu.issued), self.scalar / gpu.a_microsecond(gpu.lanes)),
        }

    def floor(self, gpu: Gpu) -> tuple[str, float]:
        return max(self.bounds(gpu).items(), key=lambda bound: bound[1])


def softmax_attention(n: int) -> list[Work]:
    """A block has 128 queries, a warp 32 of them: it reads all of K and V from shared memory, the block from L2. 5 instructions a
    score: maximum, scale and shift, sum, half a conversion, and its share of rescaling the output."""
    queries, rows = 128, 32
    scores, key_values = SETS * n * n, 2 * SETS * n * D * STORED
    return [Work("flash_mma", memory=2 * key_values, l2=key_values * n / queries, flop=4 * scores * D, special=scores,
                 shared=key_values * (n / rows + n / queries), scalar=5 * scores, blocks=math.ceil(n / queries) * SETS)]


def statistics(n: int) -> list[Work]:
    return [Work("chunk_stats", memory=SETS * n * D * STORED, scalar=6 * SETS * n * D)]


def ttt_split(n: int, conv: bool) -> tuple[int, int]:
    """Blocks of the update and of the answers, and the tokens that they read around their own (ttt_mma_split_tokens)."""
    halo = SIZES[n] + 1 if conv else 0
    splits = min(256 // SETS, n // max(512, 17 * halo - 256))
    return splits * SETS, (splits - 1) * 2 * halo * SETS


def update(n: int, conv: bool = False) -> list[Work]:
    """SwiGlu and the inner product: 12 d^2 a token. In shared memory a token's key and value are written and the key prepared
    (read, or its three rows of the grid; written); each of four warps reads both twice, as operands of the products over
    channels and of those over tokens. 5 instructions prepare an element, 23 with the convolution; 20 activate,
    differentiate and pack one of the hidden layer."""
    tokens, (blocks, around) = SETS * n, ttt_split(n, conv)
    gradients = 3 * D * D * FLOAT
    return [
        Work("ttt_mma_update" + (", conv" if conv else ""), memory=(2 * tokens + around) * D * STORED + blocks * gradients,
             flop=12 * tokens * D * D, special=2 * tokens * D, shared=tokens * D * STORED * (22 if conv else 20),
             scalar=tokens * D * (43 if conv else 25), blocks=blocks),
        Work("ttt_step", memory=(blocks + 2 * SETS) * gradients, scalar=2 * blocks * gradients / FLOAT),
    ]


def apply(n: int, conv: bool = False) -> list[Work]:
    """6 d^2 a token. A warp reads the three matrices for every 16 queries; a query is written, prepared, read, and the output
    written and read in its place."""
    tokens, (blocks, around) = SETS * n, ttt_split(n, conv)
    return [Work("ttt_mma_apply" + (", conv" if conv else ""), memory=(2 * tokens + around) * D * STORED + SETS * 3 * D * D * FLOAT,
                 flop=6 * tokens * D * D, special=2 * tokens * D,
                 shared=tokens * (D * STORED * (8 if conv else 6) + 3 * D * D * STORED / 16),
                 scalar=tokens * D * (32 if conv else 14), blocks=blocks)]


def streaming(name: str, n: int, tensors: int, scalar: int) -> Work:
    values = SETS * n * D
    return Work(name, memory=tensors * values * STORED, scalar=scalar * values)


def linear(n: int) -> list[Work]:
    rows, width = BATCH * n, HEADS * D
    return [Work("linear 1536 x 1536", memory=(2 * rows * width + width * width) * STORED, flop=2 * rows * width * width, library=True)]


# The ops that cuda_bench times, and the kernels that each is made of.
OPS = {
    "softmax_attention": softmax_attention,
    "ttt": lambda n: update(n) + apply(n),
    "ttt, key norm": lambda n: statistics(n) + update(n) + apply(n),
    "ttt, key norm and conv": lambda n: statistics(n) + update(n, conv=True) + apply(n, conv=True),
    "instance_norm": lambda n: statistics(n) + [streaming("instance_norm apply", n, 2, 5)],
    "rms_norm": lambda n: [streaming("rms_norm", n, 2, 6)],
    "depthwise_conv": lambda n: [streaming("depthwise_conv", n, 2, 25)],
    "linear": linear,
}


def predicted(work: list[Work], gpu: Gpu) -> float:
    return sum(kernel.floor(gpu)[1] / REACHED + LAUNCH for kernel in work)


def figure(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def table() -> list[str]:
    lines = ["| kernel | tokens | MB | GFLOP | " + " | ".join(f"{gpu.name}, us" for gpu in GPUS) + " |", "|---|---|---|---|" + "---|" * len(GPUS)]
    kernels = {(kernel.kernel, n): kernel for n in SIZES for op in OPS.values() for kernel in op(n)}
    for (name, n), kernel in sorted(kernels.items(), key=lambda item: list(kernels).index(item[0])):
        floors = [kernel.floor(gpu) for gpu in GPUS]
        cells = " | ".join(f"{figure(time)} {limit}" for limit, time in floors)
        lines.append(f"| {name} | {n} | {figure(kernel.memory / 1e6)} | {figure(kernel.flop / 1e9)} | {cells} |")
    lines += ["", "| op, predicted | tokens | " + " | ".join(f"{gpu.name}, us" for gpu in GPUS) + " |", "|---|---|" + "---|" * len(GPUS)]
    for name, op in OPS.items():
        for n in SIZES:
            lines.append(f"| `{name}` | {n} | " + " | ".join(figure(predicted(op(n), gpu)) for gpu in GPUS) + " |")
    return lines


def measured(program: str) -> int:
    """The program prints a line of JSON about the GPU, then one for each op and size."""
    run = subprocess.run([program], text=True, stdout=subprocess.PIPE)
    if run.returncode == 77:
        print("SKIP: no CUDA device here")
        return 0
    if run.returncode != 0:
        return run.returncode
    device, *results = map(json.loads, run.stdout.splitlines())
    gpu = next((gpu for gpu in GPUS if re.search(gpu.reported, device["name"])), None)
    print(f"{device['name']}, {device['multiprocessors']} SMs" + ("" if gpu else ": no prediction, its figures are not in bench/roofline.py"))
    print(f"{'op':24} {'tokens':>6} {'measured, us':>12}" + (f" {'predicted':>9} {'floor':>9} {'of floor':>8}" if gpu else ""))
    for result in results:
        line = f"{result['op']:24} {result['tokens']:6} {result['us']:12.1f}"
        if gpu:
            work = OPS[result["op"]](result["tokens"])
            floor = sum(kernel.floor(gpu)[1] for kernel in work)
            line += f" {predicted(work, gpu):9.1f} {floor:9.1f} {floor / result['us']:8.0%}"
        print(line)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--measured", metavar="PROGRAM")
    arguments = parser.parse_args()
    if arguments.measured:
        return measured(arguments.measured)
    text = "\n".join(table())
    if not (arguments.update or arguments.check):
        print(text)
        return 0
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    updated = before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1]
    if arguments.update:
        PAGE.write_text(updated)
    elif updated != page:
        print("FAIL docs/cuda.md has another table: bench/roofline.py --update writes it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
