"""One gradient for a weight that is both embedding and head: the rows of the tokens are added to that of the head.

PyTorch builds two (V, H) gradients of such a weight and adds them; that of the embedding is nearly all zeros.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .adapters import AppliedHead, plain_head
from .sharded import is_managed

SCRATCH = 3  # rows of H for each token: sorted, summed, and the memory of the summation


class TiedLookup(torch.autograd.Function):
    """``functional.embedding``, and an alias of the weight for the head, whose gradient the backward pass adds to.

    The head's gradient must not be held by other code, as that of the fused losses is not. The result is the sum of
    PyTorch's two gradients, to the bit on a CPU; a GPU adds the rows of one token in another order.
    """

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor, padding_idx: int):
        """Return the rows (..., H) of ids (...), and an alias of the weight (V, H)."""
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.entries = padding_idx, weight.shape[0]
        ctx.set_materialize_grads(False)
        return functional.embedding(ids, weight), weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_weight):
        """Return the gradient (V, H) of the weight."""
        (ids,) = ctx.saved_tensors
        if grad_rows is None:
            return None, grad_weight, None
        if grad_weight is None:
            return None, _sum_rows(grad_rows, ids, ctx.entries, ctx.padding_idx), None
        grad_weight = grad_weight.contiguous()  # an expanded gradient cannot be written to
        if SCRATCH * ids.numel() > ctx.entries:
            grad_weight += _sum_rows(grad_rows, ids, ctx.entries, ctx.padding_idx)
        else:
            _add_rows_(grad_weight, grad_rows, ids, ctx.padding_idx)
        return None, grad_weight, None


def _sum_rows(grad: Tensor, ids: Tensor, entries: int, padding_idx: int) -> Tensor:
    """Return the gradient (entries, H) of an embedding."""
    rows: Tensor = torch.ops.aten.embedding_dense_backward(grad, ids, entries, padding_idx, False)
    return rows


def _add_rows_(total: Tensor, grad: Tensor, ids: Tensor, padding_idx: int) -> None:
    """Add :func:`_sum_rows` to ``total`` in place, with :data:`SCRATCH` rows of H for each of the n ids."""
    flat, grad = ids.flatten().long(), grad.reshape(-1, grad.shape[-1])
    if padding_idx >= 0:
        grad = grad.masked_fill((flat == padding_idx).unsqueeze(1), 0.0)
    # The slot of each distinct id; their number stays on the GPU, so that the host does not wait.
    ordered, order = flat.sort(stable=True)
    slots = torch.zeros_like(ordered)
    slots[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    sums = _sum_rows(grad[order], slots, len(flat), -1)
    # Slots beyond the last add zeros to any entry; every entry is added to once, so the order does not matter.
    entries = torch.arange(len(flat), device=flat.device) % total.shape[0]
    total.index_add_(0, entries.scatter_(0, slots, ordered), sums)


class _Lookups(TorchFunctionMode):
    """A mode that makes the first differentiated lookup in ``weight`` a :class:`TiedLookup`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.alias: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        wanted = func is functional.embedding and self.alias is None and torch.is_grad_enabled()
        lookup = _plain_lookup(*args, **kwargs) if wanted else None
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
    """Return ids, weight and padding index (or -1) of a ``functional.embedding`` call; None if it does more."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        return None
    return input, weight, -1 if padding_idx is None else padding_idx % weight.shape[0]


class _TiedForward:
    """The forward of an embedding while one thread computes a loss; other threads and compilers get the original."""

    def __init__(self, forward: Callable[..., Any], lookups: _Lookups) -> None:
        self.forward, self.lookups, self.thread = forward, lookups, threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or threading.get_ident() != self.thread:
            return self.forward(*args, **kwargs)
        with self.lookups:
            return self.forward(*args, **kwargs)


@contextmanager
def one_gradient(
    body: nn.Module, embedding: nn.Module | None, head: nn.Module
) -> Iterator[Callable[[AppliedHead], AppliedHead]]:
    """Let token lookups in a call of a model's body share their weight's gradient with the head.

    The context yields a function to apply to the result of :func:`~cpo_kernels.models.adapters.apply_head`. It changes
    nothing where the weight is not tied or not trained, where hooks gather it, in compiled code, or while another
    thread does the same.
    """
    if not _shares_a_gradient(body, embedding, head):
        yield lambda applied: applied
        return
    module: Any = embedding
    lookups, own = _Lookups(module.weight), module.__dict__.get("forward")

    def with_alias(applied: AppliedHead) -> AppliedHead:
        if lookups.alias is None or applied.weight is not lookups.weight:
            return applied
        return replace(applied, weight=lookups.alias)

    module.forward = _TiedForward(module.forward, lookups)
    try:
        yield with_alias
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def find_embedding(model: PreTrainedModel) -> nn.Module | None:
    """Return the input embeddings, or None where the model does not say which they are."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        return None if find is None else find()
    except NotImplementedError:
        return None


def _shares_a_gradient(body: nn.Module, embedding: nn.Module | None, head: nn.Module) -> bool:
    if not isinstance(embedding, nn.Embedding) or isinstance(embedding.forward, _TiedForward):
        return False
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    weight: Tensor = embedding.weight
    plain = weight.requires_grad and type(weight) in (nn.Parameter, Tensor) and not is_managed(embedding)
    return plain and getattr(plain_head(head), "weight", None) is weight and not _may_be_compiled(body, embedding)


def _may_be_compiled(body: nn.Module, embedding: nn.Module) -> bool:
    """Tell whether the lookup may be in a compiled graph, which a replaced forward would recompile each time."""
    path = next((name for name, module in body.named_modules() if module is embedding), None)
    if path is None:
        return True
    around: list[Any] = [body]
    for part in path.split("."):
        around.append(getattr(around[-1], part))
    return any(m._compiled_call_impl is not None or (m is not embedding and "forward" in vars(m)) for m in around)
