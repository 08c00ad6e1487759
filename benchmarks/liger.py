"""Part `liger`: Liger's paired losses, compiled and not, against ours of the same names and signatures.

Loss, other outputs and all gradients, with half the tokens prompt; all of them are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from liger_kernel import chunked_loss
from torch import Tensor

from benchmarks.contestants import OURS
from benchmarks.measure import Agreement, Case, Contestant, dtype_name, measure, not_here
from benchmarks.meters import Call
from benchmarks.problem import IGNORE
from benchmarks.records import Record
from benchmarks.setting import Setting
from cpo_kernels.integrations import liger

LOSSES = {name: f"LigerFusedLinear{name}Loss" for name in ("CPO", "SimPO", "DPO")}
EAGER, COMPILED = "Liger, compiled=False", "Liger"
SAME = 0.02  # relative; rounding in bfloat16 is below
# Pairs, tokens of a sequence, half of which are prompt, H and V.
CPU, GPU, QUICK = (4, 128, 512, 16384), (16, 512, 4096, 128256), (2, 8, 16, 97)


def run(setting: Setting) -> Iterator[Record]:
    """Measure every loss in both dtypes; a quick run leaves the compiled ones out."""
    for dtype in (torch.float32, torch.bfloat16):
        for name in LOSSES:
            yield from beside_ours(name, dtype, setting)


def beside_ours(name: str, dtype: torch.dtype, setting: Setting) -> list[Record]:
    """Measure one loss in one dtype."""
    sizes = setting.choose(QUICK, CPU, GPU)
    inputs = make_inputs(*sizes, dtype, setting.device, reference=name == "DPO")
    agree = Agreement(SAME, lambda result: (result[0], *result[1]))

    def contestant(title: str, make: Callable[[], torch.nn.Module]) -> Contestant:
        def build() -> Call:
            module = make()

            def step() -> tuple[Tensor, tuple[Tensor, ...]]:
                loss = module(*inputs)[0]
                return loss.detach(), torch.autograd.grad(loss, inputs[:2])

            return step

        return Contestant(title, build, agree, needed=title != COMPILED)

    theirs = getattr(chunked_loss, LOSSES[name])
    contestants = [
        contestant(OURS, getattr(liger, LOSSES[name])),
        contestant(EAGER, lambda: theirs(compiled=False)),
        not_here(COMPILED, "not in a quick run") if setting.quick else contestant(COMPILED, theirs),
    ]
    pairs, tokens, hidden, vocab = sizes
    conditions = {"V": vocab, "H": hidden, "N": 2 * pairs * tokens, "K": 1, "dtype": dtype_name(dtype), "prompt": 0.5}
    rounds = setting.rounds(5, 5)
    case = Case(f"{name}, {dtype_name(dtype)}", contestants, conditions, {"of_ours": OURS}, rounds=rounds, peaks=True)
    return measure(case, setting.device)


def make_inputs(
    pairs: int, tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device, *, reference: bool
) -> list[Tensor | None]:
    """Draw lin_weight, _input, target, bias and, for a reference, ref_input and ref_weight; half of it prompt."""
    torch.manual_seed(0)
    target = torch.randint(vocab, (2 * pairs, tokens), device=device)
    target[:, : tokens // 2] = IGNORE
    states, ref_states = (torch.randn(2 * pairs, tokens, hidden).to(device, dtype) for _ in range(2))
    weight = (torch.randn(vocab, hidden) / hidden**0.5).to(device, dtype).requires_grad_()
    inputs = [weight, states.requires_grad_(), target, None]
    return [*inputs, ref_states, weight.detach()] if reference else inputs
