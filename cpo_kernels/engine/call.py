"""One call of a fused head, checked and flattened: which backend runs it, on which tokens, and in which chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from cpo_kernels.kernels import device, registry
from cpo_kernels.kernels.device import default_logits_bytes, is_capturing
from cpo_kernels.kernels.selection import Sizes
from cpo_kernels.options import Head

from . import products
from .filters import scratch_bytes
from .head import LinearHead
from .plan import Plan, make_plan
from .tokens import Tokens, dense_tokens, find_tokens

Needs = tuple[bool, bool, bool]
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class LinearCall:
    """Everything of a call but hidden (R, H), weight (V, H) and bias (V,), which autograd tracks.

    Attributes:
        targets: (N,) int64.
        rows: (N,) int64 or None.
        cu_tokens: (S + 1,) host integers.
        cu_groups: (G + 1,) host integers.
        head: the options of the head.
    """

    targets: Tensor
    rows: Tensor | None
    cu_tokens: Sequence[int]
    cu_groups: Sequence[int]
    head: Head

    def backend(self, hidden: Tensor, weight: Tensor) -> registry.Backend:
        """The backend that will run this call; its row kernels span the processes of a vocabulary-parallel head."""
        dtype = self.head.logits_dtype or hidden.dtype
        sizes = Sizes(weight.shape[0], dtype, weight.shape[1], hidden.dtype)
        backend = registry.select(self.head.backend, hidden.device, dtype, sizes)
        shard = self.head.vocab_shard
        return backend if shard is None else backend.with_rows(shard.rows(backend.rows))

    def vocab(self, weight: Tensor) -> int:
        """V."""
        return weight.shape[0] if self.head.vocab_shard is None else self.head.vocab_shard.vocab

    def summed(self, grads: Grads) -> Grads:
        """Gradients of hidden, weight and bias, the first summed over the processes of a vocabulary-parallel head."""
        shard = self.head.vocab_shard
        return grads if shard is None else (shard.sum_grad_hidden(grads[0]), *grads[1:])

    def linear(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> LinearHead:
        """The head with the backend that will run it."""
        dtype = self.head.logits_dtype or hidden.dtype
        backend = self.backend(hidden, weight)
        leaves = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        ways = self.fused(backend, hidden, weight, needs), self.kept(backend, hidden, weight, needs)
        return LinearHead(*leaves, self.head, backend, dtype, *ways)

    @staticmethod
    def fused(backend: registry.Backend, hidden: Tensor, weight: Tensor, needs: Needs) -> bool:
        """Whether the backend goes without logits altogether, as it may without gradients."""
        way = None if any(needs) else backend.linear_forward
        return way is not None and way.takes(hidden, weight)

    @staticmethod
    def kept(backend: registry.Backend, hidden: Tensor, weight: Tensor, needs: Needs) -> registry.KeptLinear | None:
        """The backend's path that keeps no logits for the gradient, if it has one for these matrices."""
        kept = backend.linear_kept if any(needs) else None
        return kept if kept is not None and kept.takes(hidden, weight) else None

    def is_dense(self) -> bool:
        """Whether every row enters the products, so that no value is looked at on the host."""
        capturing = is_capturing()
        slots = {end - start for start, end in pairwise(self.cu_tokens)}
        padded = self.rows is None and len(slots) == 1
        if capturing and not padded:
            raise RuntimeError("a CUDA graph can capture the padded form only, with a segment at least")
        return padded and (capturing or not self.head.skip_absent_rows)

    def tokens(self, hidden: Tensor, weight: Tensor) -> Tokens:
        """The tokens that count; raises ``ValueError`` for targets or rows out of range."""
        if self.is_dense():
            return dense_tokens(self.targets, self.vocab(weight), self.cu_tokens, self.cu_groups)
        return find_tokens(self.targets, hidden.shape[0], self.vocab(weight), self.rows, self.cu_tokens, self.cu_groups)

    def plan(
        self,
        tokens: Tokens,
        hidden: Tensor,
        weight: Tensor,
        needs: Needs,
        *,
        whole_groups: bool = True,
        known_coefficients: bool = False,
    ) -> Plan:
        """The chunks of this call; the last two arguments are those of :func:`cpo_kernels.engine.plan.make_plan`."""
        backend, shard = self.backend(hidden, weight), self.head.vocab_shard
        kept = self.kept(backend, hidden, weight, needs)
        held = weight.shape[0] if shard is None else shard.largest
        filtered = self.head.filtered and any(needs)
        copies_rows = tokens.rows_are_copied or filtered
        workspace = backend.gemm_workspace(tokens.num_rows, held, weight.shape[1], weight.dtype)
        workspace += scratch_bytes(held, hidden.device) if filtered else 0
        plan = make_plan(
            tokens,
            vocab=device.row_width(held, hidden.device) if kept is None else kept.row_elements(held),
            logits_dtype=hidden.dtype if kept is not None else self.head.logits_dtype or hidden.dtype,
            needs=needs,
            max_logits_bytes=self.head.max_logits_bytes,
            default_bytes=default_logits_bytes(hidden.device) if shard is None else shard.logits_bytes,
            accumulator_bytes=products.accumulator_bytes(weight[:, self.head.frozen_columns :])
            // weight.shape[0]
            * held,
            gathered_row_bytes=weight.shape[1] * hidden.dtype.itemsize if copies_rows else 0,
            # It depends on the threads of a process, and processes that share a head need the same chunks.
            workspace_bytes=workspace if shard is None else 0,
            whole_groups=whole_groups,
            known_coefficients=known_coefficients,
        )
        left_out = needs[1] * self.head.frozen_columns / weight.shape[1]
        plan = replace(plan, workspace_bytes=workspace, gemms=plan.gemms - left_out)
        without_logits = self.fused(backend, hidden, weight, needs)
        return replace(plan, logits_bytes=0, note="the fused forward holds no logits") if without_logits else plan
