"""Evaluation of a trained model: perplexity, contrast accuracy, free generations, and their win rate by a judge.

report = evaluate(model, tokenizer, examples, config=config, judge=ChatJudge(url, "name"), directory="eval")
print(report.markdown())
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from cpo_kernels.models.head import evaluating
from cpo_kernels.negatives import seeds
from cpo_kernels.negatives.autoregressive import Sampling
from cpo_kernels.negatives.endings import as_ids, special_tokens
from cpo_kernels.negatives.kinds import counted_kinds
from cpo_kernels.options import suggests_arguments

from .config import CPOConfig
from .data import TokenizedExamples
from .encoding import text_behind
from .files import write_whole
from .judges import Judge
from .trainer import CPOTrainer
from .verdicts import WinRate, judge_identity, judge_pairs, win_rate
from .writing import ModelWriter, room_for

__all__ = ["Report", "evaluate", "generation_statistics", "judge_pairs", "win_rate"]

# Negatives of each kind with which a model that was trained without any is evaluated.
DEFAULT_COUNT = 1
ORDERS = (1, 2, 3, 4)  # The n of the n-grams that are counted.
GENERATIONS, VERDICTS = "generations.json", "verdicts.jsonl"


@dataclass(frozen=True)
class GenerationStatistics:
    """Statistics of some completions, without counting their EOS. NaN where there is nothing to average.

    Attributes:
        count: number of completions.
        mean_length, median_length: tokens of a completion.
        ended: share of completions that EOS ended; None where no EOS was given.
        repetition: by n, the mean over completions of ``1 - distinct n-grams / n-grams``, those with fewer than n
            tokens left out: seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training".
        distinct: by n, the n-grams of all completions together, distinct ones over all: distinct-n of Li et al. 2016,
            "A Diversity-Promoting Objective Function for Neural Conversation Models", with the number of n-grams in
            place of that of tokens below, so that 1 is reached. It falls with the size of a corpus.
    """

    count: int
    mean_length: float
    median_length: float
    ended: float | None
    repetition: dict[int, float]
    distinct: dict[int, float]


def generation_statistics(
    completions: Sequence[Sequence[int]], eos_token_id: int | Sequence[int] | None = None
) -> GenerationStatistics:
    """Measure length, end and repetition of completions.

    Args:
        completions: token ids of each; tokens behind an EOS do not count.
        eos_token_id: the token that ends a completion, or every one that may; None if none does.
    """
    ends = () if eos_token_id is None else as_ids(eos_token_id)
    texts = [tuple(takewhile(lambda token: token not in ends, completion)) for completion in completions]
    lengths = [len(text) for text in texts]
    ended = sum(len(text) < len(completion) for text, completion in zip(texts, completions, strict=True))
    repetition, distinct = {}, {}
    for n in ORDERS:
        grams = [[text[i : i + n] for i in range(len(text) - n + 1)] for text in texts]
        repetition[n] = _mean([1 - len(set(own)) / len(own) for own in grams if own])
        total = sum(map(len, grams))
        distinct[n] = len(set().union(*grams)) / total if total else float("nan")
    return GenerationStatistics(
        count=len(texts),
        mean_length=_mean(lengths),
        median_length=float(statistics.median(lengths)) if lengths else float("nan"),
        ended=None if not ends or not texts else ended / len(texts),
        repetition=repetition,
        distinct=distinct,
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


@dataclass(frozen=True)
class Report:
    """The results of :func:`evaluate`.

    Attributes:
        examples: number of examples that were evaluated.
        metrics: metrics of :meth:`CPOTrainer.evaluate`, without their prefix: ``perplexity``, ``accuracy/KIND``, ...
        sampling: how the generations were drawn; None where there are none.
        generated, truths: statistics of the generations and of the ground truths of the same examples.
        win_rate: win rate of the generations against those ground truths; None without a judge.
        judge: name of the judge.
    """

    examples: int
    metrics: dict[str, float]
    sampling: Sampling | None = None
    generated: GenerationStatistics | None = None
    truths: GenerationStatistics | None = None
    win_rate: WinRate | None = None
    judge: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as nested dictionaries for JSON; a number that is not finite becomes None."""
        return _plain(asdict(self))

    def markdown(self) -> str:
        """Return the report as text: a table of scores, a table of generations, and the win rate in a sentence."""
        return "\n\n".join(filter(None, [self._scores(), self._generations(), self._verdict()])) + "\n"

    def _scores(self) -> str:
        rows = [("examples", str(self.examples)), ("perplexity", f"{self.metrics['perplexity']:.3f}")]
        for name, value in sorted(self.metrics.items()):
            if name.startswith("accuracy"):
                kind = name.partition("/")[2].replace("_", "-")
                rows.append((f"accuracy against {kind or 'all'} negatives", _percent(value)))
        return _table(("score", "value"), rows)

    def _generations(self) -> str | None:
        if self.generated is None or self.truths is None:
            return None
        sides = (self.generated, self.truths)
        rows = [
            ("completions", *(str(side.count) for side in sides)),
            ("mean length, tokens", *(f"{side.mean_length:.1f}" for side in sides)),
            ("median length, tokens", *(f"{side.median_length:.1f}" for side in sides)),
            ("ended by EOS", *(_percent(side.ended) for side in sides)),
        ]
        rows += [(f"rep-{n}", *(_percent(side.repetition[n]) for side in sides)) for n in self.generated.repetition]
        rows += [(f"distinct-{n}", *(_percent(side.distinct[n]) for side in sides)) for n in self.generated.distinct]
        return _table(("", "generated", "ground truth"), rows)

    def _verdict(self) -> str | None:
        rate = self.win_rate
        if rate is None:
            return None
        counts = f"{rate.wins} wins, {rate.ties} ties, {rate.losses} losses, {rate.unjudged} unjudged"
        if math.isnan(rate.rate):
            return f"No win rate against the ground truth: {self.judge} came to no verdict ({counts})."
        interval = f"95 % interval {_percent(rate.low)} to {_percent(rate.high)}"
        return (
            f"Win rate against the ground truth, ties counted half: {_percent(rate.rate)} ({interval}; {counts}). "
            f"Judge: {self.judge}."
        )


