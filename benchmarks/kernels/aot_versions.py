"""Compiles Triton's kernels ahead of time with every version of Triton that is supported, and reports the newest.

`make check-triton`, or `python -m benchmarks.kernels.aot_versions`. Each version gets a folder in build/triton, in
which pip installs it without its dependencies, and which comes before what the environment holds. The report of the
newest goes into benchmarks/results and names the others; theirs stay in build/triton. What is given beyond `--versions`
goes to benchmarks.kernels.aot, which then writes into build/triton only. The exit status is 1 if any kernel has a
problem.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import log

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "build" / "triton"
# That of torch 2.11, that of the torch which development pins, and the newest, in this order.
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")


def install(version: str) -> Path:
    """Returns the folder of a version of Triton, installed unless it is there."""
    folder = FOLDER / version
    if not (folder / f"triton-{version}.dist-info").exists():
        log(f"installing triton {version} ...")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    return folder


def run_aot(version: str, out: Path | None, arguments: Sequence[str]) -> int:
    """Compiles with a version of Triton, report into `out` (None: the default) and return the exit status."""
    paths = (str(install(version)), str(ROOT), os.environ.get("PYTHONPATH"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.setdefault("TRITON_CACHE_DIR", str(FOLDER / "cache"))
    where = [] if out is None else ["--out", str(out)]
    log(f"triton {version} ...")
    command = [sys.executable, "-m", "benchmarks.kernels.aot", *where, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the versions one after another, the newest last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="default: %(default)s")
    options, arguments = parser.parse_known_args(argv)
    *others, newest = options.versions
    whole = not arguments and tuple(options.versions) == VERSIONS
    reports = {version: FOLDER / "reports" / version for version in options.versions}
    statuses = [run_aot(version, reports[version], arguments) for version in others]
    beside = [str(reports[version]) for version in others]
    statuses.append(run_aot(newest, None if whole else reports[newest], [*arguments, "--beside", *beside]))
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    sys.exit(main())
