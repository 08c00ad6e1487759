"""What is measured on a GPU, and the bar that each figure is held against.

A case takes a :class:`Setting` and yields figures, each with the numbers behind it. Ceilings (copy bandwidth, bare
products) are measured on the spot, taking turns with what is compared with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import accuracy, bars
from benchmarks.contestants import FLOOR, OURS, OURS_FP32_LOGITS, OURS_ON
from benchmarks.floor import plan_of
from benchmarks.measure import CaseResult, Row, free_memory, measure_those_that_run, run_to_the_end, summary
from benchmarks.memory import meter_for
from benchmarks.peers import BUILDERS, does, installed, ours
from benchmarks.problem import IGNORE, draw
from benchmarks.shapes import FROZEN, Shape
from benchmarks.timing import Call, Effort, Timing, clock_for, round_robin
from cpo_kernels import linear_cpo_loss, plan
from cpo_kernels.kernels import plain
from cpo_kernels.kernels.triton import support as triton_support

HEAD = (None, 1.0, 0.0, 1.0)  # no bias, no scale, no softcap, temperature 1
COPY, PRODUCT = "torch copy_", "torch.mm"
FOREVER = float("inf")
MIB = 2**20
BEYOND = "GiB beyond gradients"


@dataclass(frozen=True)
class Setting:
    """Where and how large: ``quick`` takes sizes whose times mean nothing."""

    device: torch.device
    quick: bool
    rounds: int = 20

    def effort(self) -> Effort:
        """Everyone as often, a contestant that takes long less often."""
        return Effort(rounds=2 if self.quick else self.rounds, seconds=3.0, far=FOREVER, very_far=FOREVER)

    def time(self, calls: dict[str, Call], reference_name: str) -> dict[str, Timing]:
        """Medians are what is reported: the best of a GPU's clock is a matter of its boost."""
        for call in calls.values():
            call()
        return round_robin(calls, self.effort(), reference=reference_name, always=calls, clock=clock_for(self.device))


@dataclass(frozen=True)
class Figure:
    """One number, its bar (None: stated without one), and whether smaller is better."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    at_least: bool = False
    detail: str = ""

    @property
    def verdict(self) -> str:
        """ "met", "missed", or nothing where there is no bar."""
        if self.bar is None:
            return ""
        return "met" if (self.value >= self.bar if self.at_least else self.value <= self.bar) else "missed"


class NotHereError(Exception):
    """What a case measures is not here, so that it has nothing to say."""


class WrongResultError(Exception):
    """A kernel's result is not that of the reference, so its time would mean nothing."""


def triton_kernels(module: str) -> ModuleType:
    """A module of the Triton backend.

    Raises:
        NotHereError: the backend cannot be used, and there is no GPU that it would be expected of.
    """
    reason = triton_support.unavailable_reason()
    if reason is not None and not torch.cuda.is_available():
        raise NotHereError(reason)
    return import_module(f"cpo_kernels.kernels.triton.{module}")


def ceilings(setting: Setting) -> Iterator[Figure]:
    """What this GPU does at best: a large copy and a large product."""
    source = torch.randn(2**12 if setting.quick else 2**29, device=setting.device)
    target, size = torch.empty_like(source), 64 if setting.quick else 8192
    a, b = (torch.randn(size, size, device=setting.device).bfloat16() for _ in range(2))
    timings = setting.time({COPY: lambda: target.copy_(source), PRODUCT: lambda: torch.mm(a, b)}, COPY)
    yield Figure("copy bandwidth, read and written", 2 * source.nbytes / timings[COPY].median / 1e9, "GB/s")
    yield Figure(f"bf16 product of {size} cubed", 2 * size**3 / timings[PRODUCT].median / 1e12, "TFLOP/s")


