#!/usr/bin/env python3
"""Model files as people have them, and files that are something else: every command reads them or says in one sentence
what they are. What a file costs grows with its size, not with the numbers in it."""

import argparse
import gzip
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import tempfile

from commands import check, failures, refuses, run

SANITIZED = "--sanitized" in sys.argv


def write_model(path: pathlib.Path, tensors: dict[str, list[int]]) -> int:
    """Tensors of F32 zeros, which take no room on the disk. Gives the size of the header."""
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 4
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return len(text)


def outside(family: str) -> dict[str, list[int]]:
    """The tensors that tell the sizes of a family, and a first block that tells the family."""
    if family == "vit":
        tensors = {"patch_embed.proj.weight": [1, 1, 1, 1], "pos_embed": [1, 1, 1], "head.weight": [1, 1]}
    elif family == "dit":
        tensors = {"x_embedder.proj.weight": [1, 1, 1, 1], "pos_embed": [1, 1, 1], "t_embedder.mlp.0.weight": [1, 1],
                   "y_embedder.embedding_table.weight": [1, 1], "final_layer.linear.weight": [1, 1]}
    else:
        tensors = {"x_embedder.proj.weight": [1, 1, 1, 1], "pos_embed": [1, 1, 1], "t_embedder.mlp.0.weight": [1, 1],
                   "y_embedder.mlp.0.weight": [1, 1], "context_embedder.weight": [1, 1], "final_layer.linear.weight": [1, 1],
                   "joint_blocks.0.x_block.attn.qkv.weight": [3, 1], "joint_blocks.0.x_block.mlp.fc1.weight": [1, 1],
                   "joint_blocks.0.x_block.attn.ln_q.weight": [1]}
    if family != "sd35":
        tensors |= {"blocks.0.mlp.fc1.weight": [1, 1], "blocks.0.attn.qkv.weight": [3, 1]}
    return tensors


def vit_blocks(count: int) -> dict[str, list[int]]:
    """A whole ViT of one channel."""
    tensors = outside("vit") | {"patch_embed.proj.bias": [1], "head.bias": [1], "norm.weight": [1], "norm.bias": [1]}
    for i in range(count):
        for norm in ("norm1", "norm2"):
            tensors |= {f"blocks.{i}.{norm}.{part}": [1] for part in ("weight", "bias")}
        for linear, out in (("attn.qkv", 3), ("attn.proj", 1), ("mlp.fc1", 1), ("mlp.fc2", 1)):
            tensors |= {f"blocks.{i}.{linear}.weight": [out, 1], f"blocks.{i}.{linear}.bias": [out]}
    return tensors


