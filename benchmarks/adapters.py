"""What a trained, a frozen, a low-rank and a tied head cost: the CPO loss with its gradients, taking turns.

Before they are timed, the loss and every gradient of each head are compared with dense float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional

import cpo_kernels
from benchmarks.contestants import FLOOR
from benchmarks.floor import Floor
from benchmarks.problem import BETA, Problem, contrast, draw
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.shapes import Shape
from benchmarks.timing import Effort, clock_for, round_robin
from cpo_kernels.models.adapters import apply_head

CPU = Shape("heads", 16381, 512, 4, 64, torch.float32, "a prime vocabulary, and seconds for all of it")
GPU = replace(CPU, vocab=128256, hidden=4096, groups=16, tokens=128)
QUICK = replace(CPU, vocab=509, hidden=32, groups=2, tokens=8)
SHORT = 8  # tokens of a candidate that is compared with dense float64
SAME_LOSS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # rounding is below, another loss far above


class WrongHeadError(Exception):
    """A head's loss or gradients are not those of its logits, so its time would mean nothing."""


@dataclass
class Case:
    """A head and its inputs.

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
        """What gets a gradient."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        return [self.inputs, *trained] if self.inputs.requires_grad else trained

    def hidden(self) -> Tensor:
        """(G, C, T, H); of a tied head its rows, moved so that they do not predict themselves."""
        if self.inputs.is_floating_point():
            return self.inputs
        return functional.embedding(self.inputs, self.module.head.weight).roll(1, -1)

    def fused(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Our loss and the gradients of the leaves."""
        hidden = self.hidden()
        applied = apply_head(self.module.head, hidden.flatten(0, 2))
        features = applied.features.view(*hidden.shape[:3], -1)
        options = {**applied.options, "ref_logps": self.problem.ref_logps, "beta": BETA}
        loss = cpo_kernels.linear_cpo_loss(features, applied.weight, self.problem.targets, **options).loss
        return loss, torch.autograd.grad(loss, self.leaves)

    def dense(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same from all logits."""
        logits = self.module.head(self.hidden())
        logps = torch.log_softmax(logits, -1).gather(-1, self.problem.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        sums = (logps * (self.problem.targets >= 0)).sum(-1)
        loss = contrast(sums, self.problem.ref_logps)
        return loss, torch.autograd.grad(loss, self.leaves)

    def gemms(self) -> float:
        """Products of the plan."""
        hidden = self.hidden()
        applied = apply_head(self.module.head, hidden.flatten(0, 2))
        features = applied.features.view(*hidden.shape[:3], -1)
        return cpo_kernels.plan(features, applied.weight, self.problem.targets, **applied.options).gemms


def plain(problem: Problem, *, trained: bool = True) -> Case:
    """A linear head without bias."""
    module = nn.Module()
    module.head = nn.Linear(problem.weight.shape[1], problem.weight.shape[0], bias=False)
    module.head.weight = nn.Parameter(problem.weight.detach().clone(), requires_grad=trained)
    return Case(module, problem.hidden.detach().clone().requires_grad_(), problem)


def low_rank(problem: Problem, rank: int = 16) -> Case:
    """A frozen head with a LoRA adapter whose two factors are trained."""
    case = plain(problem, trained=False)
    torch.manual_seed(1)
    config = LoraConfig(r=rank, target_modules=["head"], init_lora_weights=False)
    case.module = inject_adapter_in_model(config, case.module).to(problem.weight.dtype)
    return case


def tied(problem: Problem) -> Case:
    """A head that is the embedding of the inputs as well."""
    case = plain(problem)
    case.inputs = problem.targets.clamp(min=0)
    return case


CASES: dict[str, Callable[[Problem], Case]] = {
    "trained": plain,
    "frozen": lambda problem: plain(problem, trained=False),
    "LoRA, rank 16": low_rank,
    "tied": tied,
}


def worst_error(make: Callable[[Problem], Case], problem: Problem) -> float:
    """Largest ||out - ref|| / ||ref|| of the loss and the gradients, against dense float64 of the same numbers."""
    loss, grads = make(problem).fused()
    case = make(problem)
    case.module.double()
    if case.inputs.is_floating_point():
        case.inputs = case.inputs.detach().double().requires_grad_()
    exact_loss, exact_grads = case.dense()
    pairs = zip((loss, *grads), (exact_loss, *exact_grads), strict=True)
    return max(((out.double() - ref).norm() / ref.norm()).item() for out, ref in pairs)


def run(setting: Setting) -> Iterator[Record]:
    """Every head in both dtypes."""
    shape = QUICK if setting.quick else GPU if setting.on_gpu else CPU
    for dtype in (torch.float32, torch.bfloat16):
        yield from measure(replace(shape, dtype=dtype), setting)


def measure(shape: Shape, setting: Setting) -> Iterator[Record]:
    """Time and errors of every head of one dtype.

    Raises:
        WrongHeadError: a head computes something else.
    """
    problem, short = (draw(s, device=setting.device) for s in (shape, replace(shape, tokens=SHORT)))
    errors = {name: checked_error(name, make, short) for name, make in CASES.items()}
    cases = {name: make(problem) for name, make in CASES.items()}
    calls = {FLOOR: Floor(problem, None, fresh=True)} | {name: case.fused for name, case in cases.items()}
    for call in calls.values():
        call()
    effort = Effort(rounds=1 if setting.quick else 5, seconds=5.0)
    times = round_robin(calls, effort, reference=FLOOR, always=calls, clock=clock_for(setting.device))
    sizes = {"V": shape.vocab, "H": shape.hidden, "N": shape.num_tokens, "K": shape.candidates - 1}
    for name, timing in times.items():
        values = {"seconds": timing.best, "median": timing.median, "floor": timing.best / times[FLOOR].best}
        if name in cases:
            values |= {"products": cases[name].gemms(), "error_worst": errors[name]}
        yield Record(f"heads, {shape.dtype_name}", name, values, sizes | {"dtype": shape.dtype_name})


def checked_error(name: str, make: Callable[[Problem], Case], problem: Problem) -> float:
    """The worst error of a head."""
    error = worst_error(make, problem)
    if not error <= SAME_LOSS[problem.shape.dtype]:  # not `>`: NaN is another loss too
        raise WrongHeadError(f"{name}: relative error {error:.2g}")
    return error
