"""The fused calls as operators, for ``torch.compile``: one opaque node each, so that no graph breaks.

An operator runs the call as it runs outside of a compiled region, and returns the gradients beside the loss. Options
that are names cross its boundary as one text, all numbers in one tensor and the boundaries of segments as tensors, so
that neither a batch of another size nor another value of an option compiles anything anew.
"""

from __future__ import annotations

import math
from ast import literal_eval
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import custom_op

from cpo_kernels.kernels.numerics import accumulate_dtype
from cpo_kernels.kernels.ops import NAMESPACE
from cpo_kernels.layout import CandidateLayout
from cpo_kernels.objective import CPOOutput, Groups, check_problem, make_problem
from cpo_kernels.options import HEAD_OPTIONS, OBJECTIVE_OPTIONS, Head, Objective

from .call import Needs, resolve
from .derivatives import first_order_only
from .fused import run_loss
from .inputs import Inputs, merge_ranks, prepare
from .logps import run_token_logps, token_logps_grads
from .losses import CPOLossOfCall, LossResult, resolve_cpo
from .tokens import check_targets_in

# The options that are numbers or None, in the order of their tensor; the compiler may hold them as symbols.
NUMBERS = {
    Objective: (
        "beta",
        "margin",
        "label_smoothing",
        "contrast_weight",
        "mle_weight",
        "num_groups",
        "num_target_tokens",
    ),
    Head: (
        *("logit_scale", "softcap", "temperature", "grad_filter_eps", "candidate_eps"),
        *("max_logits_bytes", "frozen_columns"),
    ),
}
NAMES = {
    kind: tuple(name for name in names if name not in (*NUMBERS[kind], "vocab_shard"))
    for kind, names in ((Objective, OBJECTIVE_OPTIONS), (Head, HEAD_OPTIONS))
}
INTEGERS = ("max_logits_bytes", "frozen_columns")
Options = TypeVar("Options", Head, Objective)


def pack(options: Head | Objective) -> tuple[str, Tensor]:
    """Take options apart into a text and a host tensor; a process group can become neither."""
    if isinstance(options, Head):
        options.check_whole("torch.compile")
    text = ", ".join([f"{name!r}: {text_of(getattr(options, name))}" for name in NAMES[type(options)]])
    values = [getattr(options, name) for name in NUMBERS[type(options)]]
    return "{" + text + "}", torch.stack([on_host(math.nan if value is None else value) for value in values])


def on_host(number: float) -> Tensor:
    """Make a host tensor of a number; traced ``torch.tensor`` would need its value."""
    return torch.full((), number, dtype=torch.float64, device="cpu")


def text_of(value: object) -> str:
    """Write a value as Python does; a dtype as ``'float32'``, the only one that an option may have."""
    return "'float32'" if isinstance(value, torch.dtype) else repr(value)


def unpack(kind: type[Options], text: str, numbers: Tensor) -> Options:
    """Restore the options that :func:`pack` took apart."""
    options: dict[str, Any] = literal_eval(text)
    if options.get("logits_dtype") is not None:
        options["logits_dtype"] = torch.float32
    for name, value in zip(NUMBERS[kind], numbers.tolist(), strict=True):
        options[name] = None if math.isnan(value) else int(value) if name in INTEGERS else value
    return kind(**options)


def sums_dtype(head: str, hidden: Tensor) -> torch.dtype:
    """Read the dtype of log-likelihoods from what :func:`pack` made of a head."""
    return accumulate_dtype(hidden.dtype if literal_eval(head)["logits_dtype"] is None else torch.float32)


def given(grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias in the shapes of ``tensors``, an empty tensor for None.

    An operator returns tensors only.
    """
    empty = next(tensor for tensor in tensors if tensor is not None).new_empty
    of_hidden, of_weight, of_bias = (
        empty(0) if grad is None or tensor is None else grad.reshape(tensor.shape)
        for grad, tensor in zip(grads, tensors, strict=True)
    )
    return of_hidden, of_weight, of_bias


def fake_grads(needs: Sequence[bool], *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Make what :func:`given` returns, without numbers."""
    contiguous = torch.contiguous_format
    wanted = zip(needs, tensors, strict=True)
    return given(
        [torch.empty_like(t, memory_format=contiguous) if n and t is not None else None for n, t in wanted], tensors
    )


class AllGroups(Sequence[int]):
    """The ``range`` of all groups for a traced function, which a real range would recompile for each new end."""

    start, step = 0, 1

    def __init__(self, stop: int) -> None:
        self.stop = stop

    def __len__(self) -> int:
        return self.stop

    def __getitem__(self, index: Any) -> Any:
        return range(self.stop)[index]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.stop))


