"""TRL's DPOTrainer on the fused loss, with any number of negatives per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.nn.functional import pad
from trl import DPOTrainer
from trl.trainer import dpo_trainer, utils

from cpo_kernels.layout import CandidateLayout
from cpo_kernels.models import CPORequest, LinearLossOutput, LogpsRequest, StatisticsRequest, attach_linear_loss
from cpo_kernels.models.adapters import find_base
from cpo_kernels.objective import log_ratios
from cpo_kernels.options import suggests_arguments

from .host import WAY_OUT, replaced, require_names
from .padded_rows import MeanLogitsRequest, exact_head
from .trl_candidates import CandidateCollator, as_list, body_inputs, has_lists, regrouped, scored_rows, to_pairs
from .trl_losses import PairLosses, PairLossRequest

TESTED = "1.16"


@partial(suggests_arguments, passes_to=DPOTrainer)
class FusedDPOTrainer(DPOTrainer):
    """``trl.DPOTrainer`` whose loss and gradients come from hidden states in one pass, by :func:`attach_linear_loss`.

    Arguments, configuration, data sets and reference (a model, a path, a PEFT model without its adapters, precomputed
    log-probabilities) are TRL's, and with one negative so are loss, gradients and metrics, of text and of text with
    images. Without images, ``rejected`` may also be a list, of texts or of conversations, whose length may differ
    between examples; with K > 1 the loss is

        log(1 + sum_k exp(beta * (r_k - r_chosen))),  r = logp - ref_logp

    (S-DPO, Chen et al. 2024, arXiv 2406.09215), with means per token for ``sigmoid_norm``.

    Loss types are all of TRL's, ``sft`` included, in any mixture by ``loss_weights``, with every ``f_divergence_type``,
    ``ld_alpha`` and ``use_weighting``: by options of :func:`cpo_kernels.linear_cpo_loss` where it has the loss, else by
    a function of log-likelihoods (:mod:`cpo_kernels.integrations.trl_losses`), which takes K = 1. ``aot`` and
    ``aot_unpaired`` sort over the batch: logits beyond the budget are computed twice. K > 1 is for ``sigmoid`` and
    ``sigmoid_norm``, and for ``sft`` beside one or alone. Means per token are over the predicted tokens; TRL also
    counts a first token without a prompt, which ``truncation_mode="keep_end"`` can leave.

    ``objective`` holds the options of :func:`cpo_kernels.linear_cpo_loss`, or, where a function computes the loss, of
    :func:`cpo_kernels.linear_sequence_loss`; more of them, such as ``max_logits_bytes``, can be added before training.
    Options of the head hold for the reference too, unless it is precomputed.

    Metrics: ``rewards/chosen``, ``rewards/rejected`` (means over a prompt's negatives first), ``rewards/accuracies``
    (the chosen one above all negatives), ``rewards/margins``, ``logps/*``, ``logits/*`` (NaN for a model with a
    softcap), ``num_tokens`` and, of a mixture of experts, ``aux_loss``.

    Args:
        *args: TRL's arguments.
        token_metrics: also log TRL's ``entropy`` (of all candidates' tokens) and ``mean_token_accuracy`` (of the chosen
            ones'; any of several most probable words is right), for one more product of the head.
        **kwargs: TRL's arguments.

    Raises:
        RuntimeError: the installed TRL lacks a private name that this class uses; or prompt tuning, p-tuning or another
            adapter that puts virtual tokens before the prompt.
        ValueError: a loss that this class does not compute; the message names it.
    """

    def __init__(self, *args: Any, token_metrics: bool = False, **kwargs: Any) -> None:
        require_names("trl", TESTED, DPOTrainer, "_prepare_dataset", "compute_ref_log_probs")
        self.token_metrics = token_metrics
        self.most_negatives = 1
        self.objective: dict[str, Any] = {}
        with self.attaching():
            super().__init__(*args, **kwargs)
        require_names("trl", TESTED, self, "_metrics", "_total_train_tokens", "precompute_ref_logps", "loss_weights")
        self._read_losses()

    def attaching(self) -> AbstractContextManager[Any]:
        """Return a context in which TRL, while it makes the trainer, attaches the loss to policy and reference."""
        require_names("trl", TESTED, dpo_trainer, "add_fused_lm_head")
        # TRL calls it between loading and preparing a model, which is when the loss has to be attached.
        attach = partial(self._attach_first, dpo_trainer.add_fused_lm_head)
        return replaced(dpo_trainer, {"add_fused_lm_head": attach})

    def _attach_first(self, stock: Any, model: Any, *args: Any, **options: Any) -> None:
        require_names("trl", TESTED, self, "precompute_ref_logps", "loss_weights")
        policy: Any = self.model
        try:
            find_base(policy)  # refuses virtual tokens, which the base model that TRL passes does not show
            attach_linear_loss(model)
        except RuntimeError as error:
            raise RuntimeError(f"{error}. {WAY_OUT}") from error
        self._read_losses()  # before a reference is precomputed
        stock(model, *args, **options)

    def _read_losses(self) -> None:
        if not hasattr(self, "losses"):
            self.losses = PairLosses.of(self)
            self.objective = self.losses.objective or {}

    @property
    def data_collator(self) -> Any:
        """The collator of candidates, which calls the collator that was set."""
        return self._collator

    @data_collator.setter
    def data_collator(self, collate: Any) -> None:
        self._collator = collate if isinstance(collate, CandidateCollator) else CandidateCollator(collate)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        first = next(iter(dataset))
        prepared = "rejected" not in first and "rejected_ids" in first
        if not prepared and not has_lists(first):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not prepared:
            pairs = dataset.map(to_pairs, with_indices=True, batched=True)
            dataset = regrouped(super()._prepare_dataset(pairs, processing_class, args, dataset_name))
        if args.precompute_ref_log_probs:
            counts = [len(as_list(negatives, of=list)) for negatives in dataset["rejected_ids"]]
            self.most_negatives = max([self.most_negatives, *counts])
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Compute reference log-likelihoods of the chosen candidates (G,) and of the negatives.

        Those of the negatives are (G,) if no example so far has more than one negative, else padded to (G, K).
        """
        self._read_losses()  # where a trainer of axolotl precomputes them, nothing else has
        logps = self._ref_logps(model, inputs).split(inputs["group_sizes"])
        negatives = [pad(own[1:], (0, self.most_negatives - len(own) + 1)) for own in logps]
        return torch.stack([own[0] for own in logps]), torch.stack(negatives).squeeze(1)

    def _ref_logps(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        adapters: Any = nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy: Any = self.accelerator.unwrap_model(self.model)
            adapters = utils.use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        targets, layout = scored_rows(inputs)
        request = LogpsRequest(targets, self.losses.split(layout), **exact_head(self.objective))
        with torch.no_grad(), adapters, self.accelerator.autocast():
            return self.losses.weighted_sums(model(**body_inputs(inputs), linear_loss=request).logps)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a batch of :class:`CandidateCollator`, a scalar, and log its metrics."""
        targets, layout = scored_rows(inputs)
        precomputed = self.precompute_ref_logps
        reference = self.model if self.ref_model is None else self.ref_model  # a compiled model has no truth value
        ref = inputs["ref_logps"] if precomputed else self._ref_logps(reference, inputs)
        counts = torch.tensor(layout.cu_tokens, device=targets.device).diff()
        chosen = torch.zeros_like(counts, dtype=torch.bool)
        chosen[list(layout.cu_groups[:-1])] = True
        of_chosen = chosen.repeat_interleave(counts)
        rows: Any = layout.rows
        row_sets = [rows[of_chosen], rows[~of_chosen]]
        head = exact_head(self.objective)
        statistics = StatisticsRequest(targets, rows, entropy=True, top1=True, **head) if self.token_metrics else None
        request = MeanLogitsRequest(self._request(targets, layout, ref), *row_sets, statistics=statistics)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        out = model(**body_inputs(inputs), **router, linear_loss=request)
        per_token = counts.clamp(min=1) if self.objective.get("length_normalized") else 1
        logps = self.losses.weighted_sums(out.logps * per_token)
        rewards = self.objective.get("beta", self.beta) * log_ratios(logps, ref)
        metrics = group_metrics(inputs["group_sizes"], logps, rewards)
        if self.aux_loss_enabled:
            out.loss = out.loss + self.router_aux_loss_coef * self._aux_loss(out)
            metrics["aux_loss"] = out.aux_loss.detach()[None]
        sizes = [len(own) for own in row_sets]
        means = dict(zip(("logits/chosen", "logits/rejected"), zip(out.mean_logits, sizes, strict=True), strict=True))
        if self.token_metrics:
            means["entropy"] = out.entropy.mean(), sum(sizes)
            means["mean_token_accuracy"] = out.top1[of_chosen].float().mean(), sizes[0]
        record(self, inputs["attention_mask"], metrics, means)
        return (out.loss, self._logits(model, inputs)) if return_outputs else out.loss

    def _request(self, targets: Tensor, layout: CandidateLayout, ref_logps: Tensor) -> Any:
        if self.losses.objective is not None:
            return CPORequest(targets, layout, ref_logps=ref_logps, **self.objective)
        return PairLossRequest(self.losses, targets, self.losses.split(layout), ref_logps, **self.objective)

    def _aux_loss(self, out: LinearLossOutput) -> Tensor:
        if out.aux_loss is None:
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef}, but this model's own forward computes no "
                "load-balancing loss; set router_aux_loss_coef=0.0. " + WAY_OUT
            )
        return out.aux_loss

    @torch.no_grad()
    def _logits(self, model: Any, inputs: dict[str, Any]) -> Any:
        return model(**body_inputs(inputs))


def group_metrics(sizes: Sequence[int], logps: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    """Compute the metrics (G,) of groups of ``sizes`` candidates, the chosen one first.

    Rejected candidates of a group are averaged; accuracy is 1 where the chosen reward is above all others.

    Args:
        sizes: G numbers.
        logps: log-likelihoods (S,).
        rewards: (S,).
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
    trainer: Any, attention_mask: Tensor, metrics: dict[str, Tensor], token_means: dict[str, tuple[Tensor, int]]
) -> None:
    """Log TRL's metrics: ``metrics`` (G,) by name, means over numbers of tokens by name, and the tokens seen.

    The arguments are of this process; the logged values are means over all processes.
    """
    train, gather = trainer.model.training, trainer.accelerator.gather
    means, tokens = zip(*token_means.values(), strict=True)
    counts = torch.tensor(tokens, device=attention_mask.device)
    sums = (torch.stack(means) * counts).masked_fill(counts == 0, 0.0)
    sums, counts = (gather(x[None]).sum(0) for x in (sums, counts))
    logged = trainer._metrics["train" if train else "eval"]
    for name, values in metrics.items():
        logged[name].append(gather(values).mean().item())
    for name, value in zip(token_means, (sums / counts.clamp(min=1)).tolist(), strict=True):
        logged[name].append(value)
    trainer._total_train_tokens += gather(attention_mask.sum()).sum().item() if train else 0
    logged["num_tokens"] = [trainer._total_train_tokens]
