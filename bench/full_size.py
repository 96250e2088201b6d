#!/usr/bin/env python3
"""SD3.5 Medium at its full size on this machine: writes random weights of the true shapes (17 GB, 16 bit), converts
the transformer (`paper`), draws 512 x 512 with softmax and with the conversion, and says what each stage took in
time and memory. Anonymous memory is what a machine must have; file pages are the mapped weights, which the system
drops when it needs the room."""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

GB = 1e9
STAGES = ("load", "text", "sampling", "decode")
WEIGHTS = ("sd3.5_medium", "clip_l", "clip_g", "t5xxl_fp16")


def memory(pid: int) -> dict[str, int] | None:
    """Bytes that a process has resident now, by kind, and the most it ever had."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    if "VmHWM" not in fields:
        return None
    kinds = {"anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    return {kind: int(fields[name].split()[0]) * 1024 for kind, name in kinds.items()}


def measured(command: list, log) -> dict:
    """Runs a command; its output, time, and the peaks of its memory, in all and by the stages it names."""
    start = time.monotonic()
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stage = ""
    errors = []

    def follow() -> None:
        nonlocal stage
        for line in process.stderr:
            errors.append(line)
            log(line.rstrip())
            if line.strip() in STAGES:
                stage = line.strip()

    output = []
    readers = [threading.Thread(target=follow), threading.Thread(target=lambda: output.append(process.stdout.read()))]
    for reader in readers:
        reader.start()
    peaks: dict[str, dict[str, int]] = {}
    while process.poll() is None:
        if (now := memory(process.pid)) is not None:
            now["together"] = now["anonymous"] + now["file"]
            for name in {"all", stage} - {""}:
                peak = peaks.setdefault(name, dict.fromkeys(now, 0))
                for kind, size in now.items():
                    peak[kind] = max(peak[kind], size)
        time.sleep(0.02)
    for reader in readers:
        reader.join()
    if process.returncode != 0:
        sys.exit(f"{command[0]}: exit code {process.returncode}\n{''.join(errors[-5:])}")
    return {"seconds": time.monotonic() - start, "memory": peaks, "output": output[0]}


def table(result: dict) -> str:
    """As markdown."""
    lines = ["| stage | " + " | ".join(f"{name}, s | anonymous, GB | file pages, GB" for name in result["runs"]) + " |",
             "|---" * (1 + 3 * len(result["runs"])) + "|"]
    for stage in (*STAGES, "all"):
        cells = []
        for run in result["runs"].values():
            peak = run["memory"].get(stage, {"anonymous": 0, "file": 0})
            cells.append(f"{run['seconds']['total' if stage == 'all' else stage]:.2f} | "
                         f"{peak['anonymous'] / GB:.2f} | {peak['file'] / GB:.2f}")
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    facts = [f"{result['threads']} threads, {result['width']} x {result['height']}, {result['steps']} steps"]
    for name, run in result["runs"].items():
        facts.append(f"{name}: {run['linear_attention_modules']} of {run['attention_modules']} attentions linear, "
                     f"{run['seconds']['a_step']:.2f} s a step, peak of all memory {run['memory']['all']['peak'] / GB:.2f} GB")
    facts.append(f"writing {result['bytes'] / GB:.2f} GB of weights {result['write']['seconds']:.0f} s, "
                 f"converting {result['convert']['seconds']:.0f} s with a peak of "
                 f"{result['convert']['memory']['all']['anonymous'] / GB:.2f} GB anonymous")
    return "\n".join(lines + [""] + facts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench full-size", description=__doc__)
    parser.add_argument("--build", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help="where the weights go (default: the build folder)")
    parser.add_argument("--keep", action="store_true", help="leave the weights there; they are used if they are there")
    parser.add_argument("--divide-depth", type=int, default=1, metavar="N", help="a small model, to try this out")
    parser.add_argument("--size", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    root = pathlib.Path(__file__).resolve().parent.parent
    folder = a.folder or pathlib.Path(tempfile.gettempdir() if os.environ.get("TMPDIR") else a.build) / "full-size"
    folder.mkdir(parents=True, exist_ok=True)

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    needed = 25 * GB / a.divide_depth
    weights = [folder / f"{name}.safetensors" for name in WEIGHTS]
    medium, converted, pictures = weights[0], folder / "sd3.5_medium_t5.safetensors", [folder / "softmax.png", folder / "paper.png"]
    complete = all(file.exists() for file in weights)
    if not complete and (free := shutil.disk_usage(folder).free) < needed:
        log(f"skipped: {folder} has {free / GB:.0f} GB of room, but the weights and their conversion need {needed / GB:.0f}")
        return 0
    try:
        result: dict = {}
        log("writing weights")
        result["write"] = {"seconds": 0.0, "memory": {}}
        if not complete:
            result["write"] = measured([a.build / "bench" / "full_size_checkpoint", "--all", folder,
                                        "--divide-depth", a.divide_depth], log)
        log("converting")
        converted.unlink(missing_ok=True)
        result["convert"] = measured([a.build / "examples" / "inherit" / "linattn-inherit", medium, converted,
                                      "--replace", "paper"], log)
        result["bytes"] = sum(f.stat().st_size for f in weights)
        result["runs"] = {}
        for name, model in (("softmax", medium), ("paper", converted)):
            log(name)
            run = measured([a.build / "examples" / "sd35" / "linattn-sd35", "-m", model,
                            "--clip_l", folder / "clip_l.safetensors", "--clip_g", folder / "clip_g.safetensors",
                            "--t5xxl", folder / "t5xxl_fp16.safetensors",
                            "--tokenizers", root / "tests" / "data" / "sd35-tiny", "-p", "a lighthouse above a stormy sea",
                            "-W", a.size, "-H", a.size, "--steps", a.steps, "-t", a.threads,
                            "-o", folder / f"{name}.png", "--json"], log)
            result["runs"][name] = {**json.loads(run["output"]), "memory": run["memory"]}
            for key in ("threads", "width", "height", "steps"):
                result[key] = result["runs"][name][key]
        for part in ("write", "convert"):
            result[part].pop("output", None)
        print(json.dumps(result, indent=2) if a.json else table(result))
    finally:
        if not a.keep:
            for file in (*weights, converted, *pictures):
                file.unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
