"""Token log-probabilities of a fused head, whose upstream gradient comes later."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels.kernels.device import own_arithmetic
from cpo_kernels.kernels.numerics import accumulate_dtype

from . import products
from .call import Call, Grads
from .derivatives import first_order_only
from .head import Forward, LinearHead
from .loop import Gradients, gradient
from .tokens import Block


class TokenLogps(NamedTuple):
    """Token log-probabilities with what their gradient needs.

    Attributes:
        logps: (N,), 0 where the target is -100.
        done: the forward of all rows, over which the gradient is written; None: backward runs the forward again.
        unscaled: gradient (R, H) of the sum of all log-probabilities, if the head is frozen and no row is shared.
    """

    logps: Tensor
    done: Forward | None
    unscaled: Tensor | None


def run_token_logps(call: Call, linear: LinearHead) -> TokenLogps:
    """Compute all log-probabilities in one pass, and choose how the gradient will be formed once it is known.

    With a frozen head and one token a row, the gradient of each row is built now and scaled later (two GEMMs).
    Otherwise the logits are kept if all of them fit the budget (three GEMMs), and recomputed if not (four GEMMs).
    """
    tokens, blocks = call.tokens, call.blocks()
    keep = any(call.needs) and len(blocks) == 1 and not call.scales_rows
    unscaled = torch.zeros_like(linear.hidden, memory_format=torch.contiguous_format) if call.scales_rows else None
    logps = linear.hidden.new_empty(tokens.targets.shape, dtype=accumulate_dtype(linear.logits_dtype))
    done, rows = None, call.plan.rows_held
    with nullcontext(linear.lasting_workspace(rows)) if keep else linear.workspace(rows) as workspace:
        if not any(call.needs):
            linear.log_probabilities(blocks, workspace, logps)
            blocks = []
        for block in blocks:
            done = linear.forward(block, workspace, keep=keep or call.scales_rows)
            logps[block.order] = done.logps
            if unscaled is not None:
                dlogits, scale = linear.unit_gradient_(block, done)
                products.hidden_grad(linear.backend, dlogits, linear.weight, unscaled, block.rows, scale, once=True)
    tokens.check()
    everywhere = tokens.among_all(logps, call.targets.numel())
    unscaled = call.summed((unscaled, None, None))[0]
    return TokenLogps(everywhere, done if keep else None, unscaled)


def token_logps_grads(call: Call, linear: LinearHead, kept: Forward | None, grad_logps: Tensor) -> Grads:
    """Compute the gradients of ``sum_n grad_logps_n * logp_n`` from the kept forward, overwritten, or a new one."""
    blocks = call.blocks()
    grads = Gradients(linear, call, num_blocks=len(blocks), rows_once=True)
    coef = call.tokens.of_slots(grad_logps).to(accumulate_dtype(linear.logits_dtype))
    with linear.workspace(call.plan.rows_held) if kept is None else nullcontext() as workspace:
        add_blocks(grads, blocks, workspace, kept, coef)
    del workspace, kept
    return call.summed(grads.result())


def add_blocks(grads: Gradients, blocks: list[Block], workspace: Any, kept: Forward | None, coef: Tensor) -> None:
    """Add what every block gives for the coefficients (n,) of all slots; a kept forward has a single block."""
    for block in blocks:
        done = grads.linear.forward(block, workspace) if kept is None else kept
        grads.keep(block, done, coef[block.order], 0)
        grads.add(gradient(grads.linear, block, done, coef[block.order]))


class LinearTokenLogps(torch.autograd.Function):
    """Token log-probabilities (N,) of (hidden, weight, bias), whose upstream gradient arrives later."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, call: Call):
        """Return the log-probabilities (N,)."""
        with own_arithmetic(hidden.device):
            result = run_token_logps(call, call.bind(hidden, weight, bias))
        ctx.save_for_backward(hidden, weight, bias, *call.given)
        ctx.call, ctx.done, ctx.unscaled = call, result.done, result.unscaled
        return result.logps

    @staticmethod
    def backward(ctx, grad_logps):
        """Scale the gradient that forward built, or use the logits that it kept, or recompute them."""
        hidden, weight, bias, *given = ctx.saved_tensors
        call = ctx.call.with_given(*given)
        # Both are overwritten, so a retained graph makes them anew the second time, in the same way.
        done, ctx.done = ctx.done, None
        unscaled, ctx.unscaled = ctx.unscaled, None
        with torch.no_grad(), own_arithmetic(hidden.device):
            linear = call.bind(hidden, weight, bias)
            grads: Grads
            if call.scales_rows:
                unscaled = run_token_logps(call, linear).unscaled if unscaled is None else unscaled
                coef = call.tokens.of_slots(grad_logps)
                call.backend.scale_rows_(unscaled, call.tokens.device_rows, call.tokens.targets, coef)
                grads = unscaled, None, None
            else:
                grads = token_logps_grads(call, linear, done, grad_logps)
        return (*first_order_only(grads, grad_logps, hidden, weight, bias), None)
