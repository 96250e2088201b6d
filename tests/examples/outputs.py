#!/usr/bin/env python3
"""Every output of every command against what may lie where it is to be written. In each cell of this matrix the command
either writes all of the output or says in one sentence why not; its inputs stay byte for byte, and nothing is left."""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Callable

failures = []
cells = 0


def check(what: str, ok: bool, detail: str = "") -> None:
    global cells
    cells += 1
    if not ok:
        print(f"FAIL {what}\n{detail}", flush=True)
        failures.append(what)


def snapshot(folder: pathlib.Path) -> dict:
    """What lies in a folder. A file that was written anew differs, even if its content is the same."""
    entries = {}
    for root, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(root, name)
            info = os.lstat(path)
            is_folder = name in folders and not os.path.islink(path)
            entries[path] = (info.st_ino, info.st_mode) + (() if is_folder else (info.st_size, info.st_mtime_ns))
    return entries


@dataclass
class Output:
    """One output of one command, in a folder of its own that holds the inputs."""

    name: str
    command: Callable[[pathlib.Path], list]  # for an output at this path
    inputs: list[pathlib.Path]  # files and folders that it reads
    files: list[str] = field(default_factory=list)  # if the path is a folder: what is written into it
    replaces_folder: bool = False


def run(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], capture_output=True, timeout=60, **options)


def refuses(what: str, words: list[str], command: list, scratch: pathlib.Path, **options) -> None:
    """Exit code 2, one sentence with these words, and everything as it was."""
    before = snapshot(scratch)
    result = run(command, **options)
    lines = result.stderr.decode().splitlines()
    same = snapshot(scratch) == before
    ok = result.returncode == 2 and len(lines) == 1 and all(word in lines[0] for word in words) and same
    changed = "" if same else f"\nchanged: {sorted({name for name, _ in set(snapshot(scratch).items()) ^ set(before.items())})[:5]}"
    check(what, ok, f"exit code {result.returncode}, stderr: {lines}{changed}\ncommand: {list(map(str, command))}")


def outputs_of(a: argparse.Namespace, home: pathlib.Path) -> list[Output]:
    """All outputs, with inputs of their own below `home`: linked as in the cache of a model hub, and plain."""
    deit, dit, sd35 = home / "deit", home / "dit", home / "sd35"
    shutil.copytree(a.data / "sd35-tiny", sd35)
    shutil.copytree(a.data / "dit-tiny", dit)
    deit.mkdir()
    blobs = home / "blobs"
    blobs.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(a.data / "deit-tiny" / name, blobs / name)
        (deit / name).symlink_to(pathlib.Path("..") / "blobs" / name)
    weights = sd35 / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(blobs / "shard")
    weights.symlink_to(blobs / "shard")
    picture, prompts, init, t5 = home / "cat.png", home / "prompts.txt", home / "init.safetensors", home / "t5.safetensors"
    shutil.copy(a.data / "deit-tiny" / "picture.png", picture)
    prompts.write_text("a red fox\n")
    shutil.copy(a.data / "sd35-tiny-ref" / "t5.safetensors", init)
    file = home / "single.safetensors"
    shutil.copy(a.data / "deit-tiny" / "model.safetensors", file)
    convert = [a.inherit, "--drop-cls", "--heads", "3"]
    subprocess.run([*convert, file, t5], check=True, capture_output=True)
    draw = ["-W", "64", "-H", "48", "--steps", "1", "-t", "1"]
    return [
        Output("inherit file", lambda out: [*convert, file, out, "--force"], [file]),
        Output("inherit folder", lambda out: [a.inherit, sd35, out, "--init", init, "--force"],
               [sd35, init, sd35 / "transformer" / "config.json", blobs / "shard"], replaces_folder=True),
        Output("inherit --report", lambda out: [a.inherit, "--dry-run", "--init", init, sd35, "--report", out],
               [sd35, init, blobs / "shard"]),
        Output("sd35", lambda out: [a.sd35, "-m", sd35, "--prompt-file", prompts, "-i", picture, *draw, "-o", out],
               [sd35, prompts, picture, sd35 / "vae" / "config.json", blobs / "shard"]),
        Output("demo", lambda out: [a.demo, sd35, sd35, "--size", "64", "--steps", "1", "--repetitions", "1", "--out", out],
               [sd35, blobs / "shard"], files=["softmax.png", "t5.png", "side_by_side.png"]),
        Output("dit", lambda out: [a.dit, "-m", dit / "model.safetensors", "--heads", "3", "--vae", dit / "vae", "-c", "1",
                                   "--steps", "1", "-o", out],
               [dit / "model.safetensors", dit / "vae", dit / "vae" / "config.json"]),
        Output("attention-map", lambda out: [a.attention_map, deit, t5, "--picture", picture, "-t", "1", "-o", out],
               [deit, t5, picture, blobs / "model.safetensors", blobs / "config.json"]),
    ]


