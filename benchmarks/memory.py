"""Meters for the peak of memory that a call takes: of resident bytes on the host, of torch's allocations on a GPU.

The host's high-water mark (VmHWM) is reset right before the call, so that it is the peak of that call; Linux only.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch


class PeakMeter:
    """Measures the peak of resident bytes since `start`, over those at `start`."""

    def __init__(self) -> None:
        self.before = 0

    def start(self) -> None:
        """Reset the high-water mark."""
        forget_cycles()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory still held by the allocator would hide new allocations
        self.before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    def growth(self) -> int:
        """Return the bytes by which resident memory has grown at its peak."""
        return _status_bytes("VmHWM") - self.before


class DeviceMeter:
    """Measures the peak of bytes that torch holds on the GPU since `start`, over those at `start`."""

    def __init__(self) -> None:
        self.before = 0

    def start(self) -> None:
        """Reset the high-water mark."""
        forget_cycles()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def growth(self) -> int:
        """Return the bytes by which the allocations have grown at their peak."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.before


def forget_cycles() -> None:
    """Free cycles of young objects; to look through those of all imported modules takes longer than many a call."""
    gc.collect(1)


def meter_for(device: torch.device) -> PeakMeter | DeviceMeter:
    """Return the meter that sees the memory of a device."""
    return DeviceMeter() if device.type == "cuda" else PeakMeter()


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
