"""Liger's paired losses, compiled and not, against ours of the same names and signatures, taking turns.

Loss, other outputs and all gradients, with half the tokens prompt; all of them are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from liger_kernel import chunked_loss
from torch import Tensor

from benchmarks.contestants import OURS
from benchmarks.memory import meter_for
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.timing import Call, Effort, clock_for, round_robin
from cpo_kernels.integrations import liger

LOSSES = {name: f"LigerFusedLinear{name}Loss" for name in ("CPO", "SimPO", "DPO")}
EAGER, COMPILED = "Liger, compiled=False", "Liger"
SAME = 0.02  # relative; rounding in bfloat16 is below


@dataclass(frozen=True)
class Sizes:
    """Of a batch of pairs."""

    pairs: int
    tokens: int  # of a sequence; half of them are prompt
    hidden: int
    vocab: int


CPU, GPU, QUICK = Sizes(4, 128, 512, 16384), Sizes(16, 512, 4096, 128256), Sizes(2, 8, 16, 97)


class AnotherLossError(Exception):
    """Ours and Liger's differ, so their times would not compare."""


def run(setting: Setting) -> Iterator[Record]:
    """Every loss in both dtypes; a quick run leaves the compiled ones out."""
    for dtype in (torch.float32, torch.bfloat16):
        for name in LOSSES:
            yield from measure(name, dtype, setting)


def make_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, *, reference: bool) -> list[Tensor | None]:
    """lin_weight, _input, target, bias and, for a reference, ref_input and ref_weight; half the tokens are prompt."""
    torch.manual_seed(0)
    rows = (2 * sizes.pairs, sizes.tokens)
    target = torch.randint(sizes.vocab, rows)
    target[:, : sizes.tokens // 2] = -100

    def states() -> Tensor:
        return torch.randn(*rows, sizes.hidden).to(device, dtype)

    weight = (torch.randn(sizes.vocab, sizes.hidden) / sizes.hidden**0.5).to(device, dtype).requires_grad_()
    inputs = [weight, states().requires_grad_(), target.to(device), None]
    return [*inputs, states(), weight.detach()] if reference else inputs


def contestants(name: str, inputs: list[Tensor | None], *, compiled: bool) -> dict[str, Call]:
    """Calls that return the loss and the gradients of weight and input."""
    modules = {OURS: getattr(liger, LOSSES[name])(), EAGER: getattr(chunked_loss, LOSSES[name])(compiled=False)}
    if compiled:
        modules[COMPILED] = getattr(chunked_loss, LOSSES[name])()

    def call(module: torch.nn.Module) -> Call:
        def step() -> tuple[Tensor, ...]:
            loss = module(*inputs)[0]
            return (loss.detach(), *torch.autograd.grad(loss, inputs[:2]))

        return step

    return {title: call(module) for title, module in modules.items()}


def measure(name: str, dtype: torch.dtype, setting: Setting) -> Iterator[Record]:
    """Time and peak of one loss in one dtype.

    Raises:
        AnotherLossError: two of them compute something else.
    """
    sizes = QUICK if setting.quick else GPU if setting.on_gpu else CPU
    inputs = make_inputs(sizes, dtype, setting.device, reference=name == "DPO")
    calls = contestants(name, inputs, compiled=not setting.quick)
    meter, peaks, results = meter_for(setting.device), {}, {}
    for title, call in calls.items():
        call()  # compiles, and lets allocators and libraries take what they keep
        meter.start()
        results[title] = call()
        peaks[title] = meter.growth() - sum(grad.nbytes for grad in results[title][1:])
    for title, result in results.items():
        for got, wanted in zip(result, results[EAGER], strict=True):
            if not (got - wanted).norm() <= SAME * wanted.norm():  # not `>`: NaN is another loss too
                raise AnotherLossError(f"{title} and {EAGER} do not compute the same {name} loss")
    results.clear()
    effort = Effort(rounds=1 if setting.quick else 3, seconds=20.0)
    times = round_robin(calls, effort, reference=OURS, always=calls, clock=clock_for(setting.device))
    dtype_name = str(dtype).removeprefix("torch.")
    conditions = {"V": sizes.vocab, "H": sizes.hidden, "N": 2 * sizes.pairs * sizes.tokens, "K": 1, "dtype": dtype_name}
    for title, timing in times.items():
        values = {"seconds": timing.best, "median": timing.median, "of_ours": timing.best / times[OURS].best}
        values["peak_mib"] = peaks[title] / 2**20
        yield Record(f"{name}, {dtype_name}", title, values, conditions | {"prompt": 0.5})
