"""Part `adapters`: what a trained, a frozen, a low-rank and a tied head cost, by the CPO loss with its gradients.

Before they are timed, the loss and every gradient of each head are compared with dense float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional

import cpo_kernels
from benchmarks.contestants import FLOOR
from benchmarks.floor import Floor
from benchmarks.measure import AnotherLossError, Case, Contestant, measure, ready
from benchmarks.problem import BETA, Problem, contrast, draw
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.shapes import Shape
from benchmarks.timing import Call
from cpo_kernels.models.adapters import apply_head

CPU = Shape("heads", 16381, 512, 4, 64, torch.float32, "a prime vocabulary, and seconds for all of it")
GPU = replace(CPU, vocab=128256, hidden=4096, groups=16, tokens=128)
QUICK = replace(CPU, vocab=509, hidden=32, groups=2, tokens=8)
SHORT = 8  # tokens of a candidate that is compared with dense float64
SAME_LOSS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # rounding is below, another loss far above


@dataclass
class Head:
    """Holds a head and its inputs.

    Attributes:
        module: holds the head as `head`.
        inputs: token ids for a tied head, else hidden states (G, C, T, H).
        problem: targets and references.
    """

    module: nn.Module
    inputs: Tensor
    problem: Problem

    @property
    def leaves(self) -> list[Tensor]:
        """Return what gets a gradient."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        return [self.inputs, *trained] if self.inputs.requires_grad else trained

    def hidden(self) -> Tensor:
        """Return (G, C, T, H); of a tied head its rows, moved so that they do not predict themselves."""
        if self.inputs.is_floating_point():
            return self.inputs
        return functional.embedding(self.inputs, self.module.head.weight).roll(1, -1)

    def arguments(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return what our loss is called with."""
        hidden = self.hidden()
        applied = apply_head(self.module.head, hidden.flatten(0, 2))
        return (applied.features.view(*hidden.shape[:3], -1), applied.weight, self.problem.targets), applied.options

    def fused(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run our loss and the gradients of the leaves."""
        tensors, options = self.arguments()
        options = {**options, "ref_logps": self.problem.ref_logps, "beta": BETA}
        loss = cpo_kernels.linear_cpo_loss(*tensors, **options).loss
        return loss, torch.autograd.grad(loss, self.leaves)

    def dense(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the same from all logits."""
        logits = self.module.head(self.hidden())
        logps = torch.log_softmax(logits, -1).gather(-1, self.problem.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        loss = contrast((logps * (self.problem.targets >= 0)).sum(-1), self.problem.ref_logps)
        return loss, torch.autograd.grad(loss, self.leaves)

    def products(self) -> float:
        """Count those of the plan."""
        tensors, options = self.arguments()
        return cpo_kernels.plan(*tensors, **options).gemms


def plain(problem: Problem, *, trained: bool = True) -> Head:
    """Make a linear head without bias."""
    module = nn.Module()
    module.head = nn.Linear(problem.weight.shape[1], problem.weight.shape[0], bias=False)
    module.head.weight = nn.Parameter(problem.weight.detach().clone(), requires_grad=trained)
    return Head(module, problem.hidden.detach().clone().requires_grad_(), problem)


def low_rank(problem: Problem, rank: int = 16) -> Head:
    """Make a frozen head with a LoRA adapter whose two factors are trained."""
    head = plain(problem, trained=False)
    torch.manual_seed(1)
    config = LoraConfig(r=rank, target_modules=["head"], init_lora_weights=False)
    head.module = inject_adapter_in_model(config, head.module).to(problem.weight.dtype)
    return head


def tied(problem: Problem) -> Head:
    """Make a head that is the embedding of the inputs as well."""
    head = plain(problem)
    head.inputs = problem.targets.clamp(min=0)
    return head


HEADS: dict[str, Callable[[Problem], Head]] = {
    "trained": plain,
    "frozen": lambda problem: plain(problem, trained=False),
    "LoRA, rank 16": low_rank,
    "tied": tied,
}


def worst_error(make: Callable[[Problem], Head], problem: Problem) -> float:
    """Return the largest ||out - ref|| / ||ref|| of loss and gradients, against dense float64 of the same numbers.

    Raises:
        AnotherLossError: it is more than rounding explains.
    """
    loss, grads = make(problem).fused()
    exact = make(problem)
    exact.module.double()
    if exact.inputs.is_floating_point():
        exact.inputs = exact.inputs.detach().double().requires_grad_()
    exact_loss, exact_grads = exact.dense()
    pairs = zip((loss, *grads), (exact_loss, *exact_grads), strict=True)
    errors = torch.stack([(out.double() - ref).norm() / ref.norm() for out, ref in pairs])
    if not errors.max() <= SAME_LOSS[problem.shape.dtype]:  # not `>`: NaN is another loss too
        raise AnotherLossError(f"relative error {errors.max().item():.2g}")
    return errors.max().item()


def run(setting: Setting) -> Iterator[Record]:
    """Measure every head in both dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        shape = replace(setting.choose(QUICK, CPU, GPU), dtype=dtype)
        problem, short = (draw(s, device=setting.device) for s in (shape, replace(shape, tokens=SHORT)))
        contestants = [contestant(name, make, problem, short) for name, make in HEADS.items()]
        name = f"heads, {shape.sizes['dtype']}"
        case = Case(
            name,
            [ready(FLOOR, Floor.of(problem, None)), *contestants],
            shape.sizes,
            {"floor": FLOOR},
            rounds=setting.rounds(5, 5),
            peaks=True,
        )
        yield from measure(case, setting.device)


def contestant(name: str, make: Callable[[Problem], Head], problem: Problem, short: Problem) -> Contestant:
    """Describe a head, which is checked on a short problem."""
    head = make(problem)

    def build() -> Call:
        worst_error(make, short)
        return head.fused

    def values(seconds: float) -> dict[str, float]:
        return {"products": head.products(), "error_worst": worst_error(make, short)}

    return Contestant(name, build, needed=True, values=values)
