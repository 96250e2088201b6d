#!/usr/bin/env python3
"""Wrong command lines, each with what has to be in its sentence: exit code 2, one line on stderr that begins with the
command's name, nothing on stdout, and nothing new or changed in the working folder. Then files with wrong numbers and
wrong text in them, and what is right though it looks odd."""

import argparse
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile

from commands import check, failures

WHOLE = "a whole number from"
SEEDS = f"{WHOLE} 0 to 18446744073709551615"

# Options that several commands have, as (what is given, what the sentence says).
THREADS = [(f"-t {value}", f"--threads: expected {WHOLE} 0 to 4096, got '{value}'")
           for value in ("-1", "4097", "2147483648", "4294967297", "18446744073709551617", "x", "1.0", "1e3", "0x10", "+4")]
OUTSIDE_SEEDS = ("18446744073709551616", "99999999999999999999999", "-2", "1e3", "0x10", "''", "' 5'", "'5 '", "5.", "--5", "5x", "٣")

# Command lines without the name of the command, which is the key.
TABLE: dict[str, list[tuple[str, str]]] = {
    "inherit": [
        ("", "input is required"),
        ("{deit} a b", "there is no place for the argument 'b'"),
        ("{deit}", "output: is required"),
        ("{deit} out --replac all", "there is no option '--replac'"),
        ("{deit} out -x", "there is no option '-x'"),
        ("{deit} out --force=yes", "--force: takes no value"),
        ("{deit} out --force=", "--force: takes no value"),
        ("{deit} out --json=false", "--json: takes no value"),
        ("{deit} out --seed", "--seed: expected a value"),
        ("{deit} out --seed --force", "--seed: expected a value, got the option --force"),
        ("{deit} out --seed 1 --seed 2", "--seed: is given 2 times"),
        ("{deit} out -s 1 --seed=1 -s3", "--seed: is given 3 times"),
        ("{deit} out --heads 0", f"--heads: expected {WHOLE} 1 to 4096, got '0'"),
        ("{deit} out --heads -3", f"--heads: expected {WHOLE} 1 to 4096, got '-3'"),
        ("{deit} out --heads 3.0", f"--heads: expected {WHOLE} 1 to 4096, got '3.0'"),
        ("{deit} out --heads 9223372036854775808", f"--heads: expected {WHOLE} 1 to 4096, got '9223372036854775808'"),
        ("{deit} out --classes 0", "--classes: expected"),
        ("{deit} out --classes 99999999999", f"--classes: expected {WHOLE} 1 to 1000000, got '99999999999'"),
        ("{deit} out --classes=", "--classes: expected"),
        ("{deit} out --inner-model linear", "--inner-model: linear not in"),
        ("{deit} out --inner-model ''", "--inner-model: "),
        ("{deit} out --weights average", "--weights: average not in"),
        ("'' out", "input: expected a path, got ''"),
        ("{deit} ''", "output: expected a path, got ''"),
        ("{deit} out --report=", "--report: expected a path, got ''"),
        ("{deit} out --init ''", ""),
        ("{deit} out --init nowhere.safetensors --drop-cls", "nowhere.safetensors"),
        ("{deit} out --replace '' --drop-cls", "cannot replace: '' is none of paper"),
        ("{deit} out --replace attn:2-1 --drop-cls", "'2-1' is no block or range"),
        ("{deit} out --replace attn:99999999999999999999 --drop-cls", "'99999999999999999999' is no block or range"),
        ("{deit} out --replace attn:0x1 --drop-cls", "'0x1' is no block or range"),
        ("{deit} out --replace attn:5 --drop-cls", "block 5 does not exist"),
        ("{deit} out --replace joint", "joint"),
        ("{sd35} out --heads 3", "heads is no option for"),
        ("{sd35} out --drop-cls", "drop-cls is no option for"),
        ("nowhere out", "nowhere"),
        ("'no\nwhere' out", "no\\nwhere"),
        ("'no\x1b[31mwhere' out", "no\\x1b[31mwhere"),
        ("no\udcffwhere out", "argument 'no\\xffwhere': byte 2 is not UTF-8"),
        ("{deit} -- out --force", "there is no place for the argument '--force'"),
        ("empty out", "empty"),
        ("text.txt out", "text.txt"),
        ("-m {deit} out", "there is no option '-m'"),
        ("{deit} out --config x.ini", "there is no option '--config'"),
        *((f"{{deit}} out --seed {seed}", f"--seed: expected {SEEDS}, got ") for seed in OUTSIDE_SEEDS + ("-1",)),
    ],
    "deit": [
        ("", "files is required"),
        ("{deit}", "neither a picture nor --size is given"),
        ("{picture}", "no model is given"),
        ("{deit} {picture} --tops 3", "there is no option '--tops'"),
        ("{deit} {picture} --top 0", f"--top: expected {WHOLE} 1 to 1000000, got '0'"),
        ("{deit} {picture} --top nan", "--top: expected"),
        ("{deit} {picture} --top inf", "--top: expected"),
        ("{deit} {picture} --top 1e400", "--top: expected"),
        ("{deit} {picture} --top", "--top: expected a value"),
        ("{deit} {picture} --top --json", "--top: expected a value, got the option --json"),
        ("{deit} {picture} --top 1 --top 1", "--top: is given 2 times"),
        ("{deit} {picture} --json=1", "--json: takes no value"),
        ("{deit} --size 4294967296 --repeat 1", "got '4294967296'"),
        ("{deit} --size 16385", f"--size: expected numbers with commas between them, each {WHOLE} 1 to 16384, got '16385'"),
        ("{deit} --size 32,4294967328", "got '32,4294967328'"),
        ("{deit} --size 32,,64", "got '32,,64'"),
        ("{deit} --size 32,", "got '32,'"),
        ("{deit} --size ,32", "got ',32'"),
        ("{deit} --size ''", "--size: expected"),
        ("{deit} --size=", "--size: expected"),
        ("{deit} --size '32, 64'", "got '32, 64'"),
        ("{deit} --size 32;64", "got '32;64'"),
        ("{deit} --size -32", "got '-32'"),
        ("{deit} --size 0", "got '0'"),
        ("{deit} --size 33", "takes multiples of 8 pixels"),
        ("{deit} --size 32 --size 64", "--size: is given 2 times"),
        ("{deit} --size 32 --repeat 0", f"--repeat: expected {WHOLE} 1 to 1000000, got '0'"),
        ("{deit} --size 32 --repeat 99999999999", "--repeat: expected"),
        ("{deit} {picture} --heads 5", "5"),
        ("{deit} {picture} --heads 1,3", "--heads: expected"),
        ("{deit} {picture} --labels ''", "--labels: expected a path, got ''"),
        ("{deit} {picture} --labels nowhere.txt", "nowhere.txt"),
        ("{deit} {picture} ''", "files: expected a path, got ''"),
        ("{deit} 'no\nwhere.png'", "no\\nwhere.png"),
        ("{deit} no\udcc3where.png", "byte 2 is not UTF-8"),
        ("{deit} [one.png,two.png]", "./[one.png,two.png]"),
        ("{deit} {picture} --labels utf16.txt", "utf16.txt: is UTF-16, UTF-8 is expected"),
        ("{deit} {picture} --labels utf32.txt", "utf32.txt: is UTF-32, UTF-8 is expected"),
        ("{deit} {picture} --labels latin1.txt", "latin1.txt: byte 3 is not UTF-8"),
        ("{deit} {picture} --labels nul.txt", "nul.txt: byte 3 is NUL"),
        ("{deit} {picture} --labels mark.txt", "mark.txt: holds no label"),
        ("{deit} {picture} --labels nul.json", "nul.json: holds a NUL in a string"),
        *((f"{{deit}} {{picture}} {option}", sentence) for option, sentence in THREADS),
    ],
    "dit": [
        ("", "is required"),
        ("-m {dit}", "--vae is required"),
        ("--vae {vae}", "--model is required"),
        ("-m {dit} --vae ''", "--vae: expected a path, got ''"),
        ("-m '' --vae {vae}", "--model: expected a path, got ''"),
        ("-m --vae {vae}", "-m: expected a value, got the option --vae"),
        ("-m {dit} --vae {vae} x", "there is no place for the argument 'x'"),
        *((f"-m {{dit}} --vae {{vae}} --heads 3 -o p.png {options}", sentence) for options, sentence in [
            ("--output q.png", "--output: is given 2 times"),
            ("--classes ''", "--classes: expected"),
            ("--classes 1,x", "got '1,x'"),
            ("--classes -1", "got '-1'"),
            ("--classes 4294967297", "got '4294967297'"),
            ("--classes 1.5", "got '1.5'"),
            ("--classes 900000", "900000"),
            ("-W 0", f"--width: expected {WHOLE} 1 to 65536, got '0'"),
            ("-W 4294967360", "--width: expected"),
            ("-H 9223372036854775808", "--height: expected"),
            ("-H -64", "--height: expected"),
            ("-W 65", "--width 65: must be a positive multiple"),
            ("--columns 0", f"--columns: expected {WHOLE} 1 to 100000, got '0'"),
            ("--steps 0", f"--steps: expected {WHOLE} 1 to 1000, got '0'"),
            ("--steps 1001", "--steps: expected"),
            ("--steps 2147483649", "--steps: expected"),
            ("--steps 2.5", "--steps: expected"),
            ("--steps 1", "steps: 2 to 1000"),
            ("--sampler ddim --steps 999", "steps"),
            ("--sampler euler", "unknown sampler 'euler'"),
            ("--sampler ''", "unknown sampler ''"),
            ("--cfg-scale 1e308", "--cfg-scale: expected a number from 0 to 1000, got '1e308'"),
            ("--cfg-scale -1", "--cfg-scale: expected"),
            ("--cfg-scale nan", "--cfg-scale: expected"),
            ("--cfg-scale inf", "--cfg-scale: expected"),
            ("--cfg-scale 1e-400", "--cfg-scale: expected"),
            ("--cfg-scale 4,5", "got '4,5'"),
            ("--cfg-scale 0x1p3", "--cfg-scale: expected"),
            *((f"-s {seed}", f"--seed: expected {SEEDS}, got ") for seed in OUTSIDE_SEEDS),
            *THREADS,
        ]),
    ],
    "sd35": [
        ("", "[-p,--prompt,--prompt-file] is required"),
        ("-p x", "--model is required"),
        ("-p x --diffusion-model {sd35}", "--model is required"),
        ("-m {sd35}", "[-p,--prompt,--prompt-file] is required"),
        ("-m {sd35} -p x --prompt-file y", "[-p,--prompt,--prompt-file] is required"),
        ("-m {sd35} -p", "-p: expected a value"),
        ("-m {sd35} -p -W 64", "-p: expected a value, got the option -W"),
        ("-m {sd35} --prompt-file nowhere.txt", "nowhere.txt"),
        ("-m {sd35} --prompt-file utf16.txt", "utf16.txt: is UTF-16, UTF-8 is expected"),
        ("-m {sd35} --prompt-file latin1.txt", "latin1.txt: byte 3 is not UTF-8"),
        ("-m {sd35} --prompt-file nul.txt", "nul.txt: byte 3 is NUL"),
        ("-m {sd35} --prompt-file mark.txt", "mark.txt: holds no prompt"),
        ("-m {sd35} --prompt-file ''", "--prompt-file: expected a path, got ''"),
        ("-m {sd35} -p \udcff", "argument '\\xff': byte 0 is not UTF-8"),
        ("-m {sd35} -p=\udced\udca0\udc80", "is not UTF-8"),
        ("-m {sd35} -p x fox", "there is no place for the argument 'fox'"),
        ("-m {sd35} -p x -- --seed", "there is no place for the argument '--seed'"),
        ("-m {sd35} -p x --no-turbo", "there is no option '--no-turbo'"),
        ("-m {sd35} -p x -z", "there is no option '-z'"),
        ("-m '' -p x", "--model: expected a path, got ''"),
        ("-m {sd35} -p x --vae=", "--vae: expected a path, got ''"),
        ("-m {sd35} -p x --clip-l ''", "--clip-l: expected a path, got ''"),
        ("-m {sd35} -p x -o", "-o: expected a value"),
        ("-m {sd35} -p x -o --json", "-o: expected a value, got the option --json"),
        *((f"-m {{sd35}} -p x -o p.png {options}", sentence) for options, sentence in [
            ("-p y", "--prompt: is given 2 times"),
            ("-n a -n b", "--negative-prompt: is given 2 times"),
            ("-W 99999999999999999999", f"--width: expected {WHOLE} 1 to 65536, got '99999999999999999999'"),
            ("-W 4294967360", "--width: expected"),
            ("-W=64", "got '=64'"),
            ("-W 64px", "--width: expected"),
            ("-H 0", "--height: expected"),
            ("-H -64", "--height: expected"),
            ("-H 1e2", "--height: expected"),
            ("--steps 0", f"--steps: expected {WHOLE} 1 to 1000, got '0'"),
            ("--steps x", f"--steps: expected {WHOLE} 1 to 1000, got 'x'"),
            ("--steps 4294967297", "--steps: expected"),
            ("--steps ''", "--steps: expected"),
            ("--steps=", "--steps: expected"),
            ("--steps 1,000", "--steps: expected"),
            ("--cfg-scale 1e308", "--cfg-scale: expected a number from 0 to 1000, got '1e308'"),
            ("--cfg-scale -0.5", "--cfg-scale: expected"),
            ("--cfg-scale NaN", "--cfg-scale: expected"),
            ("--cfg-scale -inf", "--cfg-scale: expected"),
            ("--cfg-scale 4.5.1", "--cfg-scale: expected"),
            ("--flow-shift 1e300", "--flow-shift: expected a number from 0.001 to 1000, got '1e300'"),
            ("--flow-shift 0", "--flow-shift: expected"),
            ("--flow-shift nan", "--flow-shift: expected"),
            ("--slg-scale inf", "--slg-scale: expected"),
            ("--slg-scale -1", "--slg-scale: expected"),
            ("--skip-layer-start nan", "--skip-layer-start: expected a number from 0 to 1, got 'nan'"),
            ("--skip-layer-start 1.1", "--skip-layer-start: expected"),
            ("--skip-layer-end -0.1", "--skip-layer-end: expected"),
            ("--skip-layer-start 0.5", "--skip-layer-start: 0.5 is behind --skip-layer-end, which is 0.2"),
            ("--skip-layer-end 0.005", "--skip-layer-start: 0.01 is behind --skip-layer-end, which is 0.005"),
            ("--skip-layers 7,8,", "--skip-layers: expected"),
            ("--skip-layers 4294967303", "--skip-layers: expected"),
            ("--skip-layers -1", "--skip-layers: expected"),
            ("--strength 0", "--strength: expected a number from 0.001 to 1, got '0'"),
            ("--strength 1.01", "--strength: expected"),
            ("--strength nan", "--strength: expected"),
            ("-b 0", f"--batch-count: expected {WHOLE} 1 to 100000, got '0'"),
            ("-b 4294967297", "--batch-count: expected"),
            ("-b 2 -s 18446744073709551615", "--seed: 18446744073709551615 has no 1 seeds behind it"),
            ("--sampler heun", "heun"),
            ("--sampling-method ''", "unknown"),
            ("--scheduler karras", "karras"),
            ("--vae-tiling=on", "--vae-tiling: takes no value"),
            *((f"-s {seed}", f"--seed: expected {SEEDS}, or -1 for a random one, got ") for seed in OUTSIDE_SEEDS),
            *THREADS,
        ]),
    ],
    "demo": [
        ("", "model is required"),
        ("{sd35}", "converted is required"),
        ("{sd35} {sd35} x", "there is no place for the argument 'x'"),
        ("{sd35} {sd35} -o ''", "--output: expected a path, got ''"),
        ("{sd35} {sd35} --size 0", "--size: expected"),
        ("{sd35} {sd35} --size 99999999999", "--size: expected"),
        ("{sd35} {sd35} --steps 1001", "--steps: expected"),
        ("{sd35} {sd35} --repeat 0", "--repeat: expected"),
        ("{sd35} {sd35} --seed -1", f"--seed: expected {SEEDS}, got '-1'"),
        ("{sd35} {sd35} -p \udc80", "is not UTF-8"),
        ("{sd35} {sd35} -t 5000", "--threads: expected"),
    ],
    "attention-map": [
        ("", "models is required"),
        ("a b c", "there is no place for the argument 'c'"),
        ("''", "models: expected a path, got ''"),
        ("{deit} {deit}", "two models and --picture go together"),
        ("{layer} --picture {picture}", "two models and --picture go together"),
        ("{deit} {deit} --picture ''", "--picture: expected a path, got ''"),
        *((f"{{deit}} {{deit}} --picture {{picture}} -o m.png {options}", sentence) for options, sentence in [
            ("--grid 12", "--grid: expected ROWSxCOLUMNS, such as 12x16, got '12'"),
            ("--grid 12x", "--grid: expected"),
            ("--grid x12", "--grid: expected"),
            ("--grid 12x16x3", "--grid: expected"),
            ("--grid 0x4", "--grid: expected"),
            ("--grid -1x4", "--grid: expected"),
            ("--grid 4294967296x4294967296", "--grid: expected"),
            ("--grid ''", "--grid: expected"),
            ("--grid '4 x4'", "--grid: expected"),
            ("--query 5", "--query: expected ROW,COLUMN, such as 5,9, got '5'"),
            ("--query 5,9 --query 5,", "got '5,'"),
            ("--query -1,0", "got '-1,0'"),
            ("--query 0,9999999999999999999", "got '0,9999999999999999999'"),
            ("--heads 0,x", "--heads: expected"),
            ("--heads -1", "--heads: expected"),
            ("--size 0", f"--size: expected {WHOLE} 1 to 4096, got '0'"),
            ("--size 4097", "--size: expected"),
            ("--block -1", "--block: expected"),
            ("--block 4294967296", "--block: expected"),
            ("-t -1", f"--threads: expected {WHOLE} 0 to 4096, got '-1'"),
            ("-t 4097", "--threads: expected"),
        ]),
    ],
}


