#!/usr/bin/env python3
"""linattn-dit as a user meets it: the tiny DiT, its conversion by linattn-inherit, and grids of samples."""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile

from commands import check, failures, refuses, run, without_tensor


def dit(command: pathlib.Path, inherit: pathlib.Path, data: pathlib.Path, scratch: pathlib.Path) -> None:
    tiny, png = data / "dit-tiny", scratch / "samples.png"
    softmax, vae, converted = tiny / "model.safetensors", tiny / "vae", scratch / "dit5.safetensors"

    result = run(inherit, softmax, converted, "--heads", "3", "--init", tiny / "dit5.safetensors")
    check("linattn-inherit converts the tiny DiT", result.returncode == 0 and converted.exists(), result.stderr)

    def options(*more, models=(softmax,), vae=vae, classes="1,7,3", sampler="ddim", steps=4, width=96):
        model = ["-m", *models, "--vae", vae, "--heads", "3"]
        return [*model, "-c", classes, "--sampler", sampler, "--steps", steps, "-W", width, "-o", png, *more]

    both = (softmax, converted)
    result = run(command, *options("--json", models=both))
    check("linattn-dit --json", result.returncode == 0, result.stderr)
    facts = json.loads(result.stdout)
    check("it runs what the files say", [m["linear_attention_modules"] for m in facts["models"]] == [0, 3])
    check("it times them", all(m["milliseconds_a_step"] > 0 for m in facts["models"]) and facts["height"] == 128)
    picture = png.read_bytes()
    check("the PNG is one, and says how it was made", picture[:4] == b"\x89PNG" and b"Classes: 1 7 3" in picture)
    run(command, *options("-t", "1", models=both))
    check("one thread, the same file", png.read_bytes() == picture)
    result = run(command, "-m", converted, "--vae", vae, "-c", "1", "--steps", "2", "-o", png)
    check("a converted file tells its heads", "3 of 3 attentions linear" in result.stdout, result.stderr)
    png.unlink()

    refuses("a class that is none", png, ["model.safetensors", "class 10", "0 to 9"], command, *options(classes="3,10"))
    refuses("a width between patches", png, ["width", "100", "8"], command, *options(width=100))
    small = options("-H", "64", models=(converted,))
    refuses("a grid smaller than the window", png, ["8 x 12", "4 x 6", "5 x 5"], command, *small)
    refuses("a sampler that is none", png, ["euler", "ddpm, ddim"], command, *options(sampler="euler"))
    refuses("steps that no stride gives", png, ["300", "250 or 334"], command, *options(steps=300))
    refuses("heads that nobody tells", png, ["heads"], command, "-m", softmax, "--vae", vae, "-c", "1", "-o", png)
    refuses("the VAE of SD3.5", png, ["4 channels", "16"], command, *options(vae=data / "sd35-tiny"))
    refuses("a model that is none", png, ["holds no DiT"], command, *options(models=(data / "deit-tiny",)))
    broken = scratch / "broken.safetensors"
    without_tensor(softmax, broken, "blocks.1.mlp.fc2.weight")
    refuses("a missing tensor", png, ["broken", "blocks.1.mlp.fc2.weight"], command, *options(models=(broken,)))
    shutil.copy(softmax, broken)
    broken.write_bytes(broken.read_bytes()[:-100])
    refuses("a truncated file", png, ["broken"], command, *options(models=(broken,)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "inherit", "dit"):
        parser.add_argument(name, type=pathlib.Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dit(a.dit.resolve(), a.inherit.resolve(), a.data, pathlib.Path(folder))
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
