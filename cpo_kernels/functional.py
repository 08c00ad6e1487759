"""The public functions. Targets are aligned: ``hidden[t]`` predicts ``targets[t]``; -100 means "no token here"."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NoReturn, cast

import torch
from torch import Tensor

from .engine import compiled
from .engine.call import Needs, resolve
from .engine.derivatives import has_tangent, refuse_tangents
from .engine.fused import FusedLogitsLoss, FusedLoss, LogitsCall
from .engine.inputs import FLOAT_DTYPES, autocast, check_targets, merge_ranks, per_segment, prepare
from .engine.logps import LinearTokenLogps
from .engine.losses import (
    CPOLossOfCall,
    OwnLossOfCall,
    check_loss,
    coefficients_are_known,
    resolve_cpo,
)
from .engine.plan import Plan
from .engine.tokens import check_targets_in
from .engine.vocab_parallel import VocabShard
from .kernels import plain, registry
from .kernels.backend import Backend
from .kernels.device import to_device
from .kernels.numerics import IGNORE_INDEX, accumulate_dtype
from .kernels.selection import Sizes
from .layout import CandidateLayout
from .objective import CPOOutput, CPOProblem, Groups, LossTerms, check_problem, make_problem, summarize
from .options import Head, Objective, refuse_unknown


def contrastive_loss(
    logps: Tensor,
    *,
    ref_logps: Tensor | None = None,
    ranks: Tensor | None = None,
    beta: float = 0.1,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    loss_type: str = "plackett_luce",
    reduction: str = "mean",
    **unknown: NoReturn,
) -> Tensor:
    """Compute the contrast of section 1 of docs/objective.md from log-likelihoods; differentiable.

    Args:
        logps: (G, C) log-likelihoods of the candidates, floating point; -inf is an impossible candidate, see section 4
            of docs/objective.md.
        ref_logps: (G, C) log-likelihoods under the reference model, or None.
        ranks: (G, C) integers, 0 is best; default: candidate 0 against the others.
        beta: inverse temperature of the contrast, > 0.
        margin: added to the score of every candidate of rank > 0.
        label_smoothing: probability that a pair is the wrong way round (K = 1 only).
        loss_type: ``"plackett_luce"``, or for K = 1 a loss of pairs of docs/objective.md, section 2, such as ``"ipo"``.
        reduction: ``"mean"`` over groups, ``"sum"`` or ``"none"``.
        **unknown: an option that does not exist raises a ``TypeError`` that names the nearest one.

    Returns:
        A scalar, or (G,) for ``"none"``; float32, or float64 for float64.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a pair loss with K > 1, or a group that is empty, has
            no rank-0 candidate or has nothing to contrast.
    """
    refuse_unknown(contrastive_loss, unknown)
    if logps.dim() != 2 or not logps.is_floating_point():
        raise ValueError(f"logps must be floating point (G, C), got {logps.dtype} {tuple(logps.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    objective = Objective(beta=beta, margin=margin, label_smoothing=label_smoothing, loss_type=loss_type)
    groups, candidates = logps.shape
    if logps.numel() == 0:
        raise ValueError(f"group 0 is empty: logps have shape {(groups, candidates)}")
    objective.check_candidates(candidates)
    shape = (groups, candidates)
    ref = per_segment("ref_logps", ref_logps, shape, logps)
    flat_ranks = per_segment("ranks", ranks, shape, logps)
    values = logps.to(accumulate_dtype(logps.dtype))
    lengths = torch.ones(groups * candidates, dtype=torch.int64, device=logps.device)
    problem = checked_problem(objective, shape, lengths, cast_ref(ref, values.dtype), flat_ranks)
    loss = problem.contrast(values.reshape(-1)).loss
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    max_logits_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    grad_filter_eps: float | None = None,
    candidate_eps: float | None = None,
    skip_absent_rows: bool = True,
    vocab_shard: VocabShard | None = None,
    frozen_columns: int = 0,
    **unknown: NoReturn,
) -> Tensor:
    """Compute log-probabilities of the targets under logits that already exist; differentiable.

    Args:
        logits: (..., V), float32, bfloat16, float16 (or float64 on the torch backend).
        targets: (...) int64; -100 gives 0 and no gradient.
        bias: (V,) added to the logits, or None.
        logit_scale, ..., frozen_columns: options of the head, see :class:`cpo_kernels.options.Head`.
        **unknown: an option that does not exist raises a ``TypeError`` that names the nearest one.

    Returns:
        (...) float32 (float64 for float64), in nats.

    Raises:
        ValueError: shapes, dtypes, devices or target values that do not fit.
    """
    refuse_unknown(token_logps, unknown)
    head = Head(
        *(logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype),
        *(grad_filter_eps, candidate_eps, skip_absent_rows, vocab_shard, frozen_columns),
    )
    return token_logps_of(logits, targets, bias, head)


def sequence_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    max_logits_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    grad_filter_eps: float | None = None,
    candidate_eps: float | None = None,
    skip_absent_rows: bool = True,
    vocab_shard: VocabShard | None = None,
    frozen_columns: int = 0,
    **unknown: NoReturn,
) -> Tensor:
    """Compute log-likelihoods of sequences: (..., T, V), (..., T) -> (...); otherwise as :func:`token_logps`."""
    refuse_unknown(sequence_logps, unknown)
    head = Head(
        *(logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype),
        *(grad_filter_eps, candidate_eps, skip_absent_rows, vocab_shard, frozen_columns),
    )
    return sum_tokens(token_logps_of(logits, targets, bias, head))


def token_logps_of(logits: Tensor, targets: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """Run :func:`token_logps` with its options in one object."""
    backend, flat, flat_targets = flatten_logits(logits, targets, bias, head)
    return row_logps(backend, flat, flat_targets, bias, head).reshape(targets.shape)


def row_logps(backend: Backend, logits: Tensor, targets: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """Compute the log-probability of one target a row; plain torch does it under forward-mode differentiation."""
    forward = plain.row_forward if has_tangent(logits, bias) else backend.differentiable_rows
    return forward(logits, targets, None, bias, *head.transform)[1]


def flatten_logits(
    logits: Tensor, targets: Tensor, bias: Tensor | None, options: Head
) -> tuple[Backend, Tensor, Tensor]:
    """Check logits and targets; return the backend, logits (R, V) of unit column stride and targets (R,)."""
    options.check_exact("a loss of logits that already exist")
    options.check_whole("a loss of logits that already exist")
    if logits.dtype not in FLOAT_DTYPES:
        raise ValueError(f"logits must be one of {FLOAT_DTYPES}, got {logits.dtype}")
    if targets.shape != logits.shape[:-1] or logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"targets must have shape {tuple(logits.shape[:-1])} and V >= 1, got {tuple(targets.shape)}")
    if bias is not None and (bias.shape != logits.shape[-1:] or bias.dtype not in FLOAT_DTYPES):
        raise ValueError(f"bias must be floating point ({logits.shape[-1]},), got {bias.dtype} {tuple(bias.shape)}")
    check_targets(targets)
    for name, tensor in (("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{name} must be on the device of logits, {logits.device}, got {tensor.device}")
    flat = logits.reshape(-1, logits.shape[-1])
    flat_targets = targets.reshape(-1).contiguous()
    vocab = logits.shape[-1]
    if torch.compiler.is_compiling():
        flat_targets = compiled.checked_targets(flat_targets, vocab)
    elif not flat.is_meta:
        check_targets_in(flat_targets, vocab)
    backend = registry.select(options.backend, logits.device, logits.dtype, Sizes(vocab, logits.dtype))
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    return backend, flat, flat_targets


def sum_tokens(logps: Tensor) -> Tensor:
    """Sum token log-probabilities over the last dimension in float64: (..., T) -> (...)."""
    return logps.sum(-1, dtype=torch.float64).to(logps.dtype)


def cpo_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    ref_logps: Tensor | None = None,
    ranks: Tensor | None = None,
    bias: Tensor | None = None,
    beta: float = 0.1,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    loss_type: str = "plackett_luce",
    length_normalized: bool = False,
    contrast_weight: float = 1.0,
    mle_weight: float = 0.0,
    num_groups: float | None = None,
    num_target_tokens: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    max_logits_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    grad_filter_eps: float | None = None,
    candidate_eps: float | None = None,
    skip_absent_rows: bool = True,
    vocab_shard: VocabShard | None = None,
    frozen_columns: int = 0,
    **unknown: NoReturn,
) -> CPOOutput:
    """Compute the whole objective from logits that already exist.

    Args:
        logits: (G, C, T, V).
        targets: (G, C, T) int64, -100 for no token; a candidate without tokens is absent.
        ref_logps: (G, C) log-likelihoods under the reference model, as :func:`sequence_logps` returns them: sums, also
            with ``length_normalized``, which the loss then divides by the numbers of tokens. None: no reference.
        ranks: (G, C) integers, 0 is best; default: candidate 0 against the others.
        bias: (V,) or None.
        beta, ..., num_target_tokens: see :class:`cpo_kernels.options.Objective`.
        logit_scale, ..., frozen_columns: options of the head, see :class:`cpo_kernels.options.Head`.
        **unknown: an option that does not exist raises a ``TypeError`` that names the nearest one.

    Returns:
        CPOOutput: its ``loss`` is differentiable in logits and bias.

    Raises:
        ValueError: bad shapes, dtypes, devices or values; the message names the offending value.
    """
    refuse_unknown(cpo_loss, unknown)
    objective = Objective(
        *(beta, margin, label_smoothing, loss_type, length_normalized),
        *(contrast_weight, mle_weight, num_groups, num_target_tokens),
    )
    head = Head(
        *(logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype),
        *(grad_filter_eps, candidate_eps, skip_absent_rows, vocab_shard, frozen_columns),
    )
    if targets.dim() != 3 or logits.dim() != 4:
        raise ValueError(
            f"logits must be (G, C, T, V) and targets (G, C, T), got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if 0 in targets.shape:
        raise ValueError(f"group 0 is empty: targets have shape {tuple(targets.shape)}")
    objective.check_candidates(targets.shape[1])
    shape = (targets.shape[0], targets.shape[1])
    kernels, flat, flat_targets = flatten_logits(logits, targets, bias, head)
    ref, flat_ranks = (per_segment(n, x, shape, logits) for n, x in (("ref_logps", ref_logps), ("ranks", ranks)))
    lengths = (targets != IGNORE_INDEX).sum(-1).reshape(-1)
    problem = checked_problem(objective, shape, lengths, cast_ref(ref, logits.dtype), flat_ranks)
    one_launch = objective.has_kernel and runs_in_one_launch(kernels, logits.dtype, shape[1])
    if one_launch and not has_tangent(flat, bias):
        needs, _, needs_bias = needs_grad(flat, None, bias)
        *terms, sums = FusedLogitsLoss.apply(
            flat, bias, LogitsCall(kernels, head, flat_targets, problem, (needs, needs_bias))
        )
        return summarize(problem, LossTerms(*terms), sums, shape)
    logps = row_logps(kernels, flat, flat_targets, bias, head)
    sums = sum_tokens(logps.reshape(targets.shape)).reshape(-1)
    return summarize(problem, problem.loss(sums), sums, shape)


def runs_in_one_launch(backend: Backend, dtype: torch.dtype, candidates: int) -> bool:
    """Tell whether one launch can compute the loss of stored logits; not in float16, whose gradients need a gain."""
    usable = backend.logits_loss is not None and candidates <= backend.contrast_candidates
    return usable and dtype != torch.float16 and not torch.compiler.is_compiling()


def checked_problem(
    objective: Objective, shape: tuple[int, int], lengths: Tensor, ref_logps: Tensor | None, ranks: Tensor | None
) -> CPOProblem:
    """Bind the objective to groups (G, C) and check them, also in compiled code."""
    groups = Groups(None, shape)
    if torch.compiler.is_compiling():
        lengths = compiled.checked_lengths(lengths, ranks, shape[1], objective.contrast_weight > 0)
        return make_problem(objective, groups, lengths, ref_logps, ranks)
    problem = make_problem(objective, groups, lengths, ref_logps, ranks)
    check_problem(problem)
    return problem


def cast_ref(ref_logps: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Cast reference log-likelihoods to the dtype in which those of logits of ``dtype`` are summed."""
    return None if ref_logps is None else ref_logps.to(accumulate_dtype(dtype))


