#!/usr/bin/env python3
"""The commands as a user meets them: exit codes, one clear sentence on stderr, results on stdout, files that are
whole or not there at all."""

import argparse
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile

failures = []


def check(what: str, ok: bool, detail: str = "") -> None:
    print(f"{'ok  ' if ok else 'FAIL'} {what}" + ("" if ok else f"\n{detail}"), flush=True)
    if not ok:
        failures.append(what)


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], text=True, capture_output=True, timeout=120, **options)


def refuses(what: str, target: pathlib.Path, words: list[str], *command, **options) -> None:
    """Exit code 2, a sentence with these words on stderr, nothing written, not even a temporary file."""
    before = sorted(target.parent.iterdir())
    result = run(*command, **options)
    clear = [line for line in result.stderr.splitlines() if all(word in line for word in words)]
    ok = result.returncode == 2 and len(clear) == 1 and sorted(target.parent.iterdir()) == before
    check(f"{what}: {clear[0] if clear else ''}", ok, f"exit code {result.returncode}, stderr: {result.stderr}")


def without_tensor(source: pathlib.Path, target: pathlib.Path, name: str) -> None:
    """A copy of a safetensors file in which one tensor goes by another name."""
    data = source.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header = {("other" if key == name else key): value for key, value in header.items()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    target.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def inherit(command: pathlib.Path, data: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
    tiny, init = data / "sd35-tiny", data / "sd35-tiny-ref" / "t5.safetensors"
    out, report = scratch / "t5", scratch / "report.json"

    result = run(command, tiny, out, "--dry-run")
    check("linattn-inherit --dry-run writes nothing", result.returncode == 0 and not out.exists(), result.stderr)
    check("linattn-inherit --dry-run prints its report", "inherited" in result.stdout, result.stdout)

    result = run(command, tiny, out, "--init", init, "--report", report)
    check("linattn-inherit converts", result.returncode == 0 and (out / "model_index.json").exists(), result.stderr)
    check("linattn-inherit --report is JSON", isinstance(json.loads(report.read_text()), dict))
    config = json.loads((out / "transformer" / "config.json").read_text())
    check("the converted folder says what it is", len(config["linattn"]["modules"]) == 3, json.dumps(config))
    source = next((tiny / "transformer").glob("*.safetensors")).read_bytes()
    converted = next((out / "transformer").glob("*.safetensors")).read_bytes()
    check("the converted transformer is larger", len(converted) > len(source))

    refuses("an output that exists", out, ["exists"], command, tiny, out, "--init", init)
    refuses("a converted checkpoint", out, ["converted"], command, out, scratch / "again")
    refuses("an input that is not there", out, ["nowhere"], command, scratch / "nowhere", scratch / "again")
    refuses("a module that is not there", out, ["joint"], command, tiny, scratch / "again", "--replace", "joint:99")
    refuses("an option that is none", out, ["--replac"], command, tiny, scratch / "again", "--replac", "all")
    return out


def sd35(command: pathlib.Path, data: pathlib.Path, converted: pathlib.Path, scratch: pathlib.Path) -> None:
    tiny, png = data / "sd35-tiny", scratch / "picture.png"

    def options(width=64, steps=2, output=png):
        return ["-p", "a red fox", "-W", width, "-H", 48, "--steps", steps, "-o", output]

    result = run(command, "-m", tiny, *options(), "--json")
    facts = json.loads(result.stdout)
    check("linattn-sd35 --json", result.returncode == 0 and facts["width"] == 64 and facts["seconds"]["total"] > 0)
    picture = png.read_bytes()
    check("the PNG is one, and carries the prompt", picture[:8] == b"\x89PNG\r\n\x1a\n" and b"a red fox" in picture)
    run(command, "-m", tiny, *options(), "-t", "1")
    check("one thread, the same file", png.read_bytes() == picture)
    result = run(command, "-m", converted, *options(), "--json")
    check("the converted model runs linear attention", json.loads(result.stdout)["linear_attention_modules"] == 3)
    check("and paints another picture", png.read_bytes() != picture)
    png.unlink()

    init = scratch / "init.png"
    init.write_bytes(picture)
    result = run(command, "-m", tiny, *options(), "-i", init, "--strength", "0.5", "--vae-tiling", "--json")
    check("--init-img", result.returncode == 0 and json.loads(result.stdout)["strength"] == 0.5, result.stderr)

    several = scratch / "several"
    several.mkdir()
    result = run(command, "-m", tiny, *options(output=several / "fox_%02d.png"), "-b", 2, "--seed", 7, "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    check("--batch-count: a line of JSON and a file each", result.returncode == 0 and [l["seed"] for l in lines] == [7, 8]
          and {p.name for p in several.iterdir()} == {"fox_00.png", "fox_01.png"}, result.stderr)
    prompts = scratch / "prompts.txt"
    prompts.write_text("# two\na red fox\n\na lighthouse\n")
    result = run(command, "-m", tiny, *options(output=several / "x.png")[2:], "--prompt-file", prompts, "--seed", 7)
    check("--prompt-file", result.returncode == 0 and (several / "x_001.png").exists(), result.stderr)
    check("the first of them is the batch's first", (several / "x_000.png").read_bytes() == (several / "fox_00.png").read_bytes())
    prompts.unlink()
    shutil.rmtree(several)

    refuses("a prompt and a file of them", png, ["prompt"], command, "-m", tiny, *options(), "--prompt-file", "x")
    refuses("no prompt at all", png, ["prompt"], command, "-m", tiny, *options()[2:])
    refuses("a strength beyond 1", png, ["strength"], command, "-m", tiny, *options(), "-i", init, "--strength", "2")
    init.unlink()
    refuses("a width between patches", png, ["width", "16"], command, "-m", tiny, *options(width=65))
    refuses("a negative number of steps", png, ["steps"], command, "-m", tiny, *options(steps=-1))
    refuses("a sampler that is none", png, ["heun"], command, "-m", tiny, *options(), "--sampling-method", "heun")
    refuses("a model that is not there", png, ["nowhere"], command, "-m", scratch / "nowhere", *options())
    refuses("a folder that is not there", png, ["missing"], command, "-m", tiny, *options(output=scratch / "missing" / "x.png"))

    broken = scratch / "broken"
    shutil.copytree(tiny, broken)
    (file,) = (broken / "transformer").glob("*.safetensors")
    name = "transformer_blocks.1.attn.to_k.weight"
    without_tensor(next((tiny / "transformer").glob("*.safetensors")), file, name)
    refuses("a missing tensor", png, ["1", "to_k"], command, "-m", broken, *options())
    file.write_bytes(file.read_bytes()[:-100])
    refuses("a truncated file", png, [file.name], command, "-m", broken, *options())

    if os.path.exists("/dev/full"):
        refuses("a full disk", png, ["/dev/full"], command, "-m", tiny, *options(output="/dev/full"))


def demo(command: pathlib.Path, data: pathlib.Path, converted: pathlib.Path, scratch: pathlib.Path) -> None:
    out = scratch / "demo"
    result = run(command, data / "sd35-tiny", converted, "--out", out, "--size", "64", "--steps", "2", "--repetitions", "1")
    check("linattn-demo", result.returncode == 0, result.stderr)
    check("its table has both attentions", "softmax" in result.stdout and "t5" in result.stdout, result.stdout)
    check("its pictures", {p.name for p in out.iterdir()} == {"softmax.png", "t5.png", "side_by_side.png"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "inherit", "sd35", "demo"):
        parser.add_argument(name, type=pathlib.Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        converted = inherit(a.inherit.resolve(), a.data, scratch)
        sd35(a.sd35.resolve(), a.data, converted, scratch)
        demo(a.demo.resolve(), a.data, converted, scratch)
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
