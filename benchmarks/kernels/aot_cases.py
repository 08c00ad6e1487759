"""Lists what is compiled ahead of time: the launches that users hit, each with what its machine code must contain.

A case launches kernels through their launchers, so that it has the arguments, the alignment and the block sizes of a
real call. It never runs: its tensors are created on whatever device is the default, which may be one without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.kernels.triton import contrast, gradients, linear, rows, summary, unit

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
LLAMA, GPT2, SMALL = 128256, 50257, 1024
R, H = 2048, 4096
UNALIGNED = 4100  # an H at which rows of 16-bit numbers are not all at multiples of 16 bytes
PLAIN, CAPPED = (1.0, 0.0, 1.0), (0.5, 30.0, 0.7)  # logit_scale, softcap, temperature

# Machine code to look for, by architecture prefix: 16-byte accesses of global memory, and Hopper's matrix product.
WIDE_LOAD = {"sm_": r"\bLDG\.E\S*\.(128|256)\b", "gfx": r"\b(global|buffer)_load_dwordx4\b"}
WIDE_STORE = {"sm_": r"\bSTG\.E\S*\.(128|256)\b", "gfx": r"\b(global|buffer)_store_dwordx4\b"}
WGMMA = {"sm_90": r"\bHGMMA\."}

# Several tokens a row under the whole head.
EVERYTHING, LABEL = {"shared": True, "capped": True}, ", shared rows, bias and softcap"


@dataclass(frozen=True)
class Case:
    """Describes a launch, and patterns of which the code of its kernel called ``kernel`` must contain each."""

    name: str
    launch: Callable[[], object]
    kernel: str
    required: tuple[dict[str, str], ...] = ()


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Make a tensor of no particular values."""
    return torch.empty(shape, dtype=dtype)


def row_tokens(*, shared: bool) -> tuple[Tensor, Tensor | None]:
    """Make targets (N,) and row_starts."""
    starts = torch.arange(0, 3 * R + 1, 3)
    return torch.zeros(3 * R if shared else R, dtype=torch.int64), starts if shared else None


def head(dtype: torch.dtype, V: int, *, capped: bool) -> tuple[Any, ...]:
    """Make bias, logit_scale, softcap, temperature."""
    return (empty(V, dtype=dtype), *CAPPED) if capped else (None, *PLAIN)


def row_launch(
    kernel: Callable[..., object],
    dtype: torch.dtype,
    V: int,
    *,
    shared: bool = False,
    capped: bool = False,
    **grad: Any,
) -> object:
    """Launch a kernel over the logits; one of gradients takes statistics and coefficients too."""
    targets, starts = row_tokens(shared=shared)
    of_gradient = kernel in (rows.row_backward_, unit.unit_finish_)
    sums = (empty(2, R), empty(targets.numel())) if of_gradient else ()
    return kernel(empty(R, V, dtype=dtype), targets, starts, *sums, *head(dtype, V, capped=capped), **grad)


def summarize(candidates: int, *, ranked: bool) -> object:
    """Launch loss and metrics of two groups, with a reference and the tokens of the likelihood on the device."""
    segments = 2 * candidates
    starts = torch.arange(0, segments + 1, candidates) if ranked else None
    lengths = torch.ones(segments, dtype=torch.int64)
    options = {"beta": 0.1, "margin": 0.0, "label_smoothing": 0.0, "loss_type": "plackett_luce"}
    options |= {"length_normalized": ranked, "contrast_weight": 1.0, "mle_weight": 0.1, "num_groups": 2.0}
    options |= {"num_target_tokens": None, "max_candidates": candidates}
    ranks = torch.zeros_like(lengths) if ranked else None
    return summary.summarize(empty(segments), starts, lengths, empty(segments), ranks, **options)


def scale_rows(dtype: torch.dtype) -> object:
    """Launch the coefficients of a frozen head's rows."""
    indices = torch.zeros(R, dtype=torch.int64)
    return gradients.scale_rows_(empty(R, H, dtype=dtype), indices, indices, empty(R))


def contrast_groups(
    candidates: int, *, ranked: bool, loss_type: str = "plackett_luce", config: Mapping[str, int] | None = None
) -> object:
    """Launch two groups of candidates with a reference; ranked ones as groups of any size, normalized by length."""
    segments = 2 * candidates
    starts = torch.arange(segments + 1)
    groups = starts[::candidates].contiguous() if ranked else None
    ranks = torch.zeros_like(starts[1:]) if ranked else None
    objective = {"beta": 0.1, "margin": 0.0, "label_smoothing": 0.0, "loss_type": loss_type, "gain": 1.0}
    objective |= {"length_normalized": ranked, "contrast_weight": 1.0, "mle_weight": 0.1, "num_groups": 2.0}
    objective |= {"num_target_tokens": torch.ones((), dtype=torch.float64), "max_candidates": candidates}
    given = (empty(segments), starts, groups, torch.ones_like(starts[1:]), empty(segments), ranks)
    return contrast.contrast(*given, **objective, config=config)


def linear_forward(
    dtype: torch.dtype,
    V: int = LLAMA,
    width: int = H,
    *,
    shared: bool = False,
    capped: bool = False,
    sample: bool = False,
    transposed: bool = False,
) -> object:
    """Launch log-likelihoods without logits, and on request some of four samples, and entropies."""
    weight = empty(width, V, dtype=dtype).T if transposed else empty(V, width, dtype=dtype)
    given = (empty(R, width, dtype=dtype), weight, *row_tokens(shared=shared), *head(dtype, V, capped=capped))
    extras = {"seed": torch.zeros(R, 4, dtype=torch.int64), "wanted": torch.ones(R, 4, dtype=torch.bool)}
    return linear.linear_forward(*given, entropy=sample, **(extras if sample else {}))


