"""``CPOTrainer``: the Trainer of ``transformers`` with the fused contrastive loss in place of the model's own."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from transformers.utils import logging

from cpo_kernels.layout import CandidateLayout
from cpo_kernels.models import CPORequest, LinearLossOutput, LogpsRequest, attach_linear_loss

from .config import CPOConfig
from .data import ContrastBatch, NegativeSampler, TokenizedExamples, collate_indices, tokenize_examples
from .metrics import MetricSums, group_rewards
from .reference import check_fingerprint, save_fingerprint

logger = logging.get_logger(__name__)

EVALUATION_STEP = -1  # the same negatives in every evaluation


class CPOTrainer(Trainer):
    """Trains a causal language model on ``alpha * CPO + (1 - alpha) * MLE``; see :class:`CPOConfig`.

    The body of the model runs once a step and its head never: the loss comes from the hidden states, without logits.
    Negatives are a pure function of (seed, optimizer step, example), so a batch of 8 and 4 accumulated batches of 2
    give the same gradients, and a resumed run equals an uninterrupted one.

    Logs ``loss, contrastive_loss, nll_loss, rewards/chosen, rewards/rejected, accuracy, margin`` as means over the
    logging window, and for every metric that was NaN or Inf its count as ``nonfinite/NAME``. ``evaluate`` returns the
    same with the prefix ``eval_``, and ``eval_perplexity``.

    Args:
        model: a decoder-only model; :func:`cpo_kernels.attach_linear_loss` is applied to it.
        args: the configuration.
        train_dataset: examples ``{"prompt", "completion"}``: a list, a ``datasets.Dataset``, or what
            :func:`tokenize_examples` returns.
        eval_dataset: likewise, or a dictionary of them.
        processing_class: the tokenizer.
        ref_model: the frozen reference. Default: a copy of ``model`` as it is now. To resume a run, give the trainer
            the model that the run began with, or its reference here.
        kwargs: the remaining arguments of ``transformers.Trainer``, such as ``callbacks`` or ``optimizers``.

    Raises:
        ValueError: examples or a configuration that cannot be trained on; the message names them.
        RuntimeError: a model that :func:`attach_linear_loss` does not know how to read.
    """

    # The loss is divided by the sizes of the whole accumulated batch; Trainer must not divide it again.
    loss_is_scaled_for_ga = True
    args: CPOConfig

    def __init__(
        self,
        model: PreTrainedModel,
        args: CPOConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        ref_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if processing_class is None:
            raise ValueError("CPOTrainer needs the tokenizer, as processing_class")
        for name in ("model_init", "data_collator", "compute_loss_func", "compute_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(f"CPOTrainer makes its own batches and loss, without logits; {name} is not supported")
        self._check_max_length(model, args)
        attach_linear_loss(model)
        self._tokenizer, self._config = processing_class, args
        super().__init__(
            model=model,
            args=args,
            train_dataset=None if train_dataset is None else self._tokenize(train_dataset),
            eval_dataset=self._tokenize_all(eval_dataset),
            processing_class=processing_class,
            data_collator=collate_indices,
            **kwargs,
        )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"DataParallel over {self.args.n_gpu} devices is not supported; start one process per device (torchrun)"
            )
        self._eval_examples: TokenizedExamples | None = None
        self._train_sums, self._eval_sums = MetricSums(), MetricSums()
        self.ref_model = self._frozen_reference(ref_model)

    # Examples and batches

    def _check_max_length(self, model: PreTrainedModel, args: CPOConfig) -> None:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and args.max_length > positions:
            name = type(model).__name__
            raise ValueError(f"max_length={args.max_length} exceeds the {positions} positions of {name}")

    def _tokenize(self, examples: Any) -> TokenizedExamples:
        if isinstance(examples, TokenizedExamples):
            return examples
        limits = {"max_length": self._config.max_length, "max_prompt_length": self._config.prompt_budget}
        return tokenize_examples(examples, self._tokenizer, **limits)

    def _tokenize_all(self, datasets: Any) -> Any:
        if datasets is None or isinstance(datasets, str):  # a name among the evaluation sets
            return datasets
        if isinstance(datasets, Mapping):
            return {name: self._tokenize(examples) for name, examples in datasets.items()}
        return self._tokenize(datasets)

    def _build_batch(self, examples: Any, indices: Sequence[int], step: int, contrast: bool) -> ContrastBatch:
        """Draw the negatives of some :class:`TokenizedExamples` and pack them."""
        eos = self._tokenizer.eos_token_id
        pad = self._tokenizer.pad_token_id
        batch = ContrastBatch(eos, eos if pad is None else pad, self.args.max_length)
        sampler = NegativeSampler(
            examples=examples,
            eos_token_id=eos,
            num_batch_negatives=self.args.num_batch_negatives if contrast else 0,
            num_truncation_negatives=self.args.num_truncation_negatives if contrast else 0,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        for index in indices:
            sampler.add_to(batch, index, step)
        return batch

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of one optimizer step, each with the sizes of the whole step to divide its loss by."""
        indices, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [
            self._build_batch(self.train_dataset, batch["index"].tolist(), self.state.global_step, self.args.contrasts)
            for batch in indices
        ]
        sizes = torch.tensor(
            [sum(b.num_groups for b in batches), sum(b.num_target_tokens for b in batches)], device=device
        )
        groups, tokens = self.accelerator.reduce(sizes, "sum").tolist()
        return [self._inputs(batch, groups, tokens) for batch in batches], tokens

    @staticmethod
    def _inputs(batch: ContrastBatch, num_groups: int, num_target_tokens: int) -> dict[str, Any]:
        own = {"own_target_tokens": batch.num_target_tokens}
        return batch.tensors() | own | {"num_groups": num_groups, "num_target_tokens": num_target_tokens}

    # The loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss; the shares of a step add up to it."""
        out = self._forward(model, inputs)
        groups = self._own_groups(inputs) / inputs["num_groups"]
        tokens = inputs["own_target_tokens"] / inputs["num_target_tokens"]
        self._record(self._train_sums, out, inputs, groups, tokens)
        # DDP averages gradients over processes; the shares are to be summed.
        loss = out.loss * self.accelerator.num_processes
        return (loss, out) if return_outputs else loss

    def _forward(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> LinearLossOutput:
        layout = CandidateLayout(inputs["cu_tokens"], inputs["cu_groups"], rows=inputs["rows"])
        request = CPORequest(
            inputs["targets"],
            layout,
            ref_logps=self._reference_logps(inputs, layout),
            num_groups=inputs["num_groups"],
            num_target_tokens=inputs["num_target_tokens"],
            candidate_eps=self.args.candidate_eps,
            grad_filter_eps=self.args.grad_filter_eps,
            **self.args.objective,
            **self._head_options,
        )
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], linear_loss=request)

    @property
    def _head_options(self) -> dict[str, Any]:
        return {"backend": self.args.backend, "max_logits_bytes": self.args.max_logits_bytes}

    @torch.no_grad()
    def _reference_logps(self, inputs: Mapping[str, Any], layout: CandidateLayout) -> Tensor | None:
        """Log-likelihoods (S,) under the frozen reference, in the unit of the contrast; None where there is none."""
        if self.ref_model is None:
            return None
        request = LogpsRequest(inputs["targets"], layout, **self._head_options)
        with self.accelerator.autocast():
            logps = self.ref_model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], linear_loss=request
            ).logps
        if not self.args.length_normalized:
            return logps
        return logps / torch.tensor(layout.cu_tokens, device=logps.device).diff()

    @staticmethod
    def _own_groups(inputs: Mapping[str, Any]) -> int:
        return len(inputs["cu_groups"]) - 1

    def _record(self, sums: MetricSums, out: Any, inputs: Mapping[str, Any], groups: float, tokens: float) -> None:
        """Add one batch to the metrics, its groups and target tokens weighing ``groups`` and ``tokens``."""
        own_groups = self._own_groups(inputs)
        sums.add("nll_loss", out.nll_loss * (inputs["num_target_tokens"] / inputs["own_target_tokens"]), tokens)
        if self.args.candidate_eps is not None or self.args.grad_filter_eps is not None:
            sums.add("dropped", out.dropped, tokens)
        if len(inputs["cu_tokens"]) - 1 == own_groups:  # no negatives
            return
        sums.add("contrastive_loss", out.contrastive_loss * (inputs["num_groups"] / own_groups), groups)
        for name, value in group_rewards(out.rewards, inputs["cu_groups"]).items():
            sums.add(name, value, groups)
        sums.add("accuracy", out.accuracy, groups)
        sums.add("margin", out.margin, groups)

    def _means(self, sums: MetricSums, prefix: str = "") -> dict[str, float]:
        """The metrics of a window or an evaluation; what is not finite in them is named in a warning."""
        means, nonfinite = sums.means(lambda values: self.accelerator.reduce(values, "sum"))
        if nonfinite:
            names = ", ".join(f"{prefix}{name} ({count} times)" for name, count in nonfinite.items())
            logger.warning(f"NaN or Inf at step {self.state.global_step} in: {names}")
        return {prefix + name: value for name, value in means.items()} | {
            f"{prefix}nonfinite/{name}": float(count) for name, count in nonfinite.items()
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log ``logs``; with the training loss, the metrics of the steps since the last time."""
        if "loss" in logs:
            logs |= self._means(self._train_sums)
            self._train_sums = MetricSums()
        super().log(logs, start_time)

    # Evaluation

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics over ``eval_dataset``, by default the one given to the trainer; see ``Trainer.evaluate``.

        Every evaluation contrasts the same negatives, drawn from the evaluation set, whatever its batch size. With
        ``alpha=0`` they are drawn all the same, so that runs with and without a contrast can be compared.
        With several processes, a set that they cannot share evenly has its first examples counted twice.
        """
        with torch.random.fork_rng(devices=[]):  # a data loader draws a seed, which training must not miss
            return super().evaluate(self._tokenize_all(eval_dataset), *args, **kwargs)

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, *args: Any, **kwargs: Any
    ) -> EvalLoopOutput:
        """The loop of Trainer, with exact means over groups and tokens in place of means over batches."""
        self._eval_examples, self._eval_sums = dataloader.dataset, MetricSums()
        output = super().evaluation_loop(dataloader, description, True, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval") + "_"
        means = self._means(self._eval_sums, prefix)
        nll = means[f"{prefix}nll_loss"]
        contrast = means.get(f"{prefix}contrastive_loss", 0.0)
        means[f"{prefix}loss"] = self.args.alpha * contrast + (1 - self.args.alpha) * nll if self.args.alpha else nll
        means[f"{prefix}perplexity"] = math.exp(nll) if nll < 700 else math.inf
        return output._replace(metrics={**(output.metrics or {}), **means})

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss of one evaluation batch; its logits are never computed."""
        indices = inputs["index"].tolist()
        batch = self._build_batch(self._eval_examples, indices, EVALUATION_STEP, self.args.num_negatives > 0)
        inputs = self._prepare_inputs(self._inputs(batch, batch.num_groups, batch.num_target_tokens))
        with torch.no_grad(), self.compute_loss_context_manager():
            out = self._forward(model, inputs)
        self._record(self._eval_sums, out, inputs, batch.num_groups, batch.num_target_tokens)
        return out.loss, None, None

    # The reference

    def _frozen_reference(self, ref_model: PreTrainedModel | None) -> PreTrainedModel | None:
        if self.args.reference == "none":
            if ref_model is not None:
                raise ValueError("ref_model was given together with reference='none'")
            return None
        if ref_model is None:
            if not self.args.contrasts:
                return None
            ref_model = copy.deepcopy(self.accelerator.unwrap_model(self.model))
        return attach_linear_loss(ref_model).eval().requires_grad_(False).to(self.args.device)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.ref_model is not None and self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_fingerprint(self.ref_model, os.path.join(self._get_output_dir(trial=trial), name))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.ref_model is not None:
            check_fingerprint(self.ref_model, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