def needs_grad(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Needs:
    """Tell which of the tensors need a gradient in the current grad mode."""
    enabled = torch.is_grad_enabled()
    return (
        enabled and hidden.requires_grad,
        enabled and weight is not None and weight.requires_grad,
        enabled and bias is not None and bias.requires_grad,
    )


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    max_logits_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    grad_filter_eps: float | None = None,
    candidate_eps: float | None = None,
    skip_absent_rows: bool = True,
    vocab_shard: VocabShard | None = None,
    frozen_columns: int = 0,
    **unknown: NoReturn,
) -> Tensor:
    """Compute log-probabilities of the targets under ``hidden @ weight.T``, whose logits are never stored whole.

    Args:
        hidden: (..., H) float32, bfloat16, float16 (or float64 on the torch backend).
        weight: (V, H), same dtype; may be frozen or tied.
        targets: (...) int64; -100 gives 0 and no gradient, and its row enters no GEMM.
        bias: (V,) or None.
        logit_scale, ..., frozen_columns: options of the head, see :class:`cpo_kernels.options.Head`.
        **unknown: an option that does not exist raises a ``TypeError`` that names the nearest one.

    Returns:
        (...) float32 (float64 for float64), in nats; differentiable in hidden, weight and bias.

    Raises:
        ValueError: bad shapes, dtypes, devices or target values; the message names the offending value.
        RuntimeError: a backend that is not available.
    """
    refuse_unknown(linear_token_logps, unknown)
    head = Head(
        *(logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype),
        *(grad_filter_eps, candidate_eps, skip_absent_rows, vocab_shard, frozen_columns),
    )
    return logps_of_slots(hidden, weight, targets, None, bias, head)


