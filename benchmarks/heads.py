"""Parts `heads` and `wide`: the head's loss and gradients beside every peer, on the heads of real models.

Every contestant is held against float64 before its time counts. Ratios are to the floor and to ours on the same work,
taken in turns in one process. `wide` has the largest heads, in more rounds than a run of all parts has time for: a call
takes seconds and its gradient a gigabyte of fresh memory, which a virtual machine may or may not have at hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import shapes
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

CEILINGS = "ceilings"


def run(setting: Setting) -> Iterator[Record]:
    """Measure ceilings, every case, accuracy of log-likelihoods, peak memory in processes of their own."""
    found = ceilings(setting)
    yield from found
    best = best_of(found)
    chosen = setting.choose(shapes.QUICK_CASES, shapes.CASES, shapes.GPU_CASES)
    cases = {shape.name: partial(beside_peers, shape, setting, best) for shape in chosen}
    accuracy = setting.choose(shapes.QUICK_ACCURACY, shapes.ACCURACY, shapes.ACCURACY)
    yield from each(cases | {LOGPS: partial(beside_peers, accuracy, setting), "peak memory": partial(peaks, setting)})


def run_wide(setting: Setting) -> Iterator[Record]:
    """Measure ceilings and the largest heads; nothing on a GPU, where they are cases of the part `heads`."""
    if not setting.on_gpu:
        found = ceilings(setting)
        yield from found
        chosen, best = setting.choose(shapes.QUICK_CASES[:1], shapes.WIDE, ()), best_of(found)
        yield from each({shape.name: partial(beside_peers, shape, setting, best) for shape in chosen})


def beside_peers(shape: Shape, setting: Setting, best: dict[str, float] | None = None) -> Iterator[Record]:
    """Measure one shape with the peers that it asks for."""
    torch._dynamo.reset()
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
    source = torch.ones(setting.choose(2**20, 2**29, 2**31), dtype=torch.uint8, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    copied = ready("copy", copy, values=lambda seconds: {"gbs": 2e-9 * source.nbytes / seconds})
    return records + measure(Case(CEILINGS, [copied], {"bytes": source.nbytes}), device)


def best_of(found: list[Record]) -> dict[str, float]:
    """Return the fastest product of each dtype."""
    rates = sorted((r.values["tflops"], r.conditions["dtype"]) for r in found if "tflops" in r.values)
    return {dtype: rate for rate, dtype in rates}  # the last of a dtype counts


def peaks(setting: Setting) -> Iterator[Record]:
    """Measure the peak memory of ours at few and at many tokens, each in a process that has done nothing else.

    It must be flat in N, and within the budget: the default's, and an explicit one.
    """
    measured = setting.choose(shapes.QUICK_CASES[:1], shapes.PEAK_MEMORY, shapes.GPU_PEAK_MEMORY)
    counts = setting.choose((256,), shapes.PEAK_MEMORY_TOKENS, shapes.GPU_PEAK_MEMORY_TOKENS)
    for shape, budget, count in itertools.product(measured, setting.choose((0,), (0, 64), (0, 256, 1024)), counts):
        sized = shape.with_tokens(count)
        case = f"peak memory, {'fp32' if shape.dtype.itemsize == 4 else 'bf16'}" + f", {budget} MiB" * bool(budget)
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
