"""Attention of a prefix tree branch by branch, for ``scaled_dot_product_attention``.

Given a dense mask, the kernels of PyTorch compute all L * L scores of a packed row, most of which the mask leaves
out: between candidates, and between groups. :class:`TreeMask` is such a mask that also knows the branches, and has
the same function called on them: once for all prompts, and once for all candidates, whose keys are those of their
prompt and their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from cpo_kernels.kernels.device import is_gpu


@dataclass(frozen=True)
class Gather:
    """A rearrangement of N positions into M slots, slots without a position being zero, and the reverse one.

    Attributes:
        slots: (M,) int64, the position in each slot, any number for an empty slot.
        empty: (E,) int64, the slots without a position.
        positions: (N,) int64, the slot of each position, any number for a position without one.
        padded: (F,) int64, the positions without a slot.
    """

    slots: Tensor
    empty: Tensor
    positions: Tensor
    padded: Tensor

    def reverse(self) -> Gather:
        """Return the rearrangement from slots to positions."""
        return Gather(self.positions, self.padded, self.slots, self.empty)

    @property
    def identity(self) -> bool:
        """Whether every position is its own slot, as it is when all prompts and all candidates are of one length."""
        return self.slots.shape == self.positions.shape and not len(self.empty) and not len(self.padded)

    def to(self, device: torch.device) -> Gather:
        """Copy the rearrangement to a device."""
        tensors = (self.slots, self.empty, self.positions, self.padded)
        return Gather(*(tensor.to(device, non_blocking=True) for tensor in tensors))


class _Rearrange(torch.autograd.Function):
    """``x[slots]``, whose gradient is a gather too: no position has two slots, so nothing is summed or scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return _gather(x, gather)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.gather.reverse()), None


def _gather(x: Tensor, gather: Gather) -> Tensor:
    out = x.index_select(0, gather.slots)
    return out.index_fill_(0, gather.empty, 0.0) if len(gather.empty) else out


@dataclass(frozen=True)
class TreeBlocks:
    """The branches of a tree, padded to G prompts of P positions and to C candidates of T positions for each.

    Attributes:
        gather: from the B * L flattened positions to the G * (P + C * T) slots, or None where they are the same.
        sizes: G, C, P, T.
        prompt_mask: (P, P) bool for a sliding window, else None: causal.
        candidate_mask: (G, 1, 1, T, P + T) bool over the keys of prompt and candidate, with G or 1 entries.
        uniform: whether all prompts are of one length and there is no window, so that the candidate mask is causal
            counted from its last row and last key.
    """

    gather: Gather | None
    sizes: tuple[int, int, int, int]
    prompt_mask: Tensor | None
    candidate_mask: Tensor
    uniform: bool

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Run ``scaled_dot_product_attention`` of (B, heads, L, D) tensors under the tree's mask."""
        G, C, P, T = self.sizes
        batch, length = query.shape[0], query.shape[2]
        q, k, v = (self._slots(x) for x in (query, key, value))
        sdpa = functional.scaled_dot_product_attention
        mask = self.prompt_mask
        q0, k0, v0 = (prompt.transpose(1, 2) for prompt, _ in (q, k, v))
        out = sdpa(q0, k0, v0, attn_mask=mask, is_causal=mask is None, **options).transpose(1, 2)
        if C * T:
            keys, values = (self._with_prompts(*x) for x in (k, v))
            queries = q[1].unflatten(1, (C, T)).flatten(0, 1).transpose(1, 2)
            candidates = sdpa(queries, keys, values, attn_mask=self._mask(query.device), **options)
            out = torch.cat([out, candidates.transpose(1, 2).reshape(G, C * T, *out.shape[2:])], dim=1)
        out = out.reshape(G * (P + C * T), -1)
        if self.gather is not None:
            out = _Rearrange.apply(out, self.gather.reverse())
        return out.view(batch, length, query.shape[1], -1).transpose(1, 2)

    def _slots(self, x: Tensor) -> Sequence[Tensor]:
        """Rearrange (B, heads, L, D) to prompts (G, P, heads, D) and candidates (G, C * T, heads, D).

        The tensor is split, not sliced, so that its gradient is one concatenation and not a sum of padded tensors.
        """
        G, C, P, T = self.sizes
        heads, width = x.shape[1], x.shape[3]
        flat = x.transpose(1, 2).reshape(-1, heads * width)
        if self.gather is not None:
            flat = _Rearrange.apply(flat, self.gather)
        return flat.view(G, P + C * T, heads, width).split([P, C * T], dim=1)

    def _with_prompts(self, prompt: Tensor, candidates: Tensor) -> Tensor:
        """Join prompts (G, P, heads, D) and candidates (G, C * T, heads, D) to (G * C, heads, P + T, D)."""
        _, C, _, T = self.sizes
        repeated = prompt[:, None].expand(-1, C, -1, -1, -1)
        return torch.cat([repeated, candidates.unflatten(1, (C, T))], dim=2).flatten(0, 1).transpose(1, 2)

    def _mask(self, device: torch.device) -> Tensor:
        G, C, P, T = self.sizes
        if self.uniform and is_gpu(device):
            return causal_lower_right(T, P + T)  # the flash kernel applies it without reading a mask
        mask = self.candidate_mask
        return mask.expand(G, C, -1, -1, -1).flatten(0, 1) if len(mask) > 1 else mask[0]


class TreeMask(Tensor):
    """A dense mask (B, 1, L, L) bool that ``scaled_dot_product_attention`` evaluates branch by branch.

    Every other function gets the plain tensor, and returns plain tensors.
    """

    blocks: TreeBlocks

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        mask = kwargs.get("attn_mask")
        if func is functional.scaled_dot_product_attention and len(args) == 3 and isinstance(mask, TreeMask):
            del kwargs["attn_mask"]
            if not kwargs.pop("is_causal", False):
                return mask.blocks.attend(*args, **kwargs)
            raise ValueError("expected is_causal=False beside the mask of a prefix tree")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def with_blocks(mask: Tensor, blocks: TreeBlocks) -> TreeMask:
    """Return the mask with its branches."""
    tree_mask = mask.as_subclass(TreeMask)
    tree_mask.blocks = blocks
    return tree_mask