def logps_of_slots(
    hidden: Tensor, weight: Tensor, targets: Tensor, layout: CandidateLayout | None, bias: Tensor | None, head: Head
) -> Tensor:
    """Run :func:`linear_token_logps` with its options in one object, also for a packed layout."""
    head.check_exact("a log-likelihood, whose upstream gradient arrives later,")
    if torch.compiler.is_compiling():
        refuse_tangents(hidden, weight, bias)
        hidden, weight, bias = autocast(hidden, weight, bias)
        return compiled.token_logps(hidden, weight, targets, layout, bias, head)
    inputs = prepare(hidden, weight, targets, layout, bias, head, grouped=False)
    call = resolve(inputs, needs_grad(*inputs.tensors), whole_groups=False)
    return LinearTokenLogps.apply(*inputs.tensors, call).reshape(targets.shape)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    layout: CandidateLayout | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    max_logits_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    grad_filter_eps: float | None = None,
    candidate_eps: float | None = None,
    skip_absent_rows: bool = True,
    vocab_shard: VocabShard | None = None,
    frozen_columns: int = 0,
    **unknown: NoReturn,
) -> Tensor:
    """Compute log-likelihoods of sequences: the sums of :func:`linear_token_logps` over their tokens.

    Args:
        hidden: (..., T, H), or (R, H) with a layout.
        weight: (V, H).
        targets: (..., T), or (N,) with a layout.
        layout: the packed form, or None.
        bias: (V,) or None.
        logit_scale, ..., frozen_columns: options of the head, see :class:`cpo_kernels.options.Head`.
        **unknown: an option that does not exist raises a ``TypeError`` that names the nearest one.

    Returns:
        (...), or (S,) with a layout; differentiable in hidden, weight and bias.
    """
    refuse_unknown(linear_sequence_logps, unknown)
    head = Head(
        *(logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype),
        *(grad_filter_eps, candidate_eps, skip_absent_rows, vocab_shard, frozen_columns),
    )
    return sequence_logps_of(hidden, weight, targets, layout, bias, head)


