"""The fused calls as operators, for ``torch.compile``: one opaque node each, so that no graph breaks.

An operator runs the call as it runs outside of a compiled region, and returns the gradients beside the loss. Constant
options cross its boundary as one string, counts as symbolic numbers and boundaries as tensors, so that a batch of
another size compiles nothing anew.
"""

from __future__ import annotations

import math
from ast import literal_eval
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from cpo_kernels.kernels.numerics import accumulate_dtype
from cpo_kernels.layout import CandidateLayout
from cpo_kernels.objective import CPOOutput, Groups, check_problem, make_problem, summarize
from cpo_kernels.options import HEAD_OPTIONS, OBJECTIVE_OPTIONS, Head, Objective

from . import loop
from .call import Needs, resolve
from .derivatives import first_order_only
from .inputs import Inputs, merge_ranks, prepare
from .logps import run_token_logps, token_logps_grads
from .losses import CPOLossOfCall, LossResult, resolve_cpo
from .tokens import check_targets_in

# Options that change with the batch.
COUNTS = ("num_groups", "num_target_tokens")
NUMBERS = (
    *("beta", "margin", "label_smoothing", "contrast_weight", "mle_weight"),
    *("logit_scale", "softcap", "temperature", "grad_filter_eps", "candidate_eps"),
)


class Packed(NamedTuple):
    """Options as an operator can carry them: a text of names and values, and beside it the real numbers by position.

    The compiler may hold a real number back as a symbol, which has no text.
    """

    text: str
    numbers: list[float]


def pack(options: Head | Objective) -> Packed:
    """Take options apart; counts travel by themselves, and a process group cannot travel at all."""
    if isinstance(options, Head):
        options.check_whole("torch.compile")
    names = HEAD_OPTIONS if isinstance(options, Head) else OBJECTIVE_OPTIONS
    constants = [name for name in names if name not in (*NUMBERS, *COUNTS, "vocab_shard")]
    text = ", ".join([f"{name!r}: {text_of(getattr(options, name))}" for name in constants])
    values = [getattr(options, name) for name in names if name in NUMBERS]
    return Packed("{" + text + "}", [math.nan if value is None else value for value in values])


def text_of(value: object) -> str:
    """Write a value as Python does; a dtype, of which there is only one, by its name."""
    return "'float32'" if isinstance(value, torch.dtype) else repr(value)


def unpack(names: Sequence[str], text: str, numbers: Sequence[float]) -> dict[str, Any]:
    """Read what :func:`pack` made of options with these names."""
    values = [None if math.isnan(number) else number for number in numbers]
    return literal_eval(text) | dict(zip([name for name in names if name in NUMBERS], values, strict=True))


def unpack_head(text: str, numbers: Sequence[float]) -> Head:
    """Put a head together again."""
    options = unpack(HEAD_OPTIONS, text, numbers)
    options["logits_dtype"] = None if options["logits_dtype"] is None else torch.float32
    return Head(**options)


def logits_dtype_of(text: str, hidden: Tensor) -> torch.dtype:
    """Read the dtype of the logits, and no number, from what :func:`pack` made of a head."""
    return hidden.dtype if literal_eval(text)["logits_dtype"] is None else torch.float32


def counted(count: float | None) -> Tensor | None:
    """Make a host tensor of a count, which changes with the batch: a number would be compiled for."""
    return None if count is None else torch.full((), count, dtype=torch.float64, device="cpu")


def needs_of(text: str) -> Needs:
    """Read which of hidden, weight and bias need gradients: ``"110"`` for the first two."""
    hidden, weight, bias = (digit == "1" for digit in text)
    return hidden, weight, bias


