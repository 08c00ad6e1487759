"""What is measured of the compiled CUDA kernels, and the bar that each figure is held against.

Cases as in benchmarks.gpu_cases, which has those of Triton's kernels; here Triton's take turns with them. What is new
to the hardware and can hang, Hopper's copy engine and barriers, comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks import bars
from benchmarks.contestants import FLOOR, Contestant, contestant, floor
from benchmarks.floor import plan_of
from benchmarks.gpu_cases import (
    COPY,
    HEAD,
    LLAMA3,
    LOGITS_BYTES,
    MIB,
    NAMES,
    NARROW,
    PRODUCT,
    QWEN,
    VOCABULARIES,
    Figure,
    Setting,
    compare,
    loss_figures,
    not_measured,
    token_logps_in_float64,
    triton_kernels,
)
from benchmarks.kernels.calls import (
    CONTRASTS,
    CUDA,
    FORWARD_ERROR,
    TRITON,
    ContrastProblem,
    LogitsProblem,
    RowProblem,
    arch_of,
    missing,
    missing_hopper,
    time_entries,
    under_choices,
)
from benchmarks.measure import CaseResult
from benchmarks.peers import Peer, ours
from benchmarks.problem import draw
from benchmarks.shapes import NLL, Shape
from benchmarks.timing import Call
from cpo_kernels.kernels import registry, selection
from cpo_kernels.kernels.cuda import hopper as cuda_hopper
from cpo_kernels.kernels.cuda import rows as cuda_rows
from cpo_kernels.kernels.selection import Choice, Sizes

Figures = Iterator[Figure]
SMALL = {"vocab": 257, "hidden": 16, "groups": 2, "tokens": 2}  # a dry run's: every GPU thread is emulated
L2_BYTES = 24 * MIB  # what stays in an L2 of 50 MiB beside the gradient
OURS_CUDA, OURS_TRITON = "cpo-kernels cuda", "cpo-kernels triton"
OURS_FP32, OURS_KEPT = f"{OURS_CUDA}, fp32 logits", f"{OURS_CUDA}, exponentials kept"
OURS_ONE_PASS = f"{OURS_CUDA}, row_gradient_"


def sized(shape: Shape, setting: Setting) -> Shape:
    """The shape itself, or a small one of its kind."""
    return replace(shape, **SMALL) if setting.quick else shape


def where_there_are_kernels(case: Callable[[Setting], Figures]) -> Callable[[Setting], Figures]:
    """The case; where it cannot run, a figure that says why."""

    def run(setting: Setting) -> Figures:
        if reason := missing(setting.device):
            yield from not_measured("every figure", "", {f"backend {CUDA!r}": reason})
        else:
            yield from case(setting)

    return run


def picked(operation: str, vocab: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the table picks the CUDA kernel for it."""
    sizes = Sizes(vocab, dtype)
    return selection.choices_for(selection.AUTO, arch_of(device), sizes, registry.AVAILABLE).get(operation) == CUDA


def row_kernels(setting: Setting, dtype: torch.dtype) -> Figures:
    """Row kernels against a copy of the same logits, at least 90 % of its bandwidth, and against Triton's."""
    for vocab in (SMALL["vocab"],) if setting.quick else VOCABULARIES:
        rows = 8 if setting.quick else LOGITS_BYTES // (vocab * dtype.itemsize) // 8 * 8
        yield from row_kernels_of(setting, RowProblem(rows, vocab, dtype, setting.device))


def row_kernels_of(setting: Setting, problem: RowProblem) -> Figures:
    """Forward; backward in place; bf16 gradients over fp32 logits; both in one read and one write where they fit."""
    logits, dtype = problem.logits, problem.logits.dtype
    rows, vocab = logits.shape
    touched = {"forward": logits.nbytes, "backward in place": 2 * logits.nbytes}
    made: dict[str, Callable[[str], Call]] = {"forward": problem.forward, "backward in place": problem.backward_}
    if dtype == torch.float32:
        touched["backward, bf16 over fp32"] = logits.nbytes * 3 // 2
        made["backward, bf16 over fp32"] = partial(problem.backward_, grad_dtype=torch.bfloat16)
    calls: dict[str, Call] = {COPY: lambda: problem.buffer.copy_(logits)}
    calls |= {f"{name}, {backend}": make(backend) for name, make in made.items() for backend in (CUDA, TRITON)}
    if fits := cuda_rows.row_gradient_takes(logits):
        calls["row_gradient_"] = problem.gradient_()
    timings = {name: timing.median for name, timing in setting.time(calls, COPY).items()}
    copy = 2 * logits.nbytes / timings[COPY] / 1e9

    def of_copy(name: str, nbytes: int, seconds: float) -> Figure:
        speed = nbytes / seconds / 1e9
        detail = f"{speed:.0f} of {copy:.0f} GB/s, R={rows}"
        return Figure(name, speed / copy, "of copy", bars.H200_ROWS, at_least=True, detail=detail)

    where = f"{NAMES[dtype]}, V={vocab}"
    for name in made:
        seconds, others = (timings[f"{name}, {backend}"] for backend in (CUDA, TRITON))
        yield of_copy(f"row {name}, cuda, {where}", touched[name], seconds)
        operation = "row_forward" if name == "forward" else "row_backward"
        bar = 1.0 if picked(operation, vocab, dtype, setting.device) else None
        detail = f"Triton's: {touched[name] / others / 1e9:.0f} GB/s"
        yield Figure(f"row {name}, cuda, {where}", others / seconds, "x Triton", bar, at_least=True, detail=detail)
    name = f"row_gradient_, cuda, {where}"
    if not fits:
        yield from not_measured(where, "of copy", {"row_gradient_, cuda": "a row does not fit the shared memory"})
        return
    yield of_copy(name, 2 * logits.nbytes, timings["row_gradient_"])
    pair = timings[f"forward, {TRITON}"] + timings[f"backward in place, {TRITON}"]
    detail = "speed over that of Triton's forward and backward"
    yield Figure(name, pair / timings["row_gradient_"], "x Triton", detail=detail)


