"""``CPOTrainer``: the Trainer of ``transformers`` with the fused contrastive loss in place of the model's own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from cpo_kernels.models import CPORequest, LinearLossOutput, attach_linear_loss, check_prefix_sharing
from cpo_kernels.negatives import KINDS
from cpo_kernels.negatives.endings import special_tokens
from cpo_kernels.options import argument_names, refuse_unknown

from .batch import body_inputs, layout_of
from .builder import BatchBuilder
from .config import CPOConfig
from .data import TokenizedExamples, collate_indices, tokenize_examples
from .dropout import disable_dropout
from .fingerprint import fingerprint
from .metrics import MetricSums, contrast_metrics
from .negatives import EVALUATION_STEP, Negatives
from .own_loss import LossFn, check_own_loss, own_loss
from .precomputed import ReferenceScores, precompute
from .ranking import Ranking, ranks_by_similarity
from .reference import Sources, make_reference, not_saved_with_adapters
from .resumable import ResumableTrainer
from .run_record import data_record, frozen_fingerprints, model_record, settings_of, tokens_record
from .zero import serving

logger = logging.get_logger(__name__)


class CPOTrainer(ResumableTrainer):
    """A trainer of causal language models on ``alpha * contrast + mle_weight * MLE``; see :class:`CPOConfig`.

    The body of the model runs once a step and its head never: the loss comes from the hidden states, without logits.
    Negatives are a pure function of (seed, optimizer step, example) and of the model that draws them, so a batch of 8
    and 4 accumulated batches of 2 give the same gradients, and a resumed run equals an uninterrupted one.

    A mixture of experts with ``output_router_logits=True`` in its configuration adds its load-balancing loss, over the
    tokens of all candidates of a batch; accumulated batches count by their groups.

    Logs ``loss, contrastive_loss, nll_loss, rewards/chosen, rewards/rejected, margin, accuracy, accuracy/KIND``, and
    ``aux_loss`` of a mixture of experts, as means over the logging window, and for every metric that was NaN or Inf its
    count as ``nonfinite/NAME``. ``evaluate`` returns the same with the prefix ``eval_``, and ``eval_perplexity``.

    Args:
        model: a decoder-only model, or a ``PeftModel`` around one; :func:`cpo_kernels.attach_linear_loss` is applied
            to it.
        args: the configuration.
        train_dataset: examples ``{"prompt", "completion"}``, with ``"negatives"`` and ``"ranks"`` if they bring any, or
            ``{"prompt", "chosen", "rejected"}``: a list, a ``datasets.Dataset``, or what :func:`tokenize_examples`
            returns.
        eval_dataset: likewise, or a dictionary of them.
        processing_class: the tokenizer. None suffices for examples of token ids, where the model names the token that
            ends a completion, as ``generation_config.eos_token_id`` or in its configuration, and there too, if it has
            them, those for padding and for an empty prompt.
        ref_model: the frozen reference. Default: a copy of ``model`` as it is now; for a ``PeftModel``, the model
            itself with its adapters disabled. To resume a run, give the trainer the model that the run began with as
            ``model``, or its reference as ``ref_model``.
        loss_fn: a function in place of the contrast of ``args``, with the signature of that of
            :func:`cpo_kernels.linear_sequence_loss`: ``loss_fn(logps, groups)`` returns the sum of the losses of some
            groups of the batch, a differentiable scalar, and ``groups`` is the range of their indices. The reference
            is subtracted before: ``logps`` (len(groups), C) are log-likelihoods less those of the reference, or
            unchanged with ``reference="none"``, and means per token with ``length_normalized``. The ground truth comes
            first, then its negatives, and -infinity fills up the rows of groups with fewer of them. Ranks are not
            passed. The loss is ``alpha * (sum over groups) / (number of groups) + mle_weight * MLE``; beta only scales
            the rewards that are logged.
        kwargs: the remaining arguments of ``transformers.Trainer``, such as ``callbacks`` or ``optimizers``.

    Raises:
        ValueError: examples or a configuration that cannot be trained on; the message names them.
        RuntimeError: a model that :func:`attach_linear_loss` cannot read.
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
        loss_fn: LossFn | None = None,
        **kwargs: Any,
    ) -> None:
        of_trainer = argument_names(Trainer)
        refuse_unknown(type(self), kwargs.keys() - {*of_trainer}, also=of_trainer)
        for name in ("model_init", "data_collator", "compute_loss_func", "compute_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(f"CPOTrainer makes its own batches and loss, without logits; {name} is not supported")
        args = args.fitted_to(model.config)
        if loss_fn is not None:
            check_own_loss(args)
        self._loss_fn = loss_fn
        attach_linear_loss(model)
        if args.disable_dropout:
            disable_dropout(model)
        self._special = special_tokens(processing_class, model)
        if processing_class is None:
            logger.info(f"There is no tokenizer; the special tokens are those that the model names: {self._special}")
        self._vocab_size = getattr(model.get_input_embeddings(), "num_embeddings", None)
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
        self._upcoming: deque[list[list[int]]] = deque()
        self._epoch_iterator: Iterator | None = None
        self.ref_model, self.reference = make_reference(self.args, lambda: self._policy, ref_model, self.accelerator)
        # Fingerprints of models that no checkpoint holds and that a resumed run must have again.
        self._fingerprints = frozen_fingerprints(self.accelerator.unwrap_model(self._policy), self.reference)
        sources = Sources(
            policy=lambda: self._policy,
            reference=self.reference,
            head=self.args.head_options,
            autocast=self.accelerator.autocast,
            device=self.args.device,
            synced_gpus=self.is_fsdp_enabled or self.is_deepspeed_enabled,
        )
        self._negatives = Negatives(self.args, processing_class, sources)
        for _, examples in self._own_datasets():
            self._negatives.check(examples)
        ranking = Ranking(self.args, processing_class, self.args.device)
        share = self._can_share_prefixes()
        self._batches = BatchBuilder(self.args, self._negatives, ranking, share)
        self._scores = self._precompute_reference()

    # Examples and batches

    def _tokenize(self, examples: Any) -> TokenizedExamples:
        if isinstance(examples, TokenizedExamples):
            examples.check_lengths(self._config.length_budget)
            if self._vocab_size is not None:
                examples.check_token_ids(self._vocab_size)
            return examples
        return tokenize_examples(
            examples,
            self._tokenizer,
            max_length=self._config.length_budget,
            max_prompt_length=self._config.prompt_budget,
            eos_token_id=self._special.ends,
            bos_token_id=self._special.bos,
            vocab_size=self._vocab_size,
            disable_tqdm=self._config.hides_progress,
        )

    def _tokenize_all(self, datasets: Any) -> Any:
        if datasets is None or isinstance(datasets, str):  # a name among the evaluation sets
            return datasets
        if isinstance(datasets, Mapping):
            return {name: self._tokenize(examples) for name, examples in datasets.items()}
        return self._tokenize(datasets)

    def _own_datasets(self) -> list[tuple[int, TokenizedExamples]]:
        """Return the trainer's data sets, each with a step with which its negatives are drawn."""
        evaluation: Any = self.eval_dataset
        sets = [(0, self.train_dataset)]
        sets += [
            (EVALUATION_STEP, own) for own in (evaluation.values() if isinstance(evaluation, Mapping) else [evaluation])
        ]
        return [(step, cast(TokenizedExamples, own)) for step, own in sets if own is not None]

    @property
    def _policy(self) -> torch.nn.Module:
        """The model that is trained, without what a distributed run wraps around it to reduce gradients."""
        assert self.model is not None
        return self.model

    def _can_share_prefixes(self) -> bool:
        """Tell whether model and reference may run a prompt and its candidates as one row."""
        contrasted = any(self._negatives.any_for(examples) for _, examples in self._own_datasets())
        if self.args.prefix_sharing == "off" or not contrasted:
            return False
        try:
            for model in (self.model, self.ref_model):
                if model is not None:
                    check_prefix_sharing(model)
        except RuntimeError as error:
            if self.args.prefix_sharing == "required":
                raise
            logger.warning(f"Every candidate takes a row of its own, with its prompt: {error}")
            return False
        return True

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Return the micro-batches of an optimizer step, each with the sizes by which the step's loss is divided."""
        step, examples = self.state.global_step, cast(TokenizedExamples, self.train_dataset)
        if epoch_iterator is not self._epoch_iterator:  # an epoch that ended early leaves some
            self._upcoming.clear()
            self._epoch_iterator = epoch_iterator
        if not self._upcoming:
            self._look_ahead(epoch_iterator, num_batches, device)
            ahead = [(step + k, [i for own in batches for i in own]) for k, batches in enumerate(self._upcoming)]
            self._negatives.write_ahead(examples, ahead)
        own = self._upcoming.popleft()
        batches = [self._batches.build(examples, indices, step, self.args.contrasts) for indices in own]
        groups, tokens = sum(b.num_groups for b in batches), sum(b.num_target_tokens for b in batches)
        if self.accelerator.num_processes > 1:
            groups, tokens = self.accelerator.reduce(torch.tensor([groups, tokens], device=device), "sum").tolist()
        return [
            self._batches.inputs(batch, groups, tokens, self._kept_scores(examples, indices, 0))
            for batch, indices in zip(batches, own, strict=True)
        ], tokens

    def _look_ahead(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> None:
        """Fetch the examples of the coming steps whose negatives are written together."""
        every = self.steps_written_at_once
        window = every - self.state.global_step % every
        if self.state.max_steps > 0:  # nothing is written for steps that will not be
            window = max(1, min(window, self.state.max_steps - self.state.global_step))
        for _ in range(window):
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            if not batches and self._upcoming:
                return
            self._upcoming.append([batch["index"].tolist() for batch in batches])

    @property
    def steps_written_at_once(self) -> int:
        """The number of steps whose autoregressive negatives are written together; 1 where none are written."""
        args, count = self.args, self.args.num_autoregressive_negatives
        if not count:
            return 1
        if args.autoregressive_every is not None:
            return args.autoregressive_every
        # Of all processes, so that a run does not depend on their number.
        prompts = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        return max(1, args.autoregressive_batch_size // (prompts * count))

    def _prepare_input(self, data: Any) -> Any:
        """Move inputs to the device as Trainer does; log-likelihoods stay float32, which it rounds under DeepSpeed."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    # The loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the step's loss; the shares of a step add up to the loss."""
        out = self._forward(model, inputs)
        groups = self._own_groups(inputs) / inputs["num_groups"]
        tokens = inputs["own_target_tokens"] / inputs["num_target_tokens"]
        self._record(self._train_sums, out, inputs, groups, tokens)
        # DDP averages gradients over processes; the shares are to be summed.
        loss = out.loss * self.accelerator.num_processes
        return (loss, out) if return_outputs else loss

    def _forward(self, model: torch.nn.Module, inputs: dict[str, Any]) -> LinearLossOutput:
        ref_logps = self._reference_logps(inputs)
        if self._loss_fn is not None:
            return own_loss(model, inputs, ref_logps, self._loss_fn, self.args)
        counted = self._log_weights(inputs)
        if counted is not None:
            # w e^s = e^(s + log w): a weight w shifts the score s = beta * (logp - ref_logp) by log w.
            shift = counted / self.args.objective_options["beta"]
            if self.args.length_normalized:  # by which the loss divides the sums that it is given
                shift = shift * torch.tensor(inputs["cu_tokens"], device=shift.device).diff()
            ref_logps = -shift if ref_logps is None else ref_logps - shift
        request = CPORequest(
            inputs["targets"],
            layout_of(inputs),
            ref_logps=ref_logps,
            num_groups=inputs["num_groups"],
            num_target_tokens=inputs["num_target_tokens"],
            router_share=self._own_groups(inputs) / inputs["num_groups"],
            candidate_eps=self.args.candidate_eps,
            grad_filter_eps=self.args.grad_filter_eps,
            **self.args.objective_options,
            **self.args.head_options,
        )
        out = model(**body_inputs(inputs), linear_loss=request)
        if counted is not None:
            out.rewards = out.rewards - counted
        return out

    def _log_weights(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the logarithms (S,) of the candidates' weights by kind; None where all weights are equal."""
        of_kind = self.args.negative_weights
        # Candidates of rank 0 are not negatives, so they weigh 1.
        weights = [
            of_kind[kind] if rank > 0 else 1.0 for kind, rank in zip(inputs["kinds"], inputs["ranks"], strict=True)
        ]
        if all(weight == 1 for weight in weights):
            return None
        return torch.tensor(weights, device=inputs["targets"].device).log()

    def _reference_logps(self, inputs: dict[str, Any]) -> Tensor | None:
        """Return the log-likelihoods (S,) under the reference, sums over their tokens; None without one.

        It also sets the ranks of the candidates if they come from the reference's hidden states.
        """
        logps = inputs.get("ref_logps")
        if self.reference is not None and (logps is None or "unread" in inputs):
            with self.accelerator.autocast():
                out = self.reference.score(
                    inputs.get("unread", inputs), self.args.head_options, pool=self._batches.ranking.by_reference
                )
            logps = out.logps if logps is None else logps.index_copy(0, inputs["unknown"], out.logps)
            if out.embeddings is not None:
                inputs["ranks"] = ranks_by_similarity(out.embeddings, inputs)
        return logps

    @staticmethod
    def _own_groups(inputs: Mapping[str, Any]) -> int:
        return len(inputs["cu_groups"]) - 1

    def _record(self, sums: MetricSums, out: Any, inputs: Mapping[str, Any], groups: float, tokens: float) -> None:
        """Add one batch to the metrics, with ``groups`` and ``tokens`` as weights of its means."""
        own_groups = self._own_groups(inputs)
        sums.add("nll_loss", out.nll_loss * (inputs["num_target_tokens"] / inputs["own_target_tokens"]), tokens)
        if self.args.candidate_eps is not None or self.args.grad_filter_eps is not None:
            sums.add("dropped", out.dropped, tokens)
        if out.aux_loss is not None:
            sums.add("aux_loss", out.aux_loss, groups)
        metrics = contrast_metrics(out.rewards, inputs["cu_groups"], inputs["ranks"], inputs["kinds"], [*KINDS])
        contrasted = metrics["accuracy"][1]
        total = out.contrastive_loss * inputs["num_groups"]  # a group without negatives has no contrast
        metrics = {"contrastive_loss": (total / max(contrasted, 1), contrasted), **metrics}
        # Metrics without any value in this batch too: every process has to add the same names.
        for name, (value, count) in metrics.items():
            sums.add(name, value, count * groups / own_groups)

    def _means(self, sums: MetricSums, prefix: str = "") -> dict[str, float]:
        """Return the metrics of a window or an evaluation, and warn of those that are not finite."""
        means, nonfinite = sums.means(lambda values: self.accelerator.reduce(values, "sum"))
        if nonfinite:
            names = ", ".join(f"{prefix}{name} ({count} times)" for name, count in nonfinite.items())
            logger.warning(f"NaN or Inf at step {self.state.global_step} in: {names}")
        return {prefix + name: value for name, value in means.items()} | {
            f"{prefix}nonfinite/{name}": float(count) for name, count in nonfinite.items()
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log ``logs`` and, with the training loss, the metrics of the steps since the last log."""
        if "loss" in logs:
            logs |= self._means(self._train_sums)
            self._train_sums = MetricSums()
        super().log(logs, start_time)

    # Evaluation

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute metrics of ``eval_dataset``, by default the trainer's own, as ``Trainer.evaluate`` does.

        Every evaluation contrasts the same negatives, drawn from the evaluation set, whatever its batch size; negatives
        that the trained model draws or writes are of the model at that time. With ``alpha=0`` negatives are drawn too,
        so that runs with and without a contrast can be compared.
        With several processes, a set that they cannot share evenly has its first examples counted twice.
        """
        with torch.random.fork_rng(devices=[]):  # a data loader draws a seed, which must not change training
            return super().evaluate(self._tokenize_all(eval_dataset), *args, **kwargs)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Make a data loader of examples in any form that ``evaluate`` takes."""
        return super().get_test_dataloader(self._tokenize(test_dataset))

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, *args: Any, **kwargs: Any
    ) -> EvalLoopOutput:
        """Run the loop of Trainer, with exact means over groups and tokens in place of means over batches."""
        self._eval_examples, self._eval_sums = dataloader.dataset, MetricSums()
        output = super().evaluation_loop(dataloader, description, True, *args, **kwargs)
        if self.is_deepspeed_enabled:  # ZeRO-3 cannot save parameters that it fetched for a backward pass to come
            cast(Any, self.deepspeed).empty_partition_cache()
        prefix = kwargs.get("metric_key_prefix", "eval") + "_"
        means = self._means(self._eval_sums, prefix)
        nll = means[f"{prefix}nll_loss"]
        contrast = means.get(f"{prefix}contrastive_loss", 0.0)
        weights = self.args.objective_options
        router = means.pop(f"{prefix}router_loss", 0.0)
        means[f"{prefix}loss"] = weights["contrast_weight"] * contrast + weights["mle_weight"] * nll + router
        means[f"{prefix}perplexity"] = math.exp(nll) if nll < 700 else math.inf
        return output._replace(metrics={**(output.metrics or {}), **means})

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute the loss of one evaluation batch; its logits are never computed."""
        indices = inputs["index"].tolist()
        examples: Any = self._eval_examples
        batch = self._batches.build(examples, indices, EVALUATION_STEP, self._negatives.any_for(examples))
        scores = self._kept_scores(examples, indices, EVALUATION_STEP)
        inputs = self._prepare_inputs(self._batches.inputs(batch, batch.num_groups, batch.num_target_tokens, scores))
        with torch.no_grad(), self.compute_loss_context_manager():
            out = self._forward(model, inputs)
        self._record(self._eval_sums, out, inputs, batch.num_groups, batch.num_target_tokens)
        if out.router_loss is not None:
            self._eval_sums.add("router_loss", out.router_loss, batch.num_groups)
        return out.loss, None, None

    # The reference

    def _precompute_reference(self) -> dict[tuple[str, int], ReferenceScores]:
        """Compute the scores of the trainer's data sets, by their digest and the step of their negatives."""
        if self.args.reference != "precomputed" or self.reference is None:
            return {}
        directory = Path(self.args.reference_cache or Path(str(self.args.output_dir), "reference_scores"))
        scores = {}
        with serving(self._policy, self.accelerator):
            for step, examples in self._own_datasets():
                scores[examples.digest, step] = precompute(directory, self._batches, examples, step, self.accelerator)
        # The reference is not used any more.
        self.reference, self.ref_model, self._negatives.sources.reference = None, None, None
        return scores

    def _kept_scores(self, examples: Any, indices: Sequence[int], step: int) -> Tensor | None:
        """Return the precomputed reference log-likelihoods of some examples' candidates; None without them."""
        if not self._scores:
            return None
        key = (examples.digest, step)
        if key not in self._scores:
            raise ValueError(
                "reference='precomputed' has no scores of these examples; give CPOTrainer all data sets when it is made"
            )
        return self._scores[key].of(indices)

    # Checkpoints

    def _prepare_run(self) -> None:
        if self.train_dataset is not None:
            logger.info(self._negatives.describe(cast(TokenizedExamples, self.train_dataset)))
        self._epoch_iterator = None
        self._negatives.store.negatives.clear()
        model = self.accelerator.unwrap_model(self._policy)
        if hasattr(model, "peft_config") and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # The weights under the adapters may have changed since the trainer was made.
            if self.reference is not None and self.reference.adapters:
                self._fingerprints["reference"] = self.reference.take_fingerprint()
            else:
                self._fingerprints["base"] = fingerprint(model, frozen_only=True)

    def _load_own_state(self, checkpoint: str) -> None:
        unsaved = not_saved_with_adapters(self.accelerator.unwrap_model(self._policy))
        if unsaved and not self.args.allow_partial_resume:
            raise ValueError(
                f"{unsaved[0]!r} is trained besides the adapters, and checkpoints of a model with adapters do not hold "
                "it, so the run does not go on where it was; allow_partial_resume goes on without"
            )
        self._negatives.store.load(checkpoint)

    def _save_own_state(self, checkpoint: Path) -> None:
        if self.args.num_autoregressive_negatives:
            self._negatives.store.save(checkpoint, self.accelerator.process_index)

    def run_record(self) -> dict[str, Any]:
        """Return the record of the run for its checkpoints, which is compared when the run resumes."""
        loss = self._loss_fn
        return {
            "settings": settings_of(self.args),
            "model": model_record(self.accelerator.unwrap_model(self._policy)),
            "data": None if self.train_dataset is None else data_record(cast(TokenizedExamples, self.train_dataset)),
            "tokens": tokens_record(self._tokenizer, self._special),
            "loss_fn": None if loss is None else getattr(loss, "__qualname__", type(loss).__name__),
            "processes": self.args.world_size,
            **self._fingerprints,
        }