# Checks of values cannot be traced, so they are operators. Their results are used, so the compiler keeps them.


@custom_op(f"{NAMESPACE}::checked_targets", mutates_args=())
def checked_targets(targets: Tensor, vocab: int) -> Tensor:
    """Copy targets (N,); raises ``ValueError`` for one outside [0, V) other than -100."""
    check_targets_in(targets, vocab)
    return targets.clone()


@checked_targets.register_fake
def _(targets, vocab):
    return torch.empty_like(targets)


@custom_op(f"{NAMESPACE}::checked_lengths", mutates_args=())
def checked_lengths(lengths: Tensor, ranks: Tensor | None, candidates: int, contrasted: bool) -> Tensor:
    """Copy lengths (S,) of groups of so many candidates; raises ``ValueError`` as :func:`check_problem` does."""
    groups = Groups(None, (lengths.numel() // candidates, candidates))
    check_problem(make_problem(Objective(contrast_weight=float(contrasted)), groups, lengths, None, ranks))
    return lengths.clone()


@checked_lengths.register_fake
def _(lengths, ranks, candidates, contrasted):
    return torch.empty_like(lengths)


def bound_layout(rows: Tensor | None, cu_tokens: Tensor | None, cu_groups: Tensor | None) -> CandidateLayout | None:
    """Restore a layout from the tensors that crossed the boundary of an operator."""
    if cu_tokens is None or cu_groups is None:
        return None
    return CandidateLayout(cu_tokens.tolist(), cu_groups.tolist(), rows)


def layout_tensors(layout: CandidateLayout | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Take a layout apart into the tensors that :func:`bound_layout` takes."""
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
    """Trace :func:`cpo_kernels.linear_cpo_loss` as one operator, with its arguments after autocast."""
    if layout is not None and layout.ranks is not None:
        ranks = merge_ranks(ranks, layout.ranks, (layout.boundaries[0].shape[0] - 1,), hidden)
    tensors = hidden, weight, bias, targets, *layout_tensors(layout), ref_logps, ranks
    outputs = linear_cpo(*tensors, list(needs), *pack(objective), *pack(head))
    return CPOOutput(*outputs[: len(CPOOutput._fields)])


@custom_op(f"{NAMESPACE}::linear_cpo", mutates_args=())
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
    needs: Sequence[bool],
    objective: str,
    objective_numbers: Tensor,
    head: str,
    head_numbers: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of ``CPOOutput``, the gain of the gradients, and those of hidden, weight and bias.

    A gradient that is not needed is empty. Backward divides by the gain once it knows the upstream gradient.
    """
    layout = bound_layout(rows, cu_tokens, cu_groups)
    inputs = prepare(hidden, weight, targets, layout, bias, unpack(Head, head, head_numbers))
    options = unpack(Objective, objective, objective_numbers)
    out, result = run_cpo(inputs, ref_logps, ranks, options, (needs[0], needs[1], needs[2]))
    gain = (out.loss.new_ones(()) * result.gain).to(out.loss.dtype)
    loss, contrastive, nll, logps, rewards, accuracy, margin, dropped = out
    of_hidden, of_weight, of_bias = given(result.grads, (hidden, weight, bias))
    terms = loss, contrastive, nll, logps, rewards, accuracy, margin, dropped
    return (*terms, gain, of_hidden, of_weight, of_bias)


def run_cpo(
    inputs: Inputs, ref_logps: Tensor | None, ranks: Tensor | None, objective: Objective, needs: Needs
) -> tuple[CPOOutput, LossResult]:
    """Run the objective and its gradients without autograd."""
    call, given = resolve_cpo(inputs, ref_logps, ranks, objective, needs)
    loss = CPOLossOfCall(objective, inputs.shape, inputs.hidden.dtype, inputs.hidden.shape[1], call, *given)
    result = run_loss(call, inputs.tensors, loss)
    return CPOOutput(*result.outputs), result


@linear_cpo.register_fake
def _(hidden, weight, bias, targets, rows, cu_tokens, cu_groups, ref_logps, ranks, needs, *options):
    dtype = sums_dtype(options[2], hidden)
    shape = targets.shape[:-1] if cu_tokens is None else (cu_tokens.shape[0] - 1,)
    scalar, per_segment = (lambda: hidden.new_empty((), dtype=dtype)), (lambda: hidden.new_empty(shape, dtype=dtype))
    accuracy = hidden.new_empty((), dtype=torch.float32)
    terms = scalar(), scalar(), scalar(), per_segment(), per_segment(), accuracy, scalar(), scalar()
    return (*terms, scalar(), *fake_grads(needs, hidden, weight, bias))


def save_grads(ctx, inputs, output) -> None:
    """Save the gradients that the forward computed with the loss."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[-4:])


@custom_op(f"{NAMESPACE}::scale_grads", mutates_args=())
def scale_grads(grads: Sequence[Tensor], scale: Tensor, hidden: Tensor) -> list[Tensor]:
    """Scale gradients; ``hidden`` is not read.

    It ties the gradients to what they are gradients of. So the compiler refuses a second derivative of them, which it
    would otherwise compute without them.
    """
    return [grad * scale for grad in grads]


@scale_grads.register_fake
def _(grads, scale, hidden):
    return [torch.empty_like(grad) for grad in grads]


def linear_cpo_backward(ctx, grad_loss, *_unused):
    """Scale the gradients that the forward computed with the loss."""
    hidden, weight, bias, gain, *grads = ctx.saved_tensors
    with torch.no_grad():
        grads = scale_grads(grads, grad_loss / gain, hidden)
    return needed(ctx, grads, grad_loss, hidden, weight, bias)


def needed(ctx, grads, *sources):
    """Return the gradients of hidden, weight and bias that are needed, and None for all other inputs."""
    wanted = [grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:3], strict=True)]
    return (*first_order_only(wanted, *sources), *[None] * (len(ctx.needs_input_grad) - 3))


linear_cpo.register_autograd(linear_cpo_backward, setup_context=save_grads)


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, layout: CandidateLayout | None, bias: Tensor | None, head: Head
) -> Tensor:
    """Trace :func:`cpo_kernels.linear_token_logps` as one operator, with its arguments after autocast."""
    return linear_token_logps(hidden, weight, bias, targets, *layout_tensors(layout), *pack(head))


@custom_op(f"{NAMESPACE}::linear_token_logps", mutates_args=())
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    cu_tokens: Tensor | None,
    cu_groups: Tensor | None,
    head: str,
    numbers: Tensor,
) -> Tensor:
    """Return the log-probabilities of all tokens, in the shape of targets; the gradient recomputes the logits."""
    layout = bound_layout(rows, cu_tokens, cu_groups)
    inputs = prepare(hidden, weight, targets, layout, bias, unpack(Head, head, numbers), grouped=False)
    call = resolve(inputs, (False, False, False), whole_groups=False)
    return run_token_logps(call, call.bind(*inputs.tensors)).logps.reshape(targets.shape)


@linear_token_logps.register_fake
def _(hidden, weight, bias, targets, rows, cu_tokens, cu_groups, head, numbers):
    return hidden.new_empty(targets.shape, dtype=sums_dtype(head, hidden))


@custom_op(f"{NAMESPACE}::linear_token_logps_backward", mutates_args=())
def linear_token_logps_backward(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    cu_tokens: Tensor | None,
    cu_groups: Tensor | None,
    numbers: Tensor,
    needs: Sequence[bool],
    head: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias, empty where ``needs`` asks for none."""
    layout = bound_layout(rows, cu_tokens, cu_groups)
    inputs = prepare(hidden, weight, targets, layout, bias, unpack(Head, head, numbers), grouped=False)
    call = resolve(inputs, (needs[0], needs[1], needs[2]), whole_groups=False)
    grads = token_logps_grads(call, call.bind(*inputs.tensors), None, grad_logps.reshape(-1))
    return given(grads, (hidden, weight, bias))


@linear_token_logps_backward.register_fake
def _(grad_logps, hidden, weight, bias, targets, rows, cu_tokens, cu_groups, numbers, needs, head):
    return fake_grads(needs, hidden, weight, bias)


def save_inputs(ctx, inputs, output) -> None:
    """Save the tensors from which the gradient is recomputed."""
    *tensors, ctx.head, numbers = inputs
    ctx.save_for_backward(*tensors, numbers)


def token_logps_backward(ctx, grad_logps):
    """Recompute the logits and form the gradients."""
    tensors, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:3])
    with torch.no_grad():
        grads = linear_token_logps_backward(grad_logps, *tensors, needs, ctx.head)
    return needed(ctx, grads, grad_logps, *tensors[:3])


linear_token_logps.register_autograd(token_logps_backward, setup_context=save_inputs)
