"""Lists what is compiled ahead of time: the launches that users hit, each with what its machine code must contain.

A case launches kernels through their launchers, so that it has the arguments, the alignment and the block sizes of a
real call. It never runs: its tensors are created on whatever device is the default, which may be one without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cpo_kernels.kernels.triton import contrast, gradients, linear, rows

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
LLAMA, GPT2, SMALL = 128256, 50257, 1024
R, H = 2048, 4096
UNALIGNED = 4100  # an H at which rows of 16-bit numbers are not all at multiples of 16 bytes
PLAIN = (1.0, 0.0, 1.0)
CAPPED = (0.5, 30.0, 0.7)

# Machine code to look for, by architecture prefix: 16-byte accesses of global memory, and Hopper's matrix product.
WIDE_LOAD = {"sm_": r"\bLDG\.E\S*\.(128|256)\b", "gfx": r"\b(global|buffer)_load_dwordx4\b"}
WIDE_STORE = {"sm_": r"\bSTG\.E\S*\.(128|256)\b", "gfx": r"\b(global|buffer)_store_dwordx4\b"}
WGMMA = {"sm_90": r"\bHGMMA\."}


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
    """targets (N,) and row_starts."""
    starts = torch.arange(0, 3 * R + 1, 3)
    return torch.zeros(3 * R if shared else R, dtype=torch.int64), starts if shared else None


def row_forward(dtype: torch.dtype, V: int, *, shared: bool, capped: bool) -> object:
    """Launch the one read of the logits."""
    targets, starts = row_tokens(shared=shared)
    return rows.row_forward(
        empty(R, V, dtype=dtype), targets, starts, empty(V, dtype=dtype) if capped else None, *choose(capped)
    )


def row_backward(
    dtype: torch.dtype, V: int, *, shared: bool, capped: bool, grad_dtype: torch.dtype | None = None
) -> object:
    """Launch the gradient over the logits."""
    targets, starts = row_tokens(shared=shared)
    bias = empty(V, dtype=dtype) if capped else None
    return rows.row_backward_(
        empty(R, V, dtype=dtype),
        targets,
        starts,
        empty(2, R),
        empty(targets.numel()),
        bias,
        *choose(capped),
        grad_dtype,
    )


def choose(capped: bool) -> tuple[float, float, float]:
    """Return logit_scale, softcap, temperature."""
    return CAPPED if capped else PLAIN


def scale(dtype: torch.dtype) -> object:
    """Launch the upstream gradient, on a weight gradient."""
    return gradients.scale_(empty(R, H, dtype=dtype), empty(1))


def contrast_groups(
    candidates: int,
    *,
    ranked: bool,
    loss_type: str = "plackett_luce",
    ragged: bool = False,
    config: Mapping[str, int] | None = None,
) -> object:
    """Launch two groups of candidates with a reference."""
    segments = 2 * candidates
    starts = torch.arange(segments + 1)
    return contrast.contrast(
        empty(segments),
        starts,
        starts[::candidates].contiguous() if ragged else None,
        torch.ones_like(starts[1:]),
        empty(segments),
        torch.zeros_like(starts[1:]) if ranked else None,
        beta=0.1,
        margin=0.0,
        label_smoothing=0.0,
        loss_type=loss_type,
        length_normalized=ragged,
        contrast_weight=1.0,
        mle_weight=0.1,
        num_groups=2.0,
        num_target_tokens=torch.ones((), dtype=torch.float64),
        gain=1.0,
        max_candidates=candidates,
        config=config,
    )


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
    """Launch log-likelihoods without logits, and on request samples and entropies."""
    targets, starts = row_tokens(shared=shared)
    return linear.linear_forward(
        empty(R, width, dtype=dtype),
        empty(width, V, dtype=dtype).T if transposed else empty(V, width, dtype=dtype),
        targets,
        starts,
        empty(V, dtype=dtype) if capped else None,
        *choose(capped),
        seed=torch.zeros(1, dtype=torch.int64) if sample else None,
        entropy=sample,
    )


def row_cases() -> list[Case]:
    """Return both by dtype: odd and small vocabularies, and several tokens a row under the whole head."""
    cases = []
    for name, call, kernel, wide in (
        ("row_forward", row_forward, "row_forward_kernel", (WIDE_LOAD,)),
        ("row_backward_", row_backward, "row_backward_kernel", (WIDE_LOAD, WIDE_STORE)),
    ):
        for dtype in (BF16, FP16, FP32):
            for V, label in ((LLAMA, ""), (GPT2, ", odd V"), (SMALL, ", small V")):
                launch = partial(call, dtype, V, shared=False, capped=False)
                cases.append(Case(f"{name} {NAMES[dtype]}{label}", launch, kernel, wide))
            launch = partial(call, dtype, LLAMA, shared=True, capped=True)
            cases.append(Case(f"{name} {NAMES[dtype]}, shared rows, bias and softcap", launch, kernel, wide))
    for shared in (False, True):
        launch = partial(row_backward, FP32, LLAMA, shared=shared, capped=shared, grad_dtype=BF16)
        label = ", shared rows, bias and softcap" if shared else ""
        cases.append(Case(f"row_backward_ bf16 over fp32{label}", launch, "row_backward_kernel", (WIDE_LOAD,)))
    return cases


def gradient_cases() -> list[Case]:
    """Return column statistics in one and in two stages, and the upstream scale."""
    return [
        Case("column_stats bf16", lambda: gradients.column_stats(empty(R, LLAMA, dtype=BF16)), "column_stats_kernel"),
        Case("column_stats fp32", lambda: gradients.column_stats(empty(R, LLAMA)), "column_stats_kernel"),
        Case(
            "column_stats bf16, many rows",
            lambda: gradients.column_stats(empty(1024, LLAMA, dtype=BF16)),
            "merge_column_stats_kernel",
        ),
        Case("scale_ bf16", partial(scale, BF16), "scale_kernel"),
        Case("scale_ fp32", partial(scale, FP32), "scale_kernel"),
    ]


def contrast_cases() -> list[Case]:
    """Return groups from one negative to the largest group."""
    cases = [
        Case(f"contrast of {candidates}, {'ranked' if ranked else 'default ranks'}", launch, "contrast_kernel")
        for candidates in (2, 5, 16, 64, 512, contrast.MAX_CANDIDATES)
        for ranked in (False, True)
        for launch in [partial(contrast_groups, candidates, ranked=ranked, ragged=ranked)]
    ]
    ipo = partial(contrast_groups, 2, ranked=False, loss_type="ipo")
    return [*cases, Case("contrast of 2, ipo", ipo, "contrast_kernel")]


def linear_cases() -> list[Case]:
    """Return the fused linear forward; what its products must be on Hopper holds for half precision."""
    kernel = "linear_forward_kernel"
    return [
        Case("linear_forward bf16", partial(linear_forward, BF16), kernel, (WGMMA,)),
        Case("linear_forward fp16", partial(linear_forward, FP16), kernel, (WGMMA,)),
        Case("linear_forward fp32", partial(linear_forward, FP32), kernel),
        Case("linear_forward bf16, odd V", partial(linear_forward, BF16, GPT2), kernel, (WGMMA,)),
        Case(
            "linear_forward bf16, shared rows, bias and softcap",
            partial(linear_forward, BF16, shared=True, capped=True),
            kernel,
            (WGMMA,),
        ),
        Case("linear_forward bf16, sample and entropy", partial(linear_forward, BF16, sample=True), kernel, (WGMMA,)),
        Case(
            "linear_forward bf16, sample and entropy, shared rows, bias and softcap",
            partial(linear_forward, BF16, shared=True, capped=True, sample=True),
            kernel,
            (WGMMA,),
        ),
        Case("linear_forward fp32, sample and entropy", partial(linear_forward, FP32, sample=True), kernel),
        Case(
            "linear_forward fp32, sample and entropy, shared rows, bias and softcap",
            partial(linear_forward, FP32, shared=True, capped=True, sample=True),
            kernel,
        ),
        *linear_pointer_cases(),
    ]


def linear_pointer_cases() -> list[Case]:
    """Return it where descriptors are ruled out: by the rows' alignment, or by a transposed weight."""
    calls = {
        f", H = {UNALIGNED}": partial(linear_forward, BF16, width=UNALIGNED),
        f", H = {UNALIGNED}, odd V": partial(linear_forward, BF16, GPT2, UNALIGNED),
        ", transposed weight": partial(linear_forward, BF16, transposed=True),
    }
    options = {
        "": {},
        ", shared rows, bias and softcap": {"shared": True, "capped": True},
        ", sample and entropy": {"sample": True},
        ", sample and entropy, shared rows, bias and softcap": {"shared": True, "capped": True, "sample": True},
    }
    return [
        Case(f"linear_forward bf16{layout}{label}", partial(call, **option), "linear_forward_kernel")
        for layout, call in calls.items()
        for label, option in options.items()
    ]


CASES = {case.name: case for case in (*row_cases(), *gradient_cases(), *contrast_cases(), *linear_cases())}
