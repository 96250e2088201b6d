"""Makes tests/data/deit-tiny/preprocessing.json: what timm's evaluation cuts out of picture.png, by Pillow.

    pip install pillow==13.0.0
    python tests/reference/timm_preprocessing.py [PICTURE [OUTPUT]]

The steps are those of timm 1.0 (transforms_imagenet_eval, of square sizes also torchvision's Resize and CenterCrop). Of each
result the file holds the FNV-1a hash of its bytes and its first pixels.
"""

import json
import math
import os
import sys

from PIL import Image

FILTERS = {name: getattr(Image.Resampling, name.upper())
           for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")}
MEAN = (0.485, 0.456, 0.406)


def fnv(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"


def centre(image, height, width):
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def cut(image, mode, height, width, crop, resample):
    scaled = [math.floor(size / crop) for size in (height, width)]
    if mode == "squash":
        return centre(image.resize((scaled[1], scaled[0]), resample), height, width)
    if mode == "border":
        ratio = max(image.height / scaled[0], image.width / scaled[1])
        image = image.resize((round(image.width / ratio), round(image.height / ratio)), resample)
        rest = [max(size - have, 0) for size, have in ((width, image.width), (height, image.height))]
        padded = Image.new("RGB", (image.width + rest[0], image.height + rest[1]), tuple(round(255 * v) for v in MEAN))
        padded.paste(image, (rest[0] // 2, rest[1] // 2))
        return centre(padded, height, width)
    short, long = sorted(image.size)
    to_long = int(scaled[0] * long / short)
    size = (scaled[0], to_long) if image.width <= image.height else (to_long, scaled[0])
    return centre(image.resize(size, resample), height, width)


def main():
    data = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data", "deit-tiny")
    picture = Image.open(sys.argv[1] if len(sys.argv) > 1 else f"{data}/picture.png").convert("RGB")
    cases = []

    def add(image, **what):
        cases.append({**what, "width": image.width, "height": image.height, "hash": fnv(image.tobytes()),
                      "first": list(image.tobytes()[:6])})

    for name, resample in FILTERS.items():
        for size in ((23, 17), (71, 60), (64, 20), (5, 48), (200, 3)):
            add(picture.resize(size, resample), filter=name)
        for mode in ("center", "squash", "border"):
            for turned in (False, True):
                for size, crop in ((32, 0.875), (45, 1.0), (33, 0.9), (70, 0.95)):
                    source = picture.transpose(Image.Transpose.TRANSPOSE) if turned else picture
                    add(cut(source, mode, size, size, crop, resample), filter=name, mode=mode, crop=crop,
                        transposed=turned)
        for mode in ("squash", "border"):
            add(cut(picture, mode, 24, 50, 0.9, resample), filter=name, mode=mode, crop=0.9, transposed=False)
    with open(sys.argv[2] if len(sys.argv) > 2 else f"{data}/preprocessing.json", "w") as file:
        lines = [json.dumps(case, separators=(",", ":")) for case in cases]
        file.write("[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main()