VOCABULARIES = (32000, 50257, 65536, 128256, 151936, 262144)
LOGITS_BYTES = 2**30
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def row_kernels(setting: Setting, dtype: torch.dtype) -> Iterator[Figure]:
    """Row kernels against a copy of the same logits: a share of its bandwidth."""
    for vocab in (509,) if setting.quick else VOCABULARIES:
        rows = 8 if setting.quick else LOGITS_BYTES // (vocab * dtype.itemsize) // 8 * 8
        yield from row_kernels_of(setting, rows, vocab, dtype)


def row_kernels_of(setting: Setting, rows: int, vocab: int, dtype: torch.dtype) -> Iterator[Figure]:
    """Forward, backward in place, and bf16 gradients over fp32 logits, at one size."""
    kernels = triton_kernels("rows")
    logits = (3 * torch.randn(rows, vocab, device=setting.device)).to(dtype)
    targets = torch.randint(vocab, (rows,), device=setting.device)
    coef = torch.rand(rows, device=setting.device) + 0.5
    stats, logps = kernels.row_forward(logits, targets, None, *HEAD)
    check_rows(kernels, logits, targets, stats, logps, coef)
    # The gradient is written over a buffer of its own: what earlier calls left in it does not matter to the time.
    out = logits.clone()
    arguments = (targets, None, stats, coef, *HEAD)
    calls: dict[str, Call] = {
        COPY: lambda: out.copy_(logits),
        "forward": partial(kernels.row_forward, logits, targets, None, *HEAD),
        "backward in place": partial(kernels.row_backward_, out, *arguments),
    }
    touched = {COPY: 2 * logits.nbytes, "forward": logits.nbytes, "backward in place": 2 * logits.nbytes}
    if dtype == torch.float32:
        name = "backward, bf16 over fp32"
        calls[name] = partial(kernels.row_backward_, out, *arguments, torch.bfloat16)
        touched[name] = logits.nbytes * 3 // 2
    timings = setting.time(calls, COPY)
    speed = {name: touched[name] / timings[name].median / 1e9 for name in calls}
    for name in list(calls)[1:]:
        share, detail = speed[name] / speed[COPY], f"{speed[name]:.0f} of {speed[COPY]:.0f} GB/s, R={rows}"
        yield Figure(
            f"row {name}, {NAMES[dtype]}, V={vocab}", share, "of copy", bars.H200_ROWS, at_least=True, detail=detail
        )


def check_rows(
    kernels: ModuleType, logits: Tensor, targets: Tensor, stats: Tensor, logps: Tensor, coef: Tensor, rows: int = 64
) -> None:
    """Hold the first and last rows against the reference in float64."""
    for some in (slice(0, rows), slice(-rows, None)):
        exact = logits[some].double()
        expected_stats, expected = plain.row_forward(exact, targets[some], None, *HEAD)
        compare("row_forward", logps[some], expected, 1e-5)
        wanted = plain.row_backward(exact, targets[some], None, expected_stats, coef[some].double(), *HEAD)
        part = stats[:, some].contiguous()
        grad = kernels.row_backward(logits[some].contiguous(), targets[some], None, part, coef[some], *HEAD)
        compare("row_backward", grad, wanted, 16 * torch.finfo(logits.dtype).eps)


def compare(name: str, result: Tensor, expected: Tensor, allowed: float) -> None:
    """Raise unless ||result - expected|| / ||expected|| is within ``allowed``."""
    error = ((result.double() - expected).norm() / expected.norm()).item()
    if not error <= allowed:  # not `>`: NaN is wrong too
        raise WrongResultError(f"{name}: relative error {error:.2g}, allowed {allowed:.2g}")


LLAMA3 = Shape("llama3 8k bf16", 128256, 4096, 16, 128, torch.bfloat16, "the bar's shape")
SHORT = replace(LLAMA3, name="llama3 4k bf16", groups=8, reason="published for plain cross-entropy on this chip")
QWEN = replace(LLAMA3, name="qwen 8k bf16", vocab=151936, reason="the shape of TRL's issue 7244")
NARROW = replace(LLAMA3, name="llama3 8k bf16, H=1024", hidden=1024, reason="little work a logit: the rows weigh most")
ACCURACY = replace(LLAMA3, name="accuracy", groups=1, tokens=1024, reason="1024 log-probabilities summed")
TINY = {"vocab": 509, "hidden": 32, "groups": 2, "tokens": 16}


