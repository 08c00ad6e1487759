"""The public functions. Targets are aligned: ``hidden[t]`` predicts ``targets[t]``; -100 means "no token here"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .engine import compiled
from .engine.autograd import FusedLoss, LinearTokenLogps, needs_grad
from .engine.inputs import FLOAT_DTYPES, Inputs, check_targets, merge_ranks, per_segment, prepare, split_options
from .engine.losses import LogitsCall, coefficients_are_known, run_cpo, run_loss_fn
from .engine.plan import Plan
from .kernels import registry
from .kernels.reference import IGNORE_INDEX, accumulate_dtype
from .kernels.selection import Sizes
from .layout import CandidateLayout, check_targets_in, to_device
from .objective import CPOOutput, CPOProblem, Objective, check_problem, make_problem, summarize
from .options import Head


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
) -> Tensor:
    """The contrast of section 1 of docs/objective.md, from log-likelihoods; differentiable.

    Args:
        logps: (G, C) log-likelihoods of the candidates, floating point.
        ref_logps: (G, C) log-likelihoods under the reference model, or None.
        ranks: (G, C) integers, 0 is best; default: candidate 0 against the others.
        beta: inverse temperature of the contrast, > 0.
        margin: added to the score of every candidate of rank > 0.
        label_smoothing: probability that a pair is the wrong way round (K = 1 only).
        loss_type: ``"plackett_luce"``, or for K = 1 ``"hinge"`` or ``"ipo"``.
        reduction: ``"mean"`` over groups, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or (G,) for ``"none"``; float32, or float64 for float64.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a pair loss with K > 1, or a group that is empty, has
            no rank-0 candidate or has nothing to contrast.
    """
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
    boundaries = list(range(0, groups * candidates + 1, candidates))
    lengths = torch.ones(groups * candidates, dtype=torch.int64, device=logps.device)
    problem = checked_problem(objective, boundaries, lengths, cast_ref(ref, values.dtype), flat_ranks)
    loss = problem.contrast(values.reshape(-1)).loss
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def token_logps(logits: Tensor, targets: Tensor, *, bias: Tensor | None = None, **head: Any) -> Tensor:
    """Log-probabilities of the targets under logits that already exist; differentiable.

    Args:
        logits: (..., V), float32, bfloat16, float16 (or float64 on the torch backend).
        targets: (...) int64; -100 gives 0 and no gradient.
        bias: (V,) added to the logits, or None.
        **head: see :class:`cpo_kernels.options.Head`.

    Returns:
        (...) float32 (float64 for float64), in nats.

    Raises:
        ValueError: shapes, dtypes, devices or target values that do not fit.
    """
    options = Head(**head)
    backend, flat, flat_targets = flatten_logits(logits, targets, bias, options)
    return backend.rows.forward(flat, flat_targets, None, bias, *options.transform)[1].reshape(targets.shape)


def flatten_logits(
    logits: Tensor, targets: Tensor, bias: Tensor | None, options: Head
) -> tuple[registry.Backend, Tensor, Tensor]:
    """The backend, logits (R, V) of unit column stride and targets (R,), checked."""
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
        flat_targets = torch.ops.cpo_kernels.checked_targets(flat_targets, vocab)
    elif not flat.is_meta:
        check_targets_in(flat_targets, vocab)
    backend = registry.select(options.backend, logits.device, logits.dtype, Sizes(vocab, logits.dtype))
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    return backend, flat, flat_targets


def sum_tokens(logps: Tensor) -> Tensor:
    """(..., T) -> (...), accumulated in float64."""
    return logps.double().sum(-1).to(logps.dtype)


def sequence_logps(logits: Tensor, targets: Tensor, *, bias: Tensor | None = None, **head: Any) -> Tensor:
    """Log-likelihoods of sequences: (..., T, V), (..., T) -> (...); otherwise as :func:`token_logps`."""
    return sum_tokens(token_logps(logits, targets, bias=bias, **head))


def cpo_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    ref_logps: Tensor | None = None,
    ranks: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> CPOOutput:
    """The whole objective from logits that already exist.

    Args:
        logits: (G, C, T, V).
        targets: (G, C, T) int64, -100 for no token; a candidate without tokens is absent.
        ref_logps: (G, C) log-likelihoods under the reference model, or None.
        ranks: (G, C) integers, 0 is best; default: candidate 0 against the others.
        bias: (V,) or None.
        **options: see :class:`cpo_kernels.objective.Objective` and :class:`cpo_kernels.options.Head`.

    Returns:
        CPOOutput: its ``loss`` is differentiable in logits and bias.

    Raises:
        ValueError: bad shapes, dtypes, devices or values; the message names the offending one.
    """
    objective, head = split_options("cpo_loss", options)
    if targets.dim() != 3 or logits.dim() != 4:
        raise ValueError(
            f"logits must be (G, C, T, V) and targets (G, C, T), got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if 0 in targets.shape:
        raise ValueError(f"group 0 is empty: targets have shape {tuple(targets.shape)}")
    objective.check_candidates(targets.shape[1])
    shape = (targets.shape[0], targets.shape[1])
    backend, flat, flat_targets = flatten_logits(logits, targets, bias, head)
    ref, flat_ranks = (per_segment(n, x, shape, logits) for n, x in (("ref_logps", ref_logps), ("ranks", ranks)))
    problem = checked_problem(
        objective,
        list(range(0, shape[0] * shape[1] + 1, shape[1])),
        (targets != IGNORE_INDEX).sum(-1).reshape(-1),
        cast_ref(ref, logits.dtype),
        flat_ranks,
    )
    if objective.has_kernel and runs_in_one_launch(backend, logits.dtype, shape[1]):
        call = LogitsCall(backend, head, flat_targets, problem, flat_ranks)
        needs = needs_grad(flat, None, bias)
        loss, sums, *_ = FusedLoss.apply(flat, None, bias, call.run, needs)
        return summarize(problem, loss, sums, shape)
    logps = backend.rows.forward(flat, flat_targets, None, bias, *head.transform)[1]
    sums = sum_tokens(logps.reshape(targets.shape)).reshape(-1)
    return summarize(problem, problem.loss(sums)[0], sums, shape)


def runs_in_one_launch(backend: registry.Backend, dtype: torch.dtype, candidates: int) -> bool:
    """Whether the backend's launch for given logits can be used: not for gradients of float16, which need a gain."""
    usable = backend.logits_loss is not None and candidates <= backend.contrast_candidates
    return usable and dtype != torch.float16 and not torch.compiler.is_compiling()