def sequence_logps_of(
    hidden: Tensor, weight: Tensor, targets: Tensor, layout: CandidateLayout | None, bias: Tensor | None, head: Head
) -> Tensor:
    """Run :func:`linear_sequence_logps` with its options in one object."""
    logps = logps_of_slots(hidden, weight, targets, layout, bias, head)
    if layout is None:
        return sum_tokens(logps)
    lengths = to_device(layout.boundaries[0].diff(), logps.device)
    return torch.segment_reduce(logps.double(), "sum", lengths=lengths, unsafe=True, initial=0).to(logps.dtype)


def linear_cpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    layout: CandidateLayout | None = None,
    ref_logps: Tensor | None = None,
    ranks: Tensor | None = None,
    bias: Tensor | None = None,
    beta: float = 0.1,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    loss_type: str = "plackett_luce",
    length_normalized: bool = False,
    contrast_weight: float = 1.0,
    mle_weight: float = 0.0,
    num_groups: float | None = None,
    num_target_tokens: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    max_logits_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    grad_filter_eps: float | None = None,
    candidate_eps: float | None = None,
    skip_absent_rows: bool = True,
    vocab_shard: VocabShard | None = None,
    frozen_columns: int = 0,
    **unknown: NoReturn,
) -> CPOOutput:
    """Compute the whole objective from hidden states, in one pass over the logits, which are never stored.

    The pass takes three GEMMs of the rows that predict something, two for a frozen head, one without gradients.

    Args:
        hidden: (G, C, T, H), or (R, H) with a layout; float32, bfloat16, float16 (float64 on the torch backend).
        weight: (V, H), same dtype; may be frozen or tied.
        targets: (G, C, T) int64, or (N,) with a layout; -100 for no token. A candidate without tokens is absent.
        layout: the packed form, or None.
        ref_logps: (G, C) or (S,) log-likelihoods under the reference model, as :func:`linear_sequence_logps` returns
            them: sums, also with ``length_normalized``, which the loss then divides by the numbers of tokens. None: no
            reference.
        ranks: (G, C) or (S,) integers, 0 is best; default: the first candidate of a group against the others.
        bias: (V,) or None.
        beta, ..., num_target_tokens: see :class:`cpo_kernels.options.Objective`.
        logit_scale, ..., frozen_columns: options of the head, see :class:`cpo_kernels.options.Head`.
        **unknown: an option that does not exist raises a ``TypeError`` that names the nearest one.

    Returns:
        CPOOutput: its ``loss`` is differentiable in hidden, weight and bias.

    Raises:
        ValueError: bad shapes, dtypes, devices or values; the message names the offending value.
        RuntimeError: a backend that is not available.
    """
    refuse_unknown(linear_cpo_loss, unknown)
    objective = Objective(
        *(beta, margin, label_smoothing, loss_type, length_normalized),
        *(contrast_weight, mle_weight, num_groups, num_target_tokens),
    )
    head = Head(
        *(logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype),
        *(grad_filter_eps, candidate_eps, skip_absent_rows, vocab_shard, frozen_columns),
    )
    if torch.compiler.is_compiling():
        refuse_tangents(hidden, weight, bias)
        hidden, weight, bias = autocast(hidden, weight, bias)
        needs = needs_grad(hidden, weight, bias)
        return compiled.linear_cpo_loss(hidden, weight, targets, layout, ref_logps, ranks, bias, objective, head, needs)
    inputs = prepare(hidden, weight, targets, layout, bias, head)
    call, given = resolve_cpo(inputs, ref_logps, ranks, objective, needs_grad(*inputs.tensors))
    make_loss = partial(CPOLossOfCall, objective, inputs.shape, inputs.hidden.dtype, inputs.hidden.shape[1])
    return CPOOutput(*FusedLoss.apply(*inputs.tensors, call, make_loss, given))


