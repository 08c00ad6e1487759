"""The report of ``python -m cpo_kernels info``: installed packages and usable backends."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

import cpo_kernels
from cpo_kernels.kernels import registry
from cpo_kernels.kernels.cpu import extension as cpu_extension


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device"
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return f"{torch.cuda.get_device_name()} (compute capability {capability})"


def _extension_lines() -> list[tuple[str, str]]:
    build = cpu_extension.build_info()
    if build is None:
        return [("extension", cpu_extension.unavailable_reason() or "")]
    openmp = "threads of torch's OpenMP runtime" if build.openmp else "one thread: torch has no OpenMP runtime here"
    forced = f" (forced by {cpu_extension.ISA_VARIABLE})" if os.environ.get(cpu_extension.ISA_VARIABLE) else ""
    return [
        ("extension", f"compiled by {build.compiler}, {openmp}"),
        ("instruction set", cpu_extension.isa() + forced),
        ("  compiled in", ", ".join(build.compiled_isas)),
        ("  this machine", ", ".join(build.supported_isas)),
    ]


def report() -> str:
    """Return the text of ``python -m cpo_kernels info``."""
    lines = [
        ("cpo-kernels", cpo_kernels.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", torch.__version__),
        ("triton", _installed("triton")),
        ("transformers", _installed("transformers")),
        *_extension_lines(),
        ("cuda extension", cpu_extension.cuda_summary()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
        ("cuda", _cuda()),
        ("", ""),
        ("backend", "state"),
        *((s.name, ("available: " if s.available else "not available: ") + s.reason) for s in registry.describe()),
    ]
    return "\n".join(f"{name:<16} {value}".rstrip() for name, value in lines)
