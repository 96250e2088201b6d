#!/usr/bin/env python3
"""Commands that are stopped while they write: killed or told to end before any one of their calls to the system that
change files, or with that call failing. Inputs stay as they are; an output is the old one or the new one, whole; what a
kill leaves behind is named by the next run, and nothing else leaves anything behind."""

import argparse
import concurrent.futures
import hashlib
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile

POINTS_KILL = 100  # per command: all of the rarer calls, some of the many that are alike
POINTS_OTHER = 10
failures: list[str] = []


def check(what: str, ok: bool, detail: str = "") -> None:
    if not ok:
        failures.append(what)
        print(f"FAIL {what}\n{detail}", flush=True)


def tree(path: pathlib.Path) -> dict[str, str]:
    """Every file and folder below a path, by content."""
    if not os.path.lexists(path):
        return {}
    found = {"": "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()}
    for below in path.rglob("*") if path.is_dir() else ():
        found[str(below.relative_to(path))] = "folder" if below.is_dir() else hashlib.sha256(below.read_bytes()).hexdigest()
    return found


def spread(points: list[int], count: int) -> list[int]:
    """At most `count` of them, evenly, both ends included."""
    if len(points) <= count:
        return points
    return sorted({points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)})


class Command:
    """A command line in a folder of its own, with `prepare` having laid what was there before it. A next run gets `again`,
    too, as the output may be there by then."""

    def __init__(self, name, arguments, outputs, prepare, again=()):
        self.name, self.arguments, self.outputs, self.prepare, self.again = name, arguments, outputs, prepare, again

    def start(self, scratch: pathlib.Path, *stop, more=()) -> subprocess.CompletedProcess:
        return subprocess.run([*map(str, stop), *map(str, self.arguments), *more], text=True, capture_output=True, timeout=120, cwd=scratch)


def case(command: Command, stop_at: pathlib.Path, point: int, name: str, action: str, before, after, root) -> str:
    """One command, stopped once. Returns how it ended."""
    what = f"{command.name}: {action} at call {point} ({name})"
    with tempfile.TemporaryDirectory(dir=root) as folder:
        scratch = pathlib.Path(folder)
        command.prepare(scratch)
        result = command.start(scratch, stop_at, point, action)
        found, said = tree(scratch), f"exit {result.returncode}\n{result.stderr}"
        stray = set(found)
        for output in command.outputs:
            whole = {k: v for k, v in found.items() if k == output or k.startswith(output + "/")}
            stray -= set(whole)
            old, new = (({k: v for k, v in state.items() if k == output or k.startswith(output + "/")}) for state in (before, after))
            check(f"{what}: {output} is neither the old nor the new one", whole in (old, new), said + f"\n{sorted(whole)}")
        inputs = {k: v for k, v in before.items() if k in stray}
        check(f"{what}: inputs changed", inputs == {k: found[k] for k in inputs}, said)
        stray -= set(inputs)
        if action == "KILL":
            check(f"{what}: it did not end by the signal", result.returncode in (0, 128 + signal.SIGKILL), said)
            again = command.start(scratch, more=command.again)
            said = f"exit {again.returncode}\n{again.stderr}"
            check(f"{what}: the next run fails", again.returncode == 0, said)
            check(f"{what}: the next run gives something else", after.items() <= tree(scratch).items(), said)
            for left in {s.split("/")[0] for s in stray}:
                gone = not os.path.lexists(scratch / left)
                check(f"{what}: the next run says nothing of {left}", gone or left in again.stderr, said)
        else:
            check(f"{what}: it left {sorted(stray)}", not stray, said)
            if action.startswith("E"):  # an error, no signal
                sentence = any(line.startswith("linattn-") for line in result.stderr.splitlines())
                check(f"{what}: no sentence", result.returncode == 0 or (result.returncode == 2 and sentence), said)
            else:
                check(f"{what}: it did not end by the signal", result.returncode in (0, 128 + signal.Signals["SIG" + action]), said)
        return "done" if result.returncode == 0 else "stopped"