def given(grads: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Put an empty tensor in the place of a gradient that is not needed: an operator returns tensors only."""
    return [like.new_empty(0) if grad is None else grad for grad in grads]


def fake_grads(needs: str, *tensors: Tensor | None) -> list[Tensor]:
    """Make what :func:`given` returns, without numbers."""
    first, wanted = tensors[0], needs_of(needs)
    assert first is not None
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if need and tensor is not None
        else first.new_empty(0)
        for need, tensor in zip(wanted, tensors, strict=True)
    ]


# Checks of values cannot be traced. They are operators whose result is used, so that the compiler keeps them.


@custom_op("cpo_kernels::checked_targets", mutates_args=())
def checked_targets(targets: Tensor, vocab: int) -> Tensor:
    """Copy targets (N,); raises ``ValueError`` for one outside [0, V) other than -100."""
    check_targets_in(targets, vocab)
    return targets.clone()


@checked_targets.register_fake
def _(targets, vocab):
    return torch.empty_like(targets)


@custom_op("cpo_kernels::checked_lengths", mutates_args=())
def checked_lengths(lengths: Tensor, ranks: Tensor | None, candidates: int, contrast_weight: float) -> Tensor:
    """Copy lengths (S,) of groups of so many candidates; raises ``ValueError`` as :func:`check_problem` does."""
    groups = Groups(None, (lengths.numel() // candidates, candidates))
    check_problem(make_problem(Objective(contrast_weight=contrast_weight), groups, lengths, None, ranks))
    return lengths.clone()


@checked_lengths.register_fake
def _(lengths, ranks, candidates, contrast_weight):
    return torch.empty_like(lengths)


def bound_layout(rows: Tensor | None, cu_tokens: Tensor | None, cu_groups: Tensor | None) -> CandidateLayout | None:
    """Put a layout together again from the tensors that crossed the boundary."""
    if cu_tokens is None or cu_groups is None:
        return None
    return CandidateLayout(cu_tokens.tolist(), cu_groups.tolist(), rows)


def layout_tensors(layout: CandidateLayout | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Take a layout apart into what :func:`bound_layout` wants."""
    return (None, None, None) if layout is None else (layout.rows, *layout.boundaries)


def linear_cpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    layout: CandidateLayout | None,
    ref_logps: Tensor | None,
    ranks: Tensor | None,
    bias: Tensor | None,
    objective: Objective,
    head: Head,
    needs: Needs,
) -> CPOOutput:
    """Trace :func:`cpo_kernels.linear_cpo_loss` as one operator; the arguments are those, cast by autocast."""
    if layout is not None and layout.ranks is not None:
        ranks = merge_ranks(ranks, layout.ranks, (layout.boundaries[0].shape[0] - 1,), hidden)
    outputs = linear_cpo(
        *(hidden, weight, bias, targets, *layout_tensors(layout), ref_logps, ranks),
        *(counted(objective.num_groups), counted(objective.num_target_tokens)),
        *("".join(["1" if need else "0" for need in needs]), *pack(objective), *pack(head)),
    )
    return CPOOutput(*outputs[: len(CPOOutput._fields)])


@custom_op("cpo_kernels::linear_cpo", mutates_args=())
def linear_cpo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    cu_tokens: Tensor | None,
    cu_groups: Tensor | None,
    ref_logps: Tensor | None,
    ranks: Tensor | None,
    num_groups: Tensor | None,
    num_target_tokens: Tensor | None,
    needs: str,
    objective: str,
    objective_numbers: Sequence[float],
    head: str,
    head_numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of ``CPOOutput``, the gain of the gradients, and those of hidden, weight and bias.

    A gradient is empty where ``needs`` says so. Backward divides by the gain once it knows the upstream gradient.
    """
    options = unpack(OBJECTIVE_OPTIONS, objective, objective_numbers)
    for name, count in zip(COUNTS, (num_groups, num_target_tokens), strict=True):
        options[name] = None if count is None else float(count)
    layout, head_options = bound_layout(rows, cu_tokens, cu_groups), unpack_head(head, head_numbers)
    inputs = prepare(hidden, weight, targets, layout, bias, head_options)
    out, result = run_cpo(inputs, ref_logps, ranks, Objective(**options), needs_of(needs))
    gain = (out.loss.new_ones(()) * result.gain).to(out.loss.dtype)
    loss, contrastive, nll, logps, rewards, accuracy, margin, dropped = out
    of_hidden, of_weight, of_bias = given(result.grads, hidden)
    if inputs.hidden.shape != hidden.shape and of_hidden.numel():
        of_hidden = of_hidden.reshape(hidden.shape)
    terms = loss, contrastive, nll, logps, rewards, accuracy, margin, dropped
    return (*terms, gain, of_hidden, of_weight, of_bias)


def run_cpo(
    inputs: Inputs, ref_logps: Tensor | None, ranks: Tensor | None, objective: Objective, needs: Needs
) -> tuple[CPOOutput, LossResult]:
    """Run the objective and its gradients without autograd."""
    call, problem = resolve_cpo(inputs, ref_logps, ranks, objective, needs)
    loss = CPOLossOfCall(call, problem, inputs.hidden.dtype, inputs.hidden.shape[1])
    sums, grads = loop.run(call, call.bind(*inputs.tensors), loss)
    result = loss.finish(sums, call.summed(grads.result()))
    return summarize(problem, result.terms, sums, inputs.shape, result.dropped), result


@linear_cpo.register_fake
def _(hidden, weight, bias, targets, rows, cu_tokens, cu_groups, ref_logps, ranks, *options):
    _num_groups, _num_target_tokens, needs, _objective, _numbers, head, _head_numbers = options
    dtype = accumulate_dtype(logits_dtype_of(head, hidden))
    shape = targets.shape[:-1] if cu_tokens is None else (cu_tokens.shape[0] - 1,)
    scalar, per_segment = (lambda: hidden.new_empty((), dtype=dtype)), (lambda: hidden.new_empty(shape, dtype=dtype))
    accuracy = hidden.new_empty((), dtype=torch.float32)
    terms = scalar(), scalar(), scalar(), per_segment(), per_segment(), accuracy, scalar(), scalar()
    return (*terms, scalar(), *fake_grads(needs, hidden, weight, bias))


def save_grads(ctx, inputs, output) -> None:
    """Keep the gradients that came with the loss."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[-4:])
    ctx.needs = ctx.needs_input_grad[:3]
    ctx.others = len(inputs) - 3


