"""A weight that is embedding and head in one: its gradient is one matrix from the head, to which the tokens' rows add.

PyTorch builds two (V, H) gradients of such a weight, zeros but for a few rows the one of the embedding, and adds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .adapters import AppliedHead, plain_head
from .sharded import is_managed


class TiedLookup(torch.autograd.Function):
    """``functional.embedding``, and the weight once more for a head, whose gradient the backward pass writes to.

    The gradient is bitwise what PyTorch's two are in sum. The head must bring one that nothing else holds: the fused
    losses do.
    """

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor, padding_idx: int):
        """Returns the rows (..., H) of ids (...), and an alias of the weight (V, H)."""
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.entries = padding_idx, weight.shape[0]
        ctx.set_materialize_grads(False)
        return functional.embedding(ids, weight), weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_weight):
        """(V, H) for the weight."""
        (ids,) = ctx.saved_tensors
        if grad_rows is not None and grad_weight is None:
            grad_weight = _sum_rows(grad_rows, ids, ctx.entries, ctx.padding_idx)
        elif grad_rows is not None:
            grad_weight = grad_weight.contiguous()  # an expanded one cannot be written to
            _add_rows_(grad_weight, grad_rows, ids, ctx.padding_idx)
        return None, grad_weight, None


def _sum_rows(grad: Tensor, ids: Tensor, entries: int, padding_idx: int) -> Tensor:
    """(entries, H): the gradient of an embedding."""
    rows: Tensor = torch.ops.aten.embedding_dense_backward(grad, ids, entries, padding_idx, False)
    return rows


def _add_rows_(total: Tensor, grad: Tensor, ids: Tensor, padding_idx: int) -> None:
    """``total += _sum_rows(...)`` with as many rows of scratch as there are ids (n)."""
    flat, grad = ids.flatten().long(), grad.reshape(-1, grad.shape[-1])
    if padding_idx >= 0:
        grad = grad.masked_fill((flat == padding_idx).unsqueeze(1), 0.0)
    # The slot of each distinct id, without asking how many there are: a GPU need not be waited for.
    ordered, order = flat.sort(stable=True)
    slots = torch.zeros_like(ordered)
    slots[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    sums = _sum_rows(grad[order], slots, len(flat), -1)
    # Slots beyond the last add zeros to entry 0; any other entry is added to once, so the order does not matter.
    total.index_add_(0, torch.zeros_like(ordered).scatter_(0, slots, ordered), sums)


class _Lookups(TorchFunctionMode):
    """Makes a :class:`TiedLookup` of the first lookup in ``weight``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.alias: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        lookup = _plain_lookup(*args, **kwargs) if func is functional.embedding and self.alias is None else None
        if lookup is None or lookup[1] is not self.weight:
            return func(*args, **kwargs)
        rows, self.alias = TiedLookup.apply(*lookup)
        return rows


def _plain_lookup(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Tensor, Tensor, int] | None:
    """Ids, weight and padding index (or -1) of a call of ``functional.embedding``; None if it does more."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        return None
    return input, weight, -1 if padding_idx is None else padding_idx % weight.shape[0]


@contextmanager
def one_gradient(embedding: nn.Module | None, head: nn.Module) -> Iterator[Callable[[AppliedHead], AppliedHead]]:
    """Around the body of a model: what looks tokens up inside shares its weight's gradient with the head.

    Yields what to put around :func:`~cpo_kernels.models.adapters.apply_head`; it changes nothing where the weight is
    not tied or not trained, where hooks gather it, and under ``torch.compile``.
    """
    if not _shares_a_gradient(embedding, head):
        yield lambda applied: applied
        return
    module: Any = embedding
    lookups, own, forward = _Lookups(module.weight), module.__dict__.get("forward"), module.forward

    def looked_up(*args: Any, **kwargs: Any) -> Any:
        with lookups:
            return forward(*args, **kwargs)

    def with_alias(applied: AppliedHead) -> AppliedHead:
        if lookups.alias is None or applied.weight is not lookups.weight:
            return applied
        return replace(applied, weight=lookups.alias)

    module.forward = looked_up
    try:
        yield with_alias
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _shares_a_gradient(embedding: nn.Module | None, head: nn.Module) -> bool:
    if not isinstance(embedding, nn.Embedding) or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    weight: Tensor = embedding.weight
    plain = weight.requires_grad and type(weight) in (nn.Parameter, Tensor) and not is_managed(embedding)
    return plain and getattr(plain_head(head), "weight", None) is weight
