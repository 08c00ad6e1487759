"""A data set whose negatives are written ahead of time, in parts that do not depend on each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cpo_kernels.models import attach_linear_loss
from cpo_kernels.negatives import is_wrong
from cpo_kernels.negatives.endings import special_tokens
from cpo_kernels.negatives.seeds import part_seed
from cpo_kernels.trainer.config import CPOConfig
from cpo_kernels.trainer.data import tokenize_examples
from cpo_kernels.trainer.encoding import text_behind
from cpo_kernels.trainer.formats import Example, normalize_example
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
    """Negatives to write: the examples, the writer, and the parts.

    Raises:
        InputError: data, a model or a server that cannot be used; the message says which.
    """

    def __init__(self, settings: Settings) -> None:
        self.run, config = settings.run, settings.training
        inputs = Inputs(settings)
        self.tokenizer = inputs.tokenizer
        with input_errors(TypeError):
            config = config.fitted_to(inputs.model_config)
            lengths: dict[str, Any] = {"max_length": config.length_budget, "max_prompt_length": config.prompt_budget}
            rows = inputs.train_examples()
            self.examples = [normalize_example(row, index, self.tokenizer) for index, row in enumerate(rows)]
        self.as_text = self.run.negatives_format == "text" and all(map(_is_text, self.examples))
        model = None if config.autoregressive_url else inputs.model().to(config.device).eval()
        self.writer: ModelWriter | EndpointWriter
        with input_errors(RuntimeError):
            if model is None:
                self.writer = EndpointWriter(config, self.tokenizer)
            else:
                self.writer = ModelWriter(lambda: model, self.tokenizer, disable_tqdm=config.hides_progress)
        with input_errors():
            special = special_tokens(self.tokenizer, model)
            lengths |= {"eos_token_id": special.ends, "bos_token_id": special.bos}
            lengths["disable_tqdm"] = config.hides_progress
            self.data = tokenize_examples(self.examples, self.tokenizer, **lengths)
        self.ends = special.ends
        # The same for all parts, so that negatives do not depend on where a part begins.
        self.sampling = replace(sampling_of(config, self.data), seed=config.seed)
        self.ranking: Ranking | None = None
        self.reference: Reference | None = None
        if self.run.negatives_ranking != "none":
            self._rank(config, model)

    def _rank(self, config: CPOConfig, model: Any) -> None:
        """Prepare the ranking of the written negatives, and its model."""
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
            text = json.dumps([common, start, ids, [asdict(example) for example in self.examples[start:stop]]])
            parts.append(Part(start, stop, hashlib.sha256(text.encode()).hexdigest()))
        return parts

    def write(self, part: Part) -> dict[str, Any]:
        """Write negatives for a part, and rank them: a list for each example, without its ground truth."""
        some = slice(part.start, part.stop)
        prompts, truths = self.data.prompts[some], self.data.completions[some]
        kept: Written = []
        forms: list[list[Any]] = []
        for index, own in enumerate(self._draw(prompts, part), start=part.start):
            truth = self.data.completions[index]
            wrong = [ids for ids in own if is_wrong(ids, truth, self.ends)]
            written = [(ids, self._form(index, ids)) for ids in wrong]
            if self.as_text:  # Different token ids may be the same text.
                same = self._form(index, truth)
                written = [(ids, text) for ids, text in written if text is not None and text != same]
            kept.append([ids for ids, _ in written])
            forms.append([form for _, form in written])
        ranks = None if self.ranking is None else self.ranking.rank_written(self.reference, prompts, truths, kept)
        return {"negatives": forms, "ranks": ranks}

    def _draw(self, prompts: Sequence[Sequence[int]], part: Part) -> Written:
        keys, count = range(part.start, part.stop), self.run.negatives_count
        if isinstance(self.writer, ModelWriter):
            return self.writer(prompts, keys, count, self.sampling)
        sampling = replace(self.sampling, seed=part_seed(self.sampling.seed, part.start))
        with input_errors(RuntimeError):
            return self.writer(prompts, keys, count, sampling)

    def _form(self, index: int, ids: Sequence[int]) -> str | list[int] | None:
        """Return the form in which a completion of an example is written.

        It is the text behind the prompt's where texts are written, None where no text can be it: a prompt such as
        "the cat " ends within the token " sat" of its completion, and no text behind it begins with a comma. Elsewhere
        it is the token ids.
        """
        prompt = self.examples[index].prompt
        if not self.as_text or not isinstance(prompt, str):
            return list(ids)
        return text_behind(self.tokenizer, self.data.prompts[index], ids, prompt)

    def rows(self) -> list[dict[str, Any]]:
        """Return the examples to which negatives are added, as texts or token ids, as the negatives are."""
        data, rows = self.data, []
        for index, example in enumerate(self.examples):
            prompt, (completion, *negatives) = example.prompt, example.candidates
            if not self.as_text:
                prompt, completion = list(data.prompts[index]), list(data.completions[index])
                negatives = [] if data.negatives is None else [list(ids) for ids in data.negatives[index]]
            row = {"prompt": prompt, "completion": completion, "negatives": negatives}
            rows.append(row | {"ranks": example.ranks, "kinds": example.kinds})
        return rows


def _is_text(example: Example) -> bool:
    return not example.rendered and all(isinstance(value, str) for value in (example.prompt, *example.candidates))
