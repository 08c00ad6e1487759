"""TRL on the fused loss: its DPO with K negatives, its CPO, and its fused head for all other trainers.

from cpo_kernels.integrations.trl import FusedDPOTrainer     # in place of trl.DPOTrainer
from cpo_kernels.integrations.trl import FusedCPOTrainer     # in place of trl.experimental.cpo.CPOTrainer
cpo_kernels.integrations.trl.patch_fused_head()              # for SFT, KTO, GRPO, RLOO and DPO of TRL itself
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trl_cpo import FusedCPOTrainer
    from .trl_dpo import FusedDPOTrainer
    from .trl_head import fused_head, patch_fused_head

__all__ = ["FusedCPOTrainer", "FusedDPOTrainer", "fused_head", "patch_fused_head"]

# Imported one by one: the head needs none of the trainers, and TRL's CPO is experimental.
_MODULES = {
    "FusedCPOTrainer": "trl_cpo",
    "FusedDPOTrainer": "trl_dpo",
    "fused_head": "trl_head",
    "patch_fused_head": "trl_head",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
