"""Calls with a head sharded along the vocabulary: what each process computes, and the same with the whole head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from head_logps import eager_logps, fused_logps, transform_of
from problems import PROBLEMS, Problem, eager_loss, random_problem
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from cpo_kernels import VocabShard, linear_cpo_loss, linear_sequence_loss
from cpo_kernels.engine.entropy import linear_token_entropy
from cpo_kernels.kernels.transform import transform_logits

WORLDS = (2, 4)
UPSTREAM = 1.7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass
class Case:
    """One call.

    Attributes:
        problem: by name.
        kind: "cpo", "loss_fn", "logps", or "entropy": of log-probabilities and entropies of tokens.
        dtype: by name.
        rows: rows of logits that the budget holds, or None.
        needs: which of hidden, weight and bias need a gradient.
        sizes: "even" (as DTensor splits), "uneven", or "reversed": uneven, and the last rank holds the first entries.
        dtensor: whether weight and bias are DTensors.
        worlds: numbers of processes that run it.
        head: further options.
    """

    problem: str
    kind: str = "cpo"
    dtype: str = "float32"
    rows: int | None = None
    needs: tuple[bool, bool, bool] = (True, True, True)
    sizes: str = "uneven"
    dtensor: bool = False
    head: dict[str, Any] = field(default_factory=dict)
    worlds: tuple[int, ...] = WORLDS

    def make(self, dtype: torch.dtype | None = None) -> Problem:
        """Make the whole problem, the same in every process; rounded to the case's dtype, then in ``dtype``."""
        torch.manual_seed(7)
        problem = (PROBLEMS | EXTRA)[self.problem]().to(DTYPES[self.dtype]).to(dtype or DTYPES[self.dtype])
        for tensor, need in zip(problem.tensors, self.needs, strict=True):
            if tensor is not None:
                tensor.requires_grad_(need)
        return problem

    def runs_in(self, world: int) -> bool:
        """Tell whether this number of processes runs the case, and each of them has a vocabulary entry."""
        return world in self.worlds and (PROBLEMS | EXTRA)[self.problem]().weight.shape[0] >= world


def padded_vocab() -> Problem:
    """Make a problem whose last three quarters of the vocabulary are padding: a bias of -inf empties whole shards."""
    problem = random_problem(V=37, bias=True)
    problem.bias[9:] = -torch.inf
    return replace(problem, targets=problem.targets.where(problem.targets < 0, problem.targets % 9))


EXTRA: dict[str, Callable[[], Problem]] = {
    "padded_vocab": padded_vocab,
    "long": lambda: random_problem(G=4, C=3, T=20, H=24, V=1009, bias=True, mle_weight=0.3),
}