def measured(*command) -> tuple[int, str, float, int]:
    """Exit code, what it says on stderr, seconds of the processor, and the largest number of bytes that it held."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        return process.returncode, errors.read(), usage.ru_utime + usage.ru_stime, 0 if SANITIZED else usage.ru_maxrss * 1024


def cost(commands: argparse.Namespace, scratch: pathlib.Path) -> None:
    """A header may ask for any number of blocks; it costs what its bytes cost."""
    file, picture = scratch / "model.safetensors", commands.data / "deit-tiny" / "picture.png"
    stems = {"vit": "blocks", "dit": "blocks", "sd35": "joint_blocks"}
    loads = {"vit": [commands.deit, file, picture, "--heads", "1"],
             "dit": [commands.dit, "-m", file, "--vae", commands.data / "dit-tiny" / "vae", "--heads", "1", "-o", scratch / "out.png"],
             "sd35": [commands.sd35, "-m", commands.data / "sd35-tiny", "--diffusion-model", file, "-p", "a", "-o", scratch / "out.png"]}
    base = measured(commands.inherit, "--help")[3] + (8 << 20)
    for family, stem in stems.items():
        inherits = [commands.inherit, "--dry-run", file]
        for what, names, words in (
            ("a block of a large number", [f"{stem}.4000000000.x"], [f"{stem}.4000000000.x", "block 4000000000", "block 1"]),
            ("a block of no number", [f"{stem}.99999999999999999999.x"], ["no block number"]),
            ("a gap", [f"{stem}.2.x", f"{stem}.3.x"], [f"{stem}.3.x", "block 3", "block 1"]),
            ("a number written otherwise", [f"{stem}.01.x"], [f"{stem}.01.x", "no block number"])):
            write_model(file, outside(family) | {name: [0] for name in names})
            for command in [inherits] + [loads[family]] * bool(loads[family][0]):
                code, said, _, memory = measured(*command)
                said = said.removeprefix("load\n")  # the stage, printed while it runs
                ok = code == 2 and said.count("\n") == 1 and all(word in said for word in words)
                check(f"{family}, {command[0].name}: {what}", ok and memory < base + (64 << 20), f"{code}, {memory} bytes: {said}")
        seconds = []
        for count in (30_000, 60_000):
            size = write_model(file, outside(family) | {f"{stem}.{i}.x": [0] for i in range(count)})
            code, said, spent, memory = measured(*inherits, *([] if family == "sd35" else ["--heads", "1"]))
            seconds.append(spent)
            ok = code == 2 and f"in {count} blocks" in said and memory < base + 20 * size
            check(f"{family}: {count} blocks of one tensor, {memory / size:.0f} times the header of {size} bytes", ok, said)
        check(f"{family}: twice the blocks take {seconds[1] / seconds[0]:.2f} times as long", seconds[1] < 2.5 * seconds[0] + 0.05)
    seconds = []
    for count in (1000, 2000):
        ema = {f"ema.{name}": shape for name, shape in vit_blocks(count).items()}
        size = write_model(file, vit_blocks(count) | ema)
        code, said, spent, memory = measured(commands.inherit, "--dry-run", file, "--heads", "1", "--weights", "ema")
        seconds.append(spent)
        check(f"two sets of {count} blocks: {memory / size:.0f} times the header", code == 0 and memory < base + 60 * size, said)
    check(f"twice the blocks take {seconds[1] / seconds[0]:.2f} times as long", seconds[1] < 2.5 * seconds[0] + 0.05)
    folder, seconds = scratch / "sharded", []
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for count in (500, 1000):
        write_model(folder / "part.safetensors", vit_blocks(count))
        index = {"weight_map": {name: "part.safetensors" for name in vit_blocks(count)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        code, said, spent, _ = measured(commands.inherit, folder, scratch / f"out{count}", "--heads", "1")
        seconds.append(spent)
        check(f"an index of {count} blocks is written", code == 0, said)
    check(f"twice the index takes {seconds[1] / seconds[0]:.2f} times as long", seconds[1] < 2.5 * seconds[0] + 0.05)


def read_tensors(path: pathlib.Path) -> dict[str, tuple[dict, bytes]]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, data = json.loads(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__", None)
    return {name: (info, data[slice(*info["data_offsets"])]) for name, info in header.items()}


def write_tensors(path: pathlib.Path, tensors: dict[str, tuple[dict, bytes]]) -> None:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (info, values) in tensors.items():
        header[name] = info | {"data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def shard(file: pathlib.Path, index: str, pattern: str) -> None:
    """Replaces a file by two shards, named by a pattern of their number, and an index."""
    tensors = read_tensors(file)
    names = {name: pattern.format(1 + i % 2) for i, name in enumerate(tensors)}
    for which in sorted(set(names.values())):
        write_tensors(file.parent / which, {name: tensors[name] for name in tensors if names[name] == which})
    (file.parent / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    file.unlink()


def copy(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.png", "*.jpg", "reference.json"))
    return target


PLAIN = ("{}.safetensors.index.json", "{}-0000{{}}-of-00002.safetensors")
VARIANTS = (("{}.safetensors.index.fp16.json", "{}.fp16-0000{{}}-of-00002.safetensors"),
            ("{}.fp16.safetensors.index.json", "{}-0000{{}}-of-00002.fp16.safetensors"))


def shard_all(folder: pathlib.Path, form: tuple[str, str]) -> None:
    for file in list(folder.rglob("*.safetensors")):
        shard(file, *(name.format(file.name.split(".")[0]) for name in form))


def draws(commands: argparse.Namespace, model: pathlib.Path, out: pathlib.Path) -> subprocess.CompletedProcess:
    return run(commands.sd35, "-m", model, "-p", "a red fox", "-W", 64, "-H", 48, "--steps", 1, "-t", 1, "-o", out)


def indices(commands: argparse.Namespace, scratch: pathlib.Path) -> None:
    """Shards and variants under all names that are written, and folders that say two things."""
    tiny, picture = commands.data / "deit-tiny", commands.data / "deit-tiny" / "picture.png"

    def top(*models):
        result = run(commands.deit, *models, picture, "--json", "-t", "1")
        found = json.loads(result.stdout)["pictures"][0]["results"][0]["top"] if result.returncode == 0 else None
        return found, result.stderr

    wanted, said = top(tiny)
    check("a plain file is read without a word", wanted is not None and said == "", said)
    for number, form in enumerate((PLAIN, *VARIANTS)):
        folder = copy(tiny, scratch / f"shards{number}")
        shard_all(folder, form)
        index = next(folder.glob("*.index*.json"))
        found, said = top(folder)
        note = f"note: {folder}: no plain weights are there, so the variant fp16 is read, {index.name}\n"
        check(f"{index.name}: the folder is read, and a variant named", found == wanted and said == (note if number else ""), said)
        found, said = top(index)
        check(f"{index.name}: the index by its name", found == wanted and said == "", said)
        out = scratch / f"out{number}"
        result = run(commands.inherit, folder, out, "--drop-cls")
        same = sorted(file.name for file in out.iterdir()) == sorted(file.name for file in folder.iterdir())
        check(f"{index.name}: converted under the same names", result.returncode == 0 and same, result.stderr)
        check(f"{index.name}: the report names the variant", ("variant fp16" in result.stdout) == (number > 0), result.stdout)
        if commands.map:
            result = run(commands.map, folder, out, "--picture", picture, "-o", scratch / "map.png")
            check(f"{index.name}: maps of both", result.returncode == 0, result.stderr)
    both = copy(tiny, scratch / "both")
    (both / "model.fp16.safetensors").write_bytes(b"no model")
    check("plain before variant", top(both) == (wanted, ""))
    (both / "model.safetensors").rename(both / "model.bf16.safetensors")
    none = scratch / "none" / "out"
    none.parent.mkdir()
    refuses("two variants", none, ["holds 2 models", "model.bf16.safetensors, model.fp16.safetensors"], commands.deit, both, picture)

    # What is left of an older model.
    for number, (index, pattern) in enumerate((PLAIN, *VARIANTS)):
        name = "model.fp16" if number else "model"
        folder = copy(tiny, scratch / f"stale{number}")
        kept = (folder / "model.safetensors").read_bytes()
        shard(folder / "model.safetensors", index.format("model"), pattern.format("model"))
        index = next(folder.glob("*.index*.json"))
        (folder / f"{name}.safetensors").write_bytes(kept)
        words = [f"{name}.safetensors beside {index.name}", "does not list it"]
        for command in ([commands.deit, folder, picture], [commands.inherit, folder, none]):
            refuses(f"a file beside {index.name}", none, words, *command)
        first = pattern.format("model").format(1)
        (folder / first).unlink()
        refuses("the index lists what is not there", none, [*words, first, "not there"], commands.deit, folder, picture)
        (folder / f"{name}.safetensors").unlink()
        refuses("an index without its shards", none, [index.name, f"lists '{first}'", "not there"], commands.deit, folder, picture)
        index.unlink()
        second = pattern.format("model").format(2)
        refuses("a shard without an index", none, [second, "no index that lists it"], commands.deit, folder, picture)
        (folder / f"{name}.safetensors").write_bytes(kept)
        found, said = top(folder)
        check("old shards beside a file are named", found == wanted and said.count("\n") == 1 and second in said, said)
        result = run(commands.inherit, folder, scratch / f"fresh{number}", "--drop-cls")
        check("and not copied", result.returncode == 0 and not (scratch / f"fresh{number}" / second).exists(), result.stderr)
        check("the report says so", f"left out       {second}" in result.stdout, result.stdout)
    folder = copy(tiny, scratch / "wrong")
    shard_all(folder, PLAIN)
    index = next(folder.glob("*.index.json"))
    said = json.loads(index.read_text())
    said["weight_map"]["norm.weight"], said["weight_map"]["old.weight"] = reversed(sorted(set(said["weight_map"].values())))
    said["weight_map"].pop("norm.weight")
    index.write_text(json.dumps(said))
    refuses("an index that lists other tensors", none, ["norm.weight", "not in the index"], commands.deit, folder, picture)

    pictures = scratch / "pictures"
    pictures.mkdir()
    if commands.sd35:
        draws(commands, commands.data / "sd35-tiny", pictures / "plain.png")
        pipe = copy(commands.data / "sd35-tiny", scratch / "pipe")
        shard_all(pipe, VARIANTS[0])
        result = draws(commands, pipe, pictures / "variant.png")
        notes = [line for line in result.stderr.splitlines() if "variant fp16" in line]
        same = result.returncode == 0 and (pictures / "plain.png").read_bytes() == (pictures / "variant.png").read_bytes()
        check("every component of SD3.5 as a variant in shards", same and len(notes) == 5, result.stderr)
    encoder = copy(commands.data / "sd35-tiny", scratch / "old") / "text_encoder"
    (encoder / "model-00001-of-00002.safetensors").write_bytes((encoder / "model.safetensors").read_bytes())
    result = run(commands.inherit, encoder.parent, scratch / "new")
    left = sorted(file.name for file in (scratch / "new" / "text_encoder").iterdir()) if result.returncode == 0 else []
    check("old shards of another component are left out", left == ["config.json", "model.safetensors"], result.stderr)
    check("and named", "left out       text_encoder/model-00001-of-00002.safetensors" in result.stdout, result.stdout)
    (encoder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    refuses("two models of another component", none, ["text_encoder", "model.safetensors beside"], commands.inherit, encoder.parent, none)
    if commands.dit:
        dit = scratch / "dit"
        shutil.copytree(commands.data / "dit-tiny" / "vae", dit / "vae")
        shutil.copy(commands.data / "dit-tiny" / "model.safetensors", dit)
        shard_all(dit, VARIANTS[1])
        result = run(commands.dit, "-m", dit, "--vae", dit / "vae", "--heads", 3, "-c", 1, "--sampler", "ddim", "--steps", 2, "-o", pictures / "dit.png")
        check("a DiT and its VAE as variants in shards", result.returncode == 0 and result.stderr.count("variant fp16") == 2, result.stderr)


def prefixes(commands: argparse.Namespace, scratch: pathlib.Path) -> None:
    """What torch.compile and DistributedDataParallel put before the names."""
    tiny, picture = commands.data / "deit-tiny", commands.data / "deit-tiny" / "picture.png"
    plain = run(commands.deit, tiny / "model.safetensors", picture, "-t", "1", "--json").stdout
    top = json.loads(plain)["pictures"][0]["results"][0]["top"]

    def rename(source: pathlib.Path, target: pathlib.Path, prefix: str) -> pathlib.Path:
        write_tensors(target, {prefix + name: tensor for name, tensor in read_tensors(source).items()})
        return target

    # A part of a block that is compiled by itself.
    tensors = read_tensors(tiny / "model.safetensors")
    for old, new in (("blocks.1.", "blocks.1._orig_mod."), (".attn.", ".attn._orig_mod.")):
        inner = scratch / "inner.safetensors"
        write_tensors(inner, {name.replace(old, new): tensor for name, tensor in tensors.items()})
        for command in ([commands.deit, inner, picture, "--heads", 3], [commands.inherit, inner, scratch / "never.safetensors"]):
            result = run(*command)
            check(f"{new} is refused by name", result.returncode == 2 and new in result.stderr and "torch.compile" in result.stderr, result.stderr)

    if commands.sd35:
        draws(commands, commands.data / "sd35-tiny", scratch / "plain.png")
    names = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3", "vae": "vae", "diffusion-model": "transformer"}
    for number, prefix in enumerate(("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.")):
        file = rename(tiny / "model.safetensors", scratch / "wrapped.safetensors", prefix)
        result = run(commands.deit, file, picture, "--heads", 3, "-t", "1", "--json")
        same = result.returncode == 0 and [
            [t["class"], t["probability"]] for t in json.loads(result.stdout)["pictures"][0]["results"][0]["top"]] == [
            [t["class"], t["probability"]] for t in top]
        check(f"{prefix}: a ViT", same, result.stderr)
        out = scratch / f"vit{number}.safetensors"
        result = run(commands.inherit, file, out, "--drop-cls", "--heads", "3")
        check(f"{prefix}: a ViT is converted, under plain names", result.returncode == 0 and "blocks.0.attn.w1" in read_tensors(out), result.stderr)
        if commands.dit:
            file = rename(commands.data / "dit-tiny" / "model.safetensors", scratch / "wrapped.safetensors", prefix)
            result = run(commands.dit, "-m", file, "--vae", commands.data / "dit-tiny" / "vae", "--heads", 3, "-c", 1,
                         "--sampler", "ddim", "--steps", 2, "-o", scratch / "dit.png")
            check(f"{prefix}: a DiT", result.returncode == 0, result.stderr)
        pipe = copy(commands.data / "sd35-tiny", scratch / f"pipe{number}")
        for folder in names.values():
            for file in list((pipe / folder).glob("*.safetensors")):
                rename(file, file, prefix)
        if commands.sd35:
            result = draws(commands, pipe, scratch / "wrapped.png")
            same = result.returncode == 0 and (scratch / "plain.png").read_bytes() == (scratch / "wrapped.png").read_bytes()
            check(f"{prefix}: every component of SD3.5", same, result.stderr)
        result = run(commands.inherit, pipe, scratch / f"t5{number}")
        check(f"{prefix}: SD3.5 is converted", result.returncode == 0, result.stderr)
        if result.returncode == 0:
            kept = read_tensors(next((scratch / f"t5{number}" / "transformer").glob("*.safetensors")))
            check(f"{prefix}: and keeps its names", all(name.startswith(prefix) for name in kept), ", ".join(list(kept)[:3]))
            if commands.sd35:
                result = draws(commands, scratch / f"t5{number}", scratch / "converted.png")
                check(f"{prefix}: and draws", result.returncode == 0, result.stderr)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"


def kinds(commands: argparse.Namespace, scratch: pathlib.Path) -> None:
    """Files that are something else, links, and files that are no files."""
    tiny, picture = commands.data / "deit-tiny", commands.data / "deit-tiny" / "picture.png"
    model = (tiny / "model.safetensors").read_bytes()
    none = scratch / "none" / "out"
    none.parent.mkdir()
    for name, content, words in (
        ("lfs", LFS, ["Git LFS pointer", "git lfs pull"]),
        ("html", b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>", ["HTML page", "fetch it again"]),
        ("HTML", b"<HTML><body>404</body></HTML>", ["HTML page"]),
        ("xml", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", ["XML"]),
        ("json", b'{"error": "Repository not found"}', ["weight_map"]),
        ("zip", b"PK\x03\x04\0\0\0\0" + bytes(60), ["ZIP", "torch.save", "save_file"]),
        ("gzip", gzip.compress(model[:100], mtime=0), ["gzip", "unpack"]),
        ("pickle", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", ["pickle", "save_file"]),
        ("gguf", b"GGUF\x03\0\0\0" + bytes(60), ["GGUF"]),
        ("empty", b"", ["empty", "fetch it again"]),
        ("short", model[:100], ["truncated", "fetch it again"]),
        ("cut", model[:-100], ["cut short", "fetch it again"]),
        ("zeros", bytes(4096), ["zeros", "fetch it again"])):
        file = scratch / f"{name}.safetensors"
        file.write_bytes(content)
        blob = scratch / f"{name}.bin"
        blob.write_bytes(content)
        for command in ([commands.deit, file, picture], [commands.deit, blob, picture], [commands.inherit, file, none],
                        [commands.sd35, "-m", file, "-p", "a", "-o", none]):
            if command[0]:
                refuses(f"{command[0].name}: {name}", none, words, *command)
    lfs = scratch / "lfs.safetensors"
    for what, command in (("config.json", None), ("spiece.model", None), ("a picture", [commands.deit, tiny, lfs])):
        if command is None:
            pipe = copy(commands.data / "sd35-tiny", scratch / f"pointer-{what}")
            next(pipe.rglob(f"transformer/{what}" if what == "config.json" else what)).write_bytes(LFS)
            command = [commands.sd35, "-m", pipe, "-p", "a", "-W", 64, "-H", 64, "--steps", 1, "-o", none]
        if command[0]:
            refuses(f"{what} that is a pointer", none, ["Git LFS pointer"] if what != "a picture" else ["LFS pointer"], *command)
    torch = scratch / "torch"
    torch.mkdir()
    (torch / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    (torch / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    refuses("a folder of PyTorch", none, ["no safetensors file, but pytorch_model.bin", "save_file"], commands.deit, torch, picture)

    # The cache of Hugging Face: links to blobs that are named by their hash.
    blob = scratch / "hub" / "blobs" / "4d7a214614ab"
    snapshot = scratch / "hub" / "snapshots" / "main"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob.write_bytes(model)
    shutil.copy(tiny / "config.json", snapshot)
    (snapshot / "model.safetensors").symlink_to("../../blobs/4d7a214614ab")
    (scratch / "link").symlink_to(snapshot / "model.safetensors")
    (scratch / "weights.dat").write_bytes(model)
    for path in (snapshot, snapshot / "model.safetensors", blob, scratch / "link", scratch / "weights.dat"):
        result = run(commands.deit, path, picture, "--top", "1", "--heads", "3")
        check(f"{path.relative_to(scratch)} is a model", result.returncode == 0, result.stderr)
    (scratch / "photo.safetensors").write_bytes(picture.read_bytes())
    result = run(commands.deit, tiny, scratch / "photo.safetensors", "--top", "1")
    check("a picture is one under any name", result.returncode == 0, result.stderr)
    blob.unlink()
    for path in (snapshot, snapshot / "model.safetensors"):
        refuses("a link to nothing", none, ["is a link to '../../blobs/4d7a214614ab'"], commands.deit, path, picture)

    # What is no file: nothing waits for it.
    fifo, device, bound = scratch / "fifo", pathlib.Path("/dev/null"), scratch / "socket"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(bound))
        for special, word in ((fifo, "pipe"), (device, "device"), (bound, "socket"), (snapshot, "folder")):
            folder = scratch / f"special-{word}"
            shutil.copytree(tiny, folder)
            (folder / "config.json").unlink()
            (folder / "config.json").symlink_to(special)
            pipe = scratch / f"pipe-{word}"
            shutil.copytree(commands.data / "sd35-tiny", pipe)
            (pipe / "tokenizer" / "vocab.json").unlink()
            (pipe / "tokenizer" / "vocab.json").symlink_to(special)
            sharded = scratch / f"index-{word}"
            sharded.mkdir()
            (sharded / "config.json").write_text("{}")
            (sharded / "model.safetensors.index.json").symlink_to(special)
            small = ["-W", 64, "-H", 64, "--steps", 1, "-o", none]
            cases = [("config.json", [commands.deit, folder, picture]), ("config.json", [commands.inherit, folder, none]),
                     ("vocab.json", [commands.sd35, "-m", pipe, "-p", "a", *small]),
                     ("labels", [commands.deit, tiny, picture, "--labels", special]),
                     ("a list of prompts", [commands.sd35, "-m", commands.data / "sd35-tiny", "--prompt-file", special, *small])]
            if word != "folder":
                cases += [("a model", [commands.inherit, special, none]), ("an index", [commands.inherit, sharded, none])]
            for what, command in cases:
                if command[0]:
                    refuses(f"{word} as {what}", none, [f"is a {word}, not a regular file"], *command)
    code = subprocess.run(["bash", "-c", f'"$0" "$1" "$2" --labels <(printf "%s\\n" a b c d e f)', commands.deit, tiny, picture],
                          capture_output=True, text=True, timeout=60)
    check("labels from <(command)", code.returncode == 0 and " a" in code.stdout + " ", code.stderr)

    # A small file is small.
    folder = copy(tiny, scratch / "sparse")
    with (folder / "config.json").open("r+b") as file:
        file.truncate(4 << 30)
    for command in ([commands.deit, folder, picture], [commands.inherit, "--dry-run", folder]):
        code, said, _, memory = measured(*command)
        check(f"{command[0].name}: 4 GB of config.json", code == 2 and "at most" in said and memory < (256 << 20), f"{memory} {said}")
    for content, words in (("[" * 100_000, ["nested"]), ('{"a":' * 100_000, ["nested"]), ('{"a": 1, "a": 2}', ["duplicate key 'a'"]), ("[]", ["object"])):
        (folder / "config.json").write_text(content)
        for command in ([commands.deit, folder, picture], [commands.inherit, "--dry-run", folder]):
            refuses(f"{command[0].name}: config.json of {content[:20]}", none, ["config.json", *words], *command)
    header = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    (scratch / "twice.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refuses("a header with a key twice", none, ["duplicate key 'a'"], commands.inherit, scratch / "twice.safetensors", none)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=pathlib.Path)
    for name in ("inherit", "deit"):
        parser.add_argument(name, type=pathlib.Path)
    for name in ("sd35", "dit", "map"):
        parser.add_argument(f"--{name}", type=pathlib.Path, help="tries this command as well")
    parser.add_argument("--sanitized", action="store_true", help="compares no memory: the allocator of a sanitizer keeps what is freed")
    commands = parser.parse_args()
    for part in (cost, indices, prefixes, kinds):
        with tempfile.TemporaryDirectory() as scratch:
            part(commands, pathlib.Path(scratch))
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
