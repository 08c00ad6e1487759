"""nn.Module forms of the losses: the options are fixed once, the tensors come with each call."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from .engine.vocab_parallel import VocabShard
from .functional import cpo_loss, linear_cpo_loss
from .layout import CandidateLayout
from .objective import CPOOutput
from .options import Head, Objective, chosen, refuse_unknown


class _CPOModule(nn.Module):
    """A module that holds the options of a loss, checked when it is made; see :mod:`cpo_kernels.options`."""

    def __init__(
        self,
        *,
        beta: float = 0.1,
        margin: float = 0.0,
        label_smoothing: float = 0.0,
        loss_type: str = "plackett_luce",
        length_normalized: bool = False,
        contrast_weight: float = 1.0,
        mle_weight: float = 0.0,
        num_groups: float | None = None,
        num_target_tokens: float | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        backend: str = "auto",
        max_logits_bytes: int | None = None,
        logits_dtype: torch.dtype | None = None,
        grad_filter_eps: float | None = None,
        candidate_eps: float | None = None,
        skip_absent_rows: bool = True,
        vocab_shard: VocabShard | None = None,
        frozen_columns: int = 0,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        refuse_unknown(type(self), unknown)
        objective = Objective(
            *(beta, margin, label_smoothing, loss_type, length_normalized),
            *(contrast_weight, mle_weight, num_groups, num_target_tokens),
        )
        head = Head(
            *(logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype),
            *(grad_filter_eps, candidate_eps, skip_absent_rows, vocab_shard, frozen_columns),
        )
        self.options = chosen(objective) | chosen(head)

    def extra_repr(self) -> str:
        """List the options that are not the defaults."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class CPOLoss(_CPOModule):
    """:func:`cpo_kernels.cpo_loss` with its objective and head options fixed."""

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        ref_logps: Tensor | None = None,
        ranks: Tensor | None = None,
        bias: Tensor | None = None,
        **unknown: NoReturn,
    ) -> CPOOutput:
        """Compute the loss of logits (G, C, T, V) and targets (G, C, T)."""
        refuse_unknown(CPOLoss.forward, unknown)
        return cpo_loss(logits, targets, ref_logps=ref_logps, ranks=ranks, bias=bias, **self.options)


class LinearCPOLoss(_CPOModule):
    """:func:`cpo_kernels.linear_cpo_loss` with its objective and head options fixed."""

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        layout: CandidateLayout | None = None,
        ref_logps: Tensor | None = None,
        ranks: Tensor | None = None,
        bias: Tensor | None = None,
        **unknown: NoReturn,
    ) -> CPOOutput:
        """Compute the loss of hidden (G, C, T, H), weight (V, H) and targets (G, C, T), or of a packed layout."""
        refuse_unknown(LinearCPOLoss.forward, unknown)
        return linear_cpo_loss(
            hidden, weight, targets, layout=layout, ref_logps=ref_logps, ranks=ranks, bias=bias, **self.options
        )
