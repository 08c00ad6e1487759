"""Block sizes by (kernel, architecture, vocabulary, dtype), from a committed table; nothing is tuned at run time.

``tuning.json`` holds ``source`` (where its figures come from) and ``entries``, searched in order: the first that
matches on the architecture of the device, else the first that matches on ``"default"``. An entry has ``kernel``,
``arch``, ``dtype`` (or ``"any"``), optionally ``vocab_at_most`` and ``hidden_at_most``, and ``config``: the constexpr
sizes, ``num_warps`` and ``num_stages`` of a launch. Entries whose config sets ``TMA`` are sized for loads by
descriptors, and passed over where a launch's matrices rule descriptors out.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

import torch

from cpo_kernels.kernels.device import architecture

DEFAULT = "default"
# Options of every launch: the kernels count on multiply-adds, which are no longer the default from triton 3.10 on.
LAUNCH = {"enable_fp_fusion": True}
# Of an NVIDIA multiprocessor, and the most that a thread can address.
REGISTERS, THREAD_REGISTERS = 65536, 255


@cache
def entries() -> tuple[dict[str, Any], ...]:
    """Return the entries of the table, in the order of its file."""
    table = json.loads(resources.files(__package__).joinpath("tuning.json").read_text())
    return tuple(table["entries"])


def _matches(
    entry: dict[str, Any], kernel: str, arch: str, vocab: int, dtype: str, hidden_size: int, descriptors: bool
) -> bool:
    return (
        entry["kernel"] == kernel
        and entry["arch"] == arch
        and entry["dtype"] in (dtype, "any")
        and vocab <= entry.get("vocab_at_most", vocab)
        and hidden_size <= entry.get("hidden_at_most", hidden_size)
        and (descriptors or not entry["config"].get("TMA", 0))
    )


@cache
def _lookup(kernel: str, arch: str, vocab: int, dtype: str, hidden_size: int, descriptors: bool) -> dict[str, int]:
    for name in (arch, DEFAULT):
        for entry in entries():
            if _matches(entry, kernel, name, vocab, dtype, hidden_size, descriptors):
                found: dict[str, int] = entry["config"]
                return found
    raise LookupError(
        f"tuning.json has no entry for kernel {kernel!r}, {arch}, V = {vocab}, H = {hidden_size}, {dtype}"
    )


def config(
    kernel: str,
    device: torch.device,
    vocab: int,
    dtype: torch.dtype,
    hidden_size: int = 0,
    *,
    descriptors: bool = True,
) -> dict[str, int]:
    """Return the constexpr sizes, num_warps and num_stages of a launch of ``kernel``, in a new dictionary.

    ``descriptors``: whether the launch's matrices can have them; without, no entry that sets ``TMA`` is taken.

    Raises:
        LookupError: the table has no such kernel, or no entry that covers these sizes.
    """
    name = str(dtype).removeprefix("torch.")
    return dict(_lookup(kernel, architecture(device), vocab, name, hidden_size, descriptors))


def sharing_registers(device: torch.device, num_warps: int, programs: int = 1) -> dict[str, Any]:
    """Return launch options with which ``programs`` programs share all registers of a multiprocessor.

    Without them NVIDIA's assembler may give each program fewer registers, and save values to memory.
    """
    if not architecture(device).startswith("sm_"):
        return LAUNCH
    return LAUNCH | {"maxnreg": min(REGISTERS // (32 * num_warps * programs), THREAD_REGISTERS)}
