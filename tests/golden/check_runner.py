"""Does the golden runner fail when it should? check_runner.py GOLDEN runs it on small cases, sound and broken."""

import json
import math
import random
import struct
import subprocess
import sys
import tempfile
from pathlib import Path


def write(path, tensors, metadata):
    """tensors: name -> (shape, flat list of numbers), stored as F32."""
    header, data = {"__metadata__": metadata}, b""
    for name, (shape, values) in tensors.items():
        chunk = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(chunk)]}
        data += chunk
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def norm_case(tokens=7, channels=3, eps=1.0):
    """key_instance_norm of random tokens, by its formula."""
    draw = random.Random(1)
    x = [[struct.unpack("<f", struct.pack("<f", draw.gauss(0, 1)))[0] for _ in range(channels)] for _ in range(tokens)]
    mean = [sum(row[c] for row in x) / tokens for c in range(channels)]
    var = [sum((row[c] - mean[c]) ** 2 for row in x) / tokens for c in range(channels)]
    y = [(row[c] - mean[c]) / (var[c] + eps) ** 0.5 for row in x for c in range(channels)]
    tensors = {
        "input": ([1, tokens, channels], [v for row in x for v in row]),
        "output": ([1, tokens, channels], y),
        "mid.mean": ([1, channels], mean),
        "mid.var": ([1, channels], var),
        "grad.input": ([1, tokens, channels], y),
    }
    return tensors, {"op": "key_instance_norm", "eps": str(eps)}


def conv_case(height, width, batch=1, channels=2):
    """vittt_dwc3x3 on a grid of any size, by its formula."""
    draw, scale, rate, tokens = random.Random(2), 1 / 3, 1.0, height * width
    rounded = lambda *shape: [struct.unpack("<f", struct.pack("<f", draw.gauss(0, 1)))[0] for _ in range(math.prod(shape))]
    q, k, v = (rounded(batch, tokens, channels) for _ in range(3))
    w = rounded(channels, 9)
    taps = [(i, j) for i in range(3) for j in range(3)]

    def at(x, b, c, y, column):
        return x[(b * tokens + y * width + column) * channels + c] if 0 <= y < height and 0 <= column < width else 0.0

    places = [(y, x) for y in range(height) for x in range(width)]
    gradients, updated, output = [], [], [0.0] * (batch * tokens * channels)
    for b in range(batch):
        for c in range(channels):
            raw = [-scale / tokens * sum(at(v, b, c, y, x) * at(k, b, c, y + i - 1, x + j - 1) for y, x in places)
                   for i, j in taps]
            length = sum(g * g for g in raw) ** 0.5
            g = [value / (length + 1) for value in raw]
            kernel = [w[9 * c + n] - rate * g[n] for n in range(9)]
            gradients += g
            updated += kernel
            for y, x in places:
                output[(b * tokens + y * width + x) * channels + c] = sum(
                    kernel[n] * at(q, b, c, y + i - 1, x + j - 1) for n, (i, j) in enumerate(taps))
    shape, kernels = [batch, tokens, channels], [batch, channels, 3, 3]
    tensors = {"q": (shape, q), "k": (shape, k), "v": (shape, v), "w": ([channels, 1, 3, 3], w), "output": (shape, output),
               "mid.w": (kernels, updated), "mid.g": (kernels, gradients)}
    return tensors, {"op": "vittt_dwc3x3", "scale": str(scale), "inner_lr": str(rate), "grid_h": str(height), "grid_w": str(width)}


def zeros(*shape):
    return list(shape), [0.0] * math.prod(shape)


def text_case():
    """A t5_encoder of zeros without blocks, and the embedding's third row."""
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors = {"shared.weight": zeros(5, 4), bias: zeros(32, 2), "encoder.final_layer_norm.weight": zeros(4),
               "in.tokens": ([1, 3], [2.0, 0.0, 4.0]), "out.hidden": zeros(1, 3, 4)}
    return tensors, {"op": "t5_encoder"}