# Text files of the working folder.
FILES = {
    "text.txt": b"one\ntwo\n",
    "utf16.txt": "one\ntwo\n".encode("utf-16"),
    "utf32.txt": "one\ntwo\n".encode("utf-32"),
    "latin1.txt": "caf\xe9\n".encode("latin-1"),
    "nul.txt": b"one\0two\n",
    "mark.txt": b"\xef\xbb\xbf",
    "nul.json": b'["one", "tw\\u0000o"]',
}

# Numbers of a config.json: where it lies in a model, the key, what the sentence says of any other number.
SIZES = [
    ("sd35", "transformer", "patch_size", "the tensors have 2"),
    ("sd35", "transformer", "in_channels", "the tensors have 16"),
    ("sd35", "transformer", "out_channels", "the tensors have 16"),
    ("sd35", "transformer", "num_layers", "the tensors have 4"),
    ("sd35", "transformer", "num_attention_heads", "the tensors have 4"),
    ("sd35", "transformer", "attention_head_dim", "the tensors have 16"),
    ("sd35", "transformer", "joint_attention_dim", "the tensors have 64"),
    ("sd35", "transformer", "pooled_projection_dim", "the tensors have 56"),
    ("sd35", "transformer", "caption_projection_dim", "the tensors have 64"),
    ("sd35", "transformer", "pos_embed_max_size", "the tensors have 64"),
    ("sd35", "vae", "norm_num_groups", f"expected {WHOLE} 1 to 4096"),
    ("sd35", "text_encoder", "num_attention_heads", f"expected {WHOLE} 1 to 24"),
    ("sd35", "text_encoder", "num_hidden_layers", "the tensors have 3"),
    ("sd35", "text_encoder", "hidden_size", "the tensors have 24"),
    ("sd35", "text_encoder", "vocab_size", "the tensors have 770"),
    ("sd35", "text_encoder", "max_position_embeddings", "the tensors have 77"),
    ("sd35", "text_encoder_3", "num_heads", "the tensors have 4"),
    ("sd35", "text_encoder_3", "num_layers", "the tensors have 2"),
    ("sd35", "text_encoder_3", "d_model", "the tensors have 64"),
    ("sd35", "text_encoder_3", "d_kv", "the tensors have 16"),
    ("sd35", "text_encoder_3", "d_ff", "the tensors have 96"),
    ("sd35", "text_encoder_3", "vocab_size", "the tensors have 232"),
    ("sd35", "text_encoder_3", "relative_attention_num_buckets", "the tensors have 32"),
    ("sd35", "text_encoder_3", "relative_attention_max_distance", f"expected {WHOLE} 128 to 128"),
    ("deit", ".", "num_heads", f"expected {WHOLE} 1 to 4096"),
]
WRONG_SIZES = ["0", "-1", "1e300", "18446744073709551615", "9223372036854775808", '"4"', "true", "[4]", "{}"]
FRACTIONS = [
    ("sd35", "vae", "scaling_factor", "expected a number from 0.001 to 1000", ["0", "-1", "1e300", "1e-300", '"1"', "true"]),
    ("sd35", "vae", "shift_factor", "expected a number from -1000 to 1000", ["1e300", "-1e300", '"1"', "[]"]),
    ("sd35", "text_encoder", "layer_norm_eps", "expected a number from 1e-12 to 0.1", ["0", "-1e-5", "1", '"x"', "1e-300"]),
    ("sd35", "text_encoder_3", "layer_norm_epsilon", "expected a number from 1e-12 to 0.1", ["0", "-1e-5", "1", "false"]),
    ("sd35", "text_encoder", "eos_token_id", f"expected {WHOLE} 0 to 2147483647", ["-1", "4294967298", "2.0", '"2"']),
    ("sd35", "transformer", "dual_attention_layers", "expected numbers of blocks, 0 to 3",
     ["3", "[4]", "[-1]", "[0.0]", '["0"]', "[18446744073709551615]", "{}"]),
    ("sd35", "transformer", "qk_norm", "expected a string", ["0", "true", "[]"]),
    ("deit", ".", "num_heads", "number beyond those of double", ["1e400", "-1e400"]),
]


