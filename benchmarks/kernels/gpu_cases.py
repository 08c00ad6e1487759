"""Part `gpu`: what decides the bars of a GPU, at their shapes: row kernels, loss, log-likelihoods, memory, accuracy.

Ceilings (copy bandwidth, bare products) are measured on the spot, taking turns with what is compared with them. Where
the compiled CUDA kernels are there, they take turns with Triton's; which of them is fastest for a whole call is what
benchmarks.kernels.choose measures. What is new to the hardware and can hang, Hopper's linear path, comes last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import heads, shapes
from benchmarks.contestants import OURS
from benchmarks.kernels import problems
from benchmarks.measure import Case, NotHereError, dtype_name, each, measure, ready
from benchmarks.meters import Call
from benchmarks.peers import ours
from benchmarks.problem import Problem, draw
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.shapes import BAR_8K, BAR_LOSSES, BAR_NARROW, BAR_PEERS, BAR_QWEN, STILL, Shape, tiny
from cpo_kernels.kernels import registry, selection
from cpo_kernels.kernels.device import architecture

ACCURACY = replace(shapes.ACCURACY, vocab=BAR_8K.vocab, hidden=BAR_8K.hidden, candidates=4)
VOCABULARIES = (32000, 50257, 65536, 128256, 151936, 262144)
ROUNDS = 20
COPY, PRODUCT, HOPPER = "torch copy_", "torch.mm", "fused linear, cuda"


def run(setting: Setting) -> Iterator[Record]:
    """Measure case after case; one that fails does not keep the others from being measured."""
    dtypes, no_grad = (torch.bfloat16, torch.float32), (BAR_8K,) if setting.quick else (BAR_8K, BAR_QWEN, BAR_NARROW)
    cases: dict[str, Callable[[], Iterable[Record]]] = {"ceilings": partial(heads.ceilings, setting)}
    cases |= {f"row kernels {dtype_name(dtype)}": partial(row_kernels, dtype, setting) for dtype in dtypes}
    cases |= {f"loss, {s.name}": partial(heads.beside_peers, sized(s, setting), setting) for s in BAR_LOSSES}
    cases |= {f"no_grad, {s.name}": partial(without_gradients, sized(s, setting), setting) for s in no_grad}
    cases["peak memory"] = partial(heads.peaks, setting)
    cases |= {f"peers, {s.name}": partial(heads.beside_peers, sized(s, setting), setting) for s in BAR_PEERS}
    cases["accuracy"] = partial(heads.beside_peers, sized(ACCURACY, setting), setting)
    cases |= {f"Hopper, {s.name}": partial(by_hopper, sized(s, setting), setting) for s in no_grad}
    yield from each(cases)


def sized(shape: Shape, setting: Setting) -> Shape:
    """Return the shape itself, or a tiny one of its kind with peers that do not compile."""
    if not setting.quick:
        return shape
    return replace(tiny(shape), rounds=1, peers=STILL if shape.peers is None else shape.peers)


def row_kernels(dtype: torch.dtype, setting: Setting) -> Iterator[Record]:
    """Time row kernels against a copy of the same logits: a share of its bandwidth, and the speed over Triton's."""
    backends = [problems.TRITON] if problems.missing(setting.device) else [problems.CUDA, problems.TRITON]
    for vocab in (problems.SMALL_VOCABULARY,) if setting.quick else VOCABULARIES:
        rows = 8 if setting.quick else problems.LOGITS_BYTES // (vocab * dtype.itemsize) // 8 * 8
        problem = problems.RowProblem(rows, vocab, dtype, setting.device)
        kernels = {"forward": (problem.forward, 1.0), "backward in place": (problem.backward_, 2.0)}
        if dtype == torch.float32:
            narrow = partial(problem.backward_, grad_dtype=torch.bfloat16)
            kernels["backward, bf16 over fp32"] = (narrow, 1.5)
        passes = {COPY: 2.0}  # over the logits
        calls: dict[str, Call] = {COPY: partial(problem.buffer.copy_, problem.logits)}
        for (kernel, (make, own)), backend in itertools.product(kernels.items(), backends):
            calls[f"{kernel}, {backend}"], passes[f"{kernel}, {backend}"] = make(backend), own
        for backend in backends:
            unit, name = registry.BACKENDS[backend].unit_gradient, f"unit forward, {backend}"
            if unit is not None and unit.takes(vocab, dtype, setting.device):
                calls[name], passes[name] = problem.unit_forward_(backend), 2.0
        conditions = {"V": vocab, "rows": rows, "dtype": dtype_name(dtype)}
        contestants = [ready(who, call) for who, call in calls.items()]
        name, rounds = f"row kernels, {dtype_name(dtype)}, V={vocab}", setting.rounds(ROUNDS, ROUNDS)
        found = measure(Case(name, contestants, conditions, rounds=rounds), setting.device)
        seconds = {record.contestant: record.values["seconds"] for record in found}
        speeds = {who: passes[who] * problem.logits.nbytes / own for who, own in seconds.items()}
        for record in found:
            kernel, _, backend = record.contestant.rpartition(", ")
            speed, more = speeds[record.contestant], dict[str, Any]()
            values = {**record.values, "gbs": speed / 1e9, "of_gbs": speed / speeds[COPY]}
            if backend == problems.CUDA and f"{kernel}, {problems.TRITON}" in speeds:
                values["of_triton"] = speed / speeds[f"{kernel}, {problems.TRITON}"]
                more["picked"] = is_picked(kernel, vocab, dtype, setting.device)
            yield replace(record, values=values, conditions=conditions | more)


