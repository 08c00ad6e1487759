"""Liger's fused linear losses with their names, signatures and return values, on our kernels.

The modules of ``liger_kernel.chunked_loss`` whose losses are functions of token log-probabilities, the fused linear
cross-entropy of ``liger_kernel.transformers``, and their functional forms: change the import. Liger itself is not
needed.

The differences: logits fill a budget of bytes, so that ``chunk_size``, ``compiled``, ``accum_dtype`` and
``chunk_mem_const`` are taken and have no effect; rows that predict nothing enter no product; targets may be of any
integer dtype; and what would give a wrong number raises ``ValueError``: an odd number of sequences in pairs, and a
target of -100 where the ``ignore_index`` is another.
"""

from __future__ import annotations

from typing import NoReturn

from .cross_entropy import CrossEntropyOutput, LigerFusedLinearCrossEntropyLoss
from .functional import (
    liger_fused_linear_cpo,
    liger_fused_linear_cross_entropy,
    liger_fused_linear_dpo,
    liger_fused_linear_grpo,
    liger_fused_linear_kto,
    liger_fused_linear_orpo,
    liger_fused_linear_simpo,
)
from .grpo import LigerFusedLinearGRPOLoss
from .preference import (
    DPO_LOSS_TYPES,
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from .unpaired import LigerFusedLinearKTOLoss

__all__ = [
    "DPO_LOSS_TYPES",
    "CrossEntropyOutput",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
    "liger_fused_linear_cpo",
    "liger_fused_linear_cross_entropy",
    "liger_fused_linear_dpo",
    "liger_fused_linear_grpo",
    "liger_fused_linear_kto",
    "liger_fused_linear_orpo",
    "liger_fused_linear_simpo",
]
# Liger's losses that compare whole distributions with a teacher's, of which no function of log-probabilities is one.
OF_DISTRIBUTIONS = {"JSD": "jsd", "CosineSimilarity": "cosine"}


def __getattr__(name: str) -> NoReturn:
    """Say by name which of Liger's losses are not here."""
    if name in {f"LigerFusedLinear{kind}Loss" for kind in OF_DISTRIBUTIONS} | {
        f"liger_fused_linear_{kind}" for kind in OF_DISTRIBUTIONS.values()
    }:
        raise ImportError(
            f"{name} compares whole distributions with a teacher's, which these kernels do not; "
            "it is in liger_kernel.chunked_loss"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
