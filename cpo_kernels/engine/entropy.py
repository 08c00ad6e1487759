"""Log-probabilities and entropies of a fused head that are differentiable together: what policy gradients need."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from cpo_kernels.kernels import sampling
from cpo_kernels.kernels.device import own_arithmetic
from cpo_kernels.kernels.numerics import IGNORE_INDEX, accumulate_dtype, narrow_view
from cpo_kernels.options import Head, refuse_unknown

from .call import Call, Grads, resolve
from .derivatives import first_order_only
from .filters import Kept
from .head import Forward, LinearHead, LogitGradients
from .inputs import prepare
from .loop import Gradients, gradient
from .statistics import statistics
from .tokens import Block
from .vocab_parallel import VocabShard, local_targets


class LogpsAndEntropy(NamedTuple):
    """Log-probabilities and entropies, both differentiable.

    Attributes:
        logps: (...) in nats, 0 where the target is -100.
        entropy: (...) in nats, 0 where the target is -100.
    """

    logps: Tensor
    entropy: Tensor


def linear_token_entropy(
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
) -> LogpsAndEntropy:
    """Compute log-probabilities under ``hidden @ weight.T`` with the entropies of the distributions, differentiable.

    Logits fill one buffer at a time; the backward pass uses those of the forward where all of them fit the budget, and
    computes them again where not. The gradient of the entropy is exact, ``dH/dy = -p * (log p + H)`` for logits y, and
    costs nothing where no gradient comes back through the entropy. Without gradients the call is
    :func:`cpo_kernels.linear_token_statistics`.

    Args:
        hidden: (..., H) float32, bfloat16, float16 (or float64 on the torch backend).
        weight: (V, H), same dtype; may be frozen or tied.
        targets: (...) int64; -100 gives 0 and no gradient, and its row enters no GEMM.
        bias: (V,) or None.
        logit_scale, ..., frozen_columns: options of the head, see :class:`cpo_kernels.options.Head`; entropies are of
            the distribution at ``temperature``.
        **unknown: an option that does not exist raises a ``TypeError`` that names the nearest one.

    Returns:
        Both (...), float32 (float64 for float64), differentiable in hidden, weight and bias.

    Raises:
        ValueError: bad shapes, dtypes, devices or target values; the message names the offending value.
        RuntimeError: a backend that is not available.
    """
    refuse_unknown(linear_token_entropy, unknown)
    head = Head(
        *(logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype),
        *(grad_filter_eps, candidate_eps, skip_absent_rows, vocab_shard, frozen_columns),
    )
    head.check_exact("an entropy")
    inputs = prepare(hidden, weight, targets, None, bias, head, grouped=False)
    needs: Any = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs.tensors)
    if not any(needs):
        with torch.no_grad(), own_arithmetic(hidden.device):
            out = statistics(inputs, None, True, False, targets.shape)
        assert out.entropy is not None
        return LogpsAndEntropy(out.logps, out.entropy)
    call = resolve(inputs, needs, whole_groups=False, way=EntropyHead, scratch_bytes=sampling.scratch_bytes)
    logps, entropy = LinearTokenEntropy.apply(*inputs.tensors, call)
    return LogpsAndEntropy(logps.reshape(targets.shape), entropy.reshape(targets.shape))


class EntropyHead(LinearHead):
    """A head that also computes the entropy of each row, and the gradient of both; each row has one token."""

    keeps_statistics = False  # tiles of the vocabulary are made of coefficients of log-probabilities alone

    def entropy(self, block: Block, done: Forward, elements: int) -> Tensor:
        """Compute the entropies (r,) of a block's rows, of which so many ``elements`` of logits are taken at a time."""
        entropy = sampling.row_entropy(done.source, done.stats, *self.transform, elements=elements)
        shard = self.head.vocab_shard
        return entropy if shard is None else shard.sum_(entropy)

    def entropy_gradient_(
        self, block: Block, done: Forward, coef: Tensor, entropy: Tensor, entropy_coef: Tensor, elements: int
    ) -> LogitGradients:
        """Write the gradient of ``sum_n coef_n * logp_n + entropy_coef_n * H_n`` over the logits."""
        present = block.targets != IGNORE_INDEX
        shard, targets = self.head.vocab_shard, block.targets
        if shard is not None:
            here, local = local_targets(targets, shard.start, shard.size)
            targets = local.where(here, IGNORE_INDEX)
        given = targets, done.stats, coef.where(present, 0.0), entropy, entropy_coef.where(present, 0.0)
        dtype = self.hidden.dtype
        sampling.row_entropy_backward_(done.source, *given, *self.transform, dtype, elements=elements)
        return LogitGradients(narrow_view(done.source, dtype))