def sized(shape: Shape, setting: Setting) -> Shape:
    """The shape itself, or a tiny one of its kind."""
    return replace(shape, **TINY) if setting.quick else shape


FROZEN_HEADS = {shape: replace(shape, name=f"{shape.name}, frozen", mode=FROZEN) for shape in (LLAMA3, QWEN)}
# What the case "loss" must say, by (name, unit): the bar of each.
LOSS_BARS = {
    (f"{OURS}, {SHORT.name}", "ms"): bars.H200_SHORT_MS,
    (f"{OURS}, {SHORT.name}", "x floor"): bars.H200_SHORT_LOSS,
    **{(f"{OURS}, {head.name}", "x floor"): bars.H200_LOSS for pair in FROZEN_HEADS.items() for head in pair},
    **{(f"{OURS}, {trained.name}", BEYOND): bars.H200_TRAINED_GIB for trained in FROZEN_HEADS},
    **{(f"{OURS}, {frozen.name}", BEYOND): bars.H200_FROZEN_GIB for frozen in FROZEN_HEADS.values()},
}


def loss_against_floor(setting: Setting) -> Iterator[Figure]:
    """Loss and gradients at the bars' shapes: time over the bare products, milliseconds, and peak memory."""
    for shape in (SHORT, *itertools.chain.from_iterable(FROZEN_HEADS.items())):
        result = measure_loss(setting, shape, [])[0]
        yield from loss_figures(result, LOSS_BARS)
        own = next(row for row in result.rows if row.contestant == OURS)
        values = {"ms": own.timing.median * 1e3, BEYOND: None if own.peak is None else own.peak / 2**30}
        for unit, found in values.items():
            bar = LOSS_BARS.get((f"{OURS}, {shape.name}", unit))
            if bar is not None and found is not None:
                yield Figure(f"{OURS}, {shape.name}", found, unit, bar)


def loss_against_peers(setting: Setting) -> Iterator[Figure]:
    """Loss and gradients beside every peer that is installed, without a prompt and with half of it: time and peak."""
    names, missing = installed()
    for shape in (QWEN, replace(QWEN, name=f"{QWEN.name}, half prompt", prompt_share=0.5)):
        result, failed = measure_loss(setting, shape, [name for name in names if does(name, shape)])
        yield from loss_figures(result)
        yield from against_fastest(result)
        yield from not_measured(shape.name, "x floor", missing | failed)


def against_fastest(result: CaseResult) -> Iterator[Figure]:
    """The peer that comes closest to ours on the same work, by medians; nothing where there are no peers."""
    median = {row.contestant: row.timing.median for row in result.rows}
    ours_on = {row.work: row.timing.median for row in result.rows if row.contestant in OURS_ON.values()}
    rivals = {row.contestant: median[row.contestant] / ours_on[row.work] for row in result.rows if is_peer(row)}
    if rivals:
        nearest = min(rivals, key=rivals.__getitem__)
        detail = f"{nearest}; slower: {', '.join(name for name in rivals if name != nearest) or 'none'}"
        yield Figure(f"fastest peer, {result.shape.name}", rivals[nearest], "x ours", 1.0, at_least=True, detail=detail)


def is_peer(row: Row) -> bool:
    """Neither ours nor a floor."""
    return row.contestant in BUILDERS


def not_measured(what: str, unit: str, reasons: Mapping[str, str]) -> Iterator[Figure]:
    """A figure without a number for each of these peers, with its reason."""
    for name, reason in reasons.items():
        yield Figure(f"{name}, {what}", float("nan"), unit, detail=reason)


def measure_loss(setting: Setting, shape: Shape, peers: list[str]) -> tuple[CaseResult, dict[str, str]]:
    """The case without those peers that compute another loss or fail, and why each of them has no result."""
    failed = failures(peers, setting)
    able = [name for name in peers if name not in failed]
    result = measure_those_that_run(sized(shape, setting), able, setting.effort(), setting.device)
    return result, failed | dict(result.failed)


