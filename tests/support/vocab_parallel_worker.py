"""One of the processes of test_vocab_parallel.py: runs every case, and saves what came of it.

With gloo there are four, which run all cases in pairs and together; with NCCL there are two, a GPU each.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from problems import GemmCounter
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from vocab_parallel_cases import CASES, Case, fused, results, shard_problem

from cpo_kernels import VocabShard, linear_cpo_loss, linear_token_statistics, plan
from cpo_kernels.integrations.verl import linear_cross_entropy

LONG = Case("long")


def run_case(case: Case, group: Any, device: str = "cpu") -> dict[str, torch.Tensor]:
    problem, shard = shard_problem(case, group, device)
    return {name: value.cpu() for name, value in results(*fused(case, problem, shard), problem).items()}


def gemms(group: Any) -> dict[str, float]:
    """Count products of (rows, own entries, H) with all tensors trained, with a frozen head, and without gradients."""
    counts = {}
    for name, needs in {"trained": (True,) * 3, "frozen": (True, False, False), "none": (False,) * 3}.items():
        problem, shard = shard_problem(Case("long", needs=needs), group)
        rows = int((problem.targets != -100).sum())
        with GemmCounter() as counter:
            loss = fused(LONG, problem, shard)[0]
            if name != "none":
                loss.backward()
        counts[name] = counter.products(rows, problem.weight)
    return counts


def share_of_hidden(group: Any) -> dict[str, torch.Tensor]:
    """Return the gradient of hidden that is left to the caller to sum."""
    problem, shard = shard_problem(LONG, group)
    own = VocabShard.of(problem.weight, group, reduce_grad_hidden=False)
    share = results(*fused(LONG, problem, own), problem)["hidden"]
    return {"share": share, "sum": results(*fused(LONG, problem, shard), problem)["hidden"]}


def statistics(group: Any) -> dict[str, torch.Tensor]:
    problem, shard = shard_problem(LONG, group)
    head = {"bias": problem.bias, "top1": True, "vocab_shard": shard}
    out = linear_token_statistics(*problem.tensors[:2], problem.targets, entropy=True, **head)
    whole = LONG.make()
    logits = whole.hidden.detach() @ whole.weight.detach().T + (0 if whole.bias is None else whole.bias.detach())
    words = logits.argmax(-1).where(problem.targets != -100, -100)
    best = linear_token_statistics(*problem.tensors[:2], words, **head).top1
    return {"logps": out.logps, "entropy": out.entropy, "top1": out.top1, "best": best}


def verl(group: Any) -> dict[str, torch.Tensor]:
    """Call verl's function with its group; the gradient of hidden is this process's share."""
    problem, _ = shard_problem(Case("larger_prime_vocab"), group)
    labels = problem.targets.clamp(min=0)
    logps, entropy = linear_cross_entropy(problem.hidden, problem.weight, labels, 0.8, "none", group)
    grads = torch.autograd.grad(logps.sum() - entropy.sum(), (problem.hidden, problem.weight))
    return {"logps": logps.detach(), "entropy": entropy.detach(), "hidden": grads[0], "weight": grads[1]}


def twice(group: Any) -> dict[str, torch.Tensor]:
    """Compute the gradients of a retained graph a second time."""
    problem, shard = shard_problem(LONG, group)
    loss = fused(LONG, problem, shard)[0]
    first, second = (torch.autograd.grad(loss, problem.hidden, retain_graph=True)[0] for _ in range(2))
    return {"first": first, "second": second}


def plans(group: Any) -> list[Any]:
    """Return the chunks of uneven shards, which all processes must agree on, whatever their threads."""
    problem, shard = shard_problem(LONG, group)
    torch.set_num_threads(1 + distributed.get_rank(group))
    head = {"max_logits_bytes": 20 * shard.largest * 4, "vocab_shard": shard}
    chunks = plan(**problem.arguments(), **problem.options, **head).chunks
    torch.set_num_threads(1)
    return [chunks, shard.start, shard.size, shard.vocab]


def errors(group: Any) -> dict[str, str]:
    """Return the messages of calls that cannot be right; every process raises."""
    problem, shard = shard_problem(LONG, group)
    rank, mesh = distributed.get_rank(group), DeviceMesh.from_group(group, "cpu")
    sharded = distribute_tensor(torch.zeros(8, 24), mesh, [Shard(0)])
    arguments = problem.hidden, problem.weight, problem.targets
    calls: dict[str, Callable[[], Any]] = {
        "empty shard": lambda: VocabShard.of(torch.zeros(0 if rank == 1 else 3, 2), group),
        "gap": lambda: VocabShard.of(torch.zeros(3, 2), group, start=4 * rank),
        "start of some": lambda: VocabShard.of(torch.zeros(3, 2), group, start=3 * rank if rank else None),
        "hidden sizes": lambda: VocabShard.of(torch.zeros(3, 2 + rank), group),
        "other weight": lambda: linear_cpo_loss(problem.hidden, problem.weight[1:], problem.targets, vocab_shard=shard),
        "placement": lambda: VocabShard.of(distribute_tensor(torch.zeros(4, 8), mesh, [Shard(1)])),
        "DTensor and group": lambda: VocabShard.of(sharded, group),
        "DTensor": lambda: linear_cpo_loss(problem.hidden, sharded, problem.targets),
        "filter": lambda: linear_cpo_loss(*arguments, bias=problem.bias, vocab_shard=shard, candidate_eps=0.1),
        "sample": lambda: linear_token_statistics(*arguments, seed=0, bias=problem.bias, vocab_shard=shard),
        "target": lambda: linear_cpo_loss(*arguments[:2], problem.targets + 1009, bias=problem.bias, vocab_shard=shard),
    }
    return {name: message_of(call) for name, call in calls.items()}


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


CHECKS = {
    "gemms": gemms,
    "share of hidden": share_of_hidden,
    "statistics": statistics,
    "verl": verl,
    "twice": twice,
    "plans": plans,
    "errors": errors,
}


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception:
        return traceback.format_exc()


def join(backend: str, path: Path, rank: int, world: int) -> None:
    distributed.init_process_group(backend, init_method=f"file://{path / 'store'}", rank=rank, world_size=world)


def run_gloo(path: Path, rank: int) -> dict[int, dict[str, Any]]:
    join("gloo", path, rank, 4)
    pairs = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    saved: dict[int, dict[str, Any]] = {}
    for world, group in {2: pairs[rank // 2], 4: distributed.group.WORLD}.items():
        saved[world] = {n: attempt(run_case, case, group) for n, case in CASES.items() if case.runs_in(world)}
        saved[world] |= {name: attempt(check, group) for name, check in CHECKS.items()}
    return saved


def run_nccl(path: Path, rank: int) -> dict[int, dict[str, Any]]:
    torch.cuda.set_device(rank)
    join("nccl", path, rank, 2)
    device, group = f"cuda:{rank}", distributed.group.WORLD
    cases = {n: c for n, c in CASES.items() if c.head.get("backend") != "cpu"}
    return {2: {name: attempt(run_case, case, group, device) for name, case in cases.items()}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = {"gloo": run_gloo, "nccl": run_nccl}[sys.argv[1]]
    path, rank = Path(sys.argv[2]), int(os.environ["RANK"])
    torch.save(run(path, rank), path / f"{rank}.pt")
    distributed.destroy_process_group()
