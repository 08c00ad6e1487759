"""axolotl's trainers on the fused loss; :class:`cpo_kernels.integrations.axolotl.FusedLossPlugin` chooses among them.

Each is axolotl's class in front of one of ours: axolotl's methods run first and call ours where they call TRL's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from axolotl.core.trainers import AxolotlCPOTrainer, AxolotlTrainer
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

from . import hf_trainer, trl_cpo, trl_dpo


class FusedTrainer(AxolotlTrainer, hf_trainer.FusedTrainer):
    """axolotl's trainer of SFT and pre-training, see :class:`cpo_kernels.integrations.hf_trainer.FusedTrainer`."""


class FusedDPOTrainer(AxolotlDPOTrainer, trl_dpo.FusedDPOTrainer):
    """axolotl's trainer of DPO and IPO, see :class:`cpo_kernels.integrations.trl_dpo.FusedDPOTrainer`."""

    def attaching(self) -> AbstractContextManager[Any]:
        """Attach nothing: the plugin has done so when axolotl loaded the models."""
        return nullcontext()


class FusedCPOTrainer(AxolotlCPOTrainer, trl_cpo.FusedCPOTrainer):
    """axolotl's trainer of SimPO, see :class:`cpo_kernels.integrations.trl_cpo.FusedCPOTrainer`."""