def failures(names: Sequence[str], setting: Setting) -> dict[str, str]:
    """Those peers that do not get through a tiny case here, and why."""
    return {name: reason for name in names if (reason := failure(name, setting))}


def failure(name: str, setting: Setting) -> str:
    """Why a peer does not get through a tiny case here, or nothing."""
    peer = BUILDERS[name]()
    problem = draw(replace(QWEN, **TINY), device=setting.device)
    try:
        run_to_the_end(lambda: peer.run(problem.as_work(peer.work_on(problem.shape) or problem.shape.work)))
    except Exception as error:  # a peer may fail in any way of its own
        return summary(error)
    return ""


def loss_figures(result: CaseResult, bar_of: Mapping[tuple[str, str], float] | None = None) -> Iterator[Figure]:
    """Times over the floor and peaks of everyone, some with a bar."""
    shape, floor = result.shape, next(r.timing.median for r in result.rows if r.contestant == FLOOR)
    for row in result.rows:
        seconds, name = row.timing.median, f"{row.contestant}, {shape.name}"
        detail = f"{seconds * 1e3:.2f} ms" + ("" if row.peak is None else f", peak {row.peak / MIB:.0f} MiB")
        if row.errors is not None:
            detail += f", error {row.errors.worst():.1e}"
        yield Figure(name, seconds / floor, "x floor", (bar_of or {}).get((name, "x floor")), detail=detail)


def logps_without_gradients(setting: Setting) -> Iterator[Figure]:
    """Log-likelihoods against one product, and the two ways to them."""
    for shape in (LLAMA3,) if setting.quick else (LLAMA3, QWEN, NARROW):
        yield from logps_of(setting, sized(shape, setting), shape.name)


def logps_of(setting: Setting, shape: Shape, name: str) -> Iterator[Figure]:
    """One product; ours as users call it; product and row kernel; the fused path, plain and with everything."""
    problem = draw(shape, device=setting.device)
    hidden, weight, targets = problem.hidden.detach(), problem.weight.detach(), problem.targets
    rows, flat = hidden.flatten(0, 2), targets.flatten()
    buffer = rows.new_empty(len(rows), len(weight))
    fused, row_forward = triton_kernels("linear").linear_forward, triton_kernels("rows").row_forward
    seed = torch.tensor(0, device=setting.device)

    def product_and_rows() -> object:
        return row_forward(torch.mm(rows, weight.T, out=buffer), flat, None, *HEAD)

    def ours_without_gradients() -> object:
        with torch.no_grad():
            return ours(OURS).sequence_logps(hidden, weight, targets)

    calls: dict[str, Call] = {
        PRODUCT: lambda: torch.mm(rows, weight.T, out=buffer),
        OURS: ours_without_gradients,
        "torch.mm and row kernel": product_and_rows,
        "fused linear": partial(fused, rows, weight, flat, None, *HEAD),
        "fused linear, sample and entropy": partial(fused, rows, weight, flat, None, *HEAD, seed=seed, entropy=True),
    }
    expected = token_logps_in_float64(rows[:256], weight, flat[:256])
    compare("linear_forward", fused(rows, weight, flat, None, *HEAD).logps[:256], expected, 1e-4)
    timings = setting.time(calls, PRODUCT)
    for call, timing in timings.items():
        ratio, detail = timing.median / timings[PRODUCT].median, f"{timing.median * 1e3:.2f} ms"
        bar = bars.NO_GRAD if call == OURS else None
        yield Figure(f"no_grad, {call}, {name}", ratio, "x one product", bar, detail=detail)


