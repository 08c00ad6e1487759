"""Says what a result depends on besides the code: device, versions, commit, load."""

from __future__ import annotations

import hashlib
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

PACKAGES = ("torch", "triton", "trl", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels")
SOURCE_SUFFIXES = (".py", ".json", ".cpp", ".h", ".cu", ".cuh")
NOTHING_TO_DO = 77  # exit status of what lacks something here; the last line of its output says what
_ROOT = Path(__file__).parent.parent


def describe(argv: list[str], kind: str = "cpu") -> dict[str, object]:
    """Describe, ready for JSON, a run of `python -m benchmarks.` + argv on a device of this kind."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks." + argv[0], *argv[1:]]),
        "commit": commit(),
        "sources": sources(),
        "device": device(),
        **({"gpu": gpu()} if kind.startswith("cuda") else {}),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "backends": {status.name: status.reason for status in cpo_kernels.backends.describe() if status.available},
    }


def device() -> str:
    """Return the model of the CPU, with the number of cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return f"{found.group(1) if found else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def gpu() -> dict[str, object]:
    """Describe the current GPU, its driver and the CUDA version of torch."""
    if not torch.cuda.is_available():
        return {"name": "none"}
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "L2 MiB": round(properties.L2_cache_size / 2**20, 1),
        "driver": driver(),
        "CUDA of torch": torch.version.cuda or torch.version.hip,
    }


def slug(described: dict[str, object]) -> str:
    """Return a file name for the device of a description: its GPU, or its processor."""
    found = described.get("gpu")
    name = str(found["name"]) if isinstance(found, dict) else str(described["device"]).split(",")[0]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def driver() -> str:
    """Return the version of the NVIDIA driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def sources() -> str:
    """Return a digest of the code that runs, which names it where there is no checkout to name a commit."""
    digest = hashlib.sha256()
    files = (f for folder in ("csrc", "cpo_kernels", "benchmarks") for f in (_ROOT / folder).rglob("*"))
    for path in sorted(f for f in files if f.suffix in SOURCE_SUFFIXES):
        digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def as_markdown(described: dict[str, object]) -> str:
    """List what :func:`describe` found."""
    lines = []
    for name, value in described.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"- {name}: {text}")
    return "\n".join(lines)


def commit() -> str:
    """Return HEAD, marked when the tree has changes besides results; without git CPO_KERNELS_COMMIT, or "unknown"."""
    git = ["git", "-C", str(_ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git
        return os.environ.get("CPO_KERNELS_COMMIT", "unknown")
    if head.returncode:
        return os.environ.get("CPO_KERNELS_COMMIT", "unknown")
    elsewhere = ["--", ".", ":(exclude)benchmarks/results"]  # which a run itself writes
    status = [*git, "status", "--porcelain", "--untracked-files=no", *elsewhere]
    changes = subprocess.run(status, capture_output=True, text=True)
    return head.stdout.strip() + (" with uncommitted changes" if changes.stdout else "")


def version(package: str) -> str | None:
    """Return the installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def log(message: str) -> None:
    """Tell progress on stderr: stdout carries the table."""
    print(message, file=sys.stderr, flush=True)
