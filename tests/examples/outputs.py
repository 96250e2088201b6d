#!/usr/bin/env python3
"""Every output of every command against what may lie where it is to be written. In each cell of this matrix the command
either writes all of the output or says in one sentence why not; its inputs stay byte for byte, and nothing is left."""

import argparse
import fcntl
import grp
import json
import os
import pathlib
import pwd
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import threading
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
    return subprocess.run([str(c) for c in command], capture_output=True, timeout=240, **options)


def refuses(what: str, words: list[str], command: list, scratch: pathlib.Path, **options) -> None:
    """Exit code 2, one sentence with these words, and everything as it was."""
    before = snapshot(scratch)
    result = run(command, **options)
    lines = result.stderr.decode().splitlines()
    same = snapshot(scratch) == before
    ok = result.returncode == 2 and len(lines) == 1 and all(word in lines[0] for word in words) and same
    changed = "" if same else f"\nchanged: {sorted({name for name, _ in set(snapshot(scratch).items()) ^ set(before.items())})[:5]}"
    check(what, ok, f"exit code {result.returncode}, stderr: {lines}{changed}\ncommand: {list(map(str, command))}")


def is_whole(content: bytes) -> bool:
    """A PNG, a safetensors file or a report from its first byte to its last."""
    if content.startswith(b"\x89PNG"):
        return content.endswith(b"IEND\xaeB`\x82")
    if content.startswith(b"{"):
        return isinstance(json.loads(content), dict)
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    return len(content) == 8 + size + max(t["data_offsets"][1] for n, t in header.items() if n != "__metadata__")


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
                                   "--steps", "2", "-o", out],
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


class Cell:
    """A place for one output, and who writes there."""

    def __init__(self, home: pathlib.Path, output: Output, user: str | None):
        self.output, self.user = output, user
        self.folder = home / "cell"
        self.folder.mkdir()
        # Where the folder is named and the pictures go into it, one of them is tried.
        self.place = self.folder / "pictures" if output.files else self.folder
        self.place.mkdir(exist_ok=True)
        self.path = self.place / (output.files[0] if output.files else "output")
        self.options = {"umask": 0o027}
        if user:
            self.options |= {"user": user, "group": "nogroup", "extra_groups": []}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.folder)

    def own(self) -> None:
        """Gives all that lies here to the user."""
        for path in [self.folder, *self.folder.rglob("*")] if self.user else []:
            os.chown(path, pwd.getpwnam(self.user).pw_uid, grp.getgrnam("nogroup").gr_gid, follow_symlinks=False)

    def command(self, path: pathlib.Path | None = None) -> list:
        path = path if path is not None else self.path
        return self.output.command(path.parent if self.output.files else path)

    def name(self, what: str) -> str:
        return f"{self.output.name}: {what}, as {self.user or 'root'}"

    def writes(self, what: str, path: pathlib.Path | None = None, mode: int | None = None, **options) -> None:
        """Exit code 0, all of the output, and nothing beside it."""
        self.own()
        path = path if path is not None else self.path
        before = set(os.listdir(self.place))
        result = run(self.command(path), **self.options, **options)
        whole = result.returncode == 0
        if whole and path.is_dir():
            whole = (path / "model_index.json").is_file() and not any(n.name.startswith(".") for n in path.rglob("*"))
        elif whole and path.is_file():
            whole = is_whole(path.read_bytes())
        if mode is not None:
            whole = whole and stat.S_IMODE(path.stat().st_mode) == mode
        extra = set(os.listdir(self.place)) - before - {path.name} - set(self.output.files)
        if path.is_symlink():
            extra -= {os.path.basename(os.readlink(path))}
        check(self.name(what), whole and not extra, f"exit code {result.returncode}, {result.stderr.decode()}\nleft: {extra}")

    def refuses(self, what: str, words: list[str], path: pathlib.Path | None = None) -> None:
        self.own()
        refuses(self.name(what), words, self.command(path), self.folder, **self.options)