def token_logps_in_float64(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(n,), of few rows."""
    logits = hidden.double() @ weight.double().T
    return torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def accuracy_of_sums(setting: Setting) -> Iterator[Figure]:
    """Sequence log-likelihoods of 1,024 bf16 tokens against float64; the bar is for fp32 logits."""
    shape, (names, missing) = sized(ACCURACY, setting), installed()
    names = [name for name in names if does(name, shape)]
    failed = missing | failures(names, setting)
    for error in accuracy.measure(shape, setting.device, []):
        yield error_of(error)
    for name in names:
        if name in failed:
            continue
        try:
            yield error_of(accuracy.measure(shape, setting.device, [name])[-1])
        except Exception as error:  # a peer may fail in any way of its own
            failed[name] = summary(error)
        free_memory()
    yield from not_measured("log-likelihood", "nats", failed)


def error_of(error: accuracy.LogpError) -> Figure:
    """The largest of the sequences; the bar is for ours with fp32 logits."""
    bar = bars.ACCURACY if error.contestant == OURS_FP32_LOGITS else None
    return Figure(f"{error.contestant}, log-likelihood", error.largest, "nats", bar, detail=f"mean {error.mean:.1e}")


def peak_memory(setting: Setting) -> Iterator[Figure]:
    """Peak beyond inputs and gradients: at most the plan's bytes, and the budget's, + 2 %, flat in N."""
    tokens = (64, 128) if setting.quick else (2048, 8192, 16384)
    budgets = (40 * 509 * 2,) if setting.quick else (256 * MIB, 1024 * MIB)
    shape = replace(sized(LLAMA3, setting), tokens=16 if setting.quick else 64)
    for budget, count, padded in itertools.product(budgets, tokens, (False, True)):
        yield from peak_of(setting, shape.with_tokens(count), budget, padded=padded)


def peak_of(setting: Setting, shape: Shape, budget: int, *, padded: bool) -> Iterator[Figure]:
    """One call with its gradients, after a first one for what libraries keep; `padded`: half of each candidate is."""
    problem = draw(shape, device=setting.device)
    if padded:
        problem.targets[..., shape.tokens // 2 :] = IGNORE
    tensors = problem.hidden, problem.weight

    def step() -> int:
        loss = linear_cpo_loss(*tensors, problem.targets, ref_logps=problem.ref_logps, max_logits_bytes=budget).loss
        return sum(grad.nbytes for grad in torch.autograd.grad(loss, tensors))

    step()
    meter = meter_for(setting.device)
    meter.start()
    grads = step()
    beyond = meter.growth() - grads
    planned = plan(*tensors, problem.targets, ref_logps=problem.ref_logps, max_logits_bytes=budget)
    detail = f"{beyond / MIB:.1f} MiB, planned {planned.bytes / MIB:.1f}, budget {planned.budget_bytes / MIB:.1f} MiB"
    detail += f"; {planned.note}" if planned.note else ""
    name = f"peak, N={shape.num_tokens}, budget {budget / MIB:.3g} MiB" + ", half padding" * padded
    yield Figure(name, beyond / planned.bytes, "of the plan", bars.PEAK_MEMORY, detail=detail)
    yield Figure(name, beyond / planned.budget_bytes, "of the budget", bars.PEAK_MEMORY, detail=detail)


def chunks(setting: Setting) -> Iterator[Figure]:
    """How the plan cuts the bar's shape: what the floor multiplies."""
    problem = draw(sized(LLAMA3, setting), device=setting.device)
    planned = plan_of(problem, None)
    yield Figure(
        "chunks of the plan", len(planned.chunks), "", detail=str([chunk.num_rows for chunk in planned.chunks])
    )
    yield Figure("logits of the plan", planned.bytes / MIB, "MiB", detail=planned.note)


CASES: dict[str, Callable[[Setting], Iterator[Figure]]] = {
    "ceilings": ceilings,
    "row kernels bf16": partial(row_kernels, dtype=torch.bfloat16),
    "row kernels fp32": partial(row_kernels, dtype=torch.float32),
    "plan": chunks,
    "loss": loss_against_floor,
    "no_grad": logps_without_gradients,
    "peak memory": peak_memory,
    "loss beside peers": loss_against_peers,
    "accuracy": accuracy_of_sums,
}
