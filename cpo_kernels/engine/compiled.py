"""The fused calls as operators, for ``torch.compile``: one opaque node each, so that no graph breaks.

Outside of a compiled region the autograd functions are used, which hand gradients over without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from cpo_kernels.kernels.numerics import accumulate_dtype
from cpo_kernels.objective import check_problem, make_problem
from cpo_kernels.options import Head, Objective

from .call import LinearCall
from .logps import run_token_logps, token_logps_grads
from .losses import run_cpo
from .tokens import check_targets_in


def make_head(
    logit_scale: float,
    softcap: float,
    temperature: float,
    backend: str,
    max_logits_bytes: int | None,
    logits_dtype: torch.dtype | None,
    grad_filter_eps: float | None,
    candidate_eps: float | None,
    skip_absent_rows: bool,
) -> Head:
    """The head from the arguments that an operator can carry."""
    filters = (grad_filter_eps, candidate_eps)
    head = (logit_scale, softcap or None, temperature, backend, max_logits_bytes, logits_dtype)
    return Head(*head, *filters, skip_absent_rows)


def flatten_head(head: Head) -> tuple[Any, ...]:
    """The inverse of :func:`make_head`; a process group is nothing that an operator can carry."""
    head.check_whole("torch.compile")
    filters = (head.grad_filter_eps, head.candidate_eps)
    return (*head.transform, head.backend, head.max_logits_bytes, head.logits_dtype, *filters, head.skip_absent_rows)


def flatten_objective(objective: Objective) -> tuple[Any, ...]:
    """The options of an objective in the order of its fields; ``dataclasses.astuple`` copies and breaks the graph."""
    return tuple(getattr(objective, name) for name in OBJECTIVE_NAMES)


OBJECTIVE_NAMES = tuple(field.name for field in fields(Objective))
# Position of logits_dtype among the options of a head.
LOGITS_DTYPE = -4


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if grad is None else grad


def _fake_grads(needs: Sequence[bool], *inputs: Tensor | None) -> list[Tensor]:
    first = inputs[0]
    assert first is not None
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if n and t is not None else first.new_empty(0)
        for n, t in zip(needs, inputs, strict=True)
    ]


# Checks of values cannot be traced. They are operators whose result is used, so that the compiler keeps them.


@custom_op("cpo_kernels::checked_targets", mutates_args=())
def checked_targets(targets: Tensor, vocab: int) -> Tensor:
    """A copy of targets (N,); raises ``ValueError`` for one outside [0, V) other than -100."""
    check_targets_in(targets, vocab)
    return targets.clone()


@checked_targets.register_fake
def _(targets, vocab):
    return torch.empty_like(targets)


@custom_op("cpo_kernels::checked_lengths", mutates_args=())
def checked_lengths(lengths: Tensor, ranks: Tensor | None, cu_groups: Sequence[int], contrast_weight: float) -> Tensor:
    """A copy of lengths (S,); raises ``ValueError`` for a group without rank 0, or without a contrast if weighted."""
    check_problem(make_problem(Objective(contrast_weight=contrast_weight), cu_groups, lengths, None, ranks))
    return lengths.clone()


@checked_lengths.register_fake
def _(lengths, ranks, cu_groups, contrast_weight):
    return torch.empty_like(lengths)


@custom_op("cpo_kernels::linear_cpo", mutates_args=())
def linear_cpo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    ref_logps: Tensor | None,
    ranks: Tensor | None,
    cu_tokens: Sequence[int],
    cu_groups: Sequence[int],
    needs: Sequence[bool],
    beta: float,
    margin: float,
    label_smoothing: float,
    loss_type: str,
    length_normalized: bool,
    contrast_weight: float,
    mle_weight: float,
    num_groups: float | None,
    num_target_tokens: float | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    backend: str,
    max_logits_bytes: int | None,
    logits_dtype: torch.dtype | None,
    grad_filter_eps: float | None,
    candidate_eps: float | None,
    skip_absent_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, sums (S,), lengths (S,), dropped share, gain of the gradients, gradients of hidden, weight and bias.

    A gradient is empty where ``needs`` is false. Backward divides by the gain once it knows the upstream gradient.
    """
    filters = (grad_filter_eps, candidate_eps)
    head = make_head(
        logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype, *filters, skip_absent_rows
    )
    objective = Objective(
        beta,
        margin,
        label_smoothing,
        loss_type,
        length_normalized,
        contrast_weight,
        mle_weight,
        num_groups,
        num_target_tokens,
    )
    call = LinearCall(targets, rows, cu_tokens, cu_groups, head)
    result = run_cpo(call, objective, ref_logps, ranks, hidden, weight, bias, (needs[0], needs[1], needs[2]))
    gain = (result.loss.new_ones(()) * result.gain).to(result.loss.dtype)
    grad_hidden, grad_weight, grad_bias = (_or_empty(grad, hidden) for grad in result.grads)
    return result.loss, result.sums, result.lengths, result.dropped, gain, grad_hidden, grad_weight, grad_bias