def against_files(output: Output, home: pathlib.Path, user: str | None) -> None:
    """A file at another place than an input, whatever is there already."""
    root = os.geteuid() == 0
    with Cell(home, output, user) as cell:
        cell.writes("a new file", mode=0o640)
        os.chmod(cell.path, 0o604)
        cell.writes("a file that is there, whose mode stays", mode=0o604)
        os.chmod(cell.path, 0o444)
        if user:
            cell.refuses("a file that is read-only", ["Permission denied"])
        else:
            cell.writes("a file that is read-only, which root may write", mode=0o444)
    with Cell(home, output, user) as cell:
        aim = cell.place / "aim"
        aim.write_text("old")
        cell.path.symlink_to("aim")
        cell.writes("a link to a file")
        check(cell.name("the link stays, its file is new"), cell.path.is_symlink() and is_whole(aim.read_bytes()))
        aim.unlink()
        cell.writes("a link to nothing")
        check(cell.name("the link stays, its file is there"), cell.path.is_symlink() and is_whole(aim.read_bytes()))
        cell.path.unlink()
        cell.path.symlink_to(cell.path.name)
        cell.refuses("a link to itself", ["Too many levels"])
    with Cell(home, output, user) as cell:
        cell.path.mkdir()
        cell.refuses("a folder", ["is a folder"])
        cell.refuses("a folder that is missing", ["No such file"], cell.folder / "none" / "output")
        cell.path.rmdir()
        cell.path.write_text("a file")
        cell.refuses("below a file", ["Not a directory"], cell.path / "output")
    with Cell(home, output, user) as cell:
        cell.writes("a name of 255 bytes", cell.place / ("n" * 255))
        cell.refuses("a name of 256 bytes", ["File name too long"], cell.place / ("n" * 256))
    refuses(f"{output.name}: an empty name", ["expected a path"], output.command(""), home)
    with Cell(home, output, user) as cell:
        os.mkfifo(cell.path)
        received = []
        reader = threading.Thread(target=lambda: received.append(cell.path.read_bytes()), daemon=True)
        reader.start()
        cell.writes("a pipe")
        reader.join(20)
        check(cell.name("the pipe stays, its reader has all"), stat.S_ISFIFO(cell.path.stat().st_mode) and len(received) == 1
              and is_whole(received[0]))
        if output.name == "inherit --report" and not user:
            cell.refuses("a pipe that nobody reads", ["nobody"])
    with Cell(home, output, user) as cell:
        cell.own()
        redirected = cell.place / "redirected"
        redirected.write_bytes(b"before")
        cell.path.symlink_to("/proc/self/fd/1")
        with redirected.open("ab") as standard:
            result = subprocess.run([str(c) for c in cell.command()], stdout=standard, stderr=subprocess.PIPE, **cell.options)
        content = redirected.read_bytes()
        check(cell.name("standard output"), result.returncode == 0 and cell.path.is_symlink() and content.startswith(b"before")
              and is_whole(content[6:]), result.stderr.decode())
    if root:
        for link in (False, True):
            with Cell(home, output, user) as cell:
                for name, number in (("null", 3), ("full", 7)):
                    node = cell.place / name if link else cell.path
                    os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, number))
                    os.chmod(node, 0o666)
                    if link:
                        cell.path.symlink_to(name)
                    what = f"{'a link to ' if link else ''}a device, {name}"
                    if number == 3:
                        cell.writes(what)
                    else:
                        cell.refuses(what, ["No space left"])
                    check(cell.name(f"{what}, stays"), stat.S_ISCHR(node.stat().st_mode) and cell.path.is_symlink() == link)
                    for path in {node, cell.path}:
                        path.unlink()
                    for path in cell.place.iterdir():
                        path.unlink()
        with Cell(home, output, user) as cell:
            os.mknod(cell.path, 0o666 | stat.S_IFBLK, os.makedev(1, 0))
            cell.refuses("a block device", ["block device"])