def state(folder: pathlib.Path) -> list:
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*"))


class Models:
    """Copies of the small models, in which one config.json at a time is another."""

    def __init__(self, scratch: pathlib.Path, places: dict, programs: dict) -> None:
        self.copies = {}
        for name in ("deit", "sd35"):
            self.copies[name] = scratch / f"{name}-copy"
            shutil.copytree(places[name], self.copies[name])
        self.commands = {
            "deit": [programs["deit"], self.copies["deit"], places["picture"]],
            "sd35": [programs["sd35"], "-m", self.copies["sd35"], "-p", "x", "-W", "64", "-H", "64", "--steps", "1", "-t", "1",
                     "-o", scratch / "copy.png"],
        }

    def run(self, model: str, file: str, content: bytes) -> subprocess.CompletedProcess:
        path = self.copies[model] / file
        right = path.read_bytes()
        path.write_bytes(content)
        result = subprocess.run(self.commands[model], capture_output=True, text=True, timeout=120)
        path.write_bytes(right)
        return result

    def refuses(self, model: str, file: str, content: bytes, what: str, sentence: str) -> None:
        result = self.run(model, file, content)
        last = (result.stderr.splitlines() or [""])[-1]  # a command that runs may have named its stages
        check(what, result.returncode == 2 and last.startswith("linattn-") and file in last and sentence in last
              and result.stderr.count("linattn-") == 1, f"exit code {result.returncode}, expected {sentence!r}: {result.stderr}")

    def refuses_entry(self, model: str, folder: str, key: str, value: str, sentence: str) -> None:
        file = os.path.normpath(f"{folder}/config.json")
        config = json.loads((self.copies[model] / file).read_text())
        config[key] = "VALUE"
        self.refuses(model, file, json.dumps(config).replace('"VALUE"', value).encode(), f"{model}/{file}: {key} {value}", sentence)


