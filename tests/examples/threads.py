#!/usr/bin/env python3
"""More threads than the system starts: one sentence and exit code 2, before any work."""

import pathlib
import resource
import sys
import tempfile

from commands import check, failures, run

data, sd35, demo, deit, dit, attention_map = (pathlib.Path(p) for p in sys.argv[1:7])
tiny, model = data / "sd35-tiny", data / "deit-tiny" / "model.safetensors"


def few() -> None:
    """Address space for some hundred stacks of 8 MB."""
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))


with tempfile.TemporaryDirectory() as name:
    out = pathlib.Path(name)
    for command in (
        [sd35, "-m", tiny, "-p", "x", "-W", 64, "-H", 64, "--steps", 1, "-o", out / "p.png"],
        [demo, tiny, tiny, "--out", out / "demo"],
        [deit, model, data / "deit-tiny" / "picture.png", "--heads", 3],
        [dit, "-m", data / "dit-tiny" / "model.safetensors", "--vae", data / "dit-tiny" / "vae", "--heads", 3, "-c", 1, "-o", out / "p.png"],
        [attention_map, data / "sd35-tiny-ref" / "intermediates.safetensors", "-o", out / "p.png"],
    ):
        result = run(*command, "-t", 4096, preexec_fn=few)
        sentence = [line for line in result.stderr.splitlines() if "--threads: the system starts" in line and "of 4096 threads" in line]
        check(f"{command[0].name} -t 4096", result.returncode == 2 and len(sentence) == 1 and not list(out.glob("*.png")),
              f"exit code {result.returncode}, stderr: {result.stderr}")
sys.exit(1 if failures else 0)
