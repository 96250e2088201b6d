#!/usr/bin/env python3
"""Makes tests/data/deit-tiny: a tiny DeiT with random weights, pictures, and what PyTorch and PIL make of them.

    python3 tests/reference/deit_tiny.py [--output FOLDER]

README.md beside this file says how to install what it needs. Nothing of it is trained: its classes are named after
what they are not. Output:

  model.safetensors, config.json   the model, under timm's names and with timm's config, float16
  picture.{png,jpg}, *.jpg         one picture in several formats
  grey16.png, alpha.png            two rows of pixels
  decoded_*.png, resized_*.png     what PIL reads from them, and its bicubic resize of picture.png
  reference.json                   logits of the picture at three sizes in float64, resampled positions
"""

import argparse
import json
import math
import pathlib

import numpy
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

SEED = 1
WIDTH, HEADS, DEPTH, PATCH, GRID, CLASSES = 48, 3, 2, 8, 4, 6
SIZE = PATCH * GRID
CROP = 0.875
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LABELS = ["no tench", "no goldfish", "no great white shark", "no hen, no chick", "no ostrich", "no \u00e9p\u00e9e"]
DECODED = ("picture", "grey", "cmyk", "progressive")
RESIZED = ((37, 29), (90, 71), (8, 48), (64, 20))
TABLE_WIDTH = 3
RESAMPLED = ((6, 9), (3, 2), (8, 5), (4, 4), (1, 1))
INPUTS = ((32, 32), (48, 48), (24, 40))  # height, width


def parameters():
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape, scale=1.0, mean=0.0):
        return (mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)).half()

    def linear(name, out, inputs, p):
        p[f"{name}.weight"] = normal(out, inputs, scale=1 / math.sqrt(inputs))
        p[f"{name}.bias"] = normal(out, scale=0.1)

    def norm(name, p):
        p[f"{name}.weight"] = normal(WIDTH, scale=0.2, mean=1)
        p[f"{name}.bias"] = normal(WIDTH, scale=0.2)

    p = {}
    p["cls_token"] = normal(1, 1, WIDTH)
    p["pos_embed"] = normal(1, 1 + GRID * GRID, WIDTH, scale=0.5)
    p["patch_embed.proj.weight"] = normal(WIDTH, 3, PATCH, PATCH, scale=1 / math.sqrt(3 * PATCH * PATCH))
    p["patch_embed.proj.bias"] = normal(WIDTH, scale=0.1)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        norm(f"{block}.norm1", p)
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH, p)
        linear(f"{block}.attn.proj", WIDTH, WIDTH, p)
        norm(f"{block}.norm2", p)
        linear(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH, p)
        linear(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH, p)
    norm("norm", p)
    linear("head", CLASSES, WIDTH, p)
    return p


def resample(table, rows, columns):
    """(1, grid * grid, width) to (1, rows * columns, width), as DeiT's own code takes a model to another size."""
    grid = math.isqrt(table.shape[1])
    image = table.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(rows, columns), mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def forward(parameters, x):
    p = {name: value.double() for name, value in parameters.items()}

    def linear(name, x):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    x = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=PATCH)
    rows, columns = x.shape[2:]
    positions = p["pos_embed"]
    positions = torch.cat([positions[:, :1], resample(positions[:, 1:], rows, columns)], 1)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], 1) + positions
    for i in range(DEPTH):
        block = f"blocks.{i}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
        q, k, v = qkv.reshape(*qkv.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attended = torch.softmax(q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5, -1) @ v
        x = x + linear(f"{block}.attn.proj", attended.transpose(1, 2).flatten(2))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))))
    return linear("head", norm("norm", x)[:, 0])


def draw():
    """Stripes, a disc and some noise: sharp edges, soft ones, and all colours."""
    height, width = 48, 64
    y, x = numpy.mgrid[0:height, 0:width].astype(numpy.float64)
    red = 127 + 120 * numpy.sin(x / 3 + y / 11)
    green = 255 * ((x - 40) ** 2 + (y - 20) ** 2 < 150) + 60 * ((x // 5 + y // 7) % 2)
    blue = 4 * x * (y > 30) + 200 * (y <= 30) * (x % 9 < 2)
    noise = numpy.random.default_rng(SEED).normal(0, 8, (height, width, 3))
    pixels = numpy.stack([red, green, blue], -1) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8))


def preprocess(picture, height, width):
    """Shorter side to size / CROP, centre crop, as torchvision does; both sizes of the crop may differ."""
    shorter = math.floor(max(height, width) / CROP)
    w, h = picture.size
    size = (shorter, shorter * h // w) if w <= h else (shorter * w // h, shorter)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    picture = picture.crop((left, top, left + width, top + height))
    x = torch.from_numpy(numpy.array(picture)).double() / 255
    x = (x - torch.tensor(MEAN, dtype=torch.float64)) / torch.tensor(STD, dtype=torch.float64)
    return x.permute(2, 0, 1)[None]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = pathlib.Path(__file__).resolve().parents[2]
    parser.add_argument("--output", type=pathlib.Path, default=root / "tests" / "data" / "deit-tiny")
    out = parser.parse_args().output
    out.mkdir(parents=True, exist_ok=True)

    model = parameters()
    safetensors.torch.save_file(model, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "deit_tiny_patch8_32",
        "num_classes": CLASSES,
        "num_heads": HEADS,
        "label_names": LABELS,
        "pretrained_cfg": {
            "input_size": [3, SIZE, SIZE],
            "interpolation": "bicubic",
            "crop_pct": CROP,
            "mean": MEAN,
            "std": STD,
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")

    picture = draw()
    picture.save(out / "picture.png")
    picture.save(out / "picture.jpg", quality=90)
    picture.save(out / "progressive.jpg", quality=90, progressive=True, subsampling=0)
    picture.convert("L").save(out / "grey.jpg", quality=90)
    inks = 255 - numpy.concatenate([numpy.array(picture), numpy.array(picture.convert("L"))[..., None]], -1)
    Image.fromarray(inks, "CMYK").save(out / "cmyk.jpg", quality=90)
    ramp = numpy.arange(8, dtype=numpy.uint16)[None] * (36 * 257)
    Image.fromarray(ramp).save(out / "grey16.png")
    Image.fromarray(numpy.array([[[255, 255, 255, 0], [255, 255, 255, 255]]], numpy.uint8)).save(out / "alpha.png")
    for name in DECODED:
        Image.open(out / f"{name}.jpg").convert("RGB").save(out / f"decoded_{name}.png", optimize=True)
    for width, height in RESIZED:
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        resized.save(out / f"resized_{width}x{height}.png", optimize=True)

    generator = torch.Generator().manual_seed(SEED + 1)
    table = torch.randn(1, 25, TABLE_WIDTH, generator=generator, dtype=torch.float64)
    reference = {
        "made_by": f"torch {torch.__version__.split('+')[0]}, Pillow {Image.__version__}",
        "logits": [
            {
                "height": height,
                "width": width,
                "input_mean": preprocess(picture, height, width).mean().item(),
                "logits": forward(model, preprocess(picture, height, width))[0].tolist(),
            }
            for height, width in INPUTS
        ],
        "table": table.flatten().tolist(),
        "resampled": [
            {"rows": rows, "columns": columns, "values": resample(table, rows, columns).flatten().tolist()}
            for rows, columns in RESAMPLED
        ],
    }
    (out / "reference.json").write_text(json.dumps(reference, indent=1) + "\n")


if __name__ == "__main__":
    main()
