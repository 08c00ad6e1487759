"""What the head of GPT-2 costs, plain PyTorch beside cpo-kernels: time, peak memory, the largest batch in 2 GiB.

Both compute the same loss, half contrast and half MLE, and its gradients of hidden states and weight. Peak memory is
the high-water mark of a process of its own above what its inputs take, so the gradients count for both.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_kernels import linear_cpo_loss

CANDIDATES, LENGTH, BETA = 4, 64, 0.1
TOKENS = CANDIDATES * LENGTH  # of a group
MIB = 2**20
LOGITS = 64 * MIB  # that cpo-kernels holds at once


@dataclass(frozen=True)
class Sizes:
    """Sizes of the head, groups of the batch that is timed, and where the search for the largest batch ends."""

    vocabulary: int = 50257
    hidden: int = 768
    groups: int = 4
    limit: int = 2048 * MIB
    most_groups: int = 64
    rounds: int = 3


QUICK = Sizes(vocabulary=4096, hidden=64, groups=2, limit=64 * MIB, most_groups=16, rounds=2)


@dataclass(frozen=True)
class HeadCost:
    """Median seconds and peak bytes of the batch that is timed; groups of the largest batch that fits, and its peak."""

    seconds: float
    peak: int
    largest: int
    largest_peak: int


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, ref_logps: Tensor) -> Tensor:
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None]).sum((-1, -2))  # (G, C)
    scores = BETA * (logps - ref_logps)
    contrast = F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.int64))
    return 0.5 * contrast - 0.5 * logps[:, 0].mean() / LENGTH


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, ref_logps: Tensor) -> Tensor:
    options = {"beta": BETA, "contrast_weight": 0.5, "mle_weight": 0.5, "max_logits_bytes": LOGITS}
    return linear_cpo_loss(hidden, weight, targets, ref_logps=ref_logps, **options).loss


LOSSES = {"plain PyTorch": plain, "cpo-kernels": ours}


@cache
def make_inputs(sizes: Sizes, groups: int) -> tuple[Tensor, ...]:
    """Hidden states (G, C, T, H), weight (V, H), targets (G, C, T) and reference log-likelihoods (G, C)."""
    generator = torch.Generator().manual_seed(0)
    shape = (groups, CANDIDATES, LENGTH)
    hidden = torch.randn(*shape, sizes.hidden, generator=generator)
    weight = torch.randn(sizes.vocabulary, sizes.hidden, generator=generator).mul_(sizes.hidden**-0.5)
    targets = torch.randint(sizes.vocabulary, shape, generator=generator)
    ref_logps = 10 * torch.randn(groups, CANDIDATES, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, ref_logps


def call(name: str, inputs: tuple[Tensor, ...]) -> float:
    """Compute loss and gradients; return the loss."""
    loss = LOSSES[name](*inputs)
    torch.autograd.grad(loss, inputs[:2])
    return loss.item()


def timed_call(name: str, sizes: Sizes) -> tuple[float, float]:
    """Return the seconds of a call and its loss."""
    inputs = make_inputs(sizes, sizes.groups)
    begun = time.perf_counter()
    loss = call(name, inputs)
    return time.perf_counter() - begun, loss


def peak_of_call(name: str, sizes: Sizes, groups: int) -> int:
    """Return the high-water mark of this process during its first call, above what is there with the inputs."""
    call(name, make_inputs(replace(sizes, vocabulary=64), 1))  # loads libraries and starts threads
    inputs = make_inputs(sizes, groups)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark restarts from here
    before = _resident_bytes("VmRSS")
    call(name, inputs)
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def new_process() -> ProcessPoolExecutor:
    """A process that has imported torch and nothing of this one's memory."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "cpo_kernels"])
    return ProcessPoolExecutor(1, mp_context=context)


def peak_elsewhere(name: str, sizes: Sizes, groups: int) -> int:
    with new_process() as process:
        return process.submit(peak_of_call, name, sizes, groups).result()


def alternating_seconds(sizes: Sizes) -> dict[str, float]:
    """Return the median of each implementation over rounds in which both run once, in a process of its own.

    Raises:
        RuntimeError: they compute different losses.
    """
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    losses: dict[str, float] = {}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(new_process()) for name in LOSSES}
        for number in range(1 + sizes.rounds):  # the first is a warm-up
            for name, process in processes.items():
                took, losses[name] = process.submit(timed_call, name, sizes).result()
                seconds[name] += [took] if number else []
    check_same(losses)
    return {name: statistics.median(own) for name, own in seconds.items()}


def check_same(losses: dict[str, float]) -> None:
    """Raise ``RuntimeError`` for losses that differ by more than 1e-4 of themselves."""
    first, second = losses.values()
    if not abs(first - second) <= 1e-4 * abs(first):
        raise RuntimeError(" and ".join(f"{name} computes the loss {loss}" for name, loss in losses.items()))


def largest_batch(peak: Callable[[int], int], limit: int, most: int) -> tuple[int, int]:
    """Search for the most groups, at most ``most``, whose peak is within ``limit``.

    Every batch is measured. The next one to try is where the line through two measured ones meets the limit, and the
    search ends with a batch that fits where one group more does not, or with ``most``.

    Returns:
        The groups, and their peak.

    Raises:
        RuntimeError: not even one group fits.
    """
    low, high, low_peak = 1, most + 1, peak(1)
    if low_peak > limit:
        raise RuntimeError(f"a batch of one group takes {low_peak} bytes, more than the limit of {limit}")
    slope = max(1, peak(2) - low_peak)
    while high - low > 1:
        guess = min(max(low + (limit - low_peak) // slope, low + 1), high - 1)
        found = peak(guess)
        if found <= limit:
            low, low_peak = guess, found
        else:
            high = guess
    return low, low_peak


def measure_head(sizes: Sizes) -> dict[str, HeadCost]:
    """Return the costs by implementation."""
    costs = {}
    for name, seconds in alternating_seconds(sizes).items():
        peak = cache(partial(peak_elsewhere, name, sizes))
        costs[name] = HeadCost(seconds, peak(sizes.groups), *largest_batch(peak, sizes.limit, sizes.most_groups))
    return costs


def draw_head(path: Path, costs: dict[str, HeadCost], sizes: Sizes) -> None:
    """Draw the costs as bars, one panel for each, into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batch = f"{sizes.groups * TOKENS:,} tokens"
    panels = [
        (f"Time of {batch}", "seconds", [(cost.seconds, f"{cost.seconds:.2f}") for cost in costs.values()]),
        (f"Peak memory of {batch}", "MiB", [(cost.peak / MIB, f"{cost.peak / MIB:,.0f}") for cost in costs.values()]),
        (
            f"Largest batch in {in_mib(sizes.limit)}",
            "tokens",
            [(cost.largest * TOKENS, largest_text(cost, sizes)) for cost in costs.values()],
        ),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 4), layout="constrained")
    figure.suptitle(f"Loss and gradients over a head of {sizes.vocabulary:,} words, {sizes.hidden} hidden units")
    for axis, (title, unit, own) in zip(axes, panels, strict=True):
        bars = axis.bar([*costs], [height for height, _ in own], color=["0.6", "tab:blue"], width=0.6)
        axis.bar_label(bars, [label for _, label in own], padding=2)
        axis.set(title=title, ylabel=unit)
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def in_mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"


def largest_text(cost: HeadCost, sizes: Sizes) -> str:
    """Tokens of the largest batch, as text that says whether the search could have gone on."""
    return ("at least " if cost.largest == sizes.most_groups else "") + f"{cost.largest * TOKENS:,}"