def bad_files(models: Models) -> None:
    # Each key with two of the wrong sizes: all of them meet all kinds.
    for i, (model, folder, key, sentence) in enumerate(SIZES):
        for value in {WRONG_SIZES[i % len(WRONG_SIZES)], WRONG_SIZES[(4 * i + 1) % len(WRONG_SIZES)]}:
            models.refuses_entry(model, folder, key, value, sentence)
    for value in WRONG_SIZES + ["4.0"]:
        models.refuses_entry("sd35", "text_encoder_3", "num_heads", value, "the tensors have 4")
        models.refuses_entry("deit", ".", "num_heads", value, f"expected {WHOLE} 1 to 4096")
    for model, folder, key, sentence, values in FRACTIONS:
        for value in values:
            models.refuses_entry(model, folder, key, value, sentence)
    config = (models.copies["deit"] / "config.json").read_text()
    for what, content, sentence in (
        ("UTF-16", config.encode("utf-16"), "is UTF-16, UTF-8 is expected"),
        ("Latin-1", b'{"num_heads": 3, "x": "caf\xe9"}', "syntax error"),
        ("a surrogate", b'{"num_heads": 3, "x": "\\ud800"}', "syntax error"),
        ("a NUL in a string", b'{"num_heads": 3, "x": "a\\u0000b"}', "holds a NUL in a string"),
        ("a NUL in a key", b'{"num_heads": 3, "a\\u0000b": 1}', "holds a NUL in a string"),
        ("a NUL", config.encode() + b"\0", "holds a NUL byte"),
    ):
        models.refuses("deit", "config.json", content, f"config.json with {what}", sentence)
    result = models.run("deit", "config.json", b"\xef\xbb\xbf" + config.encode())
    check("config.json with a byte-order mark is read", result.returncode == 0, result.stderr)