@suggests_arguments
def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Any,
    *,
    config: CPOConfig,
    ref_model: Any = None,
    judge: Judge | None = None,
    generate: bool = True,
    num_generations: int | None = None,
    sampling: Sampling | None = None,
    directory: str | Path | None = None,
) -> Report:
    """Evaluate a model on held-out examples, in one process.

    Perplexity and the accuracies come from :meth:`CPOTrainer.evaluate`: how often the ground truth scores above its
    negatives, as log-likelihood ratio to ``ref_model``, or without one as log-likelihood per token. A configuration
    without a contrast is evaluated with one batch and one truncation negative where it does not say how many.

    Args:
        model: a causal language model; :func:`cpo_kernels.attach_linear_loss` is applied to it, and it is moved to
            the configuration's device.
        tokenizer: its tokenizer, with an EOS token; or None, as for ``CPOTrainer``, but not with a judge.
        examples: examples as ``CPOTrainer`` takes them as ``eval_dataset``, but no dictionary.
        config: numbers of negatives, lengths, batch size and device. Its training options have no effect.
        ref_model: the reference of the log-likelihood ratios.
        judge: compares the generations with the ground truths; see :mod:`cpo_kernels.trainer.judges`.
        generate: whether to continue prompts freely; without it there is nothing to judge.
        num_generations: number of prompts to continue, drawn with the seed of ``sampling``. Default: all.
        sampling: how to continue. Default: temperature 1, the whole distribution, the configuration's evaluation
            batch size and seed, and as many tokens as the longest ground truth, as far as ``max_length`` allows.
        directory: folder for generations and verdicts, with which a later call with the same model and settings goes
            on where this one was interrupted and asks the judge nothing twice. None keeps nothing.

    Raises:
        ValueError: examples or options that contradict each other; the message names them.
        RuntimeError: several processes. Errors of the model and the judge pass through.
    """
    _check_options(config, tokenizer, judge, generate, num_generations, directory)
    config = config.fitted_to(model.config)
    trainer = CPOTrainer(
        model,
        _evaluation_config(config, ref_model is not None),
        eval_dataset=examples,
        processing_class=tokenizer,
        ref_model=ref_model,
    )
    trainer.remove_callback(PrinterCallback)  # It would print what the report holds.
    data: Any = trainer.eval_dataset
    folder = None if directory is None else Path(directory)
    with evaluating(model):
        metrics = {name.removeprefix("eval_"): float(value) for name, value in trainer.evaluate().items()}
        report = Report(len(data), metrics)
        if not generate:
            return report
        sampling = sampling or default_sampling(data, config)
        count = len(data) if num_generations is None else num_generations
        indices = seeds.chosen(sampling.seed, len(data), count)
        prompts, truths = [data.prompts[i] for i in indices], [data.completions[i] for i in indices]
        writer = ModelWriter(lambda: model, tokenizer, disable_tqdm=config.hides_progress)
        completions = _generations(writer, prompts, indices, sampling, folder)
    ends = special_tokens(tokenizer, model).ends
    generated, true = (generation_statistics(side, ends) for side in (completions, truths))
    report = replace(report, sampling=sampling, generated=generated, truths=true)
    if judge is None:
        return report
    asked = [tokenizer.decode(list(prompt), skip_special_tokens=True) for prompt in prompts]
    answers = (
        [text_behind(tokenizer, prompt, ids) or "" for prompt, ids in zip(prompts, side, strict=True)]
        for side in (completions, truths)
    )
    texts = (asked, *answers)
    cache = None if folder is None else folder / VERDICTS
    verdicts = judge_pairs(judge, *texts, cache=cache, disable_tqdm=config.hides_progress)
    return replace(report, win_rate=win_rate(verdicts), judge=_name(judge))


