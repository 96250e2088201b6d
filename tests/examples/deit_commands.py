#!/usr/bin/env python3
"""linattn-deit as a user meets it: the tiny DeiT, its conversion by linattn-inherit, and pictures."""

import argparse
import json
import math
import pathlib
import shutil
import sys
import tempfile

from commands import check, failures, refuses, run, without_tensor


def converted(inherit: pathlib.Path, tiny: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
    """The tiny model as T5, without its class token."""
    out = scratch / "t5"
    result = run(inherit, tiny, out, "--drop-cls", "--seed", "3")
    check("linattn-inherit converts the tiny DeiT", result.returncode == 0 and out.is_dir(), result.stderr)
    return out


def deit(command: pathlib.Path, inherit: pathlib.Path, data: pathlib.Path, scratch: pathlib.Path) -> None:
    tiny = data / "deit-tiny"
    png, jpeg = tiny / "picture.png", tiny / "picture.jpg"
    t5 = converted(inherit, tiny, scratch)

    result = run(command, tiny, t5, png, jpeg, "--json")
    report = json.loads(result.stdout)
    check("linattn-deit --json", result.returncode == 0 and len(report["pictures"]) == 2, result.stderr)
    softmax, linear = report["pictures"][0]["results"]
    check("it runs what the checkpoints say", (softmax["attention"], linear["attention"]) == ("softmax", "T5"))
    recorded = json.loads((tiny / "reference.json").read_text())["logits"][0]["logits"]
    total = sum(math.exp(logit) for logit in recorded)
    near = all(abs(guess["probability"] - math.exp(recorded[guess["class"]]) / total) < 1e-6 for guess in softmax["top"])
    check("its probabilities are PyTorch's", near and len(softmax["top"]) == 5, json.dumps(softmax))
    order = [guess["probability"] for guess in softmax["top"]]
    check("the best come first", order == sorted(order, reverse=True))
    check("the names are those of config.json", softmax["top"][0]["label"] == "no ostrich", json.dumps(softmax))
    check("PNG and JPEG of a picture look alike", report["pictures"][1]["results"][0]["top"][0]["class"] == softmax["top"][0]["class"])
    again = json.loads(run(command, tiny, t5, png, jpeg, "--json", "-t", "1").stdout)
    same = [[r["top"] for r in p["results"]] for p in again["pictures"]] == [[r["top"] for r in p["results"]] for p in report["pictures"]]
    check("one thread, the same bits", same)

    result = run(command, tiny, png, "--top", "2")
    lines = result.stdout.splitlines()
    check("two lines of names", len(lines) == 4 and "no ostrich" in lines[2] and "%" in lines[3], result.stdout)
    labels = scratch / "labels.txt"
    labels.write_text("".join(f"class number {i}\n" for i in range(6)))
    check("--labels counts more", "class number 4" in run(command, tiny, png, "--labels", labels).stdout)
    alone = scratch / "alone.safetensors"
    shutil.copy(next(t5.glob("*.safetensors")), alone)
    result = run(command, alone, png)
    check("a file alone needs no config.json, and prints ids", result.returncode == 0 and "ostrich" not in result.stdout, result.stderr)
    check("beside another model it takes its names", run(command, tiny, alone, png).stdout.count("no ostrich") == 2)

    result = run(command, tiny, t5, "--size", "32,64", "--repeat", "1", "--json")
    sizes = json.loads(result.stdout)["sizes"]
    check("--size measures both models", [(s["size"], s["tokens"], len(s["results"])) for s in sizes] == [(32, 16, 2), (64, 64, 2)])
    result = run(command, tiny, t5, "--size", "32,64", "--repeat", "1")
    check("as a table with their ratio", "ratio" in result.stdout and len(result.stdout.splitlines()) == 4, result.stdout)

    empty = scratch / "empty"
    refuses("no picture", empty, ["picture"], command, tiny)
    refuses("no model", empty, ["model"], command, png)
    refuses("a model that is not there", empty, ["nowhere"], command, scratch / "nowhere.safetensors", png)
    refuses("a picture that is not there", empty, ["nowhere.png"], command, tiny, scratch / "nowhere.png")
    refuses("a picture that is none", empty, ["labels.txt", "PNG"], command, tiny, labels)
    refuses("a size between patches", empty, ["33", "8"], command, tiny, "--size", "33")
    refuses("heads that do not divide the width", empty, ["48", "5"], command, tiny, png, "--heads", "5")
    refuses("an option that is none", empty, ["--tops"], command, tiny, png, "--tops", "3")
    few = scratch / "few.txt"
    few.write_text("one\ntwo\n")
    refuses("labels of another model", empty, ["2 labels", "6 classes"], command, tiny, png, "--labels", few)
    cut = scratch / "cut.jpg"
    cut.write_bytes(jpeg.read_bytes()[:1200])
    refuses("a picture cut short", empty, ["cut.jpg"], command, tiny, cut)
    broken = scratch / "broken.safetensors"
    without_tensor(tiny / "model.safetensors", broken, "blocks.1.mlp.fc2.weight")
    refuses("a missing tensor", empty, ["broken", "blocks.1.mlp.fc2.weight"], command, broken, png, "--heads", "3")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "inherit", "deit"):
        parser.add_argument(name, type=pathlib.Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        deit(a.deit.resolve(), a.inherit.resolve(), a.data, pathlib.Path(folder))
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