def against_inputs(output: Output, home: pathlib.Path) -> None:
    """The output at an input, above it, in it, and at a name of it that does not look like one."""
    for source in output.inputs:
        name = f"{output.name}: {source.relative_to(home)}"
        if output.files:  # they go into the folder that is named
            if source.is_dir():
                refuses(f"{name} itself", ["lies in the input folder"], output.command(source), home)
                refuses(f"{name}, its child", ["lies in the input folder"], output.command(source / "new"), home)
            target = home / "pictures"
            for link in ("symlink_to", "hardlink_to"):
                if source.is_dir():
                    continue
                target.mkdir()
                getattr(target / output.files[1], link)(source)
                refuses(f"{name}, {link} of a picture", ["is the input itself"], output.command(target), home)
                shutil.rmtree(target)
            continue
        refuses(f"{name} itself", ["is the input itself"], output.command(source), home)
        dotted = source.parent / "none" / ".." / ".." / source.parent.name / source.name
        (source.parent / "none").mkdir()
        refuses(f"{name} by another path", ["is the input itself"], output.command(dotted), home)
        (source.parent / "none").rmdir()
        refuses(f"{name}, its parent", ["the input"], output.command(source.parent), home)
        child = source / "new"
        refuses(f"{name}, its child", ["lies in the input folder"] if source.is_dir() else [], output.command(child), home)
        if source.is_dir():
            grandchild = source / "vae" / "new"
            refuses(f"{name}, below it", ["lies in the input folder"] if grandchild.parent.is_dir() else [],
                    output.command(grandchild), home)
        link = home / "link"
        link.symlink_to(source)
        refuses(f"{name} by a link", ["is the input itself"], output.command(link), home)
        link.unlink()
        if source.is_file():
            link.hardlink_to(source.resolve())
            refuses(f"{name} by a hard link", ["is the input itself"], output.command(link), home)
            link.unlink()
        dangling = (source if source.is_dir() else source.parent) / "created"
        if source.is_dir():
            link.symlink_to(dangling)
            refuses(f"{name}, a link to a new child", ["lies in the input folder"], output.command(link), home)
            link.unlink()


def outputs_against_each_other(a: argparse.Namespace, home: pathlib.Path) -> None:
    file, out = home / "single.safetensors", home / "out"
    convert = [a.inherit, "--drop-cls", "--heads", "3", file]
    refuses("report and output in one", ["is the other output itself"], [*convert, out, "--report", out], home)
    out.mkdir()
    refuses("report in the output", ["lies in the other output folder"],
            [a.inherit, home / "sd35", out, "--report", out / "report.json", "--force"], home)
    out.rmdir()
    (home / "p_0.png").symlink_to("p_1.png")
    refuses("two pictures in one", ["is the other output itself"],
            [a.sd35, "-m", home / "sd35", "-p", "x", "-b", "2", "-o", home / "p_%d.png"], home)
    (home / "p_0.png").unlink()
    refuses("the output lies beside the init file that it would delete", ["holds the input"],
            [a.inherit, home / "sd35", home / "blobs", "--force", "--init", home / "blobs" / "model.safetensors"], home)


def strangers(a: argparse.Namespace, home: pathlib.Path) -> None:
    """What no conversion writes keeps a folder from being replaced."""
    command, out = [a.inherit, home / "sd35", home / "out", "--force"], home / "out"
    subprocess.run([*command[:-1]], check=True, capture_output=True)
    for name in ("notes.txt", ".hidden", "vae/notes.txt", "transformer/mine.safetensors", "folder/"):
        (out / name).mkdir() if name.endswith("/") else (out / name).write_text("mine")
        refuses(f"a folder that holds {name}", [f"holds {name.strip('/')}, which this conversion does not write"], command, home)
        (out / name).rmdir() if name.endswith("/") else (out / name).unlink()
    result = run(command)
    check("without them it is replaced", result.returncode == 0 and (out / "model_index.json").is_file(), str(result.stderr))
    shutil.rmtree(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "inherit", "sd35", "demo", "dit", "attention_map"):
        parser.add_argument(name, type=lambda text: pathlib.Path(text).resolve())
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder).resolve() / "home"
        home.mkdir()
        for output in outputs_of(a, home):
            against_inputs(output, home)
        outputs_against_each_other(a, home)
        strangers(a, home)
    print(f"{cells} cells, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
