"""nn.Module forms of the losses: the options are fixed once, the tensors come with each call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .functional import cpo_loss, linear_cpo_loss
from .layout import CandidateLayout
from .objective import CPOOutput
from .options import split_options


class _CPOModule(nn.Module):
    """Holds the keyword options of a loss, checked when the module is made."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        split_options(type(self).__name__, options)
        self.options = options

    def extra_repr(self) -> str:
        """The options, as they were given."""
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
    ) -> CPOOutput:
        """(G, C, T, V), (G, C, T) -> CPOOutput."""
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
    ) -> CPOOutput:
        """(G, C, T, H), (V, H), (G, C, T) -> CPOOutput, or packed with a layout."""
        return linear_cpo_loss(
            hidden, weight, targets, layout=layout, ref_logps=ref_logps, ranks=ranks, bias=bias, **self.options
        )
