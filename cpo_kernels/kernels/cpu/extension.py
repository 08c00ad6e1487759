"""The compiled CPU extension: whether it can be used here, and with which instruction set."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

ISA_VARIABLE = "CPO_KERNELS_CPU_ISA"


OPENMP_FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


@cache
def _openmp() -> dict[str, int] | None:
    """Return addresses of functions of the OpenMP runtime that torch uses; None where torch has no such runtime.

    They are looked up as torch's own calls are: first where the whole process finds names, which is where a runtime
    named by LD_PRELOAD stands, then in torch's libraries and those that they need.
    """
    for library in (None, torch._C.__file__):
        names = ctypes.CDLL(library)
        if all(hasattr(names, function) for function in OPENMP_FUNCTIONS):
            addresses = [ctypes.cast(getattr(names, function), ctypes.c_void_p).value for function in OPENMP_FUNCTIONS]
            return dict(zip(OPENMP_FUNCTIONS, map(int, filter(None, addresses)), strict=True))
    return None


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """Return the extension, or None and the reason why it cannot be used."""
    try:
        module = import_module("..._cpu", __package__)
    except ImportError as error:
        return None, f"the compiled extension cannot be loaded ({error}); run `pip install .` where g++ is installed"
    openmp = _openmp()
    if openmp is not None:
        module.use_openmp(**openmp)
    return module, None


def available() -> bool:
    """Tell whether the compiled extension can be used here."""
    return _load()[0] is not None


def unavailable_reason() -> str | None:
    """Say why the compiled extension cannot be used; None if it can."""
    return _load()[1]


def extension() -> ModuleType:
    """Return the extension, or raise a ``RuntimeError`` that says why it cannot be used."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"backend 'cpu' is not available: {reason}")
    return module


@cache
def isa() -> str:
    """Return the instruction set in use: the best that this machine runs, or that of CPO_KERNELS_CPU_ISA.

    Raises:
        RuntimeError: the extension is not available.
        ValueError: the environment names an instruction set that is unknown, or that this machine does not run.
    """
    supported: list[str] = extension().supported_isas()
    forced = os.environ.get(ISA_VARIABLE)
    if not forced:
        return supported[-1]
    if forced not in supported:
        raise ValueError(f"{ISA_VARIABLE} is {forced!r}; this machine runs {', '.join(supported)}")
    return forced


def isa_or_default(name: str | None) -> str:
    """Return the given instruction set, or that of :func:`isa` for None."""
    return name or isa()


@dataclass(frozen=True)
class BuildInfo:
    """How the extension was compiled, and which of its instruction sets this machine runs, from slowest to fastest."""

    compiler: str
    openmp: bool  # whether torch has a runtime whose threads it can use
    compiled_isas: list[str]
    supported_isas: list[str]


def build_info() -> BuildInfo | None:
    """Return facts about how the extension was built; None where it is not available."""
    module = _load()[0]
    if module is None:
        return None
    return BuildInfo(module.compiler, _openmp() is not None, module.compiled_isas(), module.supported_isas())


def cuda_summary() -> str:
    """Say what this installation's build did with the CUDA extension, why, and how to change it."""
    module = _load()[0]
    return "not compiled, or the record of it cannot be read" if module is None else module.cuda_summary
