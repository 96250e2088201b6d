#!/usr/bin/env python3
"""hello_cuda, here on the emulator, prints the number that hello_cpu prints, to the precision of its bf16 activations."""

import re
import subprocess
import sys


def printed(program: str) -> float:
    run = subprocess.run([program], text=True, capture_output=True)
    found = re.search(r"out\[0\] = (\S+)", run.stdout)
    if run.returncode != 0 or not found:
        sys.exit(f"FAIL {program}: {run.stdout}{run.stderr}")
    return float(found[1])


host, device = map(printed, sys.argv[1:])
# 0.1 and out are rounded to bf16, by 2^-9 of themselves at most, as are the operands of the products between.
ok = abs(device - host) <= 4 * 2**-8 * abs(host)
print(f"{'ok  ' if ok else 'FAIL'} host {host}, device {device}")
sys.exit(0 if ok else 1)
