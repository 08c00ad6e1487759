"""Part `heads`: the head's loss and gradients beside every peer, on the heads of real models.

Every contestant is held against float64 before its time counts. Ratios are to the floor and to ours on the same work,
taken in turns in one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import shapes
from benchmarks.ceilings import COPY
from benchmarks.contestants import OURS, LineUp, asked_of
from benchmarks.floor import plan_of
from benchmarks.measure import MIB, Case, dtype_name, each, measure, ready
from benchmarks.peers import ours
from benchmarks.problem import draw
from benchmarks.processes import call_alone
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.shapes import LOGPS, Shape
from cpo_kernels.kernels.cpu import gemm as cpu_gemm

CEILINGS, MULTIPLY_ADDS = "ceilings", "multiply-adds"


def run(setting: Setting) -> Iterator[Record]:
    """Measure products, every case, accuracy of log-likelihoods, peak memory in processes of their own."""
    yield from ceilings(setting)
    chosen = setting.choose(shapes.QUICK_CASES, shapes.CASES, shapes.GPU_CASES)
    cases = {shape.name: partial(beside_peers, shape, setting) for shape in chosen}
    accuracy = setting.choose(shapes.QUICK_ACCURACY, shapes.ACCURACY, shapes.ACCURACY)
    yield from each(cases | {LOGPS: partial(beside_peers, accuracy, setting), "peak memory": partial(peaks, setting)})


def beside_peers(shape: Shape, setting: Setting) -> Iterator[Record]:
    """Measure one shape with the peers that it asks for."""
    torch._dynamo.reset()
    line_up = LineUp(draw(shape, device=setting.device), setting.ceilings)
    yield from measure(line_up.case(line_up.everyone(asked_of(shape))), setting.device)


def ceilings(setting: Setting) -> Iterator[Record]:
    """Measure large products of each dtype, torch's and ours, beside what the machine does at best."""
    size, device = setting.choose(64, 4096, 8192), setting.device
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
        yield from measure(Case(CEILINGS, products, {"dtype": name, "size": size}), device)
        if name in setting.ceilings:
            yield Record(CEILINGS, f"{MULTIPLY_ADDS} {name}", {"tflops": setting.ceilings[name]}, {"dtype": name})
    if COPY in setting.ceilings:
        yield Record(CEILINGS, COPY, {"gbs": setting.ceilings[COPY]})


def best_of(found: list[Record]) -> dict[str, float]:
    """Return the fastest product of each dtype, which is what a call is made of."""
    products = [r for r in found if "tflops" in r.values and not r.contestant.startswith(MULTIPLY_ADDS)]
    rates = sorted((r.values["tflops"], r.conditions["dtype"]) for r in products)
    return {dtype: rate for rate, dtype in rates}  # the last of a dtype counts


def peaks(setting: Setting) -> Iterator[Record]:
    """Measure the peak memory of ours, each time in a process that has done nothing else."""
    measured = setting.choose(shapes.QUICK_CASES[:1], shapes.PEAK_MEMORY, shapes.GPU_PEAK_MEMORY)
    counts = setting.choose((256,), shapes.PEAK_MEMORY_TOKENS, shapes.GPU_PEAK_MEMORY_TOKENS)
    for shape, budget, count in itertools.product(measured, setting.choose((0,), (0, 48), (0, 256, 1024)), counts):
        sized = shape.with_tokens(count)
        case = f"peak memory, {shape.name}, " + (f"{budget} MiB" if budget else "the default")
        values = call_alone(peak_of_ours, sized, budget * MIB or None, setting.device)
        yield Record(case, OURS, values, sized.conditions)


def peak_of_ours(shape: Shape, max_logits_bytes: int | None, device: torch.device) -> dict[str, float]:
    """Measure the peak of one call in this process, after a first one, against the plan and the budget."""
    line_up = LineUp(draw(shape, device=device))
    peer = line_up.peer(ours(OURS, max_logits_bytes), shape.work, needed=True)
    (record,) = measure(line_up.case([peer], rounds=1), device)
    plan = plan_of(line_up.problem, max_logits_bytes)
    peak, planned, budget = record.values["peak_mib"], plan.bytes / MIB, plan.budget_bytes / MIB
    values = {"peak_mib": peak, "planned_mib": planned, "budget_mib": budget}
    return values | {"of_plan": peak / planned, "of_budget": peak / budget}
