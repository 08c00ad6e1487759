"""One call of a fused head, checked and flattened: what the autograd functions and the compiled operators run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, engine, gemm
from .head import Head
from .layout import Block, Tokens, find_tokens, split_blocks
from .objective import Objective, check_problem, make_problem
from .planning import Plan, make_plan

Needs = tuple[bool, bool, bool]
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
# Headroom under 1 for the scaled coefficients of a float16 gradient: products sum thousands of them.
FLOAT16_TARGET = 2.0**-4


class LossResult(NamedTuple):
    """A loss computed with its gradients: loss, sums (S,) of token log-probabilities, lengths (S,), gradients."""

    loss: Tensor
    sums: Tensor
    lengths: Tensor
    grads: Grads
    gain: float


@dataclass(frozen=True)
class LinearCall:
    """Everything of a call but hidden (R, H), weight (V, H) and bias (V,), which autograd tracks.

    Attributes:
        targets: (N,) int64.
        rows: (N,) int64 or None.
        cu_tokens: (S + 1,) host integers.
        cu_groups: (G + 1,) host integers.
        head: the options of the head.
    """

    targets: Tensor
    rows: Tensor | None
    cu_tokens: Sequence[int]
    cu_groups: Sequence[int]
    head: Head

    def linear(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> engine.LinearHead:
        """The head with the backend that will run it."""
        dtype = self.head.logits_dtype or hidden.dtype
        backend = backends.select(self.head.backend, hidden.device, dtype)
        return engine.LinearHead(
            hidden.detach(), weight.detach(), None if bias is None else bias.detach(), self.head, backend, dtype
        )

    def tokens(self, hidden: Tensor, weight: Tensor) -> Tokens:
        """The tokens that count; raises ``ValueError`` for targets or rows out of range."""
        return find_tokens(self.targets, hidden.shape[0], weight.shape[0], self.rows, self.cu_tokens, self.cu_groups)

    def plan(self, tokens: Tokens, hidden: Tensor, weight: Tensor, needs: Needs, *, whole_groups: bool = True) -> Plan:
        """The chunks of this call."""
        dtype = self.head.logits_dtype or hidden.dtype
        backend = backends.select(self.head.backend, hidden.device, dtype)
        return make_plan(
            tokens,
            vocab=weight.shape[0],
            hidden_size=weight.shape[1],
            logits_dtype=dtype,
            weight_dtype=weight.dtype,
            needs=needs,
            max_logits_bytes=self.head.max_logits_bytes,
            workspace_bytes=backend.gemm_workspace(tokens.num_rows, weight.shape[0], weight.shape[1], weight.dtype),
            whole_groups=whole_groups,
        )


def float16_gain(dtype: torch.dtype, largest_coefficient: float) -> float:
    """Power of two that lifts coefficients of a float16 gradient out of its subnormals; 1 for every other dtype.

    Gradients are built before the upstream gradient (a loss scale, say) is known, so they must not underflow first.
    """
    if dtype != torch.float16 or not 0 < largest_coefficient < math.inf:
        return 1.0
    return 2.0 ** math.floor(math.log2(FLOAT16_TARGET / largest_coefficient))


def run_cpo(
    call: LinearCall,
    objective: Objective,
    ref_logps: Tensor | None,
    ranks: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: Needs,
) -> LossResult:
    """The CPO loss and its gradients; ref_logps and ranks are (S,)."""
    linear, tokens = call.linear(hidden, weight, bias), call.tokens(hidden, weight)
    problem = make_problem(objective, call.cu_groups, tokens.lengths, ref_logps, ranks)
    check_problem(problem)
    gain = 1.0
    if any(needs):
        per_group = abs(objective.contrast_weight) * objective.beta / problem.num_groups
        gain = float16_gain(hidden.dtype, per_group + abs(objective.mle_weight) / float(problem.num_target_tokens))

    def coefficients(sums: Tensor, groups: range) -> Tensor:
        segments = slice(call.cu_groups[groups.start], call.cu_groups[groups.stop])
        return problem.chunk(groups, segments).coefficients(sums) * gain

    sums, grads = engine.run(linear, tokens, call.plan(tokens, hidden, weight, needs), needs, coefficients)
    return LossResult(problem.loss(sums)[0], sums, tokens.lengths, grads.result(), gain)


def run_loss_fn(
    call: LinearCall,
    loss_fn: Callable[[Tensor, range], Tensor],
    candidates: int | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: Needs,
) -> LossResult:
    """Any loss of the log-likelihoods: ``loss_fn`` sees (groups, candidates), or packed segments if that is None."""
    linear, tokens = call.linear(hidden, weight, bias), call.tokens(hidden, weight)
    gain: float | None = None
    losses: list[Tensor] = []

    def coefficients(sums: Tensor, groups: range) -> Tensor:
        nonlocal gain
        with torch.enable_grad():
            leaf = sums.detach().requires_grad_()
            loss = loss_fn(leaf if candidates is None else leaf.view(len(groups), candidates), groups)
            check_loss(loss)
            (coef,) = torch.autograd.grad(loss, leaf)
        losses.append(loss.detach())
        if gain is None:
            gain = loss_fn_gain(coef, hidden.dtype, len(call.cu_groups) - 1)
        return coef * gain

    plan = call.plan(tokens, hidden, weight, needs)
    sums, grads = engine.run(linear, tokens, plan, needs, coefficients)
    if not any(needs):
        losses = [
            loss_fn(part if candidates is None else part.view(len(chunk.groups), candidates), chunk.groups)
            for chunk in plan.chunks
            for part in [sums[call.cu_groups[chunk.groups.start] : call.cu_groups[chunk.groups.stop]]]
        ]
    return LossResult(torch.stack(losses).sum(), sums, tokens.lengths, grads.result(), gain or 1.0)


def loss_fn_gain(coef: Tensor, dtype: torch.dtype, num_groups: int) -> float:
    """Gain of a user's loss from its first coefficients: not more than for a mean over groups, not less than 1.

    A plain sum has coefficients near 1, which the gain of a mean would push beyond float16.
    """
    if dtype != torch.float16:
        return 1.0
    return max(1.0, float16_gain(dtype, max(float(coef.abs().max()), 1.0 / num_groups)))


def check_loss(loss: Tensor) -> None:
    """Raise ``ValueError`` unless a user's loss is a differentiable scalar."""
    expected = "loss_fn must return a scalar tensor that depends differentiably on logps, got"
    if not isinstance(loss, Tensor):
        raise ValueError(f"{expected} {type(loss).__name__}")
    if loss.dim() != 0 or not loss.requires_grad:
        raise ValueError(f"{expected} shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}")