def checked_problem(
    objective: Objective,
    cu_groups: Sequence[int],
    lengths: Tensor,
    ref_logps: Tensor | None,
    ranks: Tensor | None,
) -> CPOProblem:
    """``make_problem`` and ``check_problem``, in compiled code too."""
    if torch.compiler.is_compiling():
        lengths = torch.ops.cpo_kernels.checked_lengths(lengths, ranks, cu_groups, objective.contrast_weight)
        return make_problem(objective, cu_groups, lengths, ref_logps, ranks)
    problem = make_problem(objective, cu_groups, lengths, ref_logps, ranks)
    check_problem(problem)
    return problem


def cast_ref(ref_logps: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Reference log-likelihoods in the dtype in which those of logits of ``dtype`` are summed."""
    return None if ref_logps is None else ref_logps.to(accumulate_dtype(dtype))


def linear_token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, **head: Any
) -> Tensor:
    """Log-probabilities of the targets under the head ``hidden @ weight.T``; the logits are never stored whole.

    Args:
        hidden: (..., H) float32, bfloat16, float16 (or float64 on the torch backend).
        weight: (V, H), same dtype; may be frozen or tied.
        targets: (...) int64; -100 gives 0 and no gradient, and its row enters no GEMM.
        bias: (V,) or None.
        **head: see :class:`cpo_kernels.options.Head`.

    Returns:
        (...) float32 (float64 for float64), in nats; differentiable in hidden, weight and bias.

    Raises:
        ValueError: bad shapes, dtypes, devices or target values; the message names the offending one.
        RuntimeError: a backend that is not available.
    """
    inputs = prepare(hidden, weight, targets, None, bias, Head(**head), grouped=False)
    return packed_token_logps(inputs).reshape(targets.shape)


def packed_token_logps(inputs: Inputs) -> Tensor:
    """Log-probabilities (N,) of flattened inputs."""
    call = inputs.call
    call.head.check_exact("a log-likelihood, whose upstream gradient arrives later,")
    if torch.compiler.is_compiling():
        tensors = inputs.hidden, inputs.weight, inputs.bias, call.targets, call.rows
        return compiled.linear_token_logps(*tensors, *compiled.flatten_head(call.head))
    needs = needs_grad(inputs.hidden, inputs.weight, inputs.bias)
    return LinearTokenLogps.apply(inputs.hidden, inputs.weight, inputs.bias, call, needs)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    layout: CandidateLayout | None = None,
    bias: Tensor | None = None,
    **head: Any,
) -> Tensor:
    """Log-likelihoods of sequences: the sums of :func:`linear_token_logps` over their tokens.

    Args:
        hidden: (..., T, H), or (R, H) with a layout.
        weight: (V, H).
        targets: (..., T), or (N,) with a layout.
        layout: the packed form, or None.
        bias: (V,) or None.
        **head: see :class:`cpo_kernels.options.Head`.

    Returns:
        (...), or (S,) with a layout; differentiable in hidden, weight and bias.
    """
    if layout is None:
        return sum_tokens(linear_token_logps(hidden, weight, targets, bias=bias, **head))
    inputs = prepare(hidden, weight, targets, layout, bias, Head(**head))
    logps = packed_token_logps(inputs)
    lengths = to_device(torch.tensor(layout.cu_tokens, device="cpu").diff(), logps.device)
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
    **options: Any,
) -> CPOOutput:
    """The whole objective from hidden states: loss and gradients in one pass over the logits, which are never stored.

    Three GEMMs of the rows that predict something; two for a frozen head, one without gradients.

    Args:
        hidden: (G, C, T, H), or (R, H) with a layout; float32, bfloat16, float16 (float64 on the torch backend).
        weight: (V, H), same dtype; may be frozen or tied.
        targets: (G, C, T) int64, or (N,) with a layout; -100 for no token. A candidate without tokens is absent.
        layout: the packed form, or None.
        ref_logps: (G, C) or (S,) log-likelihoods under the reference model, or None.
        ranks: (G, C) or (S,) integers, 0 is best; default: the first candidate of a group against the others.
        bias: (V,) or None.
        **options: see :class:`cpo_kernels.objective.Objective` and :class:`cpo_kernels.options.Head`.

    Returns:
        CPOOutput: its ``loss`` is differentiable in hidden, weight and bias.

    Raises:
        ValueError: bad shapes, dtypes, devices or values; the message names the offending one.
        RuntimeError: a backend that is not available.
    """
    objective, head = split_options("linear_cpo_loss", options)
    inputs = prepare(hidden, weight, targets, layout, bias, head)
    objective.check_candidates(largest_group(inputs.call.cu_groups))
    ref = per_segment("ref_logps", ref_logps, inputs.shape, inputs.hidden)
    flat_ranks = merge_ranks(ranks, inputs)
    call, tensors = inputs.call, (inputs.hidden, inputs.weight, inputs.bias)
    needs = needs_grad(*tensors)
    ref = cast_ref(ref, head.logits_dtype or inputs.hidden.dtype)
    if torch.compiler.is_compiling():
        loss, sums, lengths, dropped, *_ = compiled.linear_cpo(
            *tensors,
            *(call.targets, call.rows, ref, flat_ranks, call.cu_tokens, call.cu_groups, needs),
            *compiled.flatten_objective(objective),
            *compiled.flatten_head(head),
        )
    else:
        compute = partial(run_cpo, call, objective, ref, flat_ranks)
        loss, sums, lengths, dropped = FusedLoss.apply(*tensors, compute, needs)
    problem = make_problem(objective, call.cu_groups, lengths, ref, flat_ranks)
    return summarize(problem, loss, sums, inputs.shape, dropped)


def largest_group(cu_groups: Sequence[int]) -> int:
    """Candidates of the largest group."""
    return max(end - start for start, end in pairwise(cu_groups))


def linear_sequence_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: Callable[[Tensor, range], Tensor],
    *,
    layout: CandidateLayout | None = None,
    bias: Tensor | None = None,
    **head: Any,
) -> Tensor:
    """Any differentiable loss of sequence log-likelihoods, in one pass over the logits.

    Args:
        hidden: (G, C, T, H), or (R, H) with a layout.
        weight: (V, H), same dtype.
        targets: (G, C, T) int64, or (N,) with a layout; -100 for no token.
        loss_fn: called with the log-likelihoods of some whole groups, (len(groups), C) or the packed segments of
            those groups, and ``groups``, the range of their indices (to look up references or labels). Returns the
            sum of their losses, a scalar. Gradients flow to the log-likelihoods only, not to tensors it closes over.
        layout: the packed form, or None.
        bias: (V,) or None.
        **head: see :class:`cpo_kernels.options.Head`; the filters take ``1 / G`` for the largest coefficient.

    Returns:
        The sum over all groups, a scalar.

    Raises:
        ValueError: as for :func:`linear_cpo_loss`, or a loss that is not a differentiable scalar.
    """
    inputs = prepare(hidden, weight, targets, layout, bias, Head(**head))
    candidates = inputs.shape[1] if layout is None else None
    if torch.compiler.is_compiling():
        # An operator cannot carry a Python function, so the compiler traces it over the log-likelihoods instead.
        logps = linear_sequence_logps(hidden, weight, targets, layout=layout, bias=bias, **head)
        return loss_fn(logps, range(len(inputs.call.cu_groups) - 1))
    compute = partial(run_loss_fn, inputs.call, loss_fn, candidates)
    tensors = inputs.hidden, inputs.weight, inputs.bias
    return FusedLoss.apply(*tensors, compute, needs_grad(*tensors))[0]


def plan(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    layout: CandidateLayout | None = None,
    ref_logps: Tensor | None = None,
    ranks: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> Plan:
    """What :func:`linear_cpo_loss` would do with the same arguments: chunks, bytes, number of GEMMs."""
    objective, head = split_options("plan", options)
    inputs = prepare(hidden, weight, targets, layout, bias, head)
    per_segment("ref_logps", ref_logps, inputs.shape, inputs.hidden)
    merge_ranks(ranks, inputs)
    tokens = inputs.call.tokens(inputs.hidden, inputs.weight)
    needs = needs_grad(inputs.hidden, inputs.weight, inputs.bias)
    known = coefficients_are_known(inputs.call, objective, needs)
    return inputs.call.plan(tokens, inputs.hidden, inputs.weight, needs, known_coefficients=known)
