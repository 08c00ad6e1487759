"""Layers of the Hub: modules without a state of their own, whose ``forward`` replaces that of a layer or a function.

``kernels.kernelize`` gives ``forward`` to objects of another class, so it has the arguments of what it replaces and
reads only what that class holds, which the annotations name.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .functional import cpo_loss, linear_cpo_loss, linear_token_logps, token_logps
from .layout import CandidateLayout
from .objective import CPOOutput

IGNORE_INDEX = -100


class ForCausalLMLoss(nn.Module):
    """Next-token cross-entropy, as the function of that name in ``transformers``, without float32 logits."""

    can_torch_compile: bool = True

    def forward(
        self,
        logits: Tensor,  # (..., T, V)
        labels: Tensor,  # (..., T), unshifted
        vocab_size: int,
        num_items_in_batch: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the mean over the tokens that count, or the sum divided by ``num_items_in_batch``."""
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        targets = targets.masked_fill(targets == ignore_index, IGNORE_INDEX)
        total = -token_logps(logits.view(-1, vocab_size), targets).sum()
        if num_items_in_batch is None:
            return total / (targets != IGNORE_INDEX).sum()
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch


class LinearTokenLogps(nn.Module):
    """Log-probabilities of targets from hidden states and the weight of the head, without logits in memory."""

    can_torch_compile: bool = True

    def forward(
        self,
        hidden: Tensor,  # (..., H)
        weight: Tensor,  # (V, H)
        targets: Tensor,  # (...), -100 for none
        bias: Tensor | None = None,  # (V,)
        temperature: float = 1.0,
    ) -> Tensor:
        """Compute (...) log-probabilities in float32, 0 where there is no target; differentiable."""
        return linear_token_logps(hidden, weight, targets, bias=bias, temperature=temperature)


class CPOLoss(nn.Module):
    """The contrastive loss of logits, with the options that the adopting module holds."""

    can_torch_compile: bool = True

    options: dict[str, Any]

    def forward(
        self,
        logits: Tensor,  # (G, C, T, V)
        targets: Tensor,  # (G, C, T)
        *,
        ref_logps: Tensor | None = None,
        ranks: Tensor | None = None,
        bias: Tensor | None = None,
        **unknown: NoReturn,
    ) -> CPOOutput:
        """Compute ``cpo_loss``."""
        return cpo_loss(logits, targets, ref_logps=ref_logps, ranks=ranks, bias=bias, **self.options, **unknown)


class LinearCPOLoss(nn.Module):
    """The contrastive loss of hidden states and the weight of the head, with the options of the adopting module."""

    can_torch_compile: bool = True

    options: dict[str, Any]

    def forward(
        self,
        hidden: Tensor,  # (G, C, T, H), or packed (R, H)
        weight: Tensor,  # (V, H)
        targets: Tensor,  # (G, C, T), or packed (N,)
        *,
        layout: CandidateLayout | None = None,
        ref_logps: Tensor | None = None,
        ranks: Tensor | None = None,
        bias: Tensor | None = None,
        **unknown: NoReturn,
    ) -> CPOOutput:
        """Compute ``linear_cpo_loss``."""
        return linear_cpo_loss(
            hidden,
            weight,
            targets,
            layout=layout,
            ref_logps=ref_logps,
            ranks=ranks,
            bias=bias,
            **self.options,
            **unknown,
        )
