"""Peak memory of one call beyond its inputs and gradients, measured in a process of its own.

The kernel's high-water mark (VmHWM) is reset right before the call, so it is the peak of that call alone; Linux only.
`python -m benchmarks.memory CONTESTANT SHAPE [N]` prints one measurement as JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.contestants import FLOOR, OURS, contestant, floor
from benchmarks.floor import plan_of
from benchmarks.peers import BUILDERS, ours
from benchmarks.problem import draw
from benchmarks.shapes import BARS, GPU_PEAK_MEMORY, PEAK_MEMORY, QUICK, Shape

_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Peak:
    """One measurement. `planned` is what our plan says it will hold and `budget` what it may, None for a peer.

    The floor holds the logits of the same plan, and what the GEMM library takes for itself.
    """

    contestant: str
    shape: str
    num_tokens: int
    bytes: int
    planned: int | None
    budget: int | None = None


class PeakMeter:
    """Peak of resident bytes since `start`, over those at `start`."""

    def __init__(self) -> None:
        self.before = 0

    def start(self) -> None:
        """Reset the high-water mark."""
        forget_cycles()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory still held by the allocator would hide new allocations
        self.before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    def growth(self) -> int:
        """Bytes by which resident memory has grown at its peak."""
        return _status_bytes("VmHWM") - self.before


class DeviceMeter:
    """Peak of bytes that torch holds on the GPU since `start`, over those at `start`."""

    def __init__(self) -> None:
        self.before = 0

    def start(self) -> None:
        """Reset the high-water mark."""
        forget_cycles()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def growth(self) -> int:
        """Bytes by which the allocations have grown at their peak."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.before


def forget_cycles() -> None:
    """Free cycles of young objects; to look through those of all imported modules takes longer than many a call."""
    gc.collect(1)


def meter_for(device: torch.device) -> PeakMeter | DeviceMeter:
    """The meter that sees the memory of a device."""
    return DeviceMeter() if device.type == "cuda" else PeakMeter()


def measure(name: str, shape: Shape, num_tokens: int, device: torch.device | str = "cpu") -> Peak:
    """Measure one contestant on groups of the given kind, N = `num_tokens`, in a fresh process."""
    shape = shape.with_tokens(num_tokens)
    command = [sys.executable, "-m", "benchmarks.memory", name, shape.name, str(num_tokens), "--device", str(device)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def measure_here(name: str, shape: Shape, device: torch.device | str = "cpu") -> Peak:
    """Measure one contestant in this process, which should have done nothing else."""
    problem = draw(shape, device=device)
    builders = {**BUILDERS, OURS: partial(ours, OURS)}
    entry = floor(problem, None) if name == FLOOR else contestant(builders[name](), problem)
    entry.warm_up()
    plan = plan_of(problem, None) if name in (OURS, FLOOR) else None
    meter = meter_for(problem.hidden.device)
    meter.start()
    _, grads = entry.call()
    beyond = meter.growth() - sum(grad.nbytes for grad in grads)
    held = (plan.bytes, plan.budget_bytes) if plan else (None, None)
    return Peak(name, shape.name, shape.num_tokens, beyond, *held)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main(argv: list[str] | None = None) -> None:
    """Print one measurement as a line of JSON."""
    shapes = {shape.name: shape for shape in (*BARS, *PEAK_MEMORY, *GPU_PEAK_MEMORY, *QUICK)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=[FLOOR, OURS, *BUILDERS])
    parser.add_argument("shape", choices=shapes)
    parser.add_argument("num_tokens", type=int, nargs="?")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args(argv)
    shape = shapes[args.shape]
    peak = measure_here(args.contestant, shape.with_tokens(args.num_tokens or shape.num_tokens), args.device)
    print(json.dumps(asdict(peak)))


if __name__ == "__main__":
    main()