def names_of_files(models: Models, programs: dict, scratch: pathlib.Path) -> None:
    copy, out = os.fsencode(models.copies["deit"]), scratch / "out"
    stray, command = copy + b"/caf\xe9.txt", [programs["inherit"], models.copies["deit"], out, "--drop-cls"]
    with open(stray, "wb"):
        pass
    result = subprocess.run(command, capture_output=True, text=True)
    check("a file whose name is not UTF-8 is not copied along", result.returncode == 2 and not out.exists()
          and "caf\\xe9.txt: has a name that is not UTF-8\n" in result.stderr, result.stderr)
    os.unlink(stray)
    os.rename(copy + b"/model.safetensors", copy + b"/m\xff.safetensors")
    result = subprocess.run(models.commands["deit"], capture_output=True, text=True)
    check("nor is such a model read", result.returncode == 2 and "m\\xff.safetensors: has a name that is not UTF-8\n" in result.stderr, result.stderr)
    os.rename(copy + b"/m\xff.safetensors", copy + b"/model.safetensors")


def right_ones(programs: dict, places: dict, scratch: pathlib.Path) -> None:
    """What looks odd and is right: it is taken as it stands."""
    picture = scratch / "right.png"
    start = [programs["sd35"], "-m", places["sd35"], "-W", "64", "-H", "64", "--steps", "1", "-t", "1", "-o", picture, "--json"]

    def facts(*options) -> dict:
        result = subprocess.run([*start, *options], capture_output=True, text=True)
        check(f"linattn-sd35 {shlex.join(options)}", result.returncode == 0, result.stderr)
        return json.loads(result.stdout or "{}")

    for option in ("--prompt=", "--prompt=-n", "-p-x", "--prompt=--seed", "-p-5"):
        check("that is the prompt", facts(option).get("prompt") == option.removeprefix("--prompt=").removeprefix("-p"))
    check("a value that begins with a dash", facts("-p", "-fox").get("prompt") == "-fox")
    check("without the byte-order mark", facts("-p", "\ufeffa fox", "-n", "\ufeff").get("prompt") == "a fox")
    for seed in (0, 9223372036854775807, 13842039482039482039, 18446744073709551615):
        check("that is the seed", facts("-p", "x", "-s", str(seed)).get("seed") == seed)
    check("-1 is a random one", isinstance(facts("-p", "x", "-s", "-1").get("seed"), int))
    prompts = scratch / "prompts.txt"
    prompts.write_bytes("\ufeff# Füchse\r\nein Fuchs\r\n".encode())
    check("a prompt file with a byte-order mark", facts("--prompt-file", str(prompts)).get("prompt") == "ein Fuchs")
    report = subprocess.run([programs["inherit"], places["deit"], "--drop-cls", "--dry-run", "--json", "-s", "18446744073709551615"],
                            capture_output=True, text=True)
    check("linattn-inherit takes the last seed", report.returncode == 0, report.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ("inherit", "sd35", "demo", "deit", "dit", "attention_map")
    for name in ("data", *names):
        parser.add_argument(name, type=pathlib.Path)
    a = parser.parse_args()
    data = a.data.resolve()
    places = {"deit": data / "deit-tiny", "picture": data / "deit-tiny" / "picture.png", "sd35": data / "sd35-tiny",
              "dit": data / "dit-tiny" / "model.safetensors", "vae": data / "dit-tiny" / "vae",
              "layer": data / "deit-tiny" / "model.safetensors"}
    programs = {name.replace("_", "-"): str(getattr(a, name).resolve()) for name in names}
    rows = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        (folder / "empty").mkdir()
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
        before = state(folder)
        for command, lines in TABLE.items():
            for line, sentence in lines:
                rows += 1
                arguments = [part.format(**places) if "{" in part else part for part in shlex.split(line)]
                result = subprocess.run([programs[command], *arguments], cwd=folder, capture_output=True, timeout=60)
                stderr = result.stderr.decode(errors="surrogateescape")
                ok = (result.returncode == 2 and result.stdout == b"" and stderr.count("\n") == 1 and stderr[-1] == "\n"
                      and stderr.startswith(f"linattn-{command}: ") and sentence in stderr and state(folder) == before)
                shown = line.encode(errors="backslashreplace").decode().replace("\n", "\\n").replace("\x1b", "\\x1b")
                check(f"linattn-{command} {shown}", ok, f"exit code {result.returncode}, stderr: {stderr!r}, "
                      f"expected: {sentence!r}, stdout: {result.stdout!r}, left: {state(folder)!r}")
        check(f"{rows} command lines", rows >= 160)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        models = Models(folder, places, programs)
        bad_files(models)
        names_of_files(models, programs, folder)
        right_ones(programs, places, folder)
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
