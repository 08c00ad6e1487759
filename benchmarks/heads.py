"""Part `heads`: the head's loss and gradients beside every peer, on the heads of real models.

Every contestant is held against fp64 before its time counts. A floor has a record in every case; the values of the
others are ratios to the floor and to ours on the same work, taken in turns in one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from benchmarks import accuracy, memory, shapes
from benchmarks.ceilings import Ceilings
from benchmarks.contestants import FLOORS, OURS, OURS_ON
from benchmarks.floor import products
from benchmarks.measure import CaseResult, Row, free_memory, measure_those_that_run, summary
from benchmarks.oracle import Errors
from benchmarks.peers import asked_of, does, installed
from benchmarks.problem import draw
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.shapes import CPO, DPO, NO_GRAD, TRAINED, Shape
from benchmarks.timing import FOREVER, Effort

MIB = 2**20
LOGPS = "log-likelihoods of 1024 tokens"


def run(setting: Setting) -> Iterator[Record]:
    """Ceilings, every case, accuracy of log-likelihoods, peak memory in processes of their own."""
    ceilings = Ceilings()
    yield from ceilings.measure(setting)
    for shape in cases(setting):
        yield from measure(shape, setting, ceilings)
        free_memory()
    yield from accuracies(setting)
    yield from peaks(setting)


def cases(setting: Setting) -> tuple[Shape, ...]:
    """The shapes of a setting."""
    if setting.quick:
        return shapes.QUICK_CASES
    return shapes.GPU_CASES if setting.on_gpu else shapes.CASES


def effort(shape: Shape, setting: Setting) -> Effort:
    """Rounds: on a GPU a call is short enough for everyone to get all of them, on a CPU for those that are close."""
    if setting.on_gpu:
        return Effort(shape.rounds, seconds=3.0, far=FOREVER, very_far=FOREVER)
    return Effort(shape.rounds, far=1.25, very_far=1.6)


def measure(shape: Shape, setting: Setting, ceilings: Ceilings) -> Iterator[Record]:
    """The records of one case; a peer that is not there or fails has one that says why."""
    asked, (names, missing) = asked_of(shape), installed()
    able = [name for name in asked if name in names and does(name, shape)]
    result = measure_those_that_run(shape, able, effort(shape, setting), setting.device)
    for row in result.rows:
        yield Record(shape.name, row.contestant, values(row, result, ceilings), conditions(shape, row.work), shape.note)
    reasons = {name: why for name, why in missing.items() if name in asked} | dict(result.failed)
    for name, why in reasons.items():
        yield Record(shape.name, name, conditions=conditions(shape, shape.work), note=why)


def conditions(shape: Shape, work: str) -> dict[str, Any]:
    """What a record of a shape depends on; work other than the shape's own has one negative."""
    how = {"prompt": shape.prompt_share, "mode": shape.mode, "work": work}
    return sizes(shape) | {"K": shape.negatives if work == shape.work else 1} | how


def sizes(shape: Shape) -> dict[str, Any]:
    """Of head and tokens."""
    return {"V": shape.vocab, "H": shape.hidden, "N": shape.num_tokens, "dtype": shape.dtype_name}


def values(row: Row, result: CaseResult, ceilings: Ceilings) -> dict[str, float]:
    """What was measured of one contestant, and its ratios."""
    shape, seconds = result.shape, row.timing.best
    count = products(replace(shape, work=row.work))
    tflops = count * product_flops(shape) / seconds * 1e-12
    gbs = compulsory_bytes(shape, row.work) / seconds * 1e-9
    over_floor = seconds / result.seconds(FLOORS[row.work])
    measured = {
        "seconds": seconds,
        "median": row.timing.median,
        "rounds": len(row.timing.seconds),
        "floor": over_floor,
        "gemms": over_floor * count,
        "tflops": tflops,
        "of_tflops": tflops / ceilings.tflops[shape.dtype_name],
        "gbs": gbs,
        "of_gbs": gbs / ceilings.gbs,
        "of_ours": seconds / result.seconds(OURS_ON[row.work]),
    }
    if row.peak is not None:
        measured["peak_mib"] = row.peak / MIB
    return measured | ({} if row.errors is None else error_values(row.errors))


