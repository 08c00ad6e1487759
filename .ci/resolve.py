"""Resolves set-up for every supported Python as on a stranger's machine: with the registry's ordinary wheels alone.

For each Python that pyproject.toml names, uv resolves the extra "dev", which is what `make test` installs, under
constraints.txt, and installs nothing. It evaluates markers for the Python in question and reads the requirements of a
wheel without downloading it, where pip evaluates them for the Python that it runs on and downloads gigabytes. Neither
pip's nor uv's configuration is read but for the address of the registry: folders of wheels, extra indexes and
constraints of this machine hide conflicts that others meet.

Exit status: 0 if everything resolves, 1 if something does not or no registry is reached.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
UV = str(Path(sys.executable).with_name("uv"))
SHOWN = ("torch", "triton", "numpy", "transformers", "trl")


def supported_pythons() -> list[str]:
    """The versions in the classifiers of pyproject.toml."""
    return re.findall(r"Programming Language :: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())


def stranger() -> dict[str, str]:
    """The environment without what it says to uv or pip, but for the registry's address."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    index = os.environ.get("PIP_INDEX_URL") or subprocess.run(command, capture_output=True, text=True).stdout.strip()
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    return plain | ({"UV_DEFAULT_INDEX": index} if index else {})


def resolve(requirements: str, python: str, constraints: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What uv makes of requirements, one a line: the packages on standard output, or why there are none."""
    command = [UV, "pip", "compile", "-", "--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--only-binary", ":all:", "--no-config", "--no-python-downloads", "--no-header", "--no-annotate"]
    command += ["--quiet", *(["--constraint", str(constraints)] if constraints else [])]
    return subprocess.run(command, input=requirements, env=stranger(), cwd=ROOT, capture_output=True, text=True)


def main() -> int:
    """Resolve for all Pythons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--pythons", nargs="+", default=supported_pythons(), help="default: %(default)s")
    parser.add_argument("--offline-ok", action="store_true", help="exit status 0 where no registry is reached")
    options = parser.parse_args()
    if resolve("pip", options.pythons[0]).returncode:
        print("resolution: no registry is reached, nothing was checked")
        return 0 if options.offline_ok else 1
    failed = 0
    for python in options.pythons:
        done = resolve("cpo-kernels[dev] @ .", python, options.constraints)
        found = dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE))
        shown = ", ".join(f"{name} {found.get(name, 'absent')}" for name in SHOWN)
        print(f"Python {python}: " + (done.stderr.strip() if done.returncode else f"{len(found)} packages, {shown}"))
        failed += done.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