LOSS_VOCABULARIES = (32000, 128256)
LOSS_BAR = 1.1


def loss_of_logits(setting: Setting, dtype: torch.dtype) -> Figures:
    """``cpo_loss`` of given logits with its gradient against a copy of them: at most 1.1x."""
    for vocab in (SMALL["vocab"],) if setting.quick else LOSS_VOCABULARIES:
        for in_cache in (False, True):
            yield from loss_of_logits_at(setting, vocab, dtype, in_cache=in_cache)


def loss_of_logits_at(setting: Setting, vocab: int, dtype: torch.dtype, *, in_cache: bool) -> Figures:
    """As users call it on either backend, and the CUDA launch alone."""
    size, tokens = (L2_BYTES, 4) if in_cache else (LOGITS_BYTES, 128)
    if setting.quick:
        size, tokens = 0, 2  # one group
    problem = LogitsProblem(size, tokens, vocab, dtype, setting.device)
    logits = problem.logits.detach()
    target = torch.empty_like(logits)
    calls: dict[str, Call] = {
        COPY: lambda: target.copy_(logits),
        OURS_CUDA: problem.step(CUDA),
        f"{OURS_CUDA}, the launch alone": problem.launch(),
        OURS_TRITON: problem.step(TRITON),
    }
    timings = setting.time(calls, COPY)
    floor_of = "1.0 where L2 keeps the logits, else 1.5" if in_cache else "two reads and one write are 1.5"
    where = f"{NAMES[dtype]}, V={vocab}{', in L2' * in_cache}"
    for name in list(calls)[1:]:
        ratio = timings[name].median / timings[COPY].median
        detail = f"{timings[name].median * 1e6:.0f} us, {logits.nbytes / MIB:.4g} MiB; {floor_of}"
        bar = LOSS_BAR if name == OURS_CUDA and not in_cache else None  # a small call is the host's time
        yield Figure(f"cpo_loss of logits, {name}, {where}", ratio, "x copy", bar, detail=detail)


def contrasts(setting: Setting) -> Figures:
    """The contrast of a chunk, from launch to finish."""
    for groups, candidates in CONTRASTS:
        tokens = 3 if setting.quick else 128
        problem = ContrastProblem(groups, candidates, tokens, setting.device)
        timings = setting.time({backend: problem.call(backend) for backend in (CUDA, TRITON)}, CUDA)
        for backend, timing in timings.items():
            yield Figure(f"contrast, {backend}, G={groups}, C={candidates}, T={tokens}", timing.median * 1e6, "us")


def our_peer(name: str, backend: str, *choices: Choice, logits_dtype: torch.dtype | None = None) -> Peer:
    """Ours by a named backend, whatever the table says."""
    return under_choices(ours(name, None, logits_dtype, backend), *choices)


def chosen(setting: Setting, operation: str) -> Choice:
    """That the CUDA kernels take one of their ways around."""
    return Choice(operation, arch_of(setting.device), CUDA)


def loss(setting: Setting, shape: Shape, peers: Sequence[Peer], bar_of: Sequence[str] = ()) -> Figures:
    """Loss and gradients over the bare products of the same chunks; the bar is for the fastest of some of the peers.

    What fails is left out of the turns and raised at the end.
    """
    problem = draw(sized(shape, setting), device=setting.device)
    entries: list[Contestant] = [floor(problem, None), *(contestant(peer, problem) for peer in peers)]
    rows, errors = time_entries(setting, problem, entries, FLOOR)
    result = CaseResult(shape, tuple(rows), plan_of(problem, None))
    seconds = {row.contestant: row.timing.median for row in rows}
    yield from loss_figures(result)
    if able := [name for name in bar_of if name in seconds]:
        best = min(able, key=seconds.__getitem__)
        name = f"the fastest by the CUDA kernels, {shape.name}"
        yield Figure(name, seconds[best] / seconds[FLOOR], "x floor", bars.H200_LOSS, detail=best)
    if errors:
        raise errors[0]