@linear_cpo.register_fake
def _(hidden, weight, bias, targets, rows, ref_logps, ranks, cu_tokens, cu_groups, needs, *options):
    dtype = accumulate_dtype(options[LOGITS_DTYPE] or hidden.dtype)
    segments = len(cu_tokens) - 1
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty((segments,), dtype=dtype),
        hidden.new_empty((segments,), dtype=torch.int64),
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty((), dtype=dtype),
        *_fake_grads(needs, hidden, weight, bias),
    )


def _save_grads(ctx, inputs, output) -> None:
    _, sums, lengths, dropped, gain, *grads = output
    ctx.needs = inputs[9]
    ctx.mark_non_differentiable(sums, lengths, dropped, gain, *grads)
    ctx.save_for_backward(gain, *grads)


def _linear_cpo_backward(ctx, grad_loss, *_unused):
    gain, *grads = ctx.saved_tensors
    scale = grad_loss / gain
    return (*[grad * scale if need else None for grad, need in zip(grads, ctx.needs, strict=True)], *[None] * 25)


linear_cpo.register_autograd(_linear_cpo_backward, setup_context=_save_grads)


@custom_op("cpo_kernels::linear_token_logps", mutates_args=())
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    backend: str,
    max_logits_bytes: int | None,
    logits_dtype: torch.dtype | None,
    grad_filter_eps: float | None,
    candidate_eps: float | None,
    skip_absent_rows: bool,
) -> Tensor:
    """Log-probabilities (N,) of all tokens; the gradient recomputes the logits."""
    filters = (grad_filter_eps, candidate_eps)
    head = make_head(
        logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype, *filters, skip_absent_rows
    )
    call = LinearCall(targets, rows, (0, targets.numel()), (0, 1), head)
    return run_token_logps(call, hidden, weight, bias, (False, False, False)).logps


@linear_token_logps.register_fake
def _(hidden, weight, bias, targets, rows, *options):
    return hidden.new_empty(targets.shape, dtype=accumulate_dtype(options[LOGITS_DTYPE] or hidden.dtype))


@custom_op("cpo_kernels::linear_token_logps_backward", mutates_args=())
def linear_token_logps_backward(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    needs: Sequence[bool],
    logit_scale: float,
    softcap: float,
    temperature: float,
    backend: str,
    max_logits_bytes: int | None,
    logits_dtype: torch.dtype | None,
    grad_filter_eps: float | None,
    candidate_eps: float | None,
    skip_absent_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty where ``needs`` is false)."""
    filters = (grad_filter_eps, candidate_eps)
    head = make_head(
        logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype, *filters, skip_absent_rows
    )
    call = LinearCall(targets, rows, (0, targets.numel()), (0, 1), head)
    grads = token_logps_grads(call, None, grad_logps, hidden, weight, bias, (needs[0], needs[1], needs[2]))
    return _or_empty(grads[0], hidden), _or_empty(grads[1], hidden), _or_empty(grads[2], hidden)


@linear_token_logps_backward.register_fake
def _(grad_logps, hidden, weight, bias, targets, rows, needs, *options):
    return tuple(_fake_grads(needs, hidden, weight, bias))


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _linear_token_logps_backward(ctx, grad_logps):
    needs = list(ctx.needs_input_grad[:3])
    grads = linear_token_logps_backward(grad_logps, *ctx.saved_tensors, needs, *ctx.options)
    return (*[grad if need else None for grad, need in zip(grads, needs, strict=True)], *[None] * 11)


linear_token_logps.register_autograd(_linear_token_logps_backward, setup_context=_save_inputs)
