"""Part `gpu`: what decides the bars of a GPU, at their shapes: row kernels, loss, log-likelihoods, memory, accuracy.

Ceilings (copy bandwidth, bare products) are measured on the spot, taking turns with what is compared with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks import heads, shapes
from benchmarks.contestants import OURS
from benchmarks.kernels.calls import HEAD, PRODUCT, TRITON, ProductCase, row_kernels, triton_kernels
from benchmarks.measure import MIB, Case, each, measure, ready
from benchmarks.peers import ours
from benchmarks.problem import IGNORE, Problem, draw
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.shapes import BAR_8K, BAR_LOSSES, BAR_NARROW, BAR_PEERS, BAR_QWEN, STILL, Shape, tiny

ACCURACY = replace(BAR_8K, name="accuracy", groups=1, tokens=1024, peers=None)


def run(setting: Setting) -> Iterator[Record]:
    """Measure case after case; one that fails does not keep the others from being measured."""
    cases: dict[str, Callable[[], Iterator[Record]]] = {
        "ceilings": lambda: iter(heads.ceilings(setting)),
        "row kernels bf16": partial(row_kernels, torch.bfloat16, [TRITON], setting),
        "row kernels fp32": partial(row_kernels, torch.float32, [TRITON], setting),
    }
    cases |= {f"loss, {s.name}": partial(heads.beside_peers, sized(s, setting), setting) for s in BAR_LOSSES}
    no_grad = (BAR_8K,) if setting.quick else (BAR_8K, BAR_QWEN, BAR_NARROW)
    cases |= {f"no_grad, {s.name}": partial(logps_without_gradients, sized(s, setting), setting) for s in no_grad}
    cases["peak memory"] = partial(peaks, setting)
    cases |= {f"peers, {s.name}": partial(heads.beside_peers, sized(s, setting), setting) for s in BAR_PEERS}
    cases["accuracy"] = partial(heads.accuracies, setting, sized(ACCURACY, setting))
    yield from each(cases)


def sized(shape: Shape, setting: Setting) -> Shape:
    """Return the shape itself, or a tiny one of its kind with peers that do not compile."""
    if not setting.quick:
        return shape
    return replace(tiny(shape), rounds=1, peers=STILL if shape.peers is None else shape.peers)


def logps_without_gradients(shape: Shape, setting: Setting) -> Iterator[Record]:
    """Time ours as users call it, product and row kernel, and the fused path, plain and with everything."""
    problem = draw(shape, device=setting.device)
    hidden, weight, targets = problem.hidden.detach(), problem.weight.detach(), problem.targets
    given = (hidden.flatten(0, 2), weight, targets.flatten())
    case = ProductCase(shape, *given, setting)
    fused, row_forward = triton_kernels("linear").linear_forward, triton_kernels("rows").row_forward
    seed = torch.tensor(0, device=setting.device)

    def ours_without_gradients() -> torch.Tensor:
        with torch.no_grad():
            return ours(OURS).sequence_logps(hidden, weight, targets)

    calls = {
        OURS: ours_without_gradients,
        f"{PRODUCT} and row kernel": lambda: row_forward(case.product(), given[2], None, *HEAD),
        "fused linear": partial(fused, *given, None, *HEAD),
        "fused linear, sample and entropy": partial(fused, *given, None, *HEAD, seed=seed, entropy=True),
    }
    case.check("fused linear", calls["fused linear"]().logps)
    yield from case.records(calls)


def peaks(setting: Setting) -> Iterator[Record]:
    """Measure the peak beyond inputs and gradients at several N and budgets, with half of each candidate padding too.

    It must be flat in N, and within the plan's bytes and the budget.
    """
    tokens = (64, 128) if setting.quick else (2048, 8192, 16384)
    budgets = (40 * shapes.SMALL[0] * 2,) if setting.quick else (256 * MIB, 1024 * MIB)
    shape = replace(sized(BAR_8K, setting), tokens=16 if setting.quick else 64, rounds=1)
    for budget, count, padded in itertools.product(budgets, tokens, (False, True)):
        problem = draw(shape.with_tokens(count), device=setting.device)
        if padded:
            problem.targets[..., shape.tokens // 2 :] = IGNORE
        yield peak_of(problem, budget, padded=padded, setting=setting)


def peak_of(problem: Problem, budget: int, *, padded: bool, setting: Setting) -> Record:
    """Measure one call with its gradients, after a first one for what libraries keep."""
    name = f"peak memory, N={problem.shape.num_tokens}, budget {budget / MIB:.3g} MiB" + ", half padding" * padded
    call = partial(ours(OURS, budget).run, problem)
    (record,) = measure(Case(name, [ready(OURS, call)], problem.shape.conditions, rounds=1, peaks=True), setting.device)
    return replace(record, values=heads.against_plan(record.values["peak_mib"], problem, budget))
