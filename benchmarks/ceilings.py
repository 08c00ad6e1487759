"""What the device does at best: products of each dtype, torch's and ours, and a copy; measured on the spot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.timing import Call, Effort, clock_for, round_robin
from cpo_kernels.kernels.cpu import gemm as cpu_gemm

CASE, COPY = "ceilings", "copy"
DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Ceilings:
    """The best product of each dtype, in TFLOP/s, and the copy, in GB/s read and written."""

    tflops: dict[str, float] = field(default_factory=dict)
    gbs: float = float("nan")

    def measure(self, setting: Setting) -> Iterator[Record]:
        """One record a contestant; what is found is kept."""
        size = 64 if setting.quick else (8192 if setting.on_gpu else 4096)
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            rates = {who: 2e-12 * size**3 / seconds for who, seconds in _products(setting, dtype, size).items()}
            self.tflops[name] = max(rates.values())
            for who, tflops in rates.items():
                yield Record(CASE, f"{who} {name}", {"tflops": tflops}, {"dtype": name, "size": size})
        count = 2**12 if setting.quick else 2 ** (29 if setting.on_gpu else 27)  # float32
        source = torch.ones(count, device=setting.device)
        target = torch.empty_like(source)
        seconds = _seconds(setting, {COPY: lambda: target.copy_(source)})[COPY]
        self.gbs = 2e-9 * source.nbytes / seconds
        yield Record(CASE, COPY, {"gbs": self.gbs}, {"bytes": source.nbytes})


def _products(setting: Setting, dtype: torch.dtype, size: int) -> dict[str, float]:
    """Seconds of a square product: torch's, and ours where this machine has one."""
    a, b = (torch.randn(size, size, device=setting.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    calls: dict[str, Call] = {"torch.mm": lambda: torch.mm(a, b, out=out)}
    if not setting.on_gpu and cpu_gemm.gemm_supported(dtype, dtype):
        calls["our product"] = lambda: cpu_gemm.gemm(a, b, out)
    return _seconds(setting, calls)


def _seconds(setting: Setting, calls: dict[str, Call]) -> dict[str, float]:
    """Fewest of three rounds, after a first call for what libraries and the allocator do once."""
    for call in calls.values():
        call()
    first = next(iter(calls))
    timings = round_robin(calls, Effort(rounds=3), reference=first, always=calls, clock=clock_for(setting.device))
    return {name: timing.best for name, timing in timings.items()}
