"""What a trained, a frozen, a low-rank and a tied head cost: the CPO loss with its gradients, taking turns.

`python -m benchmarks.bench_heads --threads 2`. Times are the best of the rounds, as multiples of the three bare
products of the same shape (floor.py). Before they are timed, the loss and every gradient of each head are compared with
dense float64. On a machine that others use, `--threads 1 --processor-time` counts the seconds of the processor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional

import cpo_kernels
from benchmarks.environment import as_markdown, describe, log
from benchmarks.floor import Floor
from benchmarks.problem import BETA, Problem, contrast, draw
from benchmarks.shapes import Shape
from benchmarks.timing import Clock, Effort, clock_for, processor_clock, round_robin
from cpo_kernels.models.adapters import apply_head

FLOOR = "three bare products"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=4, help="candidates of a group, K + 1")
    parser.add_argument("--tokens", type=int, default=64, help="of each candidate")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=16381)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processor-time", action="store_true", help="not the clock's; for one thread")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    return parser.parse_args()


def measure(dtype: str, args: argparse.Namespace) -> list[str]:
    """The table of one dtype."""
    sizes = {"groups": args.groups, "candidates": args.candidates, "hidden": args.hidden, "vocab": args.vocab}
    sizes |= {"name": "heads", "reason": "heads", "dtype": DTYPES[dtype]}
    problem, short = (draw(Shape(tokens=tokens, **sizes)) for tokens in (args.tokens, min(8, args.tokens)))
    errors = {}
    for name, make in CASES.items():
        log(f"{dtype}, {name}: comparing with dense float64 ...")
        errors[name] = worst_error(make, short)
    cases = {name: make(problem) for name, make in CASES.items()}
    calls = {FLOOR: Floor(problem, None, fresh=True)} | {name: case.fused for name, case in cases.items()}
    clock: Clock = processor_clock if args.processor_time else clock_for(torch.device("cpu"))
    log("timing ...")
    times = round_robin(calls, Effort(rounds=args.rounds, seconds=15.0), reference=FLOOR, always=calls, clock=clock)
    floor = times[FLOOR].best
    return [
        f"{args.groups} groups of {args.candidates} candidates of {args.tokens} tokens, H={args.hidden}, "
        f"V={args.vocab}, {dtype}; three bare products take {floor:.3f} "
        f"{'seconds of the processor' if args.processor_time else 'seconds'}; best of {args.rounds} rounds.",
        "",
        "| head | products | time / three bare products | worst error |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | {case.gemms():.2f} | {times[name].best / floor:.2f} | {errors[name]:.1e} |"
            for name, case in cases.items()
        ),
        "",
    ]


def main() -> None:
    """Prints a table for each dtype."""
    args = parse()
    torch.set_num_threads(args.threads)
    report = [line for dtype in args.dtypes for line in measure(dtype, args)]
    print("\n".join(report))
    if args.out:
        header = "# Trained, frozen, low-rank and tied heads: loss and gradients"
        described = as_markdown(describe(["bench_heads", *sys.argv[1:]]))
        args.out.write_text("\n".join([header, "", *report, described, ""]))


if __name__ == "__main__":
    main()
