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

from .sharing_tree import PrefixTree


@dataclass(frozen=True)
class Gather:
    """A rearrangement of N positions into M slots: those slots that no position goes to are zero, and the reverse.

    Attributes:
        slots: (M,) int64, the position in each slot, any number where there is none.
        empty: (E,) int64, the slots without a position.
        positions: (N,) int64, the slot of each position, any number where there is none.
        padded: (F,) int64, the positions without a slot.
    """

    slots: Tensor
    empty: Tensor
    positions: Tensor
    padded: Tensor

    def reverse(self) -> Gather:
        """From slots to positions."""
        return Gather(self.positions, self.padded, self.slots, self.empty)

    @property
    def identity(self) -> bool:
        """Whether every position is its own slot, as it is when all prompts and all candidates are of one length."""
        return self.slots.shape == self.positions.shape and not len(self.empty) and not len(self.padded)

    def to(self, device: torch.device) -> Gather:
        """The same rearrangement on a device."""
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
        """``scaled_dot_product_attention`` of (B, heads, L, D) tensors under the tree's mask."""
        G, C, P, T = self.sizes
        batch, length = query.shape[0], query.shape[2]
        q, k, v = (self._slots(x) for x in (query, key, value))
        sdpa = functional.scaled_dot_product_attention
        mask = self.prompt_mask
        q0, k0, v0 = (x[:, :P].transpose(1, 2) for x in (q, k, v))
        out = sdpa(q0, k0, v0, attn_mask=mask, is_causal=mask is None, **options).transpose(1, 2)
        if C * T:
            keys, values = (self._with_prompts(x) for x in (k, v))
            queries = q[:, P:].unflatten(1, (C, T)).flatten(0, 1).transpose(1, 2)
            candidates = sdpa(queries, keys, values, attn_mask=self._mask(query.device), **options)
            out = torch.cat([out, candidates.transpose(1, 2).reshape(G, C * T, *out.shape[2:])], dim=1)
        out = out.reshape(G * (P + C * T), -1)
        if self.gather is not None:
            out = _Rearrange.apply(out, self.gather.reverse())
        return out.view(batch, length, query.shape[1], -1).transpose(1, 2)

    def _slots(self, x: Tensor) -> Tensor:
        """(B, heads, L, D) to (G, P + C * T, heads, D)."""
        G, C, P, T = self.sizes
        heads, width = x.shape[1], x.shape[3]
        flat = x.transpose(1, 2).reshape(-1, heads * width)
        if self.gather is not None:
            flat = _Rearrange.apply(flat, self.gather)
        return flat.view(G, P + C * T, heads, width)

    def _with_prompts(self, x: Tensor) -> Tensor:
        """(G, P + C * T, heads, D) to (G * C, heads, P + T, D)."""
        _, C, P, T = self.sizes
        prompt = x[:, None, :P].expand(-1, C, -1, -1, -1)
        return torch.cat([prompt, x[:, P:].unflatten(1, (C, T))], dim=2).flatten(0, 1).transpose(1, 2)

    def _mask(self, device: torch.device) -> Tensor:
        G, C, P, T = self.sizes
        if self.uniform and device.type == "cuda":
            return causal_lower_right(T, P + T)  # the flash kernel knows this one without reading a mask
        mask = self.candidate_mask
        return mask.expand(G, C, -1, -1, -1).flatten(0, 1) if len(mask) > 1 else mask[0]