def losses(setting: Setting) -> Figures:
    """Loss and gradients by the row kernels of either backend."""
    peers = [our_peer(OURS_CUDA, CUDA), our_peer(OURS_TRITON, TRITON)]
    yield from loss(setting, LLAMA3, [*peers, our_peer(OURS_FP32, CUDA, logits_dtype=torch.float32)])
    yield from loss(setting, QWEN, peers)


def losses_of_kept(setting: Setting) -> Figures:
    """The same where Hopper's linear path keeps exponentials: the faster of both ways is at most 1.08x the floor."""
    peers, reason = [our_peer(OURS_CUDA, CUDA)], missing_hopper(setting.device)
    if not reason:
        peers.append(our_peer(OURS_KEPT, CUDA, chosen(setting, "linear_kept")))
    for shape in (LLAMA3, QWEN):
        yield from loss(setting, shape, peers, [peer.name for peer in peers])
        yield from not_measured(shape.name, "x floor", {OURS_KEPT: reason} if reason else {})


def likelihood(setting: Setting) -> Figures:
    """The likelihood of the truth alone, whose coefficients are known: rows are read twice or once."""
    shape = replace(LLAMA3, name="llama3 8k bf16, likelihood", work=NLL)
    one_pass = our_peer(OURS_ONE_PASS, CUDA, chosen(setting, "row_gradient_"))
    yield from loss(setting, shape, [our_peer(OURS_CUDA, CUDA), one_pass, our_peer(OURS_TRITON, TRITON)])


def logps_without_gradients(setting: Setting) -> Figures:
    """Log-likelihoods against one product: at most 1.05x by Hopper's fused linear path."""
    for shape in (LLAMA3, NARROW):
        yield from logps_of(setting, sized(shape, setting), shape.name)


HOPPER = "fused linear, cuda"


def logps_of(setting: Setting, shape: Shape, name: str) -> Figures:
    """One product; product and row kernel; the fused linear paths."""
    problem = draw(shape, device=setting.device)
    hidden, weight, targets = problem.hidden.detach().flatten(0, 2), problem.weight.detach(), problem.targets.flatten()
    buffer = hidden.new_empty(len(hidden), len(weight))
    fused = triton_kernels("linear").linear_forward
    given = (hidden, weight, targets, None, *HEAD)

    def product() -> torch.Tensor:
        return torch.mm(hidden, weight.T, out=buffer)

    logps: dict[str, Callable[[], torch.Tensor]] = {
        "torch.mm and row kernel, cuda": lambda: cuda_rows.row_forward(product(), targets, None, *HEAD)[1],
        "fused linear, triton": lambda: fused(*given).logps,
    }
    reason = missing_hopper(setting.device)
    if not reason:
        logps[HOPPER] = lambda: cuda_hopper.linear_forward(*given)[1]
    expected = token_logps_in_float64(hidden[:256], weight, targets[:256])
    for call, run in logps.items():
        # A product alone leaves logits in the dtype of hidden.
        allowed = torch.finfo(hidden.dtype).eps if call.startswith(PRODUCT) else 10 * FORWARD_ERROR
        compare(call, run()[:256], expected, allowed)
    timings = setting.time({PRODUCT: product, **logps}, PRODUCT)
    for call, timing in timings.items():
        ratio, detail = timing.median / timings[PRODUCT].median, f"{timing.median * 1e3:.2f} ms"
        bar = bars.NO_GRAD if call == HOPPER else None
        yield Figure(f"no_grad, {call}, {name}", ratio, "x one product", bar, detail=detail)
    yield from not_measured(name, "x one product", {f"no_grad, {HOPPER}": reason} if reason else {})


ALL: dict[str, Callable[[Setting], Figures]] = {
    "row kernels bf16": partial(row_kernels, dtype=torch.bfloat16),
    "row kernels fp32": partial(row_kernels, dtype=torch.float32),
    "loss of logits bf16": partial(loss_of_logits, dtype=torch.bfloat16),
    "loss of logits fp32": partial(loss_of_logits, dtype=torch.float32),
    "contrast": contrasts,
    "likelihood": likelihood,
    "loss": losses,
    "no_grad": logps_without_gradients,
    "loss, kept": losses_of_kept,
}
CASES = {name: where_there_are_kernels(case) for name, case in ALL.items()}
