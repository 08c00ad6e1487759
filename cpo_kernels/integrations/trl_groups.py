"""DPO of groups in TRL's terms: which of its options are which objective, and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid_norm": {"length_normalized": True},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo", "length_normalized": True},
}
PLAIN = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False, "aux_loss_enabled": False}


def objective_of(trainer: Any) -> dict[str, Any]:
    """Options of :func:`cpo_kernels.linear_cpo_loss` for those of a ``trl.DPOTrainer``.

    Raises:
        ValueError: an option whose loss is not computed here.
    """
    for name, value in PLAIN.items():
        if getattr(trainer, name) != value:
            raise ValueError(f"{name}={getattr(trainer, name)!r} is not computed here; expected {value!r}")
    weights = dict(zip(trainer.loss_types, trainer.loss_weights, strict=True))
    contrasts = [name for name in trainer.loss_types if name != "sft"]
    if len(contrasts) != 1 or contrasts[0] not in LOSSES or len(weights) < len(trainer.loss_types):
        raise ValueError(
            f"loss_type={trainer.loss_types} is not computed here; expected one of {', '.join(LOSSES)}, and sft "
            "besides it at most. TRL's own DPOTrainer takes patch_fused_head()"
        )
    weighted = {"contrast_weight": weights[contrasts[0]], "mle_weight": weights.get("sft", 0.0)}
    return {"beta": trainer.beta, **weighted, **LOSSES[contrasts[0]]}


def group_metrics(sizes: Sequence[int], logps: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    """Each (G,), of groups of ``sizes`` candidates with these log-likelihoods and rewards (S,), the chosen one first.

    The rejected of a group are averaged; accuracy is 1 where the chosen one is rewarded above all of them.
    """
    chosen, others = zip(*((own[0], own[1:]) for own in rewards.split(list(sizes))), strict=True)
    rejected = torch.stack([own.mean() for own in others])
    return {
        "rewards/chosen": torch.stack(chosen),
        "rewards/rejected": rejected,
        "rewards/accuracies": (torch.stack(chosen) > torch.stack([own.max() for own in others])).float(),
        "rewards/margins": torch.stack(chosen) - rejected,
        "logps/chosen": torch.stack([own[0] for own in logps.split(list(sizes))]),
        "logps/rejected": torch.stack([own[1:].mean() for own in logps.split(list(sizes))]),
    }


def record(
    trainer: Any, attention_mask: Tensor, metrics: dict[str, Tensor], mean_logits: Tensor, tokens: Sequence[int]
) -> None:
    """Log what TRL logs: ``metrics`` (G,), mean logits (2,) of so many chosen and rejected tokens, and the tokens seen.

    All are of this process; what is logged is the mean over all.
    """
    train, gather = trainer.model.training, trainer.accelerator.gather
    counts = torch.tensor(tokens, device=mean_logits.device)
    sums, counts = (gather(x[None]).sum(0) for x in (mean_logits * counts, counts))
    logged = trainer._metrics["train" if train else "eval"]
    for name, values in metrics.items():
        logged[name].append(gather(values).mean().item())
    for name, value in zip(("logits/chosen", "logits/rejected"), (sums / counts).tolist(), strict=True):
        logged[name].append(value)
    trainer._total_train_tokens += gather(attention_mask.sum()).sum().item() if train else 0
    logged["num_tokens"] = [trainer._total_train_tokens]