def against_pictures(output: Output, home: pathlib.Path, user: str | None) -> None:
    """The demo, whose runs are long: all that it refuses, and one run."""
    with Cell(home, output, user) as cell:
        cell.path.mkdir()
        cell.refuses("a folder", ["is a folder"])
        cell.path.rmdir()
        cell.path.symlink_to(cell.path.name)
        cell.refuses("a link to itself", ["Too many levels"])
        cell.path.unlink()
        cell.path.write_text("old")
        cell.refuses("below a file", ["Not a directory"], cell.path / "softmax.png")
        if user:
            os.chmod(cell.path, 0o444)
            cell.refuses("a file that is read-only", ["Permission denied"])
        cell.path.unlink()
        if os.geteuid() == 0:
            os.mknod(cell.path, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
            os.chmod(cell.path, 0o666)
            cell.refuses("a device, full", ["No space left"])
            cell.path.unlink()
            os.mknod(cell.path, 0o666 | stat.S_IFBLK, os.makedev(1, 0))
            cell.refuses("a block device", ["block device"])
    refuses(f"{output.name}: an empty name", ["expected a path"], output.command(""), home)
    if user:
        return
    with Cell(home, output, user) as cell:
        softmax, t5, both = (cell.place / name for name in output.files)
        (cell.place / "aim").write_text("old")
        softmax.symlink_to("aim")
        os.mkfifo(t5)
        both.write_text("old")
        os.chmod(both, 0o604)
        received = []
        reader = threading.Thread(target=lambda: received.append(t5.read_bytes()), daemon=True)
        reader.start()
        cell.writes("a link to a file, a pipe and a file")
        reader.join(20)
        check(cell.name("each stays what it is and has all"), softmax.is_symlink() and is_whole(softmax.read_bytes())
              and stat.S_ISFIFO(t5.stat().st_mode) and len(received) == 1 and is_whole(received[0])
              and is_whole(both.read_bytes()) and stat.S_IMODE(both.stat().st_mode) == 0o604)


def against_folders(output: Output, home: pathlib.Path, user: str | None) -> None:
    """A folder that is written as a whole."""
    with Cell(home, output, user) as cell:
        cell.writes("a new folder", mode=0o750)
        os.chmod(cell.path, 0o700)
        cell.writes("a conversion that is there", mode=0o700)
        link = cell.place / "link"
        link.symlink_to("output")
        old = cell.path.stat().st_ino
        cell.writes("a link to one", link)
        check(cell.name("the link stays, its folder is new"), link.is_symlink() and cell.path.stat().st_ino != old)
        cell.writes("its name with a slash", pathlib.Path(f"{cell.path}/"))
        if user:
            os.chmod(cell.path / "vae" / "config.json", 0o444)
            cell.refuses("a conversion with a read-only file", ["vae/config.json", "Permission denied"])
        shutil.rmtree(cell.path)
        cell.writes("a link to nothing", link)
        check(cell.name("the link stays, its folder is there"), link.is_symlink() and cell.path.is_dir())
    with Cell(home, output, user) as cell:
        cell.path.write_text("mine")
        cell.refuses("a file", ["is a file"])
        cell.path.unlink()
        cell.path.symlink_to(cell.path.name)
        cell.refuses("a link to itself", ["Too many levels"])
        cell.path.unlink()
        os.mkfifo(cell.path)
        cell.refuses("a pipe", ["is no folder"])
        cell.path.unlink()
        if os.geteuid() == 0:
            for number in (3, 7):
                os.mknod(cell.path, 0o666 | stat.S_IFCHR, os.makedev(1, number))
                cell.refuses(f"a device, {number}", ["is no folder"])
                cell.path.unlink()
        cell.refuses("a folder that is missing", ["No such file"], cell.folder / "none" / "output")
        cell.refuses("a name of 256 bytes", ["File name too long"], cell.place / ("n" * 256))
        cell.writes("a name of 255 bytes", cell.place / ("n" * 255))
    refuses(f"{output.name}: an empty name", ["expected a path"], output.command(""), home)


def against_disks(output: Output, home: pathlib.Path, user: str | None) -> None:
    """A folder that is read-only, and a disk that is full."""
    with Cell(home, output, user) as cell:
        cell.own()
        os.chmod(cell.place, 0o555)
        if user:
            cell.refuses("a read-only folder", ["Permission denied"])
        elif not output.files:
            cell.writes("a read-only folder, which root may write")
        os.chmod(cell.place, 0o755)
    if os.geteuid() != 0:
        return
    with Cell(home, output, user) as cell:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=777", "tmpfs", cell.place], capture_output=True)
        if mounted.returncode != 0:
            print(f"SKIP {output.name}: a full disk: {mounted.stderr.decode().strip()}")
            return
        try:
            try:
                (cell.place / "filler").write_bytes(bytes(1 << 20))
            except OSError:
                pass
            cell.refuses("a full disk", ["disk has" if output.name in ("inherit file", "inherit folder") else "No space left"])
        finally:
            subprocess.run(["umount", cell.place], check=True)


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
    batch = [a.sd35, "-m", home / "sd35", "-p", "x", "-b", "3", "-o"]
    (home / "p_2.png").mkdir()
    refuses("the last picture of a batch", ["p_2.png: is a folder"], [*batch, home / "p_%d.png"], home)
    (home / "p_2.png").rmdir()
    refuses("a batch whose last name is too long", ["File name too long"], [*batch, home / ("n" * 254 + "%d")], home)
    refuses("a batch without a name", ["expected a path"], [*batch, ""], home)
    os.mkfifo(home / "pipe")
    refuses("a batch and a pipe", ["takes one picture, not 3"], [*batch, home / "pipe"], home)
    (home / "pipe").unlink()
    before = snapshot(home)
    result = run([a.demo, home / "sd35", home / "blobs", "--out", home / "made" / "here", "--size", "64", "--steps", "1"])
    check("a demo that fails takes its folder along", result.returncode == 2 and snapshot(home) == before, str(result.stderr))
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


def left_behind(output: Output, home: pathlib.Path) -> None:
    """What a killed run left is named and stays; what lives is not named."""
    with Cell(home, output, None) as cell:
        dead, old, alive = (cell.place / f".linattn-1-{name}" for name in ("0.tmp", "1.old", "2.tmp"))
        for path in (dead, old, alive):
            path.write_text("left")
        with alive.open() as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            before = snapshot(cell.place)
            result = run(cell.command())
        lines = [line for line in result.stderr.decode().splitlines() if ".linattn-" in line]
        check(cell.name("what killed runs left"), result.returncode == 0 and len(lines) == 2 and str(dead) in lines[0] + lines[1]
              and str(old) in lines[0] + lines[1] and before.items() <= snapshot(cell.place).items(), str(lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "inherit", "sd35", "demo", "dit", "attention_map"):
        parser.add_argument(name, type=lambda text: pathlib.Path(text).resolve())
    a = parser.parse_args()
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        home = pathlib.Path(folder).resolve() / "home"
        home.mkdir()
        for name in ("inherit", "sd35", "demo", "dit", "attention_map"):  # where another user finds them
            setattr(a, name, pathlib.Path(shutil.copy(getattr(a, name), folder)))
        for output in outputs_of(a, home):
            before = snapshot(home)
            against_inputs(output, home)
            for user in [None, "nobody"] if root else [None]:
                against = against_folders if output.replaces_folder else against_pictures if output.files else against_files
                against(output, home, user)
                against_disks(output, home, user)
            if not output.files:
                left_behind(output, home)
            check(f"{output.name}: its inputs", snapshot(home) == before)
        outputs_against_each_other(a, home)
        strangers(a, home)
    if not root:
        print("SKIP devices, full disks and another user: needs root")
    print(f"{cells} cells, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
