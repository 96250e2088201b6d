#!/usr/bin/env python3
"""What a command cannot print is exit code 2 and one sentence, whatever it prints: results, JSON, --help, --version.
A descriptor that is closed at the start never becomes the number of a file that the command writes."""

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import tempfile

from commands import check, failures


def full():
    """Standard output on a full disk."""
    return os.open("/dev/full", os.O_WRONLY)


def unread():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def read_only():
    return os.open("/dev/null", os.O_RDONLY)


def small_file(folder: pathlib.Path):
    return os.open(folder / "limited", os.O_WRONLY | os.O_CREAT)


def refused(what: str, command: list, folder: pathlib.Path, descriptor, **options) -> None:
    """`descriptor`: of standard output; None: closed."""
    closed = descriptor is None
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command] if closed else command, cwd=folder, timeout=120, text=True,
        stdout=subprocess.DEVNULL if closed else descriptor, stderr=subprocess.PIPE, **options)
    if not closed:
        os.close(descriptor)
    sentences = [line for line in result.stderr.splitlines() if "standard output: cannot be written: " in line]
    check(what, result.returncode == 2 and len(sentences) == 1 and result.stderr.endswith(sentences[0] + "\n"),
          f"exit code {result.returncode}, stderr: {result.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "inherit", "sd35", "demo", "deit", "dit", "attention_map"):
        parser.add_argument(name, type=pathlib.Path)
    a = parser.parse_args()
    data = a.data.resolve()
    deit, picture = data / "deit-tiny", data / "deit-tiny" / "picture.jpg"
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        converted, sd35_t5 = folder / "t5", folder / "sd35-t5"
        for source, *target in ((deit, converted, "--drop-cls"), (data / "sd35-tiny", sd35_t5)):
            subprocess.run([a.inherit, source, *target], check=True, capture_output=True)
        dit = ["-m", data / "dit-tiny" / "model.safetensors", "--heads", "3", "--vae", data / "dit-tiny" / "vae",
               "--classes", "1", "--sampler", "ddim", "--steps", "2", "-t", "1", "-o", "dit.png"]
        sd35 = ["-m", data / "sd35-tiny", "-p", "x", "-W", "64", "-H", "64", "--steps", "1", "-t", "1", "-o", "sd35.png"]
        lines = {  # the last: whether to run it, which costs the demo 8 s
            "inherit": (a.inherit, [deit, "--drop-cls", "--dry-run"], True),
            "deit": (a.deit, [deit, picture], True),
            "dit": (a.dit, dit, True),
            "sd35": (a.sd35, sd35, True),
            "demo": (a.demo, [data / "sd35-tiny", sd35_t5, "--size", "64", "--steps", "1", "--repetitions", "1"], False),
            "attention-map": (a.attention_map, [deit, converted, "--picture", picture], True),
        }
        for name, (program, arguments, cheap) in lines.items():
            command = [str(part) for part in (program.resolve(), *arguments)]
            for more in ([], ["--json"]) if cheap else ():
                what = " ".join([f"linattn-{name}", *more])
                refused(f"{what} on a full disk", command + more, folder, full())
                refused(f"{what} into a pipe that nobody reads", command + more, folder, unread())
            refused(f"linattn-{name} with a closed standard output", command, folder, None)
            refused(f"linattn-{name} with one that is only for reading", command, folder, read_only())
            for flag in ("--help", "--version"):
                refused(f"linattn-{name} {flag} on a full disk", [command[0], flag], folder, full())
                refused(f"linattn-{name} {flag} with a closed standard output", [command[0], flag], folder, None)
                refused(f"linattn-{name} {flag} into a pipe that nobody reads", [command[0], flag], folder, unread())

        command = [str(part) for part in (a.inherit.resolve(), deit, "--drop-cls", "--dry-run", "--json")]
        refused("a report of which the disk takes a part", command, folder, small_file(folder),
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
        target = folder / "never"
        refused("a conversion whose report is lost", [*command[:3], str(target)], folder, full())
        check("is not begun", not target.exists())

        command = [str(part) for part in (a.sd35.resolve(), *sd35)]
        picture = folder / "sd35.png"
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        whole = picture.read_bytes()
        for closed in ("<&-", "2>&-", "<&- 2>&-"):
            picture.unlink()
            result = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command], cwd=folder, capture_output=True)
            check(f"with {closed} the picture is whole", result.returncode == 0 and picture.read_bytes() == whole)
        picture.unlink()
        result = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], cwd=folder)
        check("with no descriptor at all there is none", result.returncode == 2 and not picture.exists())
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
