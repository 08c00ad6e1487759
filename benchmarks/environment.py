"""Says what a result depends on besides the code: device, versions, commit, load."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import cpo_kernels

PACKAGES = ("torch", "triton", "trl", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels")
SOURCE_SUFFIXES = (".py", ".json", ".cpp", ".h", ".cu", ".cuh")
NOTHING_TO_DO = 77  # exit status of what lacks something here; the last line of its output says what
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def describe(argv: list[str], kind: str = "cpu") -> dict[str, Any]:
    """Describe, ready for JSON, a run of `python -m benchmarks.` + argv on a device of this kind."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks." + argv[0], *argv[1:]]),
        "commit": commit(),
        "sources": sources(),
        "device": device(),
        "clock_ghz": clock_ghz(),
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


def clock_ghz() -> float | None:
    """Return the fastest clock that a core of the CPU reports now; None where it does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return round(max(map(float, found)) / 1e3, 2) if found else None


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
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "CUDA of torch": torch.version.cuda or torch.version.hip,
    }


def slug(described: Mapping[str, Any]) -> str:
    """Return a file name for the device of a description: its GPU, or its processor."""
    name = described["gpu"]["name"] if "gpu" in described else described["device"].split(",")[0]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def sources() -> str:
    """Return a digest of the code that runs, which names it where there is no checkout to name a commit."""
    digest = hashlib.sha256()
    files = (f for folder in ("csrc", "cpo_kernels", "benchmarks") for f in (ROOT / folder).rglob("*"))
    for path in sorted(f for f in files if f.suffix in SOURCE_SUFFIXES):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    """Return HEAD, marked when the tree has changes besides results; without git CPO_KERNELS_COMMIT, or "unknown"."""
    git = ("git", "-C", str(ROOT))
    head = said(*git, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return os.environ.get("CPO_KERNELS_COMMIT", "unknown")
    elsewhere = ("--", ".", ":(exclude)benchmarks/results")  # which a run itself writes
    changes = said(*git, "status", "--porcelain", "--untracked-files=no", *elsewhere)
    return head + (" with uncommitted changes" if changes else "")


def said(*command: str) -> str | None:
    """Return the output of a command; None where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    """Return the installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor(described: Mapping[str, Any]) -> str:
    """Name what ran: a GPU, or a CPU with its cores and its clock."""
    if "gpu" in described:
        return str(described["gpu"]["name"])
    clock = f"{ghz} GHz" if (ghz := described.get("clock_ghz")) else "clock not measured yet"
    return f"CPU: {described['device']}, {clock}"


def machine(described: Mapping[str, Any]) -> str:
    """Name what ran and what it does at best, as far as that was measured."""
    ceilings = described.get("ceilings", {})
    rates = [f"{rate:.3g} TFLOP/s in {dtype}" for dtype, rate in ceilings.items() if dtype != "copy"]
    peak = f"peak {' and '.join(rates)}" if rates else "peak not measured yet"
    copy = [f"copy {ceilings['copy']:.3g} GB/s"] if "copy" in ceilings else []
    return ", ".join([processor(described), peak, *copy])


def in_a_line(described: Mapping[str, Any]) -> str:
    """Return a description as a sentence, its command first."""
    versions = [f"{name} {number}" for name, number in described["versions"].items() if number]
    load = f"{described['threads']} threads, load average {described['load_average']:.1f} at the start"
    extension, code = described["backends"].get("cpu", ""), f"commit {described['commit']}"
    python = ", ".join([f"Python {described['python']}", *versions])
    command = re.sub(r" --out \S+", "", described["command"])
    return "; ".join([f"`{command}`", f"{machine(described)}, {load}", extension, code, python])


def log(message: str) -> None:
    """Tell progress on stderr: stdout carries the table."""
    print(message, file=sys.stderr, flush=True)
