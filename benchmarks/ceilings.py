"""Measures what the machine does at best, before anything else of a run: multiply-adds on registers, and a copy.

Every contestant is told as a share of the multiply-adds, which nothing that computes the loss can pass. A part in which
something did is void, because the machine was not the same all the time.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.measure import dtype_name
from benchmarks.meters import clock_for
from benchmarks.records import Record
from benchmarks.setting import Setting
from cpo_kernels.kernels.cpu import extension as cpu_extension
from cpo_kernels.kernels.cpu import gemm as cpu_gemm

COPY = "copy"
SECONDS, COPIES = 0.3, 5


def measure_ceilings(setting: Setting) -> dict[str, float]:
    """Return TFLOP/s by the name of a dtype, where this machine has a kernel for them, and GB/s of a copy."""
    found, seconds = dict[str, float](), 0.01 if setting.quick else SECONDS
    for dtype in (torch.float32, torch.bfloat16):
        if not setting.on_gpu and cpu_extension.available() and (rate := cpu_gemm.peak_flops(dtype, seconds)):
            found[dtype_name(dtype)] = 1e-12 * rate
    source = torch.ones(setting.choose(2**20, 2**29, 2**31), dtype=torch.uint8, device=setting.device)
    out, clock = torch.ones_like(source), clock_for(setting.device)
    times = [clock(lambda: out.copy_(source))[0] for _ in range(COPIES)]
    return found | {COPY: 2e-9 * source.nbytes / statistics.median(times)}


def too_fast(records: list[Record]) -> str:
    """Say what has passed the peak, if anything has."""
    beyond = max(records, key=lambda record: record.values.get("of_peak", 0.0), default=None)
    if beyond is None or beyond.values.get("of_peak", 0.0) <= 1:
        return ""
    return f"{beyond.contestant}, {beyond.case}, at {beyond.values['of_peak']:.0%} of the measured peak"
