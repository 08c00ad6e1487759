"""Part `liger`: Liger's paired losses, compiled and not, against ours of the same names and signatures.

Loss, other outputs and all gradients, with half the tokens prompt; all of them are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from liger_kernel import chunked_loss
from torch import Tensor

from benchmarks.contestants import OURS
from benchmarks.measure import Agreement, Case, Contestant, dtype_name, measure
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.timing import Call
from cpo_kernels.integrations import liger

LOSSES = {name: f"LigerFusedLinear{name}Loss" for name in ("CPO", "SimPO", "DPO")}
EAGER, COMPILED = "Liger, compiled=False", "Liger"
SAME = 0.02  # relative; rounding in bfloat16 is below


@dataclass(frozen=True)
class Sizes:
    """Holds the sizes of a batch of pairs."""

    pairs: int
    tokens: int  # of a sequence; half of them are prompt
    hidden: int
    vocab: int


CPU, GPU, QUICK = Sizes(4, 128, 512, 16384), Sizes(16, 512, 4096, 128256), Sizes(2, 8, 16, 97)


def run(setting: Setting) -> Iterator[Record]:
    """Measure every loss in both dtypes; a quick run leaves the compiled ones out."""
    for dtype in (torch.float32, torch.bfloat16):
        for name in LOSSES:
            yield from beside_ours(name, dtype, setting)


def beside_ours(name: str, dtype: torch.dtype, setting: Setting) -> list[Record]:
    """Measure one loss in one dtype."""
    sizes = setting.choose(QUICK, CPU, GPU)
    inputs = make_inputs(sizes, dtype, setting.device, reference=name == "DPO")
    agree = Agreement(SAME, lambda result: (result[0], *result[1]))

    def contestant(title: str, make: Callable[[], torch.nn.Module], absent: str = "") -> Contestant:
        def build() -> Call:
            module = make()

            def step() -> tuple[Tensor, tuple[Tensor, ...]]:
                loss = module(*inputs)[0]
                return loss.detach(), torch.autograd.grad(loss, inputs[:2])

            return step

        return Contestant(title, build, agree, needed=title != COMPILED, absent=absent)

    theirs = getattr(chunked_loss, LOSSES[name])
    contestants = [
        contestant(OURS, getattr(liger, LOSSES[name])),
        contestant(EAGER, lambda: theirs(compiled=False)),
        contestant(COMPILED, theirs, "not in a quick run" if setting.quick else ""),
    ]
    conditions = {"V": sizes.vocab, "H": sizes.hidden, "N": 2 * sizes.pairs * sizes.tokens, "K": 1}
    conditions |= {"dtype": dtype_name(dtype), "prompt": 0.5}
    rounds = setting.rounds(3, 5)
    case = Case(f"{name}, {dtype_name(dtype)}", contestants, conditions, {"of_ours": OURS}, rounds=rounds, peaks=True)
    return measure(case, setting.device)


def make_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, *, reference: bool) -> list[Tensor | None]:
    """Draw lin_weight, _input, target, bias and, for a reference, ref_input and ref_weight; half of it prompt."""
    torch.manual_seed(0)
    rows = (2 * sizes.pairs, sizes.tokens)
    target = torch.randint(sizes.vocab, rows)
    target[:, : sizes.tokens // 2] = -100

    def states() -> Tensor:
        return torch.randn(*rows, sizes.hidden).to(device, dtype)

    weight = (torch.randn(sizes.vocab, sizes.hidden) / sizes.hidden**0.5).to(device, dtype).requires_grad_()
    inputs = [weight, states().requires_grad_(), target.to(device), None]
    return [*inputs, states(), weight.detach()] if reference else inputs