GRID = {
    f"{problem}-{rows}-{backend}-{dtype}": Case(problem, dtype=dtype, rows=rows, head={"backend": backend})
    for problem, (rows, backend, dtype) in product(
        [
            "prime_vocab_mixed_with_mle",
            "larger_prime_vocab",
            "two_words",
            "huge_logits",
            "whole_head",
            "length_normalized_with_margin",
            "ranked",
            "packed_shared_rows",
            "packed_whole_head",
            "padded_vocab",
        ],
        [(None, "torch", "float32"), (None, "cpu", "bfloat16"), (13, "torch", "bfloat16"), (3, "cpu", "float32")],
    )
}
KINDS = {
    f"{kind}-{problem}-{rows}-{dtype}-{'frozen' if not needs[1] else 'trained'}": Case(
        problem, kind, dtype, rows, needs
    )
    for kind, problem, (rows, dtype), needs in product(
        ["logps", "loss_fn"],
        ["whole_head", "larger_prime_vocab", "packed_whole_head"],
        [(5, "float32"), (None, "bfloat16")],
        [(True, True, True), (True, False, False)],
    )
    if not (kind == "loss_fn" and problem.startswith("packed"))
}
OTHERS = {
    "several chunks": Case("long", rows=130, head={"backend": "cpu"}),
    "several chunks of bfloat16": Case("long", dtype="bfloat16", rows=130, head={"backend": "cpu"}),
    "one token each": Case("one_token_segments"),
    "frozen head": Case("whole_head", needs=(True, False, False)),
    "frozen body": Case("whole_head", needs=(False, True, True)),
    "bias alone": Case("bias_alone", needs=(False, False, True)),
    "even shards": Case("larger_prime_vocab", sizes="even"),
    "reversed shards": Case("larger_prime_vocab", sizes="reversed", rows=13),
    "DTensor": Case("whole_head", sizes="even", dtensor=True, rows=13),
    "dense": Case("whole_head", head={"skip_absent_rows": False}),
    "float64": Case("packed_whole_head", dtype="float64", rows=5),
    "float16": Case("long", dtype="float16", rows=130),
    "float32 logits of bfloat16": Case("whole_head", dtype="bfloat16", head={"logits_dtype": torch.float32}),
    "entropy": Case("whole_head", "entropy"),
    "entropy of bfloat16, recomputed": Case("larger_prime_vocab", "entropy", "bfloat16", rows=5),
    "entropy of a padded vocabulary": Case("padded_vocab", "entropy"),
    "entropy, frozen head": Case("larger_prime_vocab", "entropy", needs=(True, False, False), sizes="reversed"),
    "float32 logits, recomputed": Case("long", dtype="bfloat16", rows=25, head={"logits_dtype": torch.float32}),
}
# Of the grids, every second case runs in pairs of processes and the others in all four, so that each problem and each
# way of a grid meets both numbers.
for index, grid_case in enumerate((*GRID.values(), *KINDS.values())):
    grid_case.worlds = (WORLDS[(index + index // 4) % 2],)
CASES = GRID | KINDS | OTHERS


def sizes_of(vocab: int, world: int, how: str) -> list[int]:
    """Return the number of entries of each process."""
    if how == "even":
        return [len(part) for part in torch.arange(vocab).chunk(world)]
    first = [1 + (vocab - world) * (2 * r + 1) // world**2 for r in range(world - 1)]
    return [*first, vocab - sum(first)]


def place(problem: Problem, device: str) -> Problem:
    """Copy everything of a problem but its leaves to a device."""
    moved = {name: getattr(problem, name) for name in ("targets", "ref_logps", "ranks")}
    moved = {name: tensor if tensor is None else tensor.to(device) for name, tensor in moved.items()}
    layout = problem.layout
    if layout is not None and layout.rows is not None:
        layout = replace(layout, rows=layout.rows.to(device))
    return replace(problem, layout=layout, **moved)


def shard_problem(case: Case, group: Any, device: str = "cpu") -> tuple[Problem, VocabShard]:
    """Return this process's part of the problem, with its own leaves."""
    whole, world, rank = case.make(), distributed.get_world_size(group), distributed.get_rank(group)
    vocab = whole.weight.shape[0]
    sizes = sizes_of(vocab, world, case.sizes)
    position = world - 1 - rank if case.sizes == "reversed" else rank
    start = sum(sizes[:position])

    def part(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        mine = tensor.detach()[start : start + sizes[position]].clone().to(device)
        if case.dtensor:
            mine = DTensor.from_local(mine, DeviceMesh.from_group(group, mine.device.type), [Shard(0)])
        return mine.requires_grad_(tensor.requires_grad)

    hidden = whole.hidden.detach().to(device).requires_grad_(whole.hidden.requires_grad)
    mine = replace(place(whole, device), hidden=hidden, weight=part(whole.weight), bias=part(whole.bias))
    if case.dtensor:
        return mine, VocabShard.of(mine.weight)
    return mine, VocabShard.of(mine.weight, group, start=start if case.sizes == "reversed" else None)


def fused(case: Case, problem: Problem, shard: VocabShard | None = None) -> tuple[Tensor, Tensor]:
    """Compute a scalar by the fused functions, and the log-likelihoods that it comes from."""
    entries = problem.weight.shape[0] if shard is None else shard.largest
    logits_dtype = case.head.get("logits_dtype") or problem.hidden.dtype
    budget = None if case.rows is None else case.rows * entries * logits_dtype.itemsize
    head = {"max_logits_bytes": budget, "vocab_shard": shard, **case.head}
    if case.kind == "cpo":
        out = linear_cpo_loss(**problem.arguments(), **problem.options, **head)
        return out.loss, out.logps
    if case.kind == "logps":
        logps = fused_logps(problem, **head)
        return weighted(logps), logps
    if case.kind == "entropy":
        head |= {"bias": problem.bias, **transform_of(problem)}
        return of_both(*linear_token_entropy(problem.hidden, problem.weight, problem.targets, **head))
    seen = []

    def loss_fn(logps: Tensor, groups: range) -> Tensor:
        seen.append(logps.detach())
        return contrast(logps)

    arguments = problem.hidden, problem.weight, problem.targets, loss_fn
    loss = linear_sequence_loss(*arguments, bias=problem.bias, **transform_of(problem), **head)
    return loss, torch.cat(seen)


def eager(case: Case, problem: Problem) -> tuple[Tensor, Tensor]:
    """Compute a scalar by the dense reference, and the log-likelihoods that it comes from."""
    if case.kind == "entropy":
        return of_both(*eager_entropy(problem))
    logps = eager_logps(problem)
    if case.kind == "cpo":
        return eager_loss(problem), logps / lengths(problem) if problem.options.get("length_normalized") else logps
    return (weighted if case.kind == "logps" else contrast)(logps), logps


def eager_entropy(problem: Problem) -> tuple[Tensor, Tensor]:
    """Compute log-probabilities and entropies of tokens from dense logits."""
    logits = transform_logits(problem.hidden @ problem.weight.T, problem.bias, **transform_of(problem))
    log_p, absent = logits.log_softmax(-1), problem.targets == -100
    logps = log_p.gather(-1, problem.targets.masked_fill(absent, 0)[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    return logps.masked_fill(absent, 0.0), entropy.masked_fill(absent, 0.0)


def of_both(logps: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """Return a scalar that weighs every number, and the numbers."""
    return weighted(logps) - 0.7 * weighted(entropy), torch.stack([logps, entropy])


def lengths(problem: Problem) -> Tensor:
    """Count the tokens of each candidate, at least 1, (G, C) or (S,)."""
    present = problem.targets != -100
    if problem.layout is not None:
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), present.cumsum(0)])
        return counts[torch.tensor(problem.layout.cu_tokens)].diff().clamp(min=1)
    return present.sum(-1).clamp(min=1)


def weighted(logps: Tensor) -> Tensor:
    """Sum values with a different weight for each segment."""
    weights = torch.linspace(-1.0, 2.0, logps.numel(), dtype=torch.float64, device=logps.device).view(logps.shape)
    return (logps * weights.to(logps.dtype)).sum()


def contrast(logps: Tensor) -> Tensor:
    """Compute DPO without a reference, of the first and the last candidate, over all groups."""
    return -torch.nn.functional.logsigmoid(0.1 * (logps[:, 0] - logps[:, -1])).sum()


def results(loss: Tensor, logps: Tensor, problem: Problem) -> dict[str, Tensor]:
    """Return loss, log-likelihoods and the gradients that are asked for."""
    named = zip(("hidden", "weight", "bias"), problem.tensors, strict=True)
    wanted = {name: tensor for name, tensor in named if tensor is not None and tensor.requires_grad}
    grads = torch.autograd.grad(loss * UPSTREAM, list(wanted.values()))
    grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    return {"loss": loss.detach(), "logps": logps.detach(), **dict(zip(wanted, grads, strict=True))}