def _check_options(
    config: CPOConfig,
    tokenizer: Any,
    judge: Judge | None,
    generate: bool,
    num_generations: int | None,
    directory: str | Path | None,
) -> None:
    if config.world_size > 1:
        raise RuntimeError(f"evaluate runs in one process, got world_size={config.world_size}")
    if judge is not None and not generate:
        raise ValueError("a judge compares generations; expected generate=True")
    if judge is not None and tokenizer is None:
        raise ValueError("a judge reads text; pass the tokenizer")
    if num_generations is not None and num_generations < 1:
        raise ValueError(f"num_generations must be at least 1, got {num_generations}")
    if judge is not None and directory is not None:
        judge_identity(judge)  # Raises, before anything is computed, if verdicts of the judge cannot be kept.


def default_sampling(data: TokenizedExamples, config: CPOConfig) -> Sampling:
    """Return the sampling with which :func:`evaluate` continues prompts by default."""
    return Sampling(
        temperature=1.0,
        top_p=1.0,
        max_new_tokens=min(room_for(config, data), data.longest_completion),
        batch_size=config.per_device_eval_batch_size,
        seed=config.seed,
    )


def _evaluation_config(config: CPOConfig, has_reference: bool) -> CPOConfig:
    """Make the configuration of the evaluating trainer: no reports, and no reference but the given one."""
    config = copy.copy(config)
    config.report_to, config.push_to_hub = [], False
    if has_reference:
        config.reference = "frozen"
    else:
        config.reference, config.mean_field_source, config.length_normalized = "none", "model", True
        config.ranking = "none" if config.embedding_model is None else config.ranking
    if not config.contrasts:
        for name, kind in counted_kinds().items():
            if kind.default is None and getattr(config, name) is None:
                setattr(config, name, DEFAULT_COUNT)
    return config


def _generations(
    writer: ModelWriter,
    prompts: Sequence[Sequence[int]],
    indices: Sequence[int],
    sampling: Sampling,
    directory: Path | None,
) -> list[list[int]]:
    """Continue each prompt once, as token ids; or read the continuations of an equal call from ``directory``.

    A continuation depends on the example's index and not on the other examples that are continued.
    """
    path = None if directory is None else directory / GENERATIONS
    asked = [writer.identity, asdict(sampling), list(indices), [list(prompt) for prompt in prompts]]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    if path is not None and path.exists():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == key:
                return kept["completions"]
        except (ValueError, KeyError, TypeError) as error:
            message = f"the generations in {path} cannot be read ({error!r}); delete the file, and they are made again"
            raise ValueError(message) from error
    completions = [drawn for (drawn,) in writer(prompts, indices, 1, sampling)]
    if path is not None:
        write_whole(path, json.dumps({"key": key, "completions": completions}))
    return completions


def _name(judge: Judge) -> str:
    try:
        return judge_identity(judge)
    except ValueError:
        return "a callable without a name"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
