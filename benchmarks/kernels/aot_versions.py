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

from benchmarks.environment import ROOT, log

FOLDER = ROOT / "build" / "triton"
# That of torch 2.11, that of the torch which development pins, and the newest, in this order.
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")


def run_aot(version: str, arguments: Sequence[str]) -> int:
    """Compile with a version of Triton, installed unless it is there; returns the exit status."""
    log(f"triton {version} ...")
    folder = FOLDER / version
    if not (folder / f"triton-{version}.dist-info").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    paths = filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH")))
    environment = {"TRITON_CACHE_DIR": str(FOLDER / "cache")} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.kernels.aot", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run the versions one after another, the newest last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="default: %(default)s")
    options, arguments = parser.parse_known_args(argv)
    reports = {version: ["--out", str(FOLDER / "reports" / version)] for version in options.versions}
    *others, newest = options.versions
    if not arguments and tuple(options.versions) == VERSIONS:
        reports[newest] = []  # that of the repository
    statuses = [run_aot(version, [*reports[version], *arguments]) for version in others]
    beside = ["--beside", *(reports[version][1] for version in others)]
    return 1 if any([*statuses, run_aot(newest, [*reports[newest], *arguments, *beside])]) else 0


if __name__ == "__main__":
    sys.exit(main())