def row_cases() -> list[Case]:
    """Return both by dtype: odd and small vocabularies, and several tokens a row under the whole head."""
    cases = []
    for name, call, kernel, wide in (
        ("row_forward", rows.row_forward, "row_forward_kernel", (WIDE_LOAD,)),
        ("row_backward_", rows.row_backward_, "row_backward_kernel", (WIDE_LOAD, WIDE_STORE)),
        ("unit_forward_", unit.unit_forward_, "unit_forward_kernel", (WIDE_LOAD, WIDE_STORE)),
    ):
        for dtype in (BF16, FP16, FP32):
            ways = {"": (LLAMA, {}), ", odd V": (GPT2, {}), ", small V": (SMALL, {}), LABEL: (LLAMA, EVERYTHING)}
            for label, (V, options) in ways.items():
                launch = partial(row_launch, call, dtype, V, **options)
                cases.append(Case(f"{name} {NAMES[dtype]}{label}", launch, kernel, wide))
    for label, options in (("", {}), (LABEL, EVERYTHING)):
        launch = partial(row_launch, rows.row_backward_, FP32, LLAMA, grad_dtype=BF16, **options)
        cases.append(Case(f"row_backward_ bf16 over fp32{label}", launch, "row_backward_kernel", (WIDE_LOAD,)))
        launch = partial(row_launch, unit.unit_forward_, FP32, LLAMA, grad_dtype=BF16, **options)
        cases.append(Case(f"unit_forward_ bf16 over fp32{label}", launch, "unit_forward_kernel", (WIDE_LOAD,)))
        launch = partial(row_launch, unit.unit_finish_, BF16, LLAMA, **options)
        cases.append(Case(f"unit_finish_ bf16{label}", launch, "row_backward_kernel"))
    return cases


def gradient_cases() -> list[Case]:
    """Return column statistics in one and in two stages, and the upstream scale."""
    one, two, scale = "column_stats_kernel", "merge_column_stats_kernel", "scale_kernel"
    return [
        Case("column_stats bf16", lambda: gradients.column_stats(empty(R, LLAMA, dtype=BF16)), one),
        Case("column_stats fp32", lambda: gradients.column_stats(empty(R, LLAMA)), one),
        Case("column_stats bf16, many rows", lambda: gradients.column_stats(empty(1024, LLAMA, dtype=BF16)), two),
        Case("scale_rows_ bf16", lambda: scale_rows(BF16), "scale_rows_kernel"),
        Case("scale_ bf16", lambda: gradients.scale_(empty(R, H, dtype=BF16), empty(1)), scale),
        Case("scale_ fp32", lambda: gradients.scale_(empty(R, H), empty(1)), scale),
    ]


def contrast_cases() -> list[Case]:
    """Return groups from one negative to the largest group."""
    cases = []
    for candidates in (2, 5, 16, 64, 512, contrast.MAX_CANDIDATES):
        for ranked, label in ((False, "default ranks"), (True, "ranked")):
            launch = partial(contrast_groups, candidates, ranked=ranked)
            cases.append(Case(f"contrast of {candidates}, {label}", launch, "contrast_kernel"))
            launch = partial(summarize, candidates, ranked=ranked)
            cases.append(Case(f"loss of {candidates}, {label}", launch, "group_summary_kernel"))
    cases.append(Case("loss of all groups", partial(summarize, 5, ranked=True), "summary_kernel"))
    ipo = partial(contrast_groups, 2, ranked=False, loss_type="ipo")
    return [*cases, Case("contrast of 2, ipo", ipo, "contrast_kernel")]


def linear_cases() -> list[Case]:
    """Return the fused linear forward; what its products must be on Hopper holds for half precision.

    Where descriptors are ruled out, by the rows' alignment or by a transposed weight, nothing is required.
    """
    plain: dict[str, Any] = {"": {}, LABEL: EVERYTHING, ", sample and entropy": {"sample": True}}
    plain[f", sample and entropy{LABEL}"] = {**EVERYTHING, "sample": True}
    samples = {label: options for label, options in plain.items() if "sample" in options}
    odd, unaligned = {"V": GPT2}, {"width": UNALIGNED}
    pointers = {
        f", H = {UNALIGNED}": unaligned,
        f", H = {UNALIGNED}, odd V": odd | unaligned,
        ", transposed weight": {"transposed": True},
    }
    found = [(BF16, {**plain, ", odd V": odd}, (WGMMA,)), (FP16, {"": {}}, (WGMMA,)), (FP32, {"": {}, **samples}, ())]
    for layout, options in pointers.items():
        found.append((BF16, {f"{layout}{label}": {**options, **own} for label, own in plain.items()}, ()))
    named = [
        (f"linear_forward {NAMES[dtype]}{label}", dtype, own, code)
        for dtype, ways, code in found
        for label, own in ways.items()
    ]
    return [
        Case(name, partial(linear_forward, dtype, **own), "linear_forward_kernel", code)
        for name, dtype, own, code in named
    ]


CASES = {case.name: case for case in (*row_cases(), *gradient_cases(), *contrast_cases(), *linear_cases())}
