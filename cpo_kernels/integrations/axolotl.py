"""axolotl's plugin: one line of YAML, and its SFT, DPO, IPO and SimPO take their loss from hidden states.

plugins:
  - cpo_kernels.integrations.axolotl.FusedLossPlugin

The trainers are in :mod:`cpo_kernels.integrations.axolotl_trainers`; docs/frameworks.md says what they change.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from cpo_kernels.models import attach_linear_loss

TRAINERS = "cpo_kernels.integrations.axolotl_trainers"
# By axolotl's ``rl``; None is SFT and pre-training.
TRAINER_OF = {None: "FusedTrainer", "dpo": "FusedDPOTrainer", "ipo": "FusedDPOTrainer", "simpo": "FusedCPOTrainer"}
# Settings for which axolotl computes another loss, or the same by another fused head.
OTHERS = [
    *("reward_model", "process_reward_model", "use_eaft", "orpo_alpha", "dpo_use_liger_kernel", "cut_cross_entropy"),
    *("liger_fused_linear_cross_entropy", "chunked_cross_entropy", "flash_attn_cross_entropy"),
]


class FusedLossPlugin(BasePlugin):
    """A plugin that attaches the fused loss to every model that axolotl loads, and chooses a trainer that asks for it.

    Raises:
        ValueError: an ``rl`` without such a trainer, a ``trainer_cls`` of the user's own, or another fused head.
        RuntimeError: a model that :func:`cpo_kernels.attach_linear_loss` refuses.
    """

    def register(self, cfg: Any) -> None:
        """Choose the trainer, by the setting ``trainer_cls``, before axolotl reads and checks its settings."""
        ours = trainer_of(cfg)
        asked = cfg.get("trainer_cls")
        if asked not in (None, ours):
            raise ValueError(f"trainer_cls={asked!r} has a loss of its own; remove it, or {type(self).__name__}")
        cfg["trainer_cls"] = ours

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Attach the fused loss to a policy or a reference, adapters included."""
        attach_linear_loss(model)


def trainer_of(cfg: Any) -> str:
    """Return the name of the trainer for axolotl's settings; raise ``ValueError`` where there is none."""
    rl = cfg.get("rl")
    name = TRAINER_OF.get(None if rl is None else str(getattr(rl, "value", rl)))
    if name is None:
        known = ", ".join(str(key) for key in TRAINER_OF if key)
        raise ValueError(f"rl={rl!r} has no fused loss here; expected none, or one of {known}")
    for setting in OTHERS:
        if cfg.get(setting):
            raise ValueError(f"{setting}={cfg[setting]!r} computes the loss otherwise; remove it, or FusedLossPlugin")
    return f"{TRAINERS}.{name}"
