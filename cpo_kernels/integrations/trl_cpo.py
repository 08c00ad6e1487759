"""TRL's CPOTrainer (Xu et al. 2024), and with it SimPO, SLiC, IPO and AlphaPO, on the fused loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl.experimental.cpo import CPOTrainer

from cpo_kernels.loss_table import LOSSES, trl_options
from cpo_kernels.models import CPORequest, attach_linear_loss
from cpo_kernels.options import suggests_arguments

from .host import require_names
from .padded_rows import MeanLogitsRequest, ObservedLossRequest, candidate_rows

TESTED = "1.16"


@partial(suggests_arguments, passes_to=CPOTrainer)
class FusedCPOTrainer(CPOTrainer):
    """``trl.experimental.cpo.CPOTrainer`` whose loss and gradients come from hidden states in one pass.

    Arguments, configuration, data sets, loss, gradients and metrics are TRL's, for every ``loss_type`` (``sigmoid``,
    ``hinge``, ``ipo``, ``simpo``, ``alphapo``), ``cpo_alpha``, ``label_smoothing`` below 0.5 and ``alpha``: with
    ``alpha != 0`` (AlphaPO, Gupta et al. 2025, arXiv 2501.03884) TRL's own formula of the log-likelihoods runs inside
    :func:`cpo_kernels.linear_sequence_loss`. ``logits/*`` are NaN for a model with a softcap.

    ``head_options``, empty at first, takes options of :class:`cpo_kernels.options.Head`, such as ``max_logits_bytes``,
    before training.

    Raises:
        RuntimeError: the installed TRL lacks a name that this class uses.
        ValueError: an encoder-decoder.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require_names("trl", TESTED, CPOTrainer, "get_batch_loss_metrics", "concatenated_inputs", "cpo_loss")
        super().__init__(*args, **kwargs)
        if self.is_encoder_decoder:
            raise ValueError("expected a decoder-only model; trl.experimental.cpo.CPOTrainer takes encoder-decoders")
        attach_linear_loss(self.model)  # type: ignore[type-var]
        self.head_options: dict[str, Any] = {}

    def get_batch_loss_metrics(
        self, model: Any, batch: Any, train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, Any]]:
        """Compute the loss of a padded batch, a scalar, and TRL's metrics."""
        padding: Any = self.pad_token_id
        rows = self.concatenated_inputs(batch, padding_value=padding, device=self.accelerator.device)
        labels = rows["concatenated_labels"]
        pairs = len(labels) // 2
        positions = torch.arange(labels.numel(), device=labels.device)
        order = positions[: 2 * pairs].view(2, pairs).T.flatten()  # TRL has all chosen answers before all rejected
        targets, layout = candidate_rows(labels, [2] * pairs, order)
        lengths = torch.tensor(layout.cu_tokens, device=labels.device).diff().view(pairs, 2)
        objective = self._objective()
        divisors = lengths if objective["length_normalized"] else torch.ones_like(lengths)

        def nll(sums: Tensor) -> Tensor:
            return -sums[:, 0].sum() / lengths[:, 0].sum() if self.cpo_alpha else torch.zeros_like(sums[0, 0])

        def formula(logps: Tensor, groups: range) -> Tensor:
            sums = logps.view(-1, 2)
            losses = self.cpo_loss(*(sums / divisors[groups.start : groups.stop]).T)[0]
            return losses.sum() / pairs + self.cpo_alpha * nll(sums)

        request: Any = ObservedLossRequest(targets, layout, formula, **self.head_options)
        if not self.alpha:
            request = CPORequest(targets, layout, **objective, **self.head_options)
        out = model(
            rows["concatenated_input_ids"],
            attention_mask=rows["concatenated_attention_mask"],
            linear_loss=MeanLogitsRequest(request, *positions.chunk(2)),
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )
        loss = out.loss + self.aux_loss_coef * out.aux_loss if self.aux_loss_enabled else out.loss
        averages = out.logps.view(pairs, 2) / (divisors if self.alpha else 1)
        _, chosen, rejected = self.cpo_loss(*averages.T)
        metrics = {
            **{"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected},
            **{"rewards/accuracies": (chosen > rejected).float()},
            **{"logps/chosen": averages[:, 0], "logps/rejected": averages[:, 1]},
            **{"logits/chosen": out.mean_logits[0], "logits/rejected": out.mean_logits[1]},
            "nll_loss": nll(averages * divisors),
        }
        prefix, gather = "eval_" if train_eval == "eval" else "", self.accelerator.gather_for_metrics
        return loss, {prefix + name: gather(value).mean().item() for name, value in metrics.items()}

    def _objective(self) -> dict[str, Any]:
        """Return the options of :func:`cpo_kernels.linear_cpo_loss` for TRL's options, without a reference."""
        simpo = self.loss_type == "simpo"  # the loss of DPO's sigmoid_norm, with a margin
        loss = trl_options("sigmoid_norm" if simpo else self.loss_type)
        smoothed = LOSSES[loss["loss_type"]].smoothing != "none"
        return {
            **loss,
            "beta": self.beta,
            "margin": self.simpo_gamma if simpo else 0.0,
            "label_smoothing": self.label_smoothing if smoothed else 0.0,
            "mle_weight": self.cpo_alpha,
        }
