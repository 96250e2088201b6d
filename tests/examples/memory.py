#!/usr/bin/env python3
"""Peak memory does not grow with the number of pictures."""

import os
import pathlib
import subprocess
import sys
import tempfile

data, sd35, dit = (pathlib.Path(p) for p in sys.argv[1:4])
failures = []


def peak(*command) -> float:
    """MB of the largest resident set."""
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{command}: {error.decode()}")
    return usage.ru_maxrss / 1024


def check(what: str, few: float, many: float, most: float) -> None:
    ok = many - few <= most
    print(f"{'ok  ' if ok else 'FAIL'} {what}: {few:.1f} and {many:.1f} MB, at most {most} MB more are expected", flush=True)
    if not ok:
        failures.append(what)


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        out = pathlib.Path(name)

        def pictures(count: int, *more) -> float:
            used = peak(sd35, "-m", data / "sd35-tiny", "-W", 32, "-H", 32, "--steps", 1, "-t", 1, "-b", count, "-o",
                        out / "p.png", *more)
            written = list(out.iterdir())
            if len(written) != count:
                failures.append(f"{len(written)} of {count} pictures are written")
            for path in written:
                path.unlink()
            return used

        # A text feature of a picture is 0.2 MB here, the noise of all that the allocator does less than 1 MB.
        check("linattn-sd35, 1 and 120 pictures of a prompt", pictures(1, "-p", "a red fox"), pictures(120, "-p", "a red fox"), 2)
        start = ["-p", "a red fox", "-i", data / "deit-tiny" / "picture.png", "--strength", 1]
        check("linattn-sd35 -i, 1 and 60 pictures", pictures(1, *start), pictures(60, *start), 2)
        prompts = out.parent / (out.name + ".txt")
        prompts.write_text("a red fox\n" * 120)
        check("linattn-sd35, 120 lines that are the same",
              pictures(1, "-p", "a red fox"), peak(sd35, "-m", data / "sd35-tiny", "-W", 32, "-H", 32, "--steps", 1, "-t", 1,
                                                   "--prompt-file", prompts, "-o", out / "p.png"), 2)
        prompts.unlink()

        def samples(count: int) -> float:
            return peak(dit, "-m", data / "dit-tiny" / "model.safetensors", "--heads", 3, "--vae", data / "dit-tiny" / "vae",
                        "--classes", ",".join(["1"] * count), "--sampler", "ddpm", "--steps", 2, "-t", 1, "-o", out / "d.png")

        # A sample has its latent, fresh noise twice and its pixels: 4 (1 + 2) 4 16^2 + 3 128^2 bytes, 0.06 MB.
        check("linattn-dit, 8 and 160 samples", samples(8), samples(160), 24)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
