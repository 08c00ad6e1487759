"""Part `adapters`: what a trained, a frozen, a low-rank and a tied head cost, by the CPO loss with its gradients.

Before they are timed, the loss and every gradient of each head are compared with dense float64 on short candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional

import cpo_kernels
from benchmarks.contestants import FLOOR
from benchmarks.floor import Floor
from benchmarks.measure import Case, Contestant, measure, ready
from benchmarks.oracle import relative, require_same
from benchmarks.problem import BETA, Problem, contrast, draw
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.shapes import Shape
from cpo_kernels.models.adapters import apply_head

CPU = Shape("heads", 16381, 512, 4, 64, torch.float32)  # a prime vocabulary, and seconds for all of it
GPU = replace(CPU, vocab=128256, hidden=4096, groups=16, tokens=128)
QUICK = replace(CPU, vocab=509, hidden=32, groups=2, tokens=8)
SHORT = 8  # tokens of a candidate that is compared with dense float64
KINDS = ("trained", "frozen", "LoRA, rank 16", "tied")


@dataclass
class Head:
    """Holds a head and its inputs."""

    module: nn.Module  # holds the head as `head`
    inputs: Tensor  # token ids for a tied head, else hidden states (G, C, T, H)
    problem: Problem  # targets and references

    @property
    def leaves(self) -> list[Tensor]:
        """Returns what gets a gradient."""
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
        logits, targets = self.module.head(self.hidden()), self.problem.targets
        logps = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        loss = contrast((logps * (targets >= 0)).sum(-1), self.problem.ref_logps)
        return loss, torch.autograd.grad(loss, self.leaves)


def make(kind: str, problem: Problem) -> Head:
    """Make a linear head without bias: trained, frozen with or without an adapter, or the embedding of its inputs."""
    module = nn.Module()
    module.head = nn.Linear(problem.weight.shape[1], problem.weight.shape[0], bias=False)
    module.head.weight = nn.Parameter(problem.weight.detach().clone(), requires_grad=kind in ("trained", "tied"))
    if kind.startswith("LoRA"):
        torch.manual_seed(1)
        config = LoraConfig(r=16, target_modules=["head"], init_lora_weights=False)
        module = inject_adapter_in_model(config, module).to(problem.weight.dtype)
    hidden = problem.hidden.detach().clone().requires_grad_()
    return Head(module, problem.targets.clamp(min=0) if kind == "tied" else hidden, problem)


def worst_error(kind: str, problem: Problem) -> float:
    """Return the largest relative error against dense float64; raise AnotherLossError if rounding cannot explain it."""
    loss, grads = make(kind, problem).fused()
    exact = make(kind, problem)
    exact.module.double()
    if exact.inputs.is_floating_point():
        exact.inputs = exact.inputs.detach().double().requires_grad_()
    exact_loss, exact_grads = exact.dense()
    error = max(relative(*pair) for pair in zip((loss, *grads), (exact_loss, *exact_grads), strict=True))
    require_same({"error_worst": error}, problem.shape.dtype)
    return error


def run(setting: Setting) -> Iterator[Record]:
    """Measure every head in both dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        shape = replace(setting.choose(QUICK, CPU, GPU), dtype=dtype)
        problem, short = (draw(s, device=setting.device) for s in (shape, replace(shape, tokens=SHORT)))
        contestants = [ready(FLOOR, Floor.of(problem, None))]
        for kind in KINDS:
            head = make(kind, problem)

            def check(_: object, head: Head = head, kind: str = kind, short: Problem = short) -> dict[str, float]:
                tensors, options = head.arguments()
                return {
                    "products": cpo_kernels.plan(*tensors, **options).gemms,
                    "error_worst": worst_error(kind, short),
                }

            contestants.append(Contestant(kind, lambda head=head: head.fused, check, needed=True))
        name, rounds = f"heads, {shape.sizes['dtype']}", setting.rounds(5, 5)
        case = Case(name, contestants, shape.sizes, {"floor": FLOOR}, rounds=rounds, peaks=True)
        yield from measure(case, setting.device)