class TreeMask(Tensor):
    """A dense mask (B, 1, L, L) bool that ``scaled_dot_product_attention`` evaluates branch by branch.

    To every other function it is the plain tensor, and so is what that returns.
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
    """The mask with its branches."""
    tree_mask = mask.as_subclass(TreeMask)
    tree_mask.blocks = blocks
    return tree_mask


@dataclass(frozen=True)
class Segments:
    """Where the branches of a tree lie, as host integers: (start, length) in the B * L flattened positions."""

    shape: tuple[int, int]
    prompts: list[tuple[int, int]]
    candidates: list[list[tuple[int, int]]]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """G groups, C candidates each, P positions of a prompt, T positions of a candidate, at most."""
        lengths = [length for spans in self.candidates for _, length in spans]
        most = max(map(len, self.candidates))
        return len(self.prompts), most, max(length for _, length in self.prompts), max(lengths, default=0)


def find_segments(tree: PrefixTree) -> Segments | None:
    """The branches of a tree, or None where a group is not one run of its prompt and its candidates.

    A tree on a GPU is copied to the host, which waits for it.
    """
    groups, branches = tree.groups.cpu(), tree.branches.cpu()
    batch, length = groups.shape
    change = torch.ones(batch, length, dtype=torch.bool)
    change[:, 1:] = (groups[:, 1:] != groups[:, :-1]) | (branches[:, 1:] != branches[:, :-1])
    starts = change.flatten().nonzero().flatten().tolist()
    names = torch.stack([groups.flatten()[starts], branches.flatten()[starts]], dim=1).tolist()
    prompts: list[tuple[int, int]] = []
    candidates: list[list[tuple[int, int]]] = []
    current, seen = None, set()
    for start, stop, (group, branch) in zip(starts, [*starts[1:], batch * length], names, strict=True):
        if group < 0:
            current = None
        elif branch == 0:
            current = (start // length, group)
            if current in seen:
                return None
            seen.add(current)
            prompts.append((start, stop - start))
            candidates.append([])
        elif current != (start // length, group) or (current, branch) in seen:
            return None
        else:
            seen.add((current, branch))
            candidates[-1].append((start, stop - start))
    return Segments((batch, length), prompts, candidates) if prompts else None


def block_pairs(segments: Segments) -> int:
    """Scores that :class:`TreeBlocks` computes; a dense mask takes B * L * L."""
    G, C, P, T = segments.sizes
    return G * (P * P + C * T * (P + T))


def make_gather(segments: Segments, device: torch.device) -> Gather | None:
    """From positions to the slots of padded branches, None where nothing moves."""
    G, C, P, T = segments.sizes
    batch, length = segments.shape
    slots = torch.full((G, P + C * T), -1)
    for g, ((start, size), spans) in enumerate(zip(segments.prompts, segments.candidates, strict=True)):
        slots[g, :size] = torch.arange(start, start + size)
        for c, (start, size) in enumerate(spans):
            at = P + c * T
            slots[g, at : at + size] = torch.arange(start, start + size)
    slots = slots.flatten()
    taken = (slots >= 0).nonzero().flatten()
    positions = torch.full((batch * length,), -1)
    positions[slots[taken]] = taken
    empty, padded = (slots < 0).nonzero().flatten(), (positions < 0).nonzero().flatten()
    gather = Gather(slots.clamp(min=0), empty, positions.clamp(min=0), padded)
    if gather.identity and torch.equal(gather.slots, torch.arange(len(gather.slots))):
        return None
    return gather.to(device)


def make_blocks(segments: Segments, gather: Gather | None, window: int | None, device: torch.device) -> TreeBlocks:
    """Branches and the masks among them; with a window, a query sees the last ``window`` positions, its own included.

    The positions of a prompt and of one of its candidates are consecutive, so those are the masks of a causal row.
    """
    _, _, P, T = sizes = segments.sizes
    lengths = sorted({length for _, length in segments.prompts})
    prompt = torch.tensor(lengths if len(lengths) == 1 else [length for _, length in segments.prompts])
    prompt = prompt.view(-1, 1, 1)
    query = prompt + torch.arange(T).view(1, -1, 1)
    column = torch.arange(P + T).view(1, 1, -1)
    key = torch.where(column < P, column, prompt + column - P)
    allowed = (key <= query) & ((column >= P) | (column < prompt))
    prompt_mask = None
    if window is not None:
        allowed &= query - key < window
        i = torch.arange(P)
        prompt_mask = ((i <= i[:, None]) & (i[:, None] - i < window)).to(device)
    uniform = window is None and len(lengths) == 1
    return TreeBlocks(gather, sizes, prompt_mask, allowed[:, None, None].to(device), uniform)
