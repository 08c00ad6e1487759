"""Part `heads`: the head's loss and gradients beside every peer, on the heads of real models.

Every contestant is held against float64 before its time counts. Ratios are to the floor and to ours on the same work,
taken in turns in one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch

from benchmarks import shapes
from benchmarks.contestants import OURS, OURS_FP32_LOGITS, LineUp, asked_of, forget_compiled
from benchmarks.floor import plan_of
from benchmarks.measure import MIB, Case, Contestant, dtype_name, each, free_memory, measure, ready, summary
from benchmarks.oracle import dense_of, sequence_sums
from benchmarks.peers import BUILDERS, Peer, ours
from benchmarks.problem import Problem, draw
from benchmarks.records import Record, value
from benchmarks.setting import Setting
from benchmarks.shapes import CPO, Shape
from cpo_kernels.kernels.cpu import gemm as cpu_gemm

CEILINGS, LOGPS = "ceilings", "log-likelihoods of 1024 tokens"


def run(setting: Setting) -> Iterator[Record]:
    """Measure ceilings, every case, accuracy of log-likelihoods, peak memory in processes of their own."""
    found = ceilings(setting)
    yield from found
    best = best_of(found)
    chosen = setting.choose(shapes.QUICK_CASES, shapes.CASES, shapes.GPU_CASES)
    cases = {shape.name: partial(beside_peers, shape, setting, best) for shape in chosen}
    yield from each(cases | {LOGPS: partial(accuracies, setting), "peak memory": partial(peaks, setting)})


def beside_peers(shape: Shape, setting: Setting, best: dict[str, float] | None = None) -> Iterator[Record]:
    """Measure one shape with the peers that it asks for."""
    forget_compiled()
    line_up = LineUp(draw(shape, device=setting.device), best)
    yield from measure(line_up.case(line_up.everyone(asked_of(shape))), setting.device)


def ceilings(setting: Setting) -> list[Record]:
    """Measure what the device does at best: products of each dtype, torch's and ours, and a copy."""
    size, device, records = setting.choose(64, 4096, 8192), setting.device, []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out, name = torch.empty_like(a), dtype_name(dtype)
        calls = {"torch.mm": partial(torch.mm, a, b, out=out)}
        if not setting.on_gpu and cpu_gemm.gemm_supported(dtype, dtype):
            calls["our product"] = partial(cpu_gemm.gemm, a, b, out)
        products = [
            ready(f"{who} {name}", call, values=lambda seconds: {"tflops": 2e-12 * size**3 / seconds})
            for who, call in calls.items()
        ]
        records += measure(Case(CEILINGS, products, {"dtype": name, "size": size}), device)
    source = torch.ones(setting.choose(2**12, 2**27, 2**29), device=device)
    target = torch.empty_like(source)
    copy = ready("copy", lambda: target.copy_(source), values=lambda s: {"gbs": 2e-9 * source.nbytes / s})
    return records + measure(Case(CEILINGS, [copy], {"bytes": source.nbytes}), device)


def best_of(found: list[Record]) -> dict[str, float]:
    """Return the fastest product of each dtype and the copy."""
    best = {"copy": value(found, "gbs")[-1]}
    for record in found:
        if "tflops" in record.values:
            dtype = record.conditions["dtype"]
            best[dtype] = max(best.get(dtype, 0.0), record.values["tflops"])
    return best


def accuracies(setting: Setting, shape: Shape | None = None) -> Iterator[Record]:
    """Measure errors of sequence log-likelihoods: rounding of the logits adds up over a sum."""
    shape = shape or (shapes.QUICK_ACCURACY if setting.quick else shapes.ACCURACY)
    problem = draw(shape, device=setting.device)
    exact = sequence_sums(problem, dense_of(problem).token_logps).flatten()
    builders = {OURS: partial(ours, OURS)}
    builders[OURS_FP32_LOGITS] = partial(ours, OURS_FP32_LOGITS, logits_dtype=torch.float32)
    for name, build in (builders | {name: BUILDERS[name] for name in asked_of(shape)}).items():
        values, note = {}, ""
        try:
            values = errors_in_nats(build(), problem, exact)
        except Exception as error:  # a peer may fail in any way of its own
            note = summary(error)
        yield Record(LOGPS, name, values, shape.sizes, note)
        free_memory()


def errors_in_nats(peer: Peer, problem: Problem, exact: torch.Tensor) -> dict[str, float]:
    """Compare one peer's log-likelihoods; one that knows only pairs reads the sequences two by two."""
    if peer.sequence_logps is None:
        raise NotImplementedError("computes no log-likelihoods of sequences")
    view = problem if peer.work == CPO else problem.as_pairs()
    with torch.no_grad():
        logps = peer.sequence_logps(view.hidden, view.weight, view.targets)
    error = (logps.flatten().double() - exact).abs()
    return {"nats_largest": error.max().item(), "nats_mean": error.mean().item()}


def peaks(setting: Setting) -> Iterator[Record]:
    """Measure the peak memory of ours at few and at many tokens, each in a process that has done nothing else."""
    measured = setting.choose(shapes.QUICK_CASES[:1], shapes.PEAK_MEMORY, shapes.GPU_PEAK_MEMORY)
    counts = setting.choose((256,), shapes.PEAK_MEMORY_TOKENS, shapes.GPU_PEAK_MEMORY_TOKENS)
    for shape in measured:
        case = f"peak memory, {'fp32' if shape.dtype.itemsize == 4 else 'bf16'}"
        for count in counts:
            sized = shape.with_tokens(count)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                values = alone.submit(peak_of_ours, sized, setting.device).result()
            yield Record(case, OURS, values, sized.conditions)


def peak_of_ours(shape: Shape, device: torch.device) -> dict[str, float]:
    """Measure the peak of one call in this process, against the plan and the budget."""
    line_up = LineUp(draw(shape, device=device))
    (record,) = measure(line_up.case([ours_alone(line_up)], rounds=1), device)
    return against_plan(record.values["peak_mib"], line_up.problem)


def ours_alone(line_up: LineUp) -> Contestant:
    """Describe ours with its default budget."""
    return line_up.peer(ours(OURS), line_up.problem.shape.work, needed=True)


def against_plan(peak_mib: float, problem: Problem, max_logits_bytes: int | None = None) -> dict[str, float]:
    """Return a peak, what the plan says it will hold and what it may, and the ratios of the peak to these."""
    plan = plan_of(problem, max_logits_bytes)
    planned, budget = plan.bytes / MIB, plan.budget_bytes / MIB
    values = {"peak_mib": peak_mib, "planned_mib": planned, "budget_mib": budget}
    return values | {"of_plan": peak_mib / planned, "of_budget": peak_mib / budget}
