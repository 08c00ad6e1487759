"""The operators between the engine and its backends: schema, fake kernel and reference body, in one place.

Backends register kernels for their device (``row_forward.register_kernel("cpu")``); callers reach them through
``torch.ops.cpo_kernels``. Tokens are grouped by row: those of row r are ``targets[row_starts[r]:row_starts[r + 1]]``;
``row_starts=None`` means one token a row. ``softcap=0.0`` means none.
"""

from __future__ import annotations

from torch import Tensor
from torch.library import custom_op

from . import reference
from .reference import accumulate_dtype


@custom_op("cpo_kernels::row_forward", mutates_args=())
def row_forward(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(R, V), (N,) -> stats (2, R): max and log-sum-exp minus max; log-probabilities (N,), 0 where target is -100."""
    return reference.row_forward(logits, targets, row_starts, bias, logit_scale, softcap, temperature)


@row_forward.register_fake
def _(logits, targets, row_starts, bias, logit_scale, softcap, temperature):
    dtype = accumulate_dtype(logits.dtype)
    return logits.new_empty((2, logits.shape[0]), dtype=dtype), logits.new_empty(targets.shape, dtype=dtype)


def _save_for_row_backward(ctx, inputs, output) -> None:
    logits, targets, row_starts, bias, *ctx.transform = inputs
    stats, _ = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(logits, targets, row_starts, bias, stats)


def _row_forward_backward(ctx, _grad_stats, grad_logps):
    logits, targets, row_starts, bias, stats = ctx.saved_tensors
    coef = grad_logps.to(stats.dtype).contiguous()
    grad = row_backward(logits, targets, row_starts, stats, coef, bias, *ctx.transform)
    needs_logits, _, _, needs_bias, *_ = ctx.needs_input_grad
    grad_bias = grad.sum(0, dtype=stats.dtype).to(bias.dtype) if needs_bias else None
    return (grad if needs_logits else None), None, None, grad_bias, None, None, None


row_forward.register_autograd(_row_forward_backward, setup_context=_save_for_row_backward)


@custom_op("cpo_kernels::row_backward", mutates_args=())
def row_backward(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    stats: Tensor,
    coef: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
) -> Tensor:
    """Gradient of ``sum_n coef_n * logp_n`` with respect to the raw logits, as a new (R, V) tensor of their dtype."""
    return reference.row_backward(logits, targets, row_starts, stats, coef, bias, logit_scale, softcap, temperature)


@row_backward.register_fake
def _(logits, targets, row_starts, stats, coef, bias, logit_scale, softcap, temperature):
    return logits.new_empty(logits.shape)


@custom_op("cpo_kernels::gemm_", mutates_args=("out",))
def gemm_(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out[:] = a @ b``, or ``out += a @ b`` if ``accumulate``; (m, k), (k, n), (m, n) of floating-point dtypes."""
    reference.gemm_(a, b, out, accumulate)


@gemm_.register_fake
def _(a, b, out, accumulate):
    return None


@custom_op("cpo_kernels::gemm_pair_", mutates_args=("high", "low"))
def gemm_pair_(a: Tensor, b: Tensor, high: Tensor, low: Tensor, accumulate: bool) -> None:
    """:func:`gemm_` into the sum ``high + low``, two tensors of one half-precision dtype; ``high`` is its rounding."""
    reference.gemm_pair_(a, b, high, low, accumulate)


@gemm_pair_.register_fake
def _(a, b, high, low, accumulate):
    return None


@custom_op("cpo_kernels::row_backward_", mutates_args=("logits",))
def row_backward_(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    stats: Tensor,
    coef: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
) -> None:
    """:func:`row_backward`, written over the logits."""
    logits.copy_(
        reference.row_backward(logits, targets, row_starts, stats, coef, bias, logit_scale, softcap, temperature)
    )


@row_backward_.register_fake
def _(logits, targets, row_starts, stats, coef, bias, logit_scale, softcap, temperature):
    return None
