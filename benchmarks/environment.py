"""What a result depends on besides the code: device, versions, commit, load."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import cpo_kernels

PACKAGES = ("torch", "triton", "trl", "transformers", "liger-kernel", "cut-cross-entropy")
_ROOT = Path(__file__).parent.parent


def describe(argv: list[str]) -> dict[str, object]:
    """JSON-ready description of this run."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks.report", *argv]),
        "commit": commit(),
        "device": device(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "backends": {status.name: status.reason for status in cpo_kernels.backends.describe() if status.available},
    }


def device() -> str:
    """Model of the CPU, with the number of cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return f"{found.group(1) if found else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """Hash of HEAD, marked when the tree has changes; "unknown" outside a checkout."""
    git = ["git", "-C", str(_ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changes = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return head.stdout.strip() + (" with uncommitted changes" if changes.stdout else "")


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def log(message: str) -> None:
    """Progress, on stderr: stdout carries the table."""
    print(message, file=sys.stderr, flush=True)
