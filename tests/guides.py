#!/usr/bin/env python3
"""Runs what the guides show. A ```cpp block is a whole program, which is compiled and run; a ```sh block is run by a shell
in which the built commands are on the PATH and `tests` is that of the source tree, one folder for all blocks of a guide. A
```text block right behind one says what it prints on standard output: line by line, `...` for anything. A block whose first
line is a comment `not run here: WHY` is only counted."""

import argparse
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile

STRICT = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@dataclasses.dataclass
class Block:
    language: str
    text: str
    line: int
    prints: str | None = None

    def not_run(self) -> str:
        """Why it is not run, as its first line says; nothing if it is."""
        found = re.match(r"(?://|#) not run here: (.+)", self.text)
        return found[1] if found else ""


def blocks(text: str) -> list[Block]:
    found, behind = [], -1
    for match in FENCE.finditer(text):
        block = Block(match[1], match[2], text.count("\n", 0, match.start()) + 1)
        if block.language == "text" and found and text[behind : match.start()].strip() in ("", "prints"):
            found[-1].prints = block.text
        elif block.language not in ("cpp", "sh", "text"):
            sys.exit(f"FAIL line {block.line}: a block of '{block.language}', which this test cannot run")
        elif block.language != "text":
            found.append(block)
        behind = match.end()
    return found


def matches(expected: str, printed: str) -> bool:
    """`...` stands for any text, on a line or for any number of lines."""
    pattern = ".*".join(re.escape(part) for part in expected.strip().split("..."))
    return re.fullmatch(pattern, printed.strip(), re.S) is not None


class Runner:
    def __init__(self, source: pathlib.Path, compiler: str, path: list[pathlib.Path]):
        self.source, self.compiler = source, compiler
        self.environment = {**os.environ, "PATH": os.pathsep.join([*map(str, path), os.environ["PATH"]])}
        self.failures = 0

    def report(self, what: str, ok: bool, detail: str = "") -> None:
        print(f"{'ok  ' if ok else 'FAIL'} {what}" + ("" if ok else f"\n{detail[-6000:]}"), flush=True)
        self.failures += not ok

    def command(self, *command, folder: pathlib.Path) -> subprocess.CompletedProcess:
        return subprocess.run([str(c) for c in command], cwd=folder, env=self.environment, text=True, capture_output=True, timeout=300)

    def run(self, what: str, block: Block, folder: pathlib.Path) -> None:
        if block.language == "cpp":
            program, code = folder / "program", folder / "program.cpp"
            code.write_text(block.text)
            built = self.command(self.compiler, *STRICT, f"-I{self.source}/include", "-isystem/usr/include/eigen3", code,
                                 "-pthread", "-o", program, folder=folder)
            if built.returncode != 0:
                return self.report(what, False, built.stderr)
            result = self.command(program, folder=folder)
        else:
            result = self.command("bash", "-euo", "pipefail", "-c", block.text, folder=folder)
        printed = block.prints is None or matches(block.prints, result.stdout)
        self.report(what, result.returncode == 0 and printed, f"exit code {result.returncode}, printed\n{result.stdout}\n{result.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("guides", nargs="*", help="names without .md; default: all")
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--command", type=pathlib.Path, action="append", default=[], help="a built program that guides call")
    arguments = parser.parse_args()
    source = arguments.source.resolve()
    runner = Runner(source, arguments.compiler, [c.resolve().parent for c in arguments.command])
    skipped = []
    pages = sorted((source / "docs" / "guides").glob("*.md"))
    for page in pages:
        if arguments.guides and page.stem not in arguments.guides:
            continue
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / "tests").symlink_to(source / "tests")
            found = blocks(page.read_text())
            for block in found:
                what = f"{page.name}, line {block.line}: {block.language}"
                if why := block.not_run():
                    skipped.append(f"{what}: {why}")
                else:
                    runner.run(what, block, pathlib.Path(folder))
        if not any(not block.not_run() for block in found):
            runner.report(f"{page.name} has code that runs", False)
    if not pages:
        sys.exit("FAIL no guides")
    print(f"{runner.failures} failures; {len(skipped)} blocks not run" + "".join(f"\n     {s}" for s in skipped))
    return 1 if runner.failures else 0


if __name__ == "__main__":
    sys.exit(main())