def is_picked(kernel: str, vocab: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the table picks the CUDA kernel."""
    named = {"forward": "row_forward", "unit forward": "unit_gradient"}
    operation, sizes = named.get(kernel, "row_backward"), selection.Sizes(vocab, dtype)
    choices = selection.choices_for(selection.AUTO, architecture(device), sizes, registry.AVAILABLE)
    return choices.get(operation) == problems.CUDA


def linear_problem(given: Problem) -> problems.LinearProblem:
    """Return the tensors of a problem for ways without gradients."""
    return problems.LinearProblem(given.hidden.detach().flatten(0, 2), given.weight.detach(), given.targets.flatten())


def beside_product(
    shape: Shape, linear: problems.LinearProblem, calls: dict[str, Call], setting: Setting
) -> list[Record]:
    """Time ways to log-likelihoods over one product."""
    contestants = [ready(name, call) for name, call in ({PRODUCT: linear.product} | calls).items()]
    conditions, ratios = shape.conditions | {"mode": "no_grad"}, {"of_product": PRODUCT}
    case = Case(f"no_grad, {shape.name}", contestants, conditions, ratios, rounds=setting.rounds(ROUNDS, ROUNDS))
    return measure(case, setting.device)


def without_gradients(shape: Shape, setting: Setting) -> list[Record]:
    """Time ours as users call it, product and row kernel, and Triton's fused path, plain and with everything."""
    problem = draw(shape, device=setting.device)
    linear, tensors = linear_problem(problem), (problem.hidden.detach(), problem.weight.detach(), problem.targets)

    def ours_without_gradients() -> torch.Tensor:
        with torch.no_grad():
            return ours(OURS).sequence_logps(*tensors)

    calls = {
        OURS: ours_without_gradients,
        f"{PRODUCT} and row kernel": linear.two(problems.TRITON),
        "fused linear": linear.fused(),
        "fused linear, sample and entropy": linear.fused(seed=torch.tensor(0, device=setting.device), entropy=True),
    }
    return beside_product(shape, linear, calls, setting)


def by_hopper(shape: Shape, setting: Setting) -> list[Record]:
    """Time the fused linear path of the compiled CUDA kernels; raise NotHereError where it is not built or not for."""
    if reason := problems.missing_hopper(setting.device):
        raise NotHereError(reason)
    linear = linear_problem(draw(shape, device=setting.device))
    return beside_product(shape, linear, {HOPPER: linear.hopper()}, setting)
