#!/usr/bin/env python3
"""The version is said in meson.build, in version.hpp (numbers and text) and at the top of the changelog: the same."""

import pathlib
import re
import sys


def main() -> None:
    source, version = pathlib.Path(sys.argv[1]), sys.argv[2]
    header = (source / "include" / "linattn" / "version.hpp").read_text()
    macros = dict(re.findall(r'^#define LINATTN_(VERSION\w*) "?([\d.]+)"?$', header, re.M))
    numbers = ".".join(macros.get(f"VERSION_{part}", "?") for part in ("MAJOR", "MINOR", "PATCH"))
    newest = re.search(r"^## ([^\s,]+)", (source / "CHANGELOG.md").read_text(), re.M)
    said = {
        "version.hpp, LINATTN_VERSION_*": numbers,
        "version.hpp, LINATTN_VERSION": macros.get("VERSION", "?"),
        "CHANGELOG.md, newest entry": newest[1] if newest else "?",
    }
    wrong = [f"FAIL {place} says {text}, meson.build {version}" for place, text in said.items() if text != version]
    print("\n".join(wrong) if wrong else f"ok   {version} everywhere")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