@custom_op("cpo_kernels::scale_grads", mutates_args=())
def scale_grads(grads: Sequence[Tensor], scale: Tensor, hidden: Tensor) -> list[Tensor]:
    """Scale gradients. An argument that is not read, hidden, ties them to what they are the gradients of.

    So the compiler's own refusal of a second derivative finds them; without it, it would leave them out of one.
    """
    return [grad * scale for grad in grads]


@scale_grads.register_fake
def _(grads, scale, hidden):
    return [torch.empty_like(grad) for grad in grads]


def linear_cpo_backward(ctx, grad_loss, *_unused):
    """Scale the gradients that came with the loss."""
    *sources, gain, of_hidden, of_weight, of_bias = ctx.saved_tensors
    with torch.no_grad():
        grads = scale_grads([of_hidden, of_weight, of_bias], grad_loss / gain, sources[0])
    kept = [grad if need else None for grad, need in zip(grads, ctx.needs, strict=True)]
    return (*first_order_only(kept, grad_loss, *sources), *[None] * ctx.others)


linear_cpo.register_autograd(linear_cpo_backward, setup_context=save_grads)


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, layout: CandidateLayout | None, bias: Tensor | None, head: Head
) -> Tensor:
    """Trace :func:`cpo_kernels.linear_token_logps` as one operator; the arguments are cast by autocast."""
    return linear_token_logps(hidden, weight, bias, targets, *layout_tensors(layout), *pack(head))


@custom_op("cpo_kernels::linear_token_logps", mutates_args=())
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    cu_tokens: Tensor | None,
    cu_groups: Tensor | None,
    head: str,
    numbers: Sequence[float],
) -> Tensor:
    """Return the log-probabilities of all tokens, in the shape of targets; the gradient recomputes the logits."""
    layout = bound_layout(rows, cu_tokens, cu_groups)
    inputs = prepare(hidden, weight, targets, layout, bias, unpack_head(head, numbers), grouped=False)
    call = resolve(inputs, (False, False, False), whole_groups=False)
    return run_token_logps(call, call.bind(*inputs.tensors)).logps.reshape(targets.shape)


@linear_token_logps.register_fake
def _(hidden, weight, bias, targets, rows, cu_tokens, cu_groups, head, numbers):
    return hidden.new_empty(targets.shape, dtype=accumulate_dtype(logits_dtype_of(head, hidden)))


@custom_op("cpo_kernels::linear_token_logps_backward", mutates_args=())
def linear_token_logps_backward(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    cu_tokens: Tensor | None,
    cu_groups: Tensor | None,
    needs: str,
    head: str,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias, empty where ``needs`` says so."""
    layout = bound_layout(rows, cu_tokens, cu_groups)
    inputs = prepare(hidden, weight, targets, layout, bias, unpack_head(head, numbers), grouped=False)
    call = resolve(inputs, needs_of(needs), whole_groups=False)
    grads = token_logps_grads(call, call.bind(*inputs.tensors), None, grad_logps.reshape(-1))
    of_hidden, of_weight, of_bias = given(grads, hidden)
    return of_hidden.reshape(hidden.shape) if call.needs[0] else of_hidden, of_weight, of_bias


@linear_token_logps_backward.register_fake
def _(grad_logps, hidden, weight, bias, targets, rows, cu_tokens, cu_groups, needs, head, numbers):
    return tuple(fake_grads(needs, hidden, weight, bias))


def save_inputs(ctx, inputs, output) -> None:
    """Keep what the gradient is recomputed from."""
    *tensors, head, numbers = inputs
    ctx.options = head, numbers
    ctx.save_for_backward(*tensors)


def token_logps_backward(ctx, grad_logps):
    """Recompute the logits and form the gradients."""
    wanted = ctx.needs_input_grad[:3]
    needs = "".join(["1" if need else "0" for need in wanted])
    with torch.no_grad():
        grads = linear_token_logps_backward(grad_logps, *ctx.saved_tensors, needs, *ctx.options)
    kept = [grad if need else None for grad, need in zip(grads, wanted, strict=True)]
    others = [None] * (len(ctx.needs_input_grad) - 3)
    return (*first_order_only(kept, grad_logps, *ctx.saved_tensors[:3]), *others)


linear_token_logps.register_autograd(token_logps_backward, setup_context=save_inputs)
