"""The logit of each token's target, differentiable: a dot product a token, for losses of more than log-probabilities.

With it, the log-sum-exp of a row is ``logit - logp``, and its gradient needs no kernel of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpo_kernels.engine.vocab_parallel import VocabShard
from cpo_kernels.kernels.numerics import IGNORE_INDEX, accumulate_dtype, long_slices, tile_elements
from cpo_kernels.kernels.transform import transform_logits


def target_logits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    shard: VocabShard | None = None,
) -> Tensor:
    """Compute the logits (N,) of the targets, differentiable in hidden, weight and bias; 0 where there is no token.

    Args:
        hidden: (N, H); rows without a token may hold anything.
        weight: (V, H), or the rows that this process holds.
        targets: (N,) int64 of the whole vocabulary, -100 for no token.
        bias: (V,) or None, or what this process holds of it.
        softcap: bound of the logits, or None.
        shard: which vocabulary entries this process holds; None: all.
    """
    start, size = (0, len(weight)) if shard is None else (shard.start, shard.size)
    here = (targets >= start) & (targets < start + size)
    words = (targets - start).where(here, 0)
    logits = TargetDots.apply(hidden, weight, words, here, shard)
    if bias is not None:
        shift = bias.to(logits.dtype)[words].masked_fill(~here, 0.0)
        logits = logits + (shift if shard is None else SumOfShards.apply(shift, shard))
    return transform_logits(logits, softcap=softcap).masked_fill(targets == IGNORE_INDEX, 0.0)


class TargetDots(torch.autograd.Function):
    """Dot products (N,) of rows of hidden with rows of weight, in float32 or better; 0 where ``here`` is false.

    Gradients are summed in that dtype too, over the tokens of one word in the order of the tokens.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, hidden: Tensor, weight: Tensor, words: Tensor, here: Tensor, shard: VocabShard | None
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, words, here)
        ctx.shard = shard
        dtype = accumulate_dtype(hidden.dtype)
        dots = hidden.new_zeros(len(hidden), dtype=dtype)
        for part in long_slices(len(hidden), hidden.shape[1], tile_elements(hidden.device)):
            dots[part] = (hidden[part].to(dtype) * weight[words[part]].to(dtype)).sum(-1)
        dots = dots.masked_fill(~here, 0.0)
        return dots if shard is None else shard.sum_(dots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        hidden, weight, words, here = ctx.saved_tensors
        grad = grad.masked_fill(~here, 0.0)
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.zeros_like(hidden)
            for part in long_slices(len(hidden), hidden.shape[1], tile_elements(hidden.device)):
                grad_hidden[part] = grad[part, None] * weight[words[part]].to(grad.dtype)
            if ctx.shard is not None:
                grad_hidden = ctx.shard.sum_grad_hidden(grad_hidden)
        if ctx.needs_input_grad[1]:
            grad_weight = rows_summed_by_word(hidden, grad, words, here, weight)
        return grad_hidden, grad_weight, None, None, None


def rows_summed_by_word(hidden: Tensor, coef: Tensor, words: Tensor, here: Tensor, weight: Tensor) -> Tensor:
    """Sum ``coef_n * hidden_n`` over the tokens of each word, as a gradient (V, H) of the weight.

    The tokens are sorted by word and summed by segments: without atomics, and with no sum in half precision.
    """
    words, order = words.sort(stable=True)
    first = torch.cat([words.new_ones(1), (words[1:] != words[:-1]).long()])[: len(words)]
    slots = first.cumsum(0) - 1  # the place of each token's word among those that occur
    lengths = torch.zeros_like(words).scatter_add_(0, slots, torch.ones_like(words))
    of_slots = torch.zeros_like(words).scatter_(0, slots, words)  # word 0 in the places beyond, whose sums are 0
    out, coef, here = torch.zeros_like(weight, memory_format=torch.contiguous_format), coef[order], here[order]
    for columns in long_slices(hidden.shape[1], len(words), tile_elements(hidden.device)):
        part = (hidden[:, columns][order].to(coef.dtype) * coef[:, None]).masked_fill(~here[:, None], 0.0)
        sums = torch.segment_reduce(part, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
        out[:, columns].index_add_(0, of_slots, sums.to(out.dtype))
    return out


class SumOfShards(torch.autograd.Function):
    """The sum over processes of what each has of a value, of which every process uses the whole."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: VocabShard) -> Tensor:  # noqa: D102
        return shard.sum_(values.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        return grad, None
