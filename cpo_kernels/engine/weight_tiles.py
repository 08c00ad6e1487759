"""The gradient of the weight in tiles of the vocabulary, where a budget has no room for the sum over chunks.

A half-precision sum over chunks needs an accumulator as large as the weight. Instead, once all coefficients are known,
logits are computed a second time, for some words and all rows, and give the gradient of those words at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpo_kernels.kernels.numerics import accumulate_dtype, narrow_view

from . import products
from .plan import Tiles
from .tokens import Block, Tokens, split_blocks
from .vocab_parallel import backward_of_words_

if TYPE_CHECKING:
    from .head import Forward, LinearHead


class TiledWeightGrad:
    """The statistics and coefficients of all rows, and the gradient of the weight that is made of them."""

    def __init__(self, linear: LinearHead, tokens: Tokens, tiles: Tiles) -> None:
        dtype = accumulate_dtype(linear.logits_dtype)
        self.linear, self.tokens, self.tiles = linear, tokens, tiles
        self.stats = linear.hidden.new_empty((2, linear.hidden.shape[0]), dtype=dtype)
        self.coef = linear.hidden.new_zeros(tokens.targets.shape, dtype=dtype)

    def keep(self, block: Block, forward: Forward, coef: Tensor, first: int) -> None:
        """Keep what a block of a chunk whose slots begin at ``first`` is like, with its coefficients (n,)."""
        self.stats[:, block.rows] = forward.stats
        self.coef[first:][block.order] = coef

    def result(self, trained: slice) -> Tensor:
        """Return the gradient (V, trained columns), each tile from logits that are computed once more."""
        linear, blocks = self.linear, split_blocks(self.tokens, 0, self.tokens.targets.numel(), self.tiles.rows)
        weight = linear.weight[:, trained]
        grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
        with linear.scratch(self.tiles.rows * self.tiles.words, linear.tile_dtype(linear.logits_dtype)) as memory:
            for start in range(0, weight.shape[0], self.tiles.words):
                words = slice(start, min(start + self.tiles.words, weight.shape[0]))
                part = products.WeightGrad(linear.backend, weight[words], len(blocks), out=grad[words])
                for block in blocks:
                    size = block.num_rows * (words.stop - start)
                    self.add(part, block, words, trained, memory[:size].view(block.num_rows, -1))
                part.result()
        return grad

    def add(self, part: products.WeightGrad, block: Block, words: slice, trained: slice, logits: Tensor) -> None:
        """Add what a block gives to the gradient of some words; ``logits`` (r, words) is memory for them."""
        linear = self.linear
        linear.backend.gemm_(linear.hidden[block.rows], linear.weight[words].t(), logits, False)
        bias, dtype = None if linear.bias is None else linear.bias[words], linear.hidden.dtype
        given = block.targets, block.row_starts, self.stats[:, block.rows], self.coef[block.order], bias
        backward_of_words_(linear.backend.rows, words.start, logits, *given, *linear.head.transform, dtype)
        hidden = products.scaled_hidden(linear.hidden[block.rows, trained], None, block.absent)
        part.add(narrow_view(logits, dtype), hidden)
