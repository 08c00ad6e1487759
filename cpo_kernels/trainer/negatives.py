"""All negatives of a batch: from the data, and drawn or written by a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate.utils import gather_object

from cpo_kernels.negatives import Negative, finish, is_wrong
from cpo_kernels.negatives.endings import special_tokens, without_end
from cpo_kernels.negatives.kinds import Task, counted_kinds
from cpo_kernels.negatives.mean_field import replaced_positions
from cpo_kernels.negatives.seeds import generator, token_seeds
from cpo_kernels.options import refuse_unknown

from .along_truth import Passage, Reading, read
from .config import CPOConfig
from .data import TokenizedExamples
from .reference import Sources
from .writing import EndpointWriter, ModelWriter, Store, sampling_of

EVALUATION_STEP = -1  # Every evaluation draws with the same step, though models may have changed.


class NegativeSampler:
    """A sampler of the negatives that need no model: a function of (seed, step, example) alone.

    Batch negatives come from the whole data set. A batch is a random sample of it, so their distribution is that of
    the other completions in a batch, but they depend neither on how a batch is split into micro-batches, nor on the
    number of processes, nor on where a run was resumed, and a batch of one example has them too.

    Args:
        examples: the data.
        eos_token_id: the token that ends a completion, or every one that may.
        num_batch_negatives: number of batch negatives to draw.
        num_truncation_negatives: number of truncation negatives to draw.
        seed: any integer.
        max_length: tokens of prompt and completion together, at most.
        more: numbers of further kinds that are drawn from the data, as ``num_KIND_negatives=...``.
    """

    def __init__(
        self,
        examples: TokenizedExamples,
        eos_token_id: int | Sequence[int],
        num_batch_negatives: int,
        num_truncation_negatives: int,
        seed: int,
        max_length: int | None = None,
        **more: int,
    ) -> None:
        further = counted_kinds()
        refuse_unknown(type(self), more.keys() - further.keys(), also=further)
        self.examples, self.eos_token_id, self.seed, self.max_length = examples, eos_token_id, seed, max_length
        self.counts = more | {
            "num_batch_negatives": num_batch_negatives,
            "num_truncation_negatives": num_truncation_negatives,
        }

    def draw(self, index: int, step: int) -> list[Negative]:
        """Draw the negatives of example ``index`` at ``step``, behind those that the example brings."""
        room = None if self.max_length is None else self.max_length - len(self.examples.prompts[index])
        task = Task(self.examples.completions, index, self.eos_token_id, room, self.rank_of_drawn(index))
        rng = generator(self.seed, step, index)
        drawn = self.given(index)
        for name, kind in counted_kinds().items():
            if kind.draw is not None and self.counts.get(name):
                drawn += kind.draw(task, self.counts[name], rng)
        return drawn

    def given(self, index: int) -> list[Negative]:
        """Return the negatives that the example brings."""
        if self.examples.negatives is None:
            return []
        negatives = self.examples.negatives[index]
        ranks = None if self.examples.ranks is None else self.examples.ranks[index]
        kinds = ["given"] * len(negatives) if self.examples.kinds is None else self.examples.kinds[index]
        return [
            Negative(kind, tokens, rank=1 if ranks is None else ranks[number])
            for number, (kind, tokens) in enumerate(zip(kinds, negatives, strict=True))
        ]

    def rank_of_drawn(self, index: int) -> int:
        """Return the rank of drawn negatives: 1 more than the largest rank that the example gives, if it gives any."""
        ranks = None if self.examples.ranks is None else self.examples.ranks[index]
        return 1 + max(ranks, default=0) if ranks is not None else 1


@dataclass
class Drawn:
    """The negatives of one ground truth.

    Attributes:
        negatives: in the order of their kinds.
        ref_logp: log-likelihood of the ground truth under the reference, if drawing computed it.
    """

    negatives: list[Negative] = field(default_factory=list)
    ref_logp: float | None = None


@dataclass
class Negatives:
    """A source of the negatives that a configuration asks for.

    Args:
        config: the numbers of negatives by kind, and how they are made.
        tokenizer: the tokenizer, for the tokens that end a completion and for the text of a server; or None.
        sources: the models that draw negatives.
        store: autoregressive negatives that are written and not yet used.
    """

    config: CPOConfig
    tokenizer: Any
    sources: Sources
    store: Store = field(default_factory=Store)

    def __post_init__(self) -> None:
        # Read now: training writes the tokenizer's EOS into the model's generation configuration.
        self.special = special_tokens(self.tokenizer, self.sources.policy())
        self._writer: ModelWriter | EndpointWriter
        if self.config.autoregressive_url is None:
            quiet = self.config.hides_progress
            self._writer = ModelWriter(self.sources.policy, self.tokenizer, self.sources.synced_gpus, quiet)
        else:
            self._writer = EndpointWriter(self.config, self.tokenizer)

    @property
    def ends(self) -> tuple[int, ...]:
        """Every token that ends a completion."""
        return self.special.ends

    @property
    def seed(self) -> int:
        """The seed of everything that is drawn."""
        return self.config.seed if self.config.data_seed is None else self.config.data_seed

    def sampler(self, examples: TokenizedExamples) -> NegativeSampler:
        """Make the sampler of those negatives of some examples that need no model."""
        counts = self.config.negative_counts(examples.brings_negatives)
        return NegativeSampler(
            examples=examples,
            eos_token_id=self.ends,
            seed=self.seed,
            max_length=self.config.length_budget,
            **{name: counts[kind.name] for name, kind in counted_kinds().items()},
        )

    def describe(self, examples: TokenizedExamples) -> str:
        """Say how many negatives of every kind an example has in training."""
        if not self.config.contrasts:
            return "No negatives are drawn: alpha is 0"
        counts = self.config.negative_counts(examples.brings_negatives)
        drawn = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        return f"Negatives drawn for an example: {drawn}" + "; the data brings its own" * examples.brings_negatives

    def check(self, examples: TokenizedExamples) -> None:
        """Raise ``ValueError`` if an example would have no negative, or fewer than were asked for."""
        counts = self.config.negative_counts(examples.brings_negatives)
        if counts["batch"]:
            distinct: set[tuple[int, ...]] = set()
            for completion in examples.completions:
                distinct.add(tuple(without_end(completion, self.ends)))
                if len(distinct) > counts["batch"]:
                    break
            else:
                raise ValueError(
                    f"{counts['batch']} batch negatives need as many other completions, but {len(examples)} examples "
                    f"have {len(distinct)} distinct ones"
                )
        if not self.config.contrasts or examples.negatives is None or any(counts.values()):
            return
        for index, own in enumerate(examples.negatives):
            if not own:
                raise ValueError(f"example {index} brings no negatives and none are drawn for it")

    def any_for(self, examples: TokenizedExamples) -> bool:
        """Tell whether these examples have negatives."""
        return examples.brings_negatives or any(self.config.negative_counts(examples.brings_negatives).values())

    def draw(self, examples: TokenizedExamples, indices: Sequence[int], step: int) -> list[Drawn]:
        """Draw the negatives of some examples at ``step``."""
        step = self._effective(step)
        sampler = self.sampler(examples)
        drawn = [Drawn(sampler.draw(index, step)) for index in indices]
        if self.config.num_mean_field_negatives:
            readings = self._read(examples, indices, step, drawn)
            if self._reads_with_reference:
                drawn = [with_reference(own, reading) for own, reading in zip(drawn, readings, strict=True)]
            truths = [examples.completions[index] for index in indices]
            texts = [finish(own.samples, truth, self.ends) for own, truth in zip(readings, truths, strict=True)]
            self._add(drawn, "mean_field", texts, examples, indices, sampler)
        if self.config.num_autoregressive_negatives:
            texts = self._autoregressive(examples, indices, step)
            self._add(drawn, "autoregressive", texts, examples, indices, sampler)
        kinds = [kind for kind, count in self.config.negative_counts(examples.brings_negatives).items() if count]
        for own, index in zip(drawn, indices, strict=True):
            if kinds and not own.negatives:
                # A sure model draws only the ground truth, which as its own negative has no gradient.
                own.negatives = [Negative(kinds[0], examples.completions[index], rank=sampler.rank_of_drawn(index))]
        return drawn

    def _add(
        self,
        drawn: Sequence[Drawn],
        kind: str,
        texts: Sequence[Sequence[Sequence[int]]],
        examples: TokenizedExamples,
        indices: Sequence[int],
        sampler: NegativeSampler,
    ) -> None:
        """Add to each example those of its texts that are wrong as far as they fit behind the prompt, as negatives."""
        for group, own, index in zip(drawn, texts, indices, strict=True):
            truth, rank = examples.completions[index], sampler.rank_of_drawn(index)
            room = self.config.length_budget - len(examples.prompts[index])
            wrong = [text for text in own if is_wrong(text[:room], truth, self.ends)]
            group.negatives += [Negative(kind, text, rank=rank) for text in wrong]

    def write_ahead(self, examples: TokenizedExamples, steps: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Write those autoregressive negatives of (step, indices of examples) that are not in the store."""
        keys = [(self._effective(step), index) for step, indices in steps for index in indices]
        if not self.config.num_autoregressive_negatives:
            return
        if self.config.resample_negatives:
            self.store.forget_before(steps[0][0])
        missing = self.store.missing(list(dict.fromkeys(keys)))
        if missing or self.sources.synced_gpus:
            written = self._write(examples, [index for _, index in missing], self._effective(steps[0][0]))
            self.store.negatives.update(zip(missing, written, strict=True))
        if not self.config.resample_negatives:  # In the next epoch another process may get these examples.
            self.store.negatives |= dict(gather_object([(key, self.store.negatives[key]) for key in missing]))

    def _effective(self, step: int) -> int:
        """Return the step with which negatives are drawn: 0 unless they are drawn anew at every step."""
        return step if self.config.resample_negatives or step == EVALUATION_STEP else 0

    @property
    def _reads_with_reference(self) -> bool:
        return self.config.mean_field_source == "reference" and self.sources.reference is not None

    def _read(
        self, examples: TokenizedExamples, indices: Sequence[int], step: int, drawn: Sequence[Drawn]
    ) -> list[Reading]:
        """Read the ground truths and, in the same rows, their truncations, in one forward pass."""
        count, sources = self.config.num_mean_field_negatives, self.sources
        completions = [examples.completions[index] for index in indices]
        lengths = [len(completion) for completion in completions]
        seeds = token_seeds(self.seed, step, indices, lengths)
        chosen = replaced_positions(seeds, completions, self.ends, count, self.config.mean_field_fraction)
        masks = [None] * len(indices) if chosen is None else chosen.split(lengths, dim=1)
        passages = [
            Passage(
                examples.prompts[index],
                completion,
                own_seeds,
                mask,
                cuts=[negative.cut for negative in own.negatives if negative.cut is not None],
            )
            for index, completion, own_seeds, mask, own in zip(
                indices, completions, seeds.split(lengths), masks, drawn, strict=True
            )
        ]
        with sources.asking(str(self.config.mean_field_source)) as model:
            return read(model, passages, count, self.ends, sources.head, sources.device)

    def _autoregressive(self, examples: TokenizedExamples, indices: Sequence[int], step: int) -> list[list[list[int]]]:
        if step == EVALUATION_STEP:
            return self._write(examples, indices, step)
        return [self.store.negatives[step, index] for index in indices]

    def _write(self, examples: TokenizedExamples, indices: Sequence[int], step: int) -> list[list[list[int]]]:
        prompts = [examples.prompts[index] for index in indices]
        sampling = sampling_of(self.config, examples, self.seed, step)
        with self.sources.autocast():
            return self._writer(prompts, indices, self.config.num_autoregressive_negatives, sampling)


def with_reference(drawn: Drawn, reading: Reading) -> Drawn:
    """Add the reference's log-likelihoods of the ground truth and its truncations to negatives."""
    cut_logps = iter(reading.cut_logps)
    negatives = [own if own.cut is None else replace(own, ref_logp=next(cut_logps)) for own in drawn.negatives]
    return Drawn(negatives, reading.logp)