def linear_sequence_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: Callable[[Tensor, range], Tensor],
    *,
    layout: CandidateLayout | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    max_logits_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    grad_filter_eps: float | None = None,
    candidate_eps: float | None = None,
    skip_absent_rows: bool = True,
    vocab_shard: VocabShard | None = None,
    frozen_columns: int = 0,
    **unknown: NoReturn,
) -> Tensor:
    """Compute any differentiable loss of sequence log-likelihoods in one pass over the logits.

    Args:
        hidden: (G, C, T, H), or (R, H) with a layout.
        weight: (V, H), same dtype.
        targets: (G, C, T) int64, or (N,) with a layout; -100 for no token.
        loss_fn: called with the log-likelihoods of some whole groups, (len(groups), C) or the packed segments of
            those groups, and ``groups``, the range of their indices (to look up references or labels; compiled code
            gets an object with the start, stop and length of one). Returns the sum of their losses, a scalar. Gradients
            flow to the log-likelihoods only, not to tensors it closes over.
        layout: the packed form, or None.
        bias: (V,) or None.
        logit_scale, ..., frozen_columns: options of the head, see :class:`cpo_kernels.options.Head`; the filters take
            ``1 / G`` for the largest coefficient.
        **unknown: an option that does not exist raises a ``TypeError`` that names the nearest one.

    Returns:
        The sum over all groups, a scalar.

    Raises:
        ValueError: as for :func:`linear_cpo_loss`, or a loss that is not a differentiable scalar.
    """
    refuse_unknown(linear_sequence_loss, unknown)
    head = Head(
        *(logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype),
        *(grad_filter_eps, candidate_eps, skip_absent_rows, vocab_shard, frozen_columns),
    )
    if torch.compiler.is_compiling():
        # An operator cannot carry a Python function, so the compiler traces it over the log-likelihoods instead.
        logps = sequence_logps_of(hidden, weight, targets, layout, bias, head)
        groups = targets.shape[0] if layout is None else layout.boundaries[1].shape[0] - 1
        loss = loss_fn(logps, cast(range, compiled.AllGroups(groups)))
        check_loss(loss, differentiable=logps.requires_grad)
        return loss
    inputs = prepare(hidden, weight, targets, layout, bias, head)
    candidates = inputs.shape[1] if layout is None else None
    call = resolve(inputs, needs_grad(*inputs.tensors))
    make_loss = partial(OwnLossOfCall, loss_fn, candidates, inputs.hidden.dtype, inputs.hidden.shape[1])
    return FusedLoss.apply(*inputs.tensors, call, make_loss, ())[0]


