"""Checks and flattening of the arguments of users, before any computation and without reading values of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from cpo_kernels.kernels.device import to_device
from cpo_kernels.layout import CandidateLayout
from cpo_kernels.options import Head

from .derivatives import refuse_tangents
from .vocab_parallel import is_dtensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Inputs(NamedTuple):
    """Checked inputs of a linear function, flattened.

    Attributes:
        hidden: (R, H).
        weight: (V, H).
        bias: (V,) or None.
        targets: (N,) int64.
        rows: (N,) int64, the row that predicts each token; None: token n is predicted by row n.
        cu_tokens: (S + 1,) host integers.
        cu_groups: (G + 1,) host integers.
        head: the options of the head.
        shape: shape of results with one number a segment: (G, C), (S,), or that of targets without T.
        layout_ranks: ranks given in the layout, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    rows: Tensor | None
    cu_tokens: Sequence[int]
    cu_groups: Sequence[int]
    head: Head
    shape: tuple[int, ...]
    layout_ranks: Tensor | Sequence[int] | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What autograd tracks."""
        return self.hidden, self.weight, self.bias

    @property
    def logits_dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return self.head.logits_dtype or self.hidden.dtype


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    """Raise ``ValueError`` for dtypes, devices or shapes that do not fit each other; the message shows both."""
    if not torch.compiler.is_compiling():
        check_whole(hidden, weight, bias)
    if hidden.dtype not in FLOAT_DTYPES:
        raise ValueError(f"hidden must be one of {FLOAT_DTYPES}, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight must have the dtype of hidden, {hidden.dtype}, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape (V, {hidden.shape[-1]}) with V >= 1, got {tuple(weight.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in FLOAT_DTYPES):
        raise ValueError(f"bias must be floating point ({weight.shape[0]},), got {bias.dtype} {tuple(bias.shape)}")
    check_targets(targets)
    for name, tensor in (("weight", weight), ("bias", bias), ("targets", targets)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")


def check_whole(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ``ValueError`` for a DTensor: its shards may be FSDP's, whose processes hold different data."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and is_dtensor(tensor):
            raise ValueError(
                f"{name} is a DTensor placed {tuple(tensor.placements)}, expected a tensor. "  # type: ignore[attr-defined]
                "Weights of FSDP2 are whole inside the model's forward, where attach_linear_loss computes the loss; "
                "elsewhere full_tensor(grad_placements=[Partial('avg')]) gathers them and averages their gradient. A "
                "head sharded along the vocabulary by tensor parallelism takes vocab_shard=VocabShard.of(weight)"
            )


def check_targets(targets: Tensor) -> None:
    """Raise ``ValueError`` unless targets are int64."""
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")


def autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast tensors to the autocast dtype if autocast is on for their device, as ``F.linear`` would."""
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


def prepare(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    layout: CandidateLayout | None,
    bias: Tensor | None,
    head: Head,
    *,
    grouped: bool = True,
) -> Inputs:
    """Check and flatten the inputs of a linear function; ``grouped`` asks for (G, C, T, H) where there is no layout."""
    refuse_tangents(hidden, weight, bias)
    if hidden.dim() == 0:
        raise ValueError("hidden must be (..., H), got a scalar of shape ()")
    if targets.shape != hidden.shape[:-1] and layout is None:
        raise ValueError(f"targets must have shape {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}")
    if head.vocab_shard is not None:
        weight = head.vocab_shard.local("weight", weight)
        bias = None if bias is None else head.vocab_shard.local("bias", bias)
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_head(hidden, weight, bias, targets)
    if head.frozen_columns > weight.shape[1]:
        raise ValueError(f"frozen_columns must be at most H = {weight.shape[1]}, got {head.frozen_columns}")
    if head.logits_dtype is not None and hidden.dtype == torch.float64:
        raise ValueError(f"logits_dtype={head.logits_dtype} is less exact than hidden, which is {hidden.dtype}")
    if layout is not None:
        if hidden.dim() != 2 or targets.shape != (layout.num_tokens,):
            raise ValueError(
                f"with a layout, hidden must be (R, H) and targets ({layout.num_tokens},), "
                f"got {tuple(hidden.shape)} and {tuple(targets.shape)}"
            )
        if layout.rows is None and hidden.shape[0] != layout.num_tokens:
            raise ValueError(f"without rows, hidden must have {layout.num_tokens} rows, got {hidden.shape[0]}")
        if layout.rows is not None and layout.rows.device != hidden.device:
            raise ValueError(f"layout.rows must be on the device of hidden, {hidden.device}, got {layout.rows.device}")
        tensors, boundaries = (hidden, weight, bias), (layout.cu_tokens, layout.cu_groups)
        return Inputs(*tensors, targets, layout.rows, *boundaries, head, (layout.num_segments,), layout.ranks)
    if grouped and hidden.dim() != 4:
        raise ValueError(f"hidden must be (G, C, T, H), or (R, H) with a layout, got {tuple(hidden.shape)}")
    *segments, length = targets.shape if targets.dim() else (1,)
    num_segments = int(torch.Size(segments).numel())
    per_group = segments[-1] if grouped else num_segments
    if grouped and (num_segments == 0 or length == 0):
        raise ValueError(f"group 0 is empty: targets have shape {tuple(targets.shape)}")
    flat = hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.reshape(-1), None
    cu_tokens = [s * length for s in range(num_segments + 1)]
    cu_groups = list(range(0, num_segments + 1, max(1, per_group)))
    return Inputs(*flat, cu_tokens, cu_groups, head, tuple(segments))


def per_segment(
    name: str, values: Tensor | Sequence[int] | None, shape: tuple[int, ...], like: Tensor
) -> Tensor | None:
    """Flatten ``ref_logps`` or ``ranks`` to contiguous (S,); raise ``ValueError`` unless they have ``shape``."""
    if values is None:
        return None
    if not isinstance(values, Tensor):
        values = to_device(torch.tensor(values, device="cpu"), like.device)
    if tuple(values.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(values.shape)}")
    if values.device != like.device:
        raise ValueError(f"{name} must be on the device of the input, {like.device}, got {values.device}")
    integer = not values.is_floating_point() and values.dtype != torch.bool
    if integer != (name == "ranks"):
        raise ValueError(f"{name} must be {'integers' if name == 'ranks' else 'floating point'}, got {values.dtype}")
    return values.detach().reshape(-1).contiguous()


def merge_ranks(
    ranks: Tensor | None, layout_ranks: Tensor | Sequence[int] | None, shape: tuple[int, ...], like: Tensor
) -> Tensor | None:
    """Return the ranks (S,) given as argument or in the layout; raise ``ValueError`` if both are given."""
    if ranks is not None and layout_ranks is not None:
        raise ValueError("ranks are given twice: as an argument and in the layout")
    return per_segment("ranks", layout_ranks if ranks is None else ranks, shape, like)


def largest_group(cu_groups: Sequence[int]) -> int:
    """Count the candidates of the largest group."""
    return max(end - start for start, end in pairwise(cu_groups))
