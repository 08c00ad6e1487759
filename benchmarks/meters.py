"""Reads off what a call takes: seconds by the clock of its device, and the peak of bytes beyond those before it."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
Clock = Callable[[Call], tuple[float, Any]]  # runs a call; its seconds and its result

FLUSH_BYTES = 2**30  # many times any L2, and longer to read than a launch takes


def host_clock(call: Call) -> tuple[float, Any]:
    """Run a call between two looks at the host's clock."""
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


class DeviceClock:
    """Runs a call between two events on a GPU's stream, with nothing of its operands left in the L2 cache.

    The cache is emptied by reading, which leaves no dirty lines to be written back during the call; while that goes
    on, the host is already launching the call, so that the time of a short kernel is not that of its launch.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.zeros(FLUSH_BYTES // 4, device=device)
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> tuple[float, Any]:
        """Run one call."""
        torch.cuda.synchronize()
        self.buffer.sum()
        self.begin.record()
        result = call()
        self.end.record()
        torch.cuda.synchronize()
        return self.begin.elapsed_time(self.end) / 1e3, result


def clock_for(device: torch.device) -> Clock:
    """Return the clock that sees the work of a device."""
    return DeviceClock(device) if device.type == "cuda" else host_clock


class PeakMeter:
    """Measures the peak of memory since `start` over what was taken then: resident on the host, allocated on a GPU.

    The host's high-water mark (VmHWM) is reset right before a call, so that it is the peak of that call; Linux only.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.before = device.type == "cuda", 0

    def start(self) -> None:
        """Reset the high-water mark."""
        gc.collect(1)  # to look through the objects of all imported modules takes longer than many a call
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator holds would hide new allocations
            self.before = _resident_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")

    def growth(self) -> int:
        """Return the bytes by which memory has grown at its peak."""
        if self.on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.before
        return _resident_bytes("VmHWM") - self.before


def _resident_bytes(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024