def plan(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    layout: CandidateLayout | None = None,
    ref_logps: Tensor | None = None,
    ranks: Tensor | None = None,
    bias: Tensor | None = None,
    beta: float = 0.1,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    loss_type: str = "plackett_luce",
    length_normalized: bool = False,
    contrast_weight: float = 1.0,
    mle_weight: float = 0.0,
    num_groups: float | None = None,
    num_target_tokens: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    max_logits_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    grad_filter_eps: float | None = None,
    candidate_eps: float | None = None,
    skip_absent_rows: bool = True,
    vocab_shard: VocabShard | None = None,
    frozen_columns: int = 0,
    **unknown: NoReturn,
) -> Plan:
    """Return what :func:`linear_cpo_loss` would do with the same arguments: chunks, bytes, number of GEMMs."""
    refuse_unknown(plan, unknown)
    objective = Objective(
        *(beta, margin, label_smoothing, loss_type, length_normalized),
        *(contrast_weight, mle_weight, num_groups, num_target_tokens),
    )
    head = Head(
        *(logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype),
        *(grad_filter_eps, candidate_eps, skip_absent_rows, vocab_shard, frozen_columns),
    )
    inputs = prepare(hidden, weight, targets, layout, bias, head)
    per_segment("ref_logps", ref_logps, inputs.shape, inputs.hidden)
    merge_ranks(ranks, inputs.layout_ranks, inputs.shape, inputs.hidden)
    needs = needs_grad(*inputs.tensors)
    return resolve(inputs, needs, known_coefficients=coefficients_are_known(head, objective, needs)).plan
