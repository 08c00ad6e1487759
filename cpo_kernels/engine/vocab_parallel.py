"""Heads whose weight is sharded over processes along the vocabulary.

Every process holds all hidden states and some rows of the weight. Only the row kernels differ from those of a whole
head: the engine runs on the local logits, the statistics and the targets' log-probabilities are combined over
the processes before the contrast, and the gradient of the hidden states is summed at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

from cpo_kernels.kernels.device import default_logits_bytes
from cpo_kernels.kernels.numerics import IGNORE_INDEX, accumulate_dtype, narrow_view
from cpo_kernels.kernels.ops import RowKernels
from cpo_kernels.kernels.transform import transform_logits
from cpo_kernels.options import suggests_arguments


@dataclass(frozen=True)
class VocabShard:
    """Which vocabulary entries of a head this process holds; made once by :meth:`of`, then passed as ``vocab_shard``.

    Attributes:
        group: the processes that hold the head together.
        start: first vocabulary entry held here.
        size: number of entries held here, the rows of the local weight.
        vocab: V, the number of entries of all processes.
        largest: most entries that one process holds; every process plans its chunks for that number.
        logits_bytes: budget of a process's logits where the call names none: the smallest default among the processes.
        reduce_grad_hidden: whether the gradient of ``hidden`` is summed over the processes.
    """

    group: Any
    start: int
    size: int
    vocab: int
    largest: int
    logits_bytes: int
    reduce_grad_hidden: bool = True

    @classmethod
    @suggests_arguments
    def of(
        cls, weight: Tensor, group: Any = None, *, start: int | None = None, reduce_grad_hidden: bool = True
    ) -> VocabShard:
        """Find the shards of a head; a collective call, which every process of ``group`` makes once.

        Args:
            weight: (size, H), the rows held here; or a DTensor (V, H) on a mesh of one dimension, placed ``Shard(0)``.
            group: the processes; None: that of the DTensor, or all.
            start: first vocabulary entry held here; None for shards in the order of the ranks.
            reduce_grad_hidden: True: the fused loss sums the gradient of ``hidden`` over the processes, in float32,
                once a call. False: it returns this process's share, for a caller whose own backward pass sums it
                (Megatron's ``copy_to_tensor_model_parallel_region``, or a reduce-scatter over a sharded sequence).

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised.
            ValueError: on every process alike, shards that are empty, that leave a gap or overlap, or whose H differ;
                a DTensor of another placement.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError("a vocabulary-parallel head needs torch.distributed.init_process_group() first")
        if is_dtensor(weight):
            if group is not None or start is not None:
                raise ValueError(f"a DTensor brings its group and its start; got group={group}, start={start}")
            group = group_of(weight)
            weight = weight.to_local()  # type: ignore[attr-defined]
        mine = tuple(weight.shape), start, default_logits_bytes(weight.device)
        everyone: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(everyone, mine, group=group)
        shapes, starts, budgets = zip(*everyone, strict=True)
        first = tile(shapes, starts)
        sizes = [shape[0] for shape in shapes]
        return cls(
            group=group,
            start=first[distributed.get_rank(group)],
            size=weight.shape[0],
            vocab=sum(sizes),
            largest=max(sizes),
            logits_bytes=min(budgets),
            reduce_grad_hidden=reduce_grad_hidden,
        )

    def local(self, name: str, tensor: Tensor) -> Tensor:
        """Return the local rows of a weight or bias, differentiable; raise ``ValueError`` if they are not ``size``."""
        if is_dtensor(tensor):
            group_of(tensor)
            tensor = tensor.to_local()  # type: ignore[attr-defined]
        if tensor.shape[0] != self.size:
            raise ValueError(f"{name} must have the {self.size} rows of vocab_shard, got {tuple(tensor.shape)}")
        return tensor

    def rows(self, kernels: RowKernels) -> RowKernels:
        """Return row kernels that take local logits (R, size) and targets of the whole vocabulary."""
        backward_ = partial(backward_of_words_, kernels, self.start)
        return RowKernels(partial(self._forward, kernels), _no_separate_gradient, backward_)

    def sum_grad_hidden(self, grad: Tensor | None) -> Tensor | None:
        """Sum the gradient of hidden (R, H) over the processes, in float32 or better, unless the caller does it."""
        if grad is None or not self.reduce_grad_hidden:
            return grad
        return self.sum_(grad.to(accumulate_dtype(grad.dtype))).to(grad.dtype)

    def sum_(self, values: Tensor) -> Tensor:
        """Sum ``values`` over the processes, in place."""
        distributed.all_reduce(values, group=self.group)
        return values

    def _forward(
        self,
        kernels: RowKernels,
        logits: Tensor,
        targets: Tensor,
        row_starts: Tensor | None,
        bias: Tensor | None,
        *transform: float,
    ) -> tuple[Tensor, Tensor]:
        """Compute statistics (2, R) and log-probabilities (N,) of the whole vocabulary by one all-gather of 2 R + N."""
        here, local = local_targets(targets, self.start, self.size)
        stats, logps = kernels.forward(logits, local, row_starts, bias, *transform)
        rows = rows_of_tokens(targets, row_starts)
        # A shard whose words are all impossible (vocabulary padding with a bias of -inf) adds nothing.
        impossible = stats[0] == -math.inf
        logps = logps.masked_fill(~here | impossible[rows], -math.inf)
        mine = torch.cat([stats[0], stats[1].masked_fill(impossible, 0.0), logps])
        everyone = mine.new_empty((distributed.get_world_size(self.group), mine.numel()))
        distributed.all_gather(list(everyone.unbind()), mine, group=self.group)
        tops, log_sums, log_probs = everyone.double().split([*stats.shape[1:], *stats.shape[1:], logps.numel()], dim=1)
        top = tops.amax(0)
        below = tops - top
        log_sum = (below + log_sums).exp().sum(0).log()
        # log p = (y - own lse) - (lse - own lse): no term is as large as the logits. All shards but one give -inf.
        logp = (log_probs - (log_sum - log_sums - below)[:, rows]).amax(0)
        logp = logp.masked_fill(targets == IGNORE_INDEX, 0.0)
        return torch.stack([top, log_sum]).to(stats.dtype), logp.to(stats.dtype)


def local_targets(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Tell which targets (N,) are of some words, and return them (N,) among those words, 0 for other words."""
    here = (targets >= start) & (targets < start + size)
    local = (targets - start).where(here, 0)
    return here, local.where(targets != IGNORE_INDEX, IGNORE_INDEX)


def backward_of_words_(
    kernels: RowKernels,
    start: int,
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    stats: Tensor,
    coef: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    grad_dtype: torch.dtype | None = None,
) -> None:
    """Write the gradient of ``sum_n coef_n * logp_n`` over the logits (r, size) of some words, from ``start`` on.

    Targets (n,) and statistics (2, r) are those of the whole vocabulary, ``bias`` is that of the words. Targets among
    other words go to column 0, which is then computed again.
    """
    here, local = local_targets(targets, start, logits.shape[1])
    transform = (logit_scale, softcap, temperature)
    first_bias = None if bias is None else bias[0]
    counted = coef.where(local != IGNORE_INDEX, 0.0)
    own = counted.where(here & (local == 0), 0.0)
    column = column_gradient(logits[:, 0].to(stats.dtype), own, counted, row_starts, stats, first_bias, *transform)
    kernels.backward_(logits, local, row_starts, stats, coef, bias, *transform, grad_dtype)
    narrow_view(logits, grad_dtype or logits.dtype)[:, 0] = column


def column_gradient(
    logits: Tensor,
    own: Tensor,
    coef: Tensor,
    row_starts: Tensor | None,
    stats: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
) -> Tensor:
    """Return the gradient (R,) of ``sum_n coef_n * logp_n`` in one column of the raw logits.

    Args:
        logits: (R,), the column, in the dtype of the statistics.
        own: (N,) ``coef`` of the tokens whose target is this column, 0 for other tokens.
        coef: (N,), 0 for tokens that do not count.
        row_starts: (R + 1,) prefix count of the tokens of each row; None: one a row.
        stats: (2, R).
        bias: scalar or None.
        logit_scale: as in :class:`cpo_kernels.options.Head`, like softcap and temperature.
        softcap: 0 for none.
    """
    y = transform_logits(logits, bias, logit_scale, softcap, temperature)
    grad = row_sums(own, row_starts) - row_sums(coef, row_starts) * (y - stats[0] - stats[1]).exp()
    if softcap:
        grad = grad * (1 - (y * temperature / softcap) ** 2)
    active = row_sums(coef.abs(), row_starts) != 0
    return (grad * (logit_scale / temperature)).where(active, 0.0)


def row_sums(values: Tensor, row_starts: Tensor | None) -> Tensor:
    """Sum values (N,) over the tokens of each row, (R,), accumulated in float64."""
    if row_starts is None:
        return values
    sums = torch.segment_reduce(values.double(), "sum", lengths=row_starts.diff(), unsafe=True, initial=0)
    return sums.to(values.dtype)


def rows_of_tokens(targets: Tensor, row_starts: Tensor | None) -> Tensor | slice:
    """Return the row of each token (N,) without waiting for a device; a full slice where row r has token r."""
    if row_starts is None:
        return slice(None)
    rows = torch.arange(row_starts.numel() - 1, device=targets.device)
    return rows.repeat_interleave(row_starts.diff(), output_size=targets.numel())


def tile(shapes: Sequence[tuple[int, ...]], starts: Sequence[int | None]) -> list[int]:
    """Return the first entry of each shard, by rank; raise ``ValueError`` unless shards make up a vocabulary."""
    for rank, shape in enumerate(shapes):
        if len(shape) != 2 or shape[1] != shapes[0][-1]:
            raise ValueError(f"the shard of rank {rank} has shape {shape}, expected (size, {shapes[0][-1]})")
        if shape[0] == 0:
            raise ValueError(
                f"the shard of rank {rank} is empty, shape {shape}; expected a vocabulary entry on every process: pad "
                "the vocabulary or use fewer processes"
            )
    sizes = [shape[0] for shape in shapes]
    if all(start is None for start in starts):
        return [sum(sizes[:rank]) for rank in range(len(sizes))]
    if any(start is None for start in starts):
        raise ValueError(f"start must be given on all ranks or on none, got {list(starts)}")
    end = 0
    for rank in sorted(range(len(sizes)), key=lambda rank: starts[rank] or 0):
        if starts[rank] != end:
            raise ValueError(
                f"the shard of rank {rank} starts at {starts[rank]}, expected {end}; the starts are {list(starts)}, "
                f"the sizes {sizes}"
            )
        end += sizes[rank]
    return [start or 0 for start in starts]


def is_dtensor(tensor: Tensor) -> bool:
    """Tell whether ``tensor`` is a DTensor, without an import for ordinary tensors."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def group_of(tensor: Any) -> Any:
    """Return the process group of a DTensor sharded along the vocabulary; raise ``ValueError`` for other placements."""
    from torch.distributed.tensor import Shard

    placements = tuple(tensor.placements)
    if tensor.device_mesh.ndim != 1 or placements != (Shard(0),):
        raise ValueError(
            f"a vocabulary-parallel weight must be a DTensor placed (Shard(0),) on a mesh of one dimension, got "
            f"{placements} on {tensor.device_mesh}"
        )
    return tensor.device_mesh.get_group()


def _no_separate_gradient(*_arguments: Any) -> Tensor:
    raise RuntimeError("a vocabulary-parallel head writes its gradient over its logits only")