def every_point(command: Command, stop_at: pathlib.Path, root: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(dir=root) as folder:
        scratch = pathlib.Path(folder)
        command.prepare(scratch)
        before = tree(scratch)
        counted = command.start(scratch, stop_at, "count")
        after = tree(scratch)
        assert counted.returncode == 0, counted.stderr
        assert before != after, f"{command.name} writes nothing"
    calls = [line.split() for line in counted.stdout.splitlines() if len(line.split()) == 2 and line.split()[0].isdigit()]
    points = {int(number): name for number, name in calls}
    rare = [p for p, name in points.items() if name not in ("copy_file_range", "write", "pwrite")]
    common = sorted(set(points) - set(rare))
    rare = spread(rare, POINTS_KILL)
    killed = sorted({*rare, *spread(common, max(2, POINTS_KILL - len(rare)))})
    jobs = [(p, "KILL") for p in killed]
    jobs += [(p, s) for s in ("INT", "TERM", "HUP") for p in spread(killed, POINTS_OTHER)]
    # What cannot be taken away stays, whoever tries.
    failing = [p for p in killed if points[p] not in ("unlink", "unlinkat", "rmdir")]
    jobs += [(p, e) for e in ("ENOSPC", "EIO") for p in spread(failing, POINTS_OTHER)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        ends = list(pool.map(lambda job: case(command, stop_at, job[0], points[job[0]], job[1], before, after, root), jobs))
    check(f"{command.name}: nothing was stopped", ends.count("stopped") > len(jobs) // 2, f"{ends}")
    print(f"{command.name}: {len(points)} calls, {len(killed)} of them killed at, {len(jobs)} runs", flush=True)


def limited(command: Command, root: pathlib.Path) -> None:
    """No file may be longer than this: XFSZ, or a write that fails."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        scratch = pathlib.Path(folder)
        command.prepare(scratch)
        before = tree(scratch)
        result = subprocess.run([*map(str, command.arguments)], text=True, capture_output=True, timeout=120, cwd=scratch,
                                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)))
        check(f"{command.name}: a limit of 300 bytes a file", result.returncode == 2 and tree(scratch) == before,
              f"exit {result.returncode}\n{result.stderr}")


def commands(args) -> list[Command]:
    data = args.data.resolve()
    tiny, deit, dit = data / "sd35-tiny", data / "deit-tiny", data / "dit-tiny"

    def copied(*sources):
        def prepare(scratch):
            for name, source in sources:
                (shutil.copytree if source.is_dir() else shutil.copy)(source, scratch / name)
        return prepare

    picture = data / "sd35-tiny-ref" / "softmax-prompt0-seed0.png"
    sd35 = [args.sd35, "-m", tiny, "-p", "x", "-W", "64", "-H", "64", "--steps", "1", "-t", "1"]
    return [
        Command("linattn-inherit, a new folder", [args.inherit, "in", "out"], ["out"], copied(("in", tiny)), ["--force"]),
        Command("linattn-inherit --force, a folder", [args.inherit, "in", "out", "--force", "--report", "report.json"],
                ["out", "report.json"], copied(("in", tiny), ("out", tiny), ("report.json", deit / "config.json"))),
        Command("linattn-inherit --force, a file", [args.inherit, "in.safetensors", "out.safetensors", "--force", "--heads", "3"],
                ["out.safetensors"], copied(("in.safetensors", dit / "model.safetensors"), ("out.safetensors", deit / "model.safetensors"))),
        Command("linattn-sd35, two pictures", [*sd35, "-b", "2", "-o", "out.png"], ["out_000.png", "out_001.png"],
                copied(("out_000.png", picture))),
        Command("linattn-dit", [args.dit, "-m", dit / "model.safetensors", "--vae", dit / "vae", "--heads", "3", "-c", "1", "--steps", "2",
                                          "--sampler", "ddim", "-t", "1", "-o", "out.png"], ["out.png"], copied(("out.png", picture))),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=pathlib.Path)
    for name in ("stop_at", "inherit", "sd35", "dit"):
        parser.add_argument(name, type=lambda path: pathlib.Path(path).resolve())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        if subprocess.run([args.stop_at, "count", "true"], capture_output=True).returncode == 77:
            print("SKIP: this system lets no process trace another")
            return 77
        for command in commands(args):
            every_point(command, args.stop_at, root)
            limited(command, root)
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
