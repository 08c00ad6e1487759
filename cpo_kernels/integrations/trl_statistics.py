"""What TRL's fused head tells of a token besides its log-probability."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from cpo_kernels.engine.statistics import linear_token_statistics
from cpo_kernels.kernels.transform import transform_logits

FIELDS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
CHUNK = 32768  # vocabulary entries at a time in TRL's own computation, as TRL has it
LOGITS = 2**24  # held at once where more than the entropy is asked for: 64 MiB


class TokenFields(torch.autograd.Function):
    """Those of :data:`FIELDS` that are asked for, each (N,), else None; of them the entropy has a gradient.

    The entropy alone (GRPO, RLOO) is that of :func:`cpo_kernels.linear_token_statistics`. With other fields (SFT, DPO,
    KTO) all come from one more product in plain torch, 64 MiB of logits at a time. The gradient of the entropy, which
    only an entropy bonus asks for, is TRL's own computation.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Any,
        names: Any,
        stock: Any,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head, ctx.stock = head, stock
        if set(names) <= {"log_probs", "entropy"}:
            entropy = linear_token_statistics(hidden, weight, targets, entropy=True, bias=bias, **head).entropy
            return entropy, None, None, None
        blocks = zip(*(x.split(max(1, LOGITS // len(weight))) for x in (hidden, targets)), strict=True)
        parts = [fields_of(transform_logits(linear(h, weight).float(), bias, **head), t) for h, t in blocks]
        columns = [
            torch.cat(column) if name in names else None
            for name, column in zip(FIELDS, zip(*parts, strict=True), strict=True)
        ]
        ctx.mark_non_differentiable(*(column for column in columns[1:] if column is not None))
        return tuple(columns)

    @staticmethod
    def backward(ctx: Any, grad_entropy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # noqa: D102
        *inputs, targets = ctx.saved_tensors
        leaves: Any = [None if x is None else x.detach() for x in inputs]
        wanted = [x.requires_grad_() for x, needed in zip(leaves, ctx.needs_input_grad, strict=False) if needed]
        options = ctx.head["temperature"], CHUNK, ctx.head["softcap"], ctx.head["logit_scale"]
        with torch.enable_grad():
            entropy = ctx.stock.apply(*leaves, targets, *options, ("entropy",))[1]
        grads = iter(torch.autograd.grad(entropy, wanted, grad_entropy))
        return *(next(grads) if needed else None for needed in ctx.needs_input_grad[:3]), None, None, None, None


def fields_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """:data:`FIELDS` of some rows, each (n,), from their logits (n, V) and targets (n,)."""
    lse = logits.logsumexp(-1)
    entropy = lse - (logits.softmax(-1) * logits).sum(-1)
    return entropy, (2 * logits).logsumexp(-1) - 2 * lse, logits.mean(-1), logits.argmax(-1) == targets
