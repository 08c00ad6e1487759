"""Token log-probabilities of a fused head, whose upstream gradient comes later."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import loop, products
from .call import Grads, LinearCall, Needs
from .filters import Kept
from .head import Evaluated
from .plan import Plan
from .tokens import Block, Tokens, split_blocks


class TokenLogps(NamedTuple):
    """Token log-probabilities with what their gradient needs.

    Attributes:
        logps: (N,), 0 where the target is -100.
        kept: the forward of all rows with the logits it is of, or None if they are recomputed.
        unscaled: gradient (R, H) of the sum of all log-probabilities, if the head is frozen and no row is shared.
    """

    logps: Tensor
    kept: Evaluated | None
    unscaled: Tensor | None


def run_token_logps(call: LinearCall, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> TokenLogps:
    """Log-probabilities of all tokens, in one pass; chooses how the gradient will be formed once it is known.

    A frozen head with one token a row: the gradient of each row is built now and scaled later (two GEMMs). Otherwise
    the logits are kept if all of them fit the budget (three), and recomputed if not (four).
    """
    linear, tokens = call.linear(hidden, weight, bias, needs), call.tokens(hidden, weight)
    blocks, plan = token_blocks(call, tokens, hidden, weight, needs)
    scale_later = needs == (True, False, False) and tokens.one_per_row
    keep = any(needs) and not scale_later and len(blocks) == 1
    unscaled = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if scale_later else None
    workspace, done = linear.workspace(0 if linear.fused_forward else plan.rows_held), None
    logps = hidden.new_zeros(tokens.targets.shape, dtype=loop.accumulate_dtype(linear.logits_dtype))
    for block in blocks:
        if linear.fused_forward:
            logps[block.order] = linear.forward_without_logits(block)
        elif unscaled is not None:
            ones = torch.ones_like(logps[block.order])
            logps[block.order], dlogits = linear.evaluate_with_gradient(block, workspace, ones)
            products.hidden_grad(linear.backend, dlogits, linear.weight, unscaled, block.rows, once=True)
        else:
            done = linear.evaluate(block, workspace, keep=keep)
            logps[block.order] = done.logps
    everywhere = tokens.among_all(logps, call.targets.numel())
    unscaled = call.summed((unscaled, None, None))[0]
    return TokenLogps(everywhere, done if keep else None, unscaled)


def token_blocks(
    call: LinearCall, tokens: Tokens, hidden: Tensor, weight: Tensor, needs: Needs
) -> tuple[list[Block], Plan]:
    """Blocks of rows within the budget, whatever the groups, and the plan that they come from."""
    plan = call.plan(tokens.as_one_group(), hidden, weight, needs, whole_groups=False)
    return split_blocks(tokens, 0, tokens.targets.numel(), plan.chunks[0].rows_per_block), plan


def token_logps_grads(
    call: LinearCall,
    kept: Evaluated | None,
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: Needs,
) -> Grads:
    """Gradients of ``sum_n grad_logps_n * logp_n``, over the kept logits (which it overwrites) or recomputed ones."""
    linear, tokens = call.linear(hidden, weight, bias, needs), call.tokens(hidden, weight)
    blocks, plan = token_blocks(call, tokens, hidden, weight, needs)
    coef = tokens.of_slots(grad_logps).to(loop.accumulate_dtype(linear.logits_dtype))
    grads = loop.Gradients(linear, needs, num_blocks=len(blocks), rows_once=True)
    workspace = linear.workspace(plan.rows_held) if kept is None else None
    for block in blocks:  # one, if it is kept
        done = linear.evaluate(block, workspace) if kept is None else kept
        dlogits = linear.gradient_(block, done, coef[block.order])
        grads.add(Kept(dlogits, block.rows, absent=block.absent))
    return call.summed(grads.result())