class LinearTokenEntropy(torch.autograd.Function):
    """Log-probabilities (N,) and entropies (N,) of (hidden, weight, bias), whose upstream gradients arrive later."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities and the entropies."""
        with own_arithmetic(hidden.device):
            logps, entropy, ctx.done = run_token_entropy(call, call.bind(hidden, weight, bias))
        ctx.save_for_backward(hidden, weight, bias, entropy, *call.given)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Use the logits that forward kept, or compute them again."""
        hidden, weight, bias, entropy, *given = ctx.saved_tensors
        call = ctx.call.with_given(*given)
        done, ctx.done = ctx.done, None  # overwritten; a retained graph computes them anew the second time
        if grad_logps is None:
            grad_logps = torch.zeros_like(entropy)
        with torch.no_grad(), own_arithmetic(hidden.device):
            linear = call.bind(hidden, weight, bias)
            grads = token_entropy_grads(call, linear, done, grad_logps, entropy, grad_entropy)
        return (*first_order_only(grads, grad_logps, grad_entropy, hidden, weight, bias), None)


def run_token_entropy(call: Call, linear: LinearHead) -> tuple[Tensor, Tensor, Forward | None]:
    """Compute all log-probabilities and entropies (N,), and keep the forward if a single block holds all rows."""
    assert isinstance(linear, EntropyHead)
    blocks, elements = call.blocks(), elements_of(call)
    keep = len(blocks) == 1
    logps = linear.hidden.new_empty(call.tokens.targets.shape, dtype=accumulate_dtype(linear.logits_dtype))
    entropies, done, rows = torch.empty_like(logps), None, call.plan.rows_held
    with nullcontext(linear.lasting_workspace(rows)) if keep else linear.workspace(rows) as workspace:
        for block in blocks:
            done = linear.forward(block, workspace)
            logps[block.order] = done.logps
            entropies[block.order] = linear.entropy(block, done, elements)
    call.tokens.check()
    entropies.masked_fill_(call.tokens.targets == IGNORE_INDEX, 0.0)
    logps, entropies = (call.tokens.among_all(values, call.targets.numel()) for values in (logps, entropies))
    return logps, entropies, done if keep else None


def token_entropy_grads(
    call: Call,
    linear: LinearHead,
    kept: Forward | None,
    grad_logps: Tensor,
    entropy: Tensor,
    grad_entropy: Tensor | None,
) -> Grads:
    """Compute the gradients of ``sum_n grad_logps_n * logp_n + grad_entropy_n * H_n``.

    Those of the log-probabilities alone (``grad_entropy`` None) come from the backend's row kernels.
    """
    assert isinstance(linear, EntropyHead)
    blocks, elements, of_slots = call.blocks(), elements_of(call), call.tokens.of_slots
    grads = Gradients(linear, call, num_blocks=len(blocks), rows_once=True)
    dtype = accumulate_dtype(linear.logits_dtype)
    coef, slot_entropy = of_slots(grad_logps).to(dtype), of_slots(entropy)
    entropy_coef = None if grad_entropy is None else of_slots(grad_entropy).to(dtype)
    with linear.workspace(call.plan.rows_held) if kept is None else nullcontext() as workspace:
        for block in blocks:
            done = linear.forward(block, workspace) if kept is None else kept
            here = block.order
            if entropy_coef is None:
                grads.add(gradient(linear, block, done, coef[here]))
                continue
            given = coef[here], slot_entropy[here], entropy_coef[here]
            dlogits, scale = linear.entropy_gradient_(block, done, *given, elements)
            grads.add(Kept(dlogits, block.rows, absent=block.absent, scale=scale))
    del workspace, kept
    return call.summed(grads.result())


def elements_of(call: Call) -> int:
    """Return how many elements of logits to take at a time, so that the plan's workspace suffices."""
    return sampling.elements_within(call.plan.workspace_bytes, call.targets.device)
