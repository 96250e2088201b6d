#!/usr/bin/env python3
"""linattn-attention-map on a small layer, whose numbers and colours are computed here once more: softmax, and a linear
inner model, whose map is scale / N (q_i . k_j) behind the key norm; then on a small vision transformer and its conversion."""

import argparse
import json
import math
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
import zlib

TOKENS, HEADS, DIM, HEIGHT, WIDTH = 13, 2, 4, 3, 4  # the first token is not of the grid
failures = []


def check(what: str, ok: bool, detail: str = "") -> None:
    print(f"{'ok  ' if ok else 'FAIL'} {what}" + ("" if ok else f"\n{detail}"), flush=True)
    if not ok:
        failures.append(what)


def write_safetensors(path: pathlib.Path, tensors: dict, metadata: dict) -> None:
    header, data = {"__metadata__": metadata}, b""
    for name, (shape, values) in tensors.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + 4 * len(values)]}
        data += struct.pack(f"<{len(values)}f", *values)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_png(path: pathlib.Path):
    """Pixels of an 8-bit RGB file as rows of (r, g, b), and its text chunks."""
    data, at, packed, text = path.read_bytes(), 8, b"", {}
    while at < len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            assert (depth, colour) == (8, 2)
        elif kind == b"IDAT":
            packed += body
        elif kind == b"tEXt":
            key, value = body.split(b"\0", 1)
            text[key.decode()] = value.decode()
        at += size + 12
    raw, stride, rows, before = zlib.decompress(packed), 3 * width, [], bytes(3 * width)
    for y in range(height):
        kind, line = raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        for x in range(stride):
            left, up, corner = (line[x - 3] if x >= 3 else 0), before[x], (before[x - 3] if x >= 3 else 0)
            guess = left + up - corner
            paeth = min((left, up, corner), key=lambda value: abs(guess - value))
            line[x] = (line[x] + (0, left, up, (left + up) // 2, paeth)[kind]) & 255
        rows.append([tuple(line[x : x + 3]) for x in range(0, stride, 3)])
        before = line
    return rows, text


def row(values: list, token: int, head: int) -> list:
    begin = (token * HEADS + head) * DIM
    return values[begin : begin + DIM]


def dot(a: list, b: list) -> float:
    return sum(x * y for x, y in zip(a, b))


def normalised_keys(k: list, head: int) -> list:
    keys = [row(k, n, head) for n in range(TOKENS)]
    out = [[0.0] * DIM for _ in keys]
    for c in range(DIM):
        mean = sum(key[c] for key in keys) / TOKENS
        variance = sum((key[c] - mean) ** 2 for key in keys) / TOKENS
        for n, key in enumerate(keys):
            out[n][c] = (key[c] - mean) / math.sqrt(variance + 1.0)
    return out


def expected_maps(q: list, k: list, head: int, query: int) -> dict:
    logits = [dot(row(q, query, head), row(k, j, head)) / math.sqrt(DIM) for j in range(TOKENS)]
    total = sum(math.exp(s) for s in logits)
    linear = [dot(row(q, query, head), key) / math.sqrt(DIM) / TOKENS for key in normalised_keys(k, head)]
    return {"softmax": [math.exp(s) / total for s in logits][1:], "ttt": linear[1:]}  # on the grid


def expected_ratio(k: list, head: int) -> float:
    keys = [row(k, n, head) for n in range(TOKENS)]
    mean = [sum(key[c] for key in keys) / TOKENS for c in range(DIM)]
    return math.sqrt(dot(mean, mean)) / (sum(math.sqrt(dot(key, key)) for key in keys) / TOKENS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "command", "inherit"):
        parser.add_argument(name, type=pathlib.Path)
    arguments = parser.parse_args()
    command, inherit, deit = arguments.command.resolve(), arguments.inherit.resolve(), arguments.data / "deit-tiny"

    def run(*arguments) -> subprocess.CompletedProcess:
        return subprocess.run([command, *map(str, arguments)], text=True, capture_output=True, timeout=60)

    random.seed(7)
    count = TOKENS * HEADS * DIM
    # As the file holds them.
    q, k, v = ([struct.unpack("<f", struct.pack("<f", random.gauss(mean, 1)))[0] for _ in range(count)] for mean in (0, 0.7, 0))
    stem = "blocks.5.attn"
    metadata = {"linattn.format": "1", f"linattn.{stem}.inner_model": "linear", f"linattn.{stem}.inner_loss": "inner_product",
                f"linattn.{stem}.inner_lr": "1", f"linattn.{stem}.key_norm_eps": "1", f"linattn.{stem}.conv": "false"}
    shape = [TOKENS, HEADS, DIM]
    tensors = {"q": (shape, q), "k": (shape, k), "v": (shape, v),
               f"{stem}.w1": ([1, HEADS, DIM, DIM], [random.gauss(0, 0.5) for _ in range(HEADS * DIM * DIM)])}

    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        file, png = scratch / "layer.safetensors", scratch / "map.png"
        write_safetensors(file, tensors, metadata)
        queries, size = [(1, 2), (0, 0)], 64  # 16 pixels a token
        options = [file, "--grid", f"{HEIGHT}x{WIDTH}", "-o", png, "--size", size]
        result = run(*options, "--query", "1,2", "--query", "0,0", "--json")
        check("it runs", result.returncode == 0, result.stderr)
        facts = json.loads(result.stdout)
        for head in range(HEADS):
            ratio, expected = facts["key_shift_ratio"]["softmax"][head], expected_ratio(k, head)
            check(f"key shift ratio of head {head}: {ratio:.4f}", abs(ratio - expected) < 1e-5, f"expected {expected}")

        pixels, text = read_png(png)
        token, pad = size // WIDTH, 4
        wide, high = WIDTH * token, HEIGHT * token
        check("the size of the picture", (len(pixels[0]), len(pixels)) == (4 * wide + 4 * pad + 16, HEADS * high + 3 * pad),
              f"{len(pixels[0])} x {len(pixels)}")
        check("its text states the scales", json.loads(text["Comment"]) == facts["maps"], str(text))
        scales = {(s["head"], *s["query"], s["map"]): s for s in facts["maps"]}
        check("a scale for each map", len(scales) == len(facts["maps"]) == 2 * HEADS * len(queries))
        for head in range(HEADS):
            for column, (y, x) in enumerate(queries):
                query = 1 + y * WIDTH + x  # among all tokens
                for index, (kind, values) in enumerate(expected_maps(q, k, head, query).items()):
                    scale, largest = scales[head, y, x, kind], max(map(abs, values))
                    close = max(abs(scale["min"] - min(values)), abs(scale["max"] - max(values))) < 1e-5 * largest
                    check(f"head {head}, token {query}, {kind}: numbers", close, f"{scale}, {values}")
                    left, top = pad + column * (2 * wide + pad + 16) + index * (wide + pad), pad + head * (high + pad)
                    wrong = []
                    for n, value in enumerate(values):
                        r, _, b = pixels[top + n // WIDTH * token + token // 2][left + n % WIDTH * token + token // 2]
                        darkest = abs(value) == largest
                        # Red over blue by the sign, and full colour for the largest alone.
                        if abs(value) > 0.02 * largest and (r > b) != (value > 0) or (min(r, b) < 60) < darkest:
                            wrong.append((n, value / largest, r, b))
                    check(f"head {head}, token {query}, {kind}: colours", not wrong, str(wrong))
        yellow = [(x, y) for y, line in enumerate(pixels) for x, p in enumerate(line) if p == (255, 214, 10)]
        check("the queries are framed", len(yellow) == 2 * HEADS * len(queries) * 4 * (token - token // 8) * (token // 8), str(len(yellow)))

        before = png.read_bytes()
        run(*options, "--query", "1,2", "--query", "0,0", "-t", "1")
        check("one thread, the same file", png.read_bytes() == before)
        png.unlink()

        def refuses(what: str, words: list, *arguments) -> None:
            result = run(*arguments)
            clear = [line for line in result.stderr.splitlines() if all(word in line for word in words)]
            ok = result.returncode == 2 and len(clear) == 1 and not png.exists()
            check(f"{what}: {clear[0] if clear else ''}", ok, f"exit code {result.returncode}, stderr: {result.stderr}")

        refuses("no square", ["13", "3 x 3", "--grid"], file, "-o", png)
        refuses("a grid that is none", ["--grid", "3by4"], file, "-o", png, "--grid", "3by4")
        refuses("a grid that is too large", ["13", "4 x 4"], file, "-o", png, "--grid", "4x4")
        refuses("a query outside", ["--query", "3,0"], *options, "--query", "3,0")
        refuses("a head that is not there", ["--heads", "2"], *options, "--heads", "0,2")
        refuses("a file that is not there", ["nowhere"], scratch / "nowhere", "-o", png)
        write_safetensors(file, {name: t for name, t in tensors.items() if name != "k"}, metadata)
        refuses("a missing tensor", ["layer.safetensors", "'k'"], *options)
        write_safetensors(file, {name: t for name, t in tensors.items() if "w1" not in name}, {})
        refuses("no TTT tensors", ["layer.safetensors", "w1"], *options)

        t5, photo = scratch / "t5.safetensors", deit / "picture.png"
        subprocess.run([inherit, deit / "model.safetensors", t5, "--drop-cls", "--heads", "3", "--replace", "attn:1"], check=True, capture_output=True)
        options = [deit, t5, "--picture", photo, "-o", png, "--block", 1, "--size", size]
        result = run(*options, "--query", "0,3", "--json")
        check("two models run", result.returncode == 0, result.stderr)
        facts = json.loads(result.stdout)
        ratios = facts["key_shift_ratio"]
        check("of a vision transformer", facts["grid"] == [4, 4] and len(ratios["softmax"]) == 3, result.stdout)
        check("ratios of both", all(0 < r < 1 for kind in ("softmax", "ttt") for r in ratios[kind]), str(ratios))
        check("each model has its own inputs", ratios["softmax"] != ratios["ttt"], str(ratios))  # one has no class token
        rows = read_png(png)[0]
        photo_row = [p for line in rows[pad : pad + size] for p in line[pad : pad + size]]
        check("the picture, a row above those of the heads", (len(rows), len(set(photo_row)) > 100) == (4 * size + 5 * pad, True),
              f"{len(rows)} rows, {len(set(photo_row))} colours")
        softmax = [m for m in facts["maps"] if m["map"] == "softmax"]
        check("probabilities", all(0 < m["min"] <= m["max"] < 1 for m in softmax), str(softmax))
        png.unlink()
        refuses("a block that is softmax", ["t5.safetensors", "blocks.0.attn"], deit, t5, "--picture", photo, "-o", png, "--block", 0)
        refuses("a block that is not there", ["--block 2"], deit, t5, "--picture", photo, "-o", png, "--block", 2)
        refuses("models the other way round", ["t5.safetensors", "blocks.1.attn"], t5, deit, "--picture", photo, "-o", png, "--block", 1)
        refuses("models without a picture", ["--picture"], deit, t5, "-o", png)
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
