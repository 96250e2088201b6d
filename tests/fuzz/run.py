#!/usr/bin/env python3
"""Fuzzes for some time and says what came of it: run.py BUILD --seconds N [TARGET...]

What a target finds is kept in BUILD/fuzz/TARGET/crash-*; inputs that reach new code are kept in BUILD/fuzz/TARGET/corpus and
are where the next run goes on. --minimise adds a few of them that reach the same code to tests/fuzz/corpus instead.
"""
import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

SEEDS = pathlib.Path(__file__).resolve().parent / "corpus"
# An input that takes a minute of a busy machine, or 2 GB, is a finding as well. A single allocation may be what the largest picture takes.
LIMITS = ["-timeout=60", "-rss_limit_mb=2048", "-malloc_limit_mb=1024"]


def environment(work):
    """Where libraries.sh has built libraries, they are loaded in place of the system's."""
    libraries = work.parent / "libraries"
    return {"LD_LIBRARY_PATH": str(libraries)} if libraries.is_dir() else {}


def fuzz(program, seconds, seed, work):
    name = program.name.removeprefix("fuzz_")
    corpus = work / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = [str(SEEDS / name)] if (SEEDS / name).is_dir() else []
    before = set(work.glob(f"{name}/*-*"))
    with open(work / name / "log", "w") as log:
        code = subprocess.run([program, f"-max_total_time={seconds}", f"-seed={seed}", *LIMITS, "-print_final_stats=1", "-max_len=4096", "-len_control=0", f"-dict={SEEDS.parent / 'words.dict'}",
                               f"-artifact_prefix={work / name}/", corpus, *seeds],
                              env=os.environ | environment(work), stdout=log, stderr=subprocess.STDOUT).returncode
    text = (work / name / "log").read_text(errors="replace")
    executions = re.search(r"number_of_executed_units: (\d+)", text) or re.search(r"(?s:.*)^#(\d+)", text, re.M)
    rate = re.search(r"average_exec_per_sec: *(\d+)", text)
    coverage = re.findall(r"cov: (\d+)", text)
    found = sorted(set(work.glob(f"{name}/*-*")) - before)
    return {"name": name, "failed": code != 0, "executions": int(executions[1]) if executions else 0,
            "rate": int(rate[1]) if rate else 0, "coverage": coverage[-1] if coverage else "?", "found": found,
            "text": text}


def minimise(program, work):
    name = program.name.removeprefix("fuzz_")
    with tempfile.TemporaryDirectory(dir=work) as merged:
        if (SEEDS / name).is_dir():
            shutil.copytree(SEEDS / name, merged, dirs_exist_ok=True)
        # Of code that is reached, not of how often it is: a tenth of the inputs.
        subprocess.run([program, "-set_cover_merge=1", "-use_counters=0", *LIMITS, merged, work / name / "corpus"], check=True,
                       env=os.environ | environment(work), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shutil.copytree(merged, SEEDS / name, dirs_exist_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0, help="of libFuzzer's random numbers; 0: another one each time")
    parser.add_argument("--minimise", action="store_true")
    parser.add_argument("-j", "--jobs", type=int, default=len(os.sched_getaffinity(0)))
    a = parser.parse_intermixed_args()
    programs = {p.name.removeprefix("fuzz_"): p.resolve() for p in sorted((a.build / "tests/fuzz").glob("fuzz_*"))
                if p.is_file() and os.access(p, os.X_OK)}
    if unknown := [t for t in a.targets if t not in programs]:
        sys.exit(f"unknown target: {unknown[0]} (there are: {', '.join(programs)})")
    chosen = [programs[t] for t in a.targets or programs]
    work = (a.build / "fuzz").resolve()
    if a.minimise:
        for program in chosen:
            minimise(program, work)
        return
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
        for result in pool.map(lambda p: fuzz(p, a.seconds, a.seed, work), chosen):
            print("{name:20} {executions:>10} executions, {rate:>6}/s, {coverage:>6} edges: ".format(**result)
                  + ("FAILED" if result["failed"] else "nothing found"), flush=True)
            if result["failed"]:
                failed += 1
                print(result["text"][-4000:])
                loaded = "".join(f"{name}={value} " for name, value in environment(work).items())
                for path in result["found"]:
                    print(f"again with: {loaded}{a.build}/tests/fuzz/fuzz_{result['name']} {path}")
    print(f"{len(chosen) - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
