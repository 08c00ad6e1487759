"""TRL's DPOTrainer on the fused loss, with any number of negatives per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.nn.functional import pad
from trl import DPOTrainer
from trl.trainer import dpo_trainer, utils

from cpo_kernels.loss_table import DISCOPOP_TAU, TRL_NAMES, trl_options
from cpo_kernels.models import CPORequest, LogpsRequest, attach_linear_loss
from cpo_kernels.models.adapters import find_base
from cpo_kernels.options import HEAD_OPTIONS, Objective, suggests_arguments

from .host import replaced, require_names
from .padded_rows import MeanLogitsRequest
from .trl_candidates import CandidateCollator, as_list, body_inputs, has_lists, regrouped, scored_rows, to_pairs

TESTED = "1.16"
# The only values of these options of TRL for which an objective computes TRL's loss.
PLAIN = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}


@partial(suggests_arguments, passes_to=DPOTrainer)
class FusedDPOTrainer(DPOTrainer):
    """``trl.DPOTrainer`` whose loss and gradients come from hidden states in one pass, by :func:`attach_linear_loss`.

    Arguments, configuration, data sets and reference (a model, a path, a PEFT model without its adapters, precomputed
    log-probabilities) are TRL's, and with one negative so are loss, gradients and metrics. ``rejected`` may also be a
    list, of texts or of conversations, whose length may differ between examples; with K > 1 the loss is

        log(1 + sum_k exp(beta * (r_k - r_chosen))),  r = logp - ref_logp

    (S-DPO, Chen et al. 2024, arXiv 2406.09215), with means per token for ``sigmoid_norm``.

    Loss types: ``sigmoid`` or ``sigmoid_norm``, with K = 1 also the pair losses of :mod:`cpo_kernels.loss_table`, and
    ``sft`` in addition to one of these; ``loss_weights`` apply. Means per token are over the
    predicted tokens; TRL also counts a first token without a prompt, which ``truncation_mode="keep_end"`` can leave.

    ``objective`` holds the options of :func:`cpo_kernels.linear_cpo_loss`; more options, such as ``max_logits_bytes``,
    can be added to it before training. Options of the head hold for the reference too, unless it is precomputed.

    Metrics: ``rewards/chosen``, ``rewards/rejected`` (means over a prompt's negatives first), ``rewards/accuracies``
    (the chosen one above all negatives), ``rewards/margins``, ``logps/*``, ``logits/*`` (NaN for a model with a
    softcap), ``num_tokens`` and, of a mixture of experts, ``aux_loss``. TRL's ``entropy`` and ``mean_token_accuracy``
    need the logits, and are missing; TRL's own DPOTrainer has them under
    :func:`~cpo_kernels.integrations.trl.patch_fused_head`.

    Raises:
        RuntimeError: the installed TRL lacks a private name that this class uses; or prompt tuning, p-tuning or another
            adapter that puts virtual tokens before the prompt.
        ValueError: an option whose loss this class does not compute; the message names it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require_names("trl", TESTED, DPOTrainer, "_prepare_dataset", "compute_ref_log_probs")
        require_names("trl", TESTED, dpo_trainer, "add_fused_lm_head")
        self.most_negatives = 1
        self.objective: dict[str, Any] = {}
        # TRL calls it between loading and preparing a model, which is when the loss has to be attached.
        attaching = partial(self._attach_first, dpo_trainer.add_fused_lm_head)
        with replaced(dpo_trainer, {"add_fused_lm_head": attaching}):
            super().__init__(*args, **kwargs)
        require_names("trl", TESTED, self, "_metrics", "_total_train_tokens")

    def _attach_first(self, stock: Any, model: Any, *args: Any, **options: Any) -> None:
        require_names("trl", TESTED, self, "precompute_ref_logps", "loss_weights")
        policy: Any = self.model
        find_base(policy)  # refuses virtual tokens, which the base model that TRL passes does not show
        self.objective = objective_of(self)  # before a reference is precomputed
        stock(attach_linear_loss(model), *args, **options)

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
        logps = self._ref_logps(model, inputs).split(inputs["group_sizes"])
        negatives = [pad(own[1:], (0, self.most_negatives - len(own) + 1)) for own in logps]
        return torch.stack([own[0] for own in logps]), torch.stack(negatives).squeeze(1)

    def _ref_logps(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        adapters: Any = nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy: Any = self.accelerator.unwrap_model(self.model)
            adapters = utils.use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        head = {name: value for name, value in self.objective.items() if name in HEAD_OPTIONS}
        with torch.no_grad(), adapters, self.accelerator.autocast():
            return model(**body_inputs(inputs), linear_loss=LogpsRequest(*scored_rows(inputs), **head)).logps

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a batch of :class:`CandidateCollator`, a scalar, and log its metrics."""
        targets, layout = scored_rows(inputs)
        precomputed = self.precompute_ref_logps
        reference = self.model if self.ref_model is None else self.ref_model  # a compiled model has no truth value
        ref = inputs["ref_logps"] if precomputed else self._ref_logps(reference, inputs)
        counts = torch.tensor(layout.cu_tokens, device=targets.device).diff()
        per_token = counts.clamp(min=1) if self.objective.get("length_normalized") else 1
        chosen = torch.zeros_like(counts, dtype=torch.bool)
        chosen[list(layout.cu_groups[:-1])] = True
        of_chosen = chosen.repeat_interleave(counts)
        request = CPORequest(targets, layout, ref_logps=ref, **self.objective)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        row_sets = [layout.rows[where] for where in (of_chosen, ~of_chosen)]  # type: ignore[index]
        out = model(**body_inputs(inputs), **router, linear_loss=MeanLogitsRequest(request, *row_sets))
        metrics = group_metrics(inputs["group_sizes"], out.logps * per_token, out.rewards * per_token)
        if self.aux_loss_enabled:
            out.loss = out.loss + self.router_aux_loss_coef * out.aux_loss
            metrics["aux_loss"] = out.aux_loss.detach()[None]
        record(self, inputs["attention_mask"], metrics, out.mean_logits, [len(rows) for rows in row_sets])
        return (out.loss, self._logits(model, inputs)) if return_outputs else out.loss

    @torch.no_grad()
    def _logits(self, model: Any, inputs: dict[str, Any]) -> Any:
        return model(**body_inputs(inputs))


def objective_of(trainer: Any) -> dict[str, Any]:
    """Return the options of :func:`cpo_kernels.linear_cpo_loss` for those of a ``trl.DPOTrainer``.

    Raises:
        ValueError: an option whose loss the objective lacks, or a number that the loss does not take.
    """
    for name, value in PLAIN.items():
        if getattr(trainer, name) != value:
            raise ValueError(f"{name}={getattr(trainer, name)!r} is not computed here; expected {value!r}")
    weights = dict(zip(trainer.loss_types, trainer.loss_weights, strict=True))
    contrasts = [name for name in trainer.loss_types if name != "sft"]
    if len(contrasts) != 1 or contrasts[0] not in TRL_NAMES or len(weights) < len(trainer.loss_types):
        raise ValueError(
            f"loss_type={trainer.loss_types} is not computed here; expected one of {', '.join(TRL_NAMES)}, and sft "
            "besides it at most. TRL's own DPOTrainer takes patch_fused_head()"
        )
    if contrasts == ["discopop"] and trainer.args.discopop_tau != DISCOPOP_TAU:
        raise ValueError(f"discopop_tau={trainer.args.discopop_tau} is not computed here; expected {DISCOPOP_TAU}")
    weighted = {"contrast_weight": weights[contrasts[0]], "mle_weight": weights.get("sft", 0.0)}
    options = {"beta": trainer.beta, **weighted, **trl_options(contrasts[0], trainer.label_smoothing)}
    Objective(**options)  # checks the numbers before anything runs
    return options


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
    trainer: Any, attention_mask: Tensor, metrics: dict[str, Tensor], mean_logits: Tensor, tokens: Sequence[int]
) -> None:
    """Log TRL's metrics: ``metrics`` (G,), mean logits (2,) over the numbers of ``tokens``, and the tokens seen.

    The arguments are of this process; the logged values are means over all processes.
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