def main():
    golden = sys.argv[1]
    failures = []

    def run(what, code, last, *arguments):
        result = subprocess.run([golden, *map(str, arguments)], capture_output=True, text=True)
        found = (result.stdout.splitlines() or [""])[-1]
        if result.returncode != code or (last is not None and found != last):
            failures.append(f"{what}: exit code {result.returncode}, '{found}'; expected {code}, '{last}'")
            print(result.stdout, result.stderr)
        return result

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        def case(name, change=lambda tensors, metadata: None):
            tensors, metadata = norm_case()
            change(tensors, metadata)
            path = folder / f"{name}.safetensors"
            write(path, tensors, metadata)
            return path

        def scaled(name, factor):
            def change(tensors, _):
                shape, values = tensors[name]
                tensors[name] = (shape, [v * factor for v in values])
            return change

        good = case("good")
        result = run("a sound case", 0, "1 passed, 0 failed", good)
        if "grad.input" not in result.stdout or "not yet checked" not in result.stdout:
            failures.append("gradients are not listed")
        broken = {
            "a wrong output": scaled("output", 1 + 1e-5),
            "a wrong intermediate": scaled("mid.var", 1 + 1e-6),
            "an output of NaN": scaled("output", float("nan")),
            "an unknown tensor": lambda t, _: t.update({"mid.other": ([1], [0.0])}),
            "a missing input": lambda t, _: t.pop("input"),
            "a missing output": lambda t, _: t.pop("output"),
            "a missing intermediate": lambda t, _: t.pop("mid.mean"),
            "an output of another shape": lambda t, _: t.update({"output": ([1, 3, 7], t["output"][1])}),
            "an unknown op": lambda _, m: m.update({"op": "no_such_op"}),
            "no op": lambda _, m: m.pop("op"),
            "a missing option": lambda _, m: m.pop("eps"),
            "an option that is no number": lambda _, m: m.update({"eps": "1.0x"}),
            "an option out of range": lambda _, m: m.update({"eps": "-1"}),
        }
        for index, (what, change) in enumerate(broken.items()):
            run(what, 1, "0 passed, 1 failed", case(f"broken{index}", change))
        cut = folder / "cut.safetensors"
        cut.write_bytes(good.read_bytes()[:-4])
        run("a truncated file", 1, "0 passed, 1 failed", cut)
        run("a file that is not there", 1, "0 passed, 1 failed", folder / "nothing.safetensors")

        run("a folder", 1, f"1 passed, {len(broken) + 1} failed", folder)
        empty = folder / "empty"
        empty.mkdir()
        run("an empty folder", 1, "0 passed, 1 failed", empty)
        run("the op that was asked for", 0, "1 passed, 0 failed", good, "--ops", "key_instance_norm,softmax_attention")
        run("another op, so that nothing ran", 1, "0 passed, 0 failed", good, "--ops=softmax_attention")
        run("an unknown op in --ops", 2, None, good, "--ops", "key_instance_norm,no_such_op")
        run("no path", 2, None)

        def conv(name, change=lambda tensors, metadata: None, sizes=(4, 3)):
            tensors, metadata = conv_case(*sizes)
            change(tensors, metadata)
            path = folder / f"conv{name}.safetensors"
            write(path, tensors, metadata)
            return path

        for sizes in ((4, 3), (1, 1), (1, 5), (4, 1), (2, 2), (2, 7, 3), (3, 3, 2, 5)):
            run(f"ttt_conv of {sizes}", 0, "1 passed, 0 failed", conv("good", sizes=sizes))
        wrong = {
            "a row of w is missing": lambda t, _: t.update({"w": ([1, 1, 3, 3], t["w"][1][:9])}),
            "w of two axes": lambda t, _: t.update({"w": ([2, 9], t["w"][1])}),
            "fewer keys": lambda t, _: t.update({"k": ([1, 11, 2], t["k"][1][:22])}),
            "more values": lambda t, _: t.update({"v": ([1, 13, 2], t["v"][1] + [0.0, 0.0])}),
            "keys of two axes": lambda t, _: t.update({"k": ([12, 2], t["k"][1])}),
            "no queries": lambda t, _: t.update({"q": ([1, 0, 2], [])}),
            "another batch of keys": lambda t, _: t.update({"k": ([2, 12, 2], t["k"][1] * 2)}),
            "a key of NaN": lambda t, _: t["k"][1].__setitem__(3, float("nan")),
            "a larger grid": lambda _, m: m.update({"grid_h": "5"}),
            "a grid of NaN": lambda _, m: m.update({"grid_h": "nan"}),
            "a grid of words": lambda _, m: m.update({"grid_w": "three"}),
            "no grid": lambda _, m: m.pop("grid_w"),
            "a gradient of another tap": lambda t, _: t["mid.g"][1].reverse(),
        }
        for index, (what, change) in enumerate(wrong.items()):
            run(what, 1, "0 passed, 1 failed", conv(f"wrong{index}", change))

        path = folder / "text.safetensors"
        write(path, *text_case())
        run("a sound text case", 0, "1 passed, 0 failed", path)
        for sentence, change in {
            "'in.tokens' holds 1.5": lambda t: t["in.tokens"][1].__setitem__(1, 1.5),
            "'in.tokens' holds 1000000015": lambda t: t["in.tokens"][1].__setitem__(1, 1e30),
            "token id 5, but the table has 5 rows": lambda t: t["in.tokens"][1].__setitem__(1, 5.0),
            "'in.tokens' has shape [3], expected [any, any]": lambda t: t["in.tokens"][0].pop(0),
        }.items():
            tensors, metadata = text_case()
            change(tensors)
            write(path, tensors, metadata)
            said = run(sentence, 1, "0 passed, 1 failed", path).stdout
            if sentence not in said:
                failures.append(f"expected '{sentence}' in: {said}")

        cuda = "--context", "cuda"
        run("a sound case on cuda", 0, "1 passed, 0 failed", good, *cuda)
        for index in (0, 1, 6, 9, 12):
            run(f"{list(broken)[index]} on cuda", 1, "0 passed, 1 failed", folder / f"broken{index}.safetensors", *cuda)
        elsewhere = case("elsewhere", lambda _, m: m.update({"op": "neighborhood_attention"}))
        result = run("an op that cuda does not have", 0, "1 passed, 0 failed", good, elsewhere, *cuda)
        if "not on cuda" not in result.stdout or "1 cases not on cuda skipped" not in result.stdout:
            failures.append("what cuda does not have is not listed")
        run("nothing that cuda has", 1, "0 passed, 0 failed", elsewhere, *cuda)
        run("an op in --ops that cuda does not have", 2, None, good, "--ops=neighborhood_attention", *cuda)
        run("an op in --ops before the context", 2, None, good, *cuda, "--ops", "key_instance_norm,no_such_op")
        run("the cpu by name", 0, "1 passed, 0 failed", good, "--context=cpu")
        run("an unknown context", 2, None, good, "--context=gpu")
        run("no context", 2, None, good, "--context")
        run("an unknown option", 2, None, good, "--fast")

    for failure in failures:
        print("FAIL", failure)
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
