"""A data set whose negatives are written ahead of time, in parts that do not depend on each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cpo_kernels.models import attach_linear_loss
from cpo_kernels.negatives.seeds import part_seed
from cpo_kernels.trainer.config import CPOConfig
from cpo_kernels.trainer.data import tokenize_examples
from cpo_kernels.trainer.formats import normalize_example
from cpo_kernels.trainer.ranking import Ranking
from cpo_kernels.trainer.reference import Reference
from cpo_kernels.trainer.writing import EndpointWriter, ModelWriter, Written, sampling_of

from .errors import InputError, input_errors
from .inputs import Inputs
from .parsing import Settings


@dataclass(frozen=True)
class Part:
    """Consecutive examples, ``start`` to ``stop``, and a digest of all that their negatives depend on."""

    start: int
    stop: int
    digest: str

    @property
    def name(self) -> str:
        """The name of the part's file."""
        return f"{self.start:09d}-{self.digest[:16]}.json"


class Job:
    """Negatives to write: the examples, who draws them, and into which parts.

    Raises:
        InputError: data, a model or a server that cannot be used; the message says which.
    """

    def __init__(self, settings: Settings) -> None:
        self.run, config = settings.run, settings.training
        inputs = Inputs(settings)
        self.tokenizer = inputs.tokenizer
        lengths = {"max_length": config.max_length, "max_prompt_length": config.prompt_budget}
        with input_errors(TypeError):
            rows = inputs.train_examples()
            self.examples = [normalize_example(row, index, self.tokenizer) for index, row in enumerate(rows)]
            self.data = tokenize_examples(self.examples, self.tokenizer, **lengths)
        self.as_text = self.run.negatives_format == "text" and all(map(_is_text, self.examples))
        # The same for all parts, so that they do not depend on where one begins.
        self.sampling = replace(sampling_of(config, self.data), seed=config.seed)
        model = None if config.autoregressive_url else inputs.model().to(config.device).eval()
        self.writer: ModelWriter | EndpointWriter
        if model is None:
            with input_errors(RuntimeError):
                self.writer = EndpointWriter(config, self.tokenizer)
        else:
            self.writer = ModelWriter(lambda: model, self.tokenizer)
        self.ranking: Ranking | None = None
        self.reference: Reference | None = None
        if self.run.negatives_ranking != "none":
            self._rank(config, model)

    def _rank(self, config: CPOConfig, model: Any) -> None:
        """Get ready to rank what is written."""
        if config.embedding_model is None and model is None:
            raise InputError(
                "negatives_ranking='similarity' needs an embedding_model where a server writes the negatives"
            )
        with input_errors(RuntimeError):
            self.ranking = Ranking(config, self.tokenizer, config.device, wanted=True)
            if self.ranking.by_reference:
                attach_linear_loss(model)
                self.reference = Reference(lambda: model, adapters=False)

    def parts(self) -> list[Part]:
        """Cut the data into parts, in order."""
        common = [self.writer.identity, asdict(self.sampling), self.run.negatives_count, self.as_text]
        common += [None if self.ranking is None else ["similarity", self.ranking.config.embedding_model]]
        parts = []
        for start in range(0, len(self.data), self.run.negatives_part):
            stop = min(start + self.run.negatives_part, len(self.data))
            ids = [[list(self.data.prompts[i]), list(self.data.completions[i])] for i in range(start, stop)]
            text = json.dumps([common, start, ids, self.examples[start:stop]])
            parts.append(Part(start, stop, hashlib.sha256(text.encode()).hexdigest()))
        return parts

    def write(self, part: Part) -> dict[str, Any]:
        """Write the negatives of a part and their ranks, a list for each example; none is the ground truth itself."""
        some = slice(part.start, part.stop)
        prompts, truths = self.data.prompts[some], self.data.completions[some]
        drawn = self._draw(prompts, part)
        kept = [
            [ids for ids in own if not self._is_truth(ids, truth)] for own, truth in zip(drawn, truths, strict=True)
        ]
        ranks = None if self.ranking is None else self.ranking.rank_written(self.reference, prompts, truths, kept)
        return {"negatives": self._as_written(kept), "ranks": ranks}

    def _draw(self, prompts: Sequence[Sequence[int]], part: Part) -> Written:
        keys, count = range(part.start, part.stop), self.run.negatives_count
        if isinstance(self.writer, ModelWriter):
            return self.writer(prompts, keys, count, self.sampling)
        sampling = replace(self.sampling, seed=part_seed(self.sampling.seed, part.start))
        with input_errors(RuntimeError):
            return self.writer(prompts, keys, count, sampling)

    def _is_truth(self, ids: Sequence[int], truth: Sequence[int]) -> bool:
        """Tell whether what was drawn is the ground truth in the form it is written in; EOS alone is a fair draw."""
        if self.as_text:
            first, second = self.tokenizer.batch_decode([list(ids), list(truth)], skip_special_tokens=True)
            return first == second
        eos = self.tokenizer.eos_token_id
        return _without(ids, eos) == _without(truth, eos)

    def _as_written(self, negatives: list[list[list[int]]]) -> list[Any]:
        if not self.as_text:
            return negatives
        return [self.tokenizer.batch_decode(own, skip_special_tokens=True) if own else [] for own in negatives]

    def rows(self) -> list[dict[str, Any]]:
        """Return the examples that negatives are put to, in the form that these have."""
        if self.as_text:
            return self.examples
        data, rows = self.data, []
        for index, example in enumerate(self.examples):
            own = [] if data.negatives is None else [list(ids) for ids in data.negatives[index]]
            ids = {"prompt": list(data.prompts[index]), "completion": list(data.completions[index]), "negatives": own}
            rows.append(example | ids)
        return rows


def _is_text(example: dict[str, Any]) -> bool:
    return all(isinstance(value, str) for value in (example["prompt"], example["completion"], *example["negatives"]))


def _without(ids: Sequence[int], eos: int) -> list[int]:
    return list(ids[:-1] if len(ids) and ids[-1] == eos else ids)
