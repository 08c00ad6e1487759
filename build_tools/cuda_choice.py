"""Which GPUs _cuda is compiled for, or why it is left out.

Compiling it takes minutes for the architectures of a release, so a build takes only those of the GPUs that it sees. It
asks the driver, not torch, which a build does not need.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

RELEASE_ARCHITECTURES = ("80", "90a", "100+PTX")
OLDEST = (8, 0)
SYNTAX = re.compile(r"(\d+[af]?)(\+PTX)?")


@dataclass(frozen=True)
class CudaChoice:
    """The architectures that _cuda is compiled for, none where it is left out, and one sentence about it."""

    architectures: tuple[str, ...]
    summary: str
    nvcc: str = ""

    def flags(self) -> list[str]:
        """-gencode for each architecture; `+PTX` adds PTX, which newer GPUs compile when the module is loaded."""
        flags = []
        for architecture in self.architectures:
            number, _, ptx = architecture.partition("+")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if ptx:
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME if that is set, else from the PATH or the usual place."""
    home = os.environ.get("CUDA_HOME")
    if home:
        candidate = Path(home) / "bin" / "nvcc"
        return str(candidate) if candidate.exists() else None
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def visible_capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the NVIDIA GPUs of this machine, each once, in ascending order."""
    return sorted(set(_from_nvidia_smi() or _from_driver()))


def _from_nvidia_smi() -> list[tuple[int, int]]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    # Drivers that do not know the query say so in prose.
    return [(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d+)$", result.stdout, re.MULTILINE)]


def _from_driver() -> list[tuple[int, int]]:
    """From libcuda, for containers that have the driver without its tools."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, number = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for device in range(count.value):
        capability = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
            if cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device) == 0:
                capability.append(number.value)
        if len(capability) == 2:
            found.append((capability[0], capability[1]))
    return found


def _known_to(nvcc: str) -> set[str]:
    """Architectures that this nvcc compiles for, by their numbers."""
    result = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    return set(re.findall(r"sm_(\d+)", result.stdout))


def _named(text: str) -> tuple[str, ...]:
    """The architectures of CPO_KERNELS_CUDA_ARCHS."""
    names = tuple(text.split())
    for name in names:
        if not SYNTAX.fullmatch(name):
            raise SystemExit(f"CPO_KERNELS_CUDA_ARCHS holds {name!r}; expected for example '80 90a 100+PTX'")
    return names


def _spelled(architectures: tuple[str, ...]) -> str:
    return ", ".join(f"sm_{name}" for name in architectures)


def _left_out(why: str, change: str) -> CudaChoice:
    return CudaChoice((), f"left out because {why} (to change it: {change})")


def choose() -> CudaChoice:
    """What the environment and the machine ask for; raises where CUDA is demanded and cannot be compiled."""
    demand = os.environ.get("CPO_KERNELS_CUDA", "")
    if demand not in ("", "0", "1"):
        raise SystemExit(
            f"CPO_KERNELS_CUDA is {demand!r}; expected 0 (never), 1 (required) or unset (for the GPUs that are visible)"
        )
    if demand == "0":
        return _left_out("CPO_KERNELS_CUDA=0", "unset it, or CPO_KERNELS_CUDA=1")
    nvcc, named = find_nvcc(), _named(os.environ.get("CPO_KERNELS_CUDA_ARCHS", ""))
    install = "install the CUDA toolkit, or set CUDA_HOME to it"
    if demand == "1" and nvcc is None:
        raise SystemExit(f"CPO_KERNELS_CUDA=1, but nvcc was not found ({install})")

    everything = f"CPO_KERNELS_CUDA=1 compiles it for {_spelled(named or RELEASE_ARCHITECTURES)}"
    visible = visible_capabilities()
    usable = [capability for capability in visible if capability >= OLDEST]
    if demand == "" and not visible:
        return _left_out("no NVIDIA GPU was visible", everything)
    seen = ", ".join(f"{major}.{minor}" for major, minor in visible)
    if demand == "" and not usable:
        return _left_out(f"GPUs before compute capability 8.0 are not supported, and this one has {seen}", everything)
    if nvcc is None:
        return _left_out("nvcc was not found", install)

    change = 'CPO_KERNELS_CUDA_ARCHS="80 90a" names others, CPO_KERNELS_CUDA=0 leaves it out'
    if named:
        return CudaChoice(named, f"compiled for {_spelled(named)}, as CPO_KERNELS_CUDA_ARCHS says", nvcc)
    if not usable:
        summary = f"compiled for {_spelled(RELEASE_ARCHITECTURES)}, those of a release (to change it: {change})"
        return CudaChoice(RELEASE_ARCHITECTURES, summary, nvcc)
    known = _known_to(nvcc)
    # wgmma and TMA, which the Hopper path is made of, are in sm_90a and not in sm_90.
    numbers = [str(10 * major + minor) for major, minor in usable]
    there = tuple("90a" if number == "90" else number for number in numbers if number in known)
    if there:
        summary = f"compiled for {_spelled(there)}, the GPUs that were visible (to change it: {change})"
        return CudaChoice(there, summary, nvcc)
    why = f"this nvcc does not know the visible GPU's compute capability {seen}"
    if demand == "1":
        raise SystemExit(f"CPO_KERNELS_CUDA=1, but {why}; install a newer CUDA toolkit, or set CPO_KERNELS_CUDA_ARCHS")
    return _left_out(why, f"install a newer CUDA toolkit, or {everything}")