class TokenLogps(NamedTuple):
    """Token log-probabilities with what their gradient needs.

    Attributes:
        logps: (N,), 0 where the target is -100.
        kept: logits (n, V) and statistics per block, or None if they are recomputed.
        unscaled: gradient (R, H) of the sum of all log-probabilities, if the head is frozen and no row is shared.
    """

    logps: Tensor
    kept: tuple[Tensor, list[Tensor]] | None
    unscaled: Tensor | None


def run_token_logps(call: LinearCall, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> TokenLogps:
    """Log-probabilities of all tokens, in one pass; chooses how the gradient will be formed once it is known.

    A frozen head with one token a row: the gradient of each row is built now and scaled later (two GEMMs). Otherwise
    the logits are kept if all of them fit the budget (three), and recomputed if not (four).
    """
    linear, tokens = call.linear(hidden, weight, bias), call.tokens(hidden, weight)
    blocks, plan = token_blocks(call, tokens, hidden, weight, needs)
    scale_later = needs == (True, False, False) and tokens.one_per_row
    keep = any(needs) and not scale_later and len(blocks) == 1
    unscaled = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if scale_later else None
    buffer, stats = linear.workspace(plan.logits_bytes // (weight.shape[0] * linear.logits_dtype.itemsize)), []
    logps = hidden.new_zeros(tokens.targets.shape, dtype=engine.accumulate_dtype(linear.logits_dtype))
    for block in blocks:
        logits = linear.compute_logits(block, buffer)
        block_stats, logps[block.order] = linear.forward(block, logits)
        if unscaled is not None:
            linear.backward_(block, logits, block_stats, torch.ones_like(logps[block.order]))
            gemm.hidden_grad(linear.backend, logits, linear.weight, unscaled, block.rows, once=True)
        if keep:
            stats.append(block_stats)
    everywhere = logps.new_zeros(call.targets.shape).index_copy_(0, tokens.positions, logps)
    return TokenLogps(everywhere, (buffer, stats) if keep else None, unscaled)


def token_blocks(
    call: LinearCall, tokens: Tokens, hidden: Tensor, weight: Tensor, needs: Needs
) -> tuple[list[Block], Plan]:
    """Blocks of rows within the budget, whatever the groups, and the plan that they come from."""
    plan = call.plan(tokens.as_one_group(), hidden, weight, needs, whole_groups=False)
    return split_blocks(tokens, 0, tokens.targets.numel(), plan.chunks[0].rows_per_block), plan


def token_logps_grads(
    call: LinearCall,
    kept: tuple[Tensor, list[Tensor]] | None,
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: Needs,
) -> Grads:
    """Gradients of ``sum_n grad_logps_n * logp_n``, over the kept logits (which it overwrites) or recomputed ones."""
    linear, tokens = call.linear(hidden, weight, bias), call.tokens(hidden, weight)
    blocks, plan = token_blocks(call, tokens, hidden, weight, needs)
    coef = grad_logps[tokens.positions].to(engine.accumulate_dtype(linear.logits_dtype))
    grads = engine.Gradients(linear, needs, num_blocks=len(blocks), rows_once=True)
    rows = plan.logits_bytes // (weight.shape[0] * linear.logits_dtype.itemsize)
    buffer = linear.workspace(rows) if kept is None else kept[0]
    for index, block in enumerate(blocks):
        if kept is None:
            logits = linear.compute_logits(block, buffer)
            stats, _ = linear.forward(block, logits)
        else:
            logits, stats = buffer[: block.num_rows], kept[1][index]
        linear.backward_(block, logits, stats, coef[block.order])
        grads.add(block, logits)
    return grads.result()