def product_flops(shape: Shape) -> int:
    """Of one product of the rows that predict a token."""
    rows = shape.groups * shape.candidates * (shape.tokens - shape.prompt_tokens)
    return 2 * rows * shape.vocab * shape.hidden


def compulsory_bytes(shape: Shape, work: str) -> int:
    """Every input that is needed read once, every gradient written once; no logits."""
    rows = shape.groups * shape.candidates * (shape.tokens - shape.prompt_tokens)
    hidden, weight = (count * shape.hidden * shape.dtype.itemsize for count in (rows, shape.vocab))
    of_hidden = 1 + (shape.mode != NO_GRAD) + (work == DPO)
    of_weight = 1 + (shape.mode == TRAINED) + (work == DPO)
    return of_hidden * hidden + of_weight * weight


def error_values(errors: Errors) -> dict[str, float]:
    """Against fp64."""
    if errors.nats is not None:
        return {"nats_largest": errors.nats[0], "nats_mean": errors.nats[1]}
    found = {"loss": errors.loss, "grad_hidden": errors.grad_hidden, "grad_weight": errors.grad_weight}
    return {f"error_{name}": error for name, error in found.items() if error is not None}


def accuracies(setting: Setting) -> Iterator[Record]:
    """Errors of sequence log-likelihoods, of every contestant."""
    shape = shapes.QUICK_ACCURACY if setting.quick else shapes.ACCURACY
    problem = draw(shape, device=setting.device)
    exact = accuracy.exact_logps(problem)
    for name, build in accuracy.contestants(asked_of(shape)).items():
        measured, note = {}, ""
        try:
            peer = build()
            if peer.sequence_logps is None:
                note = "computes no log-likelihoods of sequences"
            else:
                error = accuracy.error_of(name, peer, problem, exact)
                measured = {"nats_largest": error.largest, "nats_mean": error.mean}
        except Exception as error:  # a peer may fail in any way of its own
            note = summary(error)
        yield Record(LOGPS, name, measured, sizes(shape), note)
        free_memory()


def peaks(setting: Setting) -> Iterator[Record]:
    """Peak memory of ours at few and at many tokens."""
    few_and_many = shapes.GPU_PEAK_MEMORY_TOKENS if setting.on_gpu else shapes.PEAK_MEMORY_TOKENS
    measured = shapes.GPU_PEAK_MEMORY if setting.on_gpu else shapes.PEAK_MEMORY
    if setting.quick:
        few_and_many, measured = (256,), shapes.QUICK[:1]
    asked = [(shape, count) for shape in measured for count in few_and_many]
    with ThreadPoolExecutor(1 if setting.on_gpu else 2) as pool:  # a process has its memory to itself, not a GPU
        found = pool.map(lambda one: memory.measure(OURS, *one, setting.device), asked)
        for (shape, count), peak in zip(asked, found, strict=True):
            case = f"peak memory, {'fp32' if shape.dtype.itemsize == 4 else 'bf16'}"
            yield Record(case, OURS, peak_values(peak), conditions(shape.with_tokens(count), CPO))


def peak_values(peak: memory.Peak) -> dict[str, float]:
    """Against the plan and the budget, which a measurement of ours has."""
    held = {"planned": peak.planned, "budget": peak.budget}
    known = {name: count for name, count in held.items() if count is not None}
    ratios = {"of_plan": "planned", "of_budget": "budget"}
    return (
        {"peak_mib": peak.bytes / MIB}
        | {f"{name}_mib": count / MIB for name, count in known.items()}
        | {ratio: peak.bytes / known[name] for ratio, name in ratios.items() if name in known}
    )
