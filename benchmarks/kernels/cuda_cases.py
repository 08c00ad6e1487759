"""Part `cuda`: the compiled CUDA kernels, with Triton's taking turns with them.

What is new to the hardware and can hang, Hopper's copy engine and barriers, comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.contestants import LineUp
from benchmarks.kernels.calls import (
    CONTRASTS,
    COPY,
    CUDA,
    HEAD,
    LOGITS_BYTES,
    PRODUCT,
    SMALL_VOCABULARY,
    TRITON,
    ContrastProblem,
    LogitsProblem,
    ProductCase,
    arch_of,
    missing,
    missing_hopper,
    row_kernels,
    triton_kernels,
    under_choices,
)
from benchmarks.measure import MIB, Case, Contestant, ContestantError, NotHereError, dtype_name, each, measure, ready
from benchmarks.peers import Peer, ours
from benchmarks.problem import draw
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.shapes import BAR_8K, BAR_NARROW, BAR_QWEN, NLL, Shape
from benchmarks.timing import Call
from cpo_kernels.kernels.cuda import hopper as cuda_hopper
from cpo_kernels.kernels.cuda import rows as cuda_rows
from cpo_kernels.kernels.selection import Choice

SMALL = {"vocab": SMALL_VOCABULARY, "hidden": 16, "groups": 2, "tokens": 2, "rounds": 1}
L2_BYTES = 24 * MIB  # what stays in an L2 of 50 MiB beside the gradient
LOSS_VOCABULARIES = (32000, 128256)
OURS_CUDA, OURS_TRITON = "cpo-kernels cuda", "cpo-kernels triton"
OURS_FP32, OURS_KEPT = f"{OURS_CUDA}, fp32 logits", f"{OURS_CUDA}, exponentials kept"
OURS_ONE_PASS = f"{OURS_CUDA}, row_gradient_"
HOPPER = "fused linear, cuda"
KEPT, IN_L2 = ", kept", ", in L2"  # of the names of cases


def run(setting: Setting) -> Iterator[Record]:
    """Measure case after case; one that fails does not keep the others from being measured.

    Raises:
        NotHereError: there are no such kernels.
    """
    if reason := missing(setting.device):
        raise NotHereError(reason)
    yield from each(cases(setting))


def cases(setting: Setting) -> dict[str, Callable[[], Iterator[Record]]]:
    """Return the cases in order."""
    found: dict[str, Callable[[], Iterator[Record]]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        found[f"row kernels {dtype_name(dtype)}"] = partial(row_kernels, dtype, [CUDA, TRITON], setting)
    for dtype in (torch.bfloat16, torch.float32):
        found[f"loss of logits {dtype_name(dtype)}"] = partial(losses_of_logits, dtype, setting)
    likelihood = replace(BAR_8K, name=f"{BAR_8K.name}, likelihood", work=NLL)
    ways, one_pass = both_ways(), our_peer(OURS_ONE_PASS, CUDA, chosen(setting, "row_gradient_"))
    fp32_logits = our_peer(OURS_FP32, CUDA, logits_dtype=torch.float32)
    found |= {
        "contrast": partial(contrasts, setting),
        # The truth alone, whose coefficients are known: rows are read twice or once.
        "likelihood": partial(losses, likelihood, [*ways, one_pass], setting),
        "loss": partial(losses, BAR_8K, [*ways, fp32_logits], setting),
        "loss, qwen": partial(losses, BAR_QWEN, ways, setting),
        "no_grad": partial(logps_without_gradients, BAR_8K, setting),
        "no_grad, narrow": partial(logps_without_gradients, BAR_NARROW, setting),
    }
    # Where Hopper's linear path keeps exponentials.
    kept = our_peer(OURS_KEPT, CUDA, chosen(setting, "linear_kept"))
    for shape in (BAR_8K, BAR_QWEN):
        named, reasons = replace(shape, name=shape.name + KEPT), {OURS_KEPT: missing_hopper(setting.device)}
        found[named.name] = partial(losses, named, [our_peer(OURS_CUDA, CUDA), kept], setting, reasons)
    return found


def our_peer(name: str, backend: str, *choices: Choice, logits_dtype: torch.dtype | None = None) -> Peer:
    """Make ours by a named backend, whatever the table says."""
    return under_choices(ours(name, None, logits_dtype, backend), *choices)


def both_ways() -> list[Peer]:
    """Make ours by the row kernels of either backend."""
    return [our_peer(OURS_CUDA, CUDA), our_peer(OURS_TRITON, TRITON)]


def chosen(setting: Setting, operation: str) -> Choice:
    """Choose that the CUDA kernels take one of their ways around."""
    return Choice(operation, arch_of(setting.device), CUDA)


def sized(shape: Shape, setting: Setting) -> Shape:
    """Return the shape itself, or a small one of its kind: in a dry run every GPU thread is emulated."""
    return replace(shape, **SMALL) if setting.quick else shape


def losses_of_logits(dtype: torch.dtype, setting: Setting) -> Iterator[Record]:
    """Time ``cpo_loss`` of given logits with its gradient, and the CUDA launch alone, against a copy of the logits.

    Two reads and one write are 1.5 copies; 1.0 where L2 keeps the logits.
    """
    for vocab in (SMALL_VOCABULARY,) if setting.quick else LOSS_VOCABULARIES:
        for in_cache in (False, True):
            size, tokens = (L2_BYTES, 4) if in_cache else (LOGITS_BYTES, 128)
            if setting.quick:
                size, tokens = 0, 2  # one group
            problem = LogitsProblem(size, tokens, vocab, dtype, setting.device)
            logits = problem.logits.detach()
            target = torch.empty_like(logits)
            calls: dict[str, Call] = {
                COPY: partial(target.copy_, logits),
                OURS_CUDA: problem.step(CUDA),
                f"{OURS_CUDA}, the launch alone": problem.launch(),
                OURS_TRITON: problem.step(TRITON),
            }
            name = f"loss of logits, {dtype_name(dtype)}, V={vocab}{IN_L2 * in_cache}"
            conditions = {"V": vocab, "MiB": round(logits.nbytes / MIB, 3), "dtype": dtype_name(dtype)}
            yield from timed(name, calls, conditions, setting, {"of_copy": COPY})


def timed(
    name: str, calls: dict[str, Call], conditions: dict[str, object], setting: Setting, ratios: dict[str, str]
) -> list[Record]:
    """Measure calls that are all needed."""
    contestants = [ready(who, call) for who, call in calls.items()]
    return measure(Case(name, contestants, conditions, ratios, rounds=setting.rounds(20, 20)), setting.device)


def contrasts(setting: Setting) -> Iterator[Record]:
    """Time the contrast of a chunk, from launch to finish."""
    for groups, candidates in CONTRASTS:
        tokens = 3 if setting.quick else 128
        problem = ContrastProblem(groups, candidates, tokens, setting.device)
        calls = {backend: problem.call(backend) for backend in (CUDA, TRITON)}
        conditions = {"G": groups, "C": candidates, "T": tokens}
        yield from timed(
            f"contrast, G={groups}, C={candidates}", calls, conditions, setting, {"of_triton_time": TRITON}
        )


def losses(
    shape: Shape, peers: Sequence[Peer], setting: Setting, absent: dict[str, str] | None = None
) -> Iterator[Record]:
    """Time loss and gradients over the bare products of the same chunks.

    Raises:
        ContestantError: at the end, where one that should be here was not measured.
    """
    line_up, absent = LineUp(draw(sized(shape, setting), device=setting.device)), absent or {}
    contestants: list[Contestant] = [line_up.floor(shape.work)]
    contestants += [replace(line_up.peer(peer, shape.work), absent=absent.get(peer.name, "")) for peer in peers]
    found = measure(line_up.case(contestants), setting.device)
    yield from found
    if failed := [f"{r.contestant}: {r.note}" for r in found if not r.values and not absent.get(r.contestant)]:
        raise ContestantError("; ".join(failed))


def logps_without_gradients(shape: Shape, setting: Setting) -> Iterator[Record]:
    """Time product and row kernel, and the fused linear paths, against one product."""
    shape = sized(shape, setting)
    problem = draw(shape, device=setting.device)
    tensors = (problem.hidden.detach().flatten(0, 2), problem.weight.detach(), problem.targets.flatten())
    case, fused = ProductCase(shape, *tensors, setting), triton_kernels("linear").linear_forward
    calls: dict[str, Callable[[], torch.Tensor]] = {
        f"{PRODUCT} and row kernel, cuda": lambda: cuda_rows.row_forward(case.product(), tensors[2], None, *HEAD)[1],
        "fused linear, triton": lambda: fused(*tensors, None, *HEAD).logps,
    }
    reason = missing_hopper(setting.device)
    if not reason:
        calls[HOPPER] = lambda: cuda_hopper.linear_forward(*tensors, None, *HEAD)[1]
    for name, call in calls.items():
        case.check(name, call())
    yield from case.records(calls)
    if reason:
        yield Record(f"no_grad, {shape.name}", HOPPER, conditions=shape.conditions, note=reason)
