"""Judges of continuations: an OpenAI-compatible chat endpoint, a local model's likelihood, or any Python callable.

A judge is a callable ``(prompt, first, second) -> verdict`` on texts, called for one order of a pair at a time. The
verdict is 1 where ``first`` is the better continuation of ``prompt``, 0 where ``second`` is, 0.5 for a tie, and None
where the judge came to no verdict. It may have these attributes, which :func:`~.verdicts.judge_pairs` looks up:

- ``symmetric``: true if swapping ``first`` and ``second`` always gives ``1 - verdict``, so that one order is enough;
- ``identity``: a string that names the judge and everything its verdicts depend on, the key of cached verdicts;
- ``verdicts``: a method that takes a list of :class:`Question` and yields ``(index, verdict)`` in any order, each as
  soon as it is known, for a judge that is faster on many questions than on one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cpo_kernels.functional import linear_sequence_logps
from cpo_kernels.layout import CandidateLayout
from cpo_kernels.models import LogpsRequest, attach_linear_loss
from cpo_kernels.models.head import evaluating, positions_of
from cpo_kernels.negatives.endings import end_token_ids
from cpo_kernels.negatives.endpoint import Endpoint, EndpointError
from cpo_kernels.options import suggests_arguments

from .config import default_length
from .data import tokenize_examples
from .fingerprint import fingerprint

Verdict = float | None
Judge = Callable[[str, str, str], Verdict]

INSTRUCTIONS = (
    "You compare two continuations of the same prompt. Judge which one is the better continuation: relevant to the "
    "prompt, correct, coherent, fluent and free of repetition. Neither their order nor their length matters. Answer "
    "with a single word: A, B or tie."
)
QUESTION = (
    "<prompt>\n{prompt}\n</prompt>\n\n<continuation_A>\n{first}\n</continuation_A>\n\n"
    "<continuation_B>\n{second}\n</continuation_B>\n\nWhich continuation is better? Answer with A, B or tie."
)
REMINDER = "Answer with exactly one word and nothing else: A, B or tie."
ANSWER = re.compile(r"\W*(A|B|tie)\W*", re.IGNORECASE)
VERDICTS = {"a": 1.0, "b": 0.0, "tie": 0.5}


class Question(NamedTuple):
    """The question which of two continuations of a prompt is better; ``pair`` numbers it in error messages."""

    pair: int
    prompt: str
    first: str
    second: str


@partial(suggests_arguments, passes_to=Endpoint)
class ChatJudge(Endpoint):
    """A chat model behind an OpenAI-compatible endpoint.

    The answer must be ``A``, ``B`` or ``tie`` but for case and punctuation. After any other answer the model is asked
    once more, with a reminder of the form; after a second one there is no verdict.

    Args:
        url, model, endpoint: as for :class:`~cpo_kernels.negatives.endpoint.Endpoint`.
        instructions: the system message. It must ask for ``A``, ``B`` or ``tie``.
        options: further keywords of ``chat.completions.create``. Default: ``{"temperature": 0}``.

    Raises:
        RuntimeError: ``openai`` is not installed; on asking, a request that failed for good or an answer that is not a
            chat message. The message names the URL and the pair.
        ValueError: as for :class:`~cpo_kernels.negatives.endpoint.Endpoint`.
    """

    symmetric = False

    def __init__(
        self,
        url: str,
        model: str,
        *,
        instructions: str = INSTRUCTIONS,
        options: Mapping[str, Any] | None = None,
        **endpoint: Any,
    ) -> None:
        super().__init__(url, model, **endpoint)
        self.instructions = instructions
        self.options: dict[str, Any] = {"temperature": 0} if options is None else dict(options)
        self._secrets.add(*map(str, (self.options.get("extra_headers") or {}).values()))

    @property
    def identity(self) -> str:
        """URL, model and a digest of everything else that is sent."""
        sent = json.dumps([self.instructions, QUESTION, REMINDER, self.options], sort_keys=True, default=repr)
        return f"chat {self.url} {self.model} {hashlib.sha256(sent.encode()).hexdigest()[:16]}"

    def __call__(self, prompt: str, first: str, second: str) -> Verdict:
        """Return the verdict for the continuations in this order, on which a chat model's verdict depends."""
        return next(iter(dict(self._in_flight(self._ask, [Question(0, prompt, first, second)])).values()))

    def verdicts(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Yield ``(index, verdict)`` as they come; before an error is raised, also those in flight."""
        return self._in_flight(self._ask, questions)

    async def _ask(self, client: Any, question: Question) -> Verdict:
        text = QUESTION.format(prompt=question.prompt, first=question.first, second=question.second)
        messages = [{"role": "system", "content": self.instructions}, {"role": "user", "content": text}]
        answer = await self._answer(client, messages, question.pair)
        if parse_verdict(answer) is None:
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": REMINDER}]
            answer = await self._answer(client, messages, question.pair)
        return parse_verdict(answer)

    async def _answer(self, client: Any, messages: list[dict[str, str]], pair: int) -> str:
        answer = await self._request(
            client.chat.completions.create,
            f"verdict of {self.model} on pair {pair}",
            messages=messages,
            **self.options,
        )
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list) or not choices:
            raise EndpointError(f"{self.url} answered without choices on pair {pair}: {self._quoted(answer)!r}")
        content = getattr(getattr(choices[0], "message", None), "content", ...)
        if not isinstance(content, str | None):
            raise EndpointError(f"{self.url} answered without a message on pair {pair}: {self._quoted(answer)!r}")
        return content or ""


def parse_verdict(answer: str) -> Verdict:
    """Return 1 for ``A``, 0 for ``B`` and 0.5 for ``tie``, whatever the case and punctuation; None for others."""
    match = ANSWER.fullmatch(answer)
    return VERDICTS[match[1].lower()] if match else None


@partial(suggests_arguments, passes_to=linear_sequence_logps)
class LikelihoodJudge:
    """A judge that prefers the continuation with the higher log-likelihood per token under a local model.

    A continuation is scored with EOS at its end, so that an empty one has a score too. A prompt over half of
    ``max_length`` loses its beginning, and a continuation that does not fit behind it its end.

    Args:
        model: a causal language model; :func:`cpo_kernels.attach_linear_loss` is applied to it.
        tokenizer: its tokenizer, with an EOS token.
        batch_size: pairs scored at once.
        max_length: tokens of prompt and continuation, at most. Default: 1024 or the model's positions, whichever is
            smaller.
        head: head keywords of :func:`cpo_kernels.linear_sequence_logps`, such as ``backend``.

    Raises:
        ValueError: no tokenizer, or one without EOS, a ``batch_size`` below 1, or a ``max_length`` below 2.
        RuntimeError: a model that :func:`cpo_kernels.attach_linear_loss` cannot read; on asking, a score that is NaN.
    """

    symmetric = True

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int = 16, max_length: int | None = None, **head: Any
    ) -> None:
        if tokenizer is None:
            raise ValueError("a judge reads text; pass the tokenizer of its model, got None")
        self._ends = end_token_ids(tokenizer, model)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if max_length is None:
            max_length = default_length(positions_of(model.config))
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        self.model, self.tokenizer = attach_linear_loss(model), tokenizer
        self.batch_size, self.max_length, self.head = batch_size, max_length, head

    @property
    def identity(self) -> str:
        """The model's fingerprint and dtype, the length that texts are cut to, and the tokens that end them."""
        return f"likelihood {fingerprint(self.model)} {self.model.dtype} {self.max_length} {self._ends}"

    def __call__(self, prompt: str, first: str, second: str) -> Verdict:
        """Return the verdict on one pair."""
        return next(self.verdicts([Question(0, prompt, first, second)]))[1]

    def verdicts(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Yield ``(index, verdict)`` batch by batch, with pairs of similar length together."""
        tokens = self._tokenize(questions)
        order = sorted(range(len(questions)), key=lambda i: max(len(p) + len(c) for p, c in tokens[i]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            scores = self._scores([text for i in batch for text in tokens[i]]).view(-1, 2)
            for i, (first, second) in zip(batch, scores.tolist(), strict=True):
                question = questions[i]
                if math.isnan(first) or math.isnan(second):
                    raise RuntimeError(f"the judge's log-likelihood of pair {question.pair} is NaN")
                # Equal texts may still get scores that are rounded differently.
                equal = first == second or question.first == question.second
                yield i, 0.5 if equal else float(first > second)

    def _tokenize(self, questions: Sequence[Question]) -> list[list[tuple[list[int], list[int]]]]:
        """Tokenize each question's prompt with the first and with the second continuation."""
        if not questions:
            return []
        examples = [{"prompt": q.prompt, "completion": q.first, "negatives": [q.second]} for q in questions]
        limits: dict[str, Any] = {"max_length": self.max_length, "max_prompt_length": max(1, self.max_length // 2)}
        limits["disable_tqdm"] = True  # whoever asks the judge shows how far it is
        tokens = tokenize_examples(examples, self.tokenizer, eos_token_id=self._ends, **limits)
        assert tokens.negatives is not None
        return [
            [(list(prompt), list(first)), (list(prompt), list(second))]
            for prompt, first, (second,) in zip(tokens.prompts, tokens.completions, tokens.negatives, strict=True)
        ]

    def _scores(self, texts: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """Compute log-likelihoods per token (len(texts),) float32 of continuations behind their prompts."""
        # The last token predicts nothing, so the body does not see it.
        inputs = [torch.tensor([*prompt, *text[:-1]]) for prompt, text in texts]
        ids = pad_sequence(inputs, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in inputs], batch_first=True)
        starts = [i * ids.shape[1] + len(prompt) - 1 for i, (prompt, _) in enumerate(texts)]
        lengths = torch.tensor([len(text) for _, text in texts])
        rows = torch.cat([torch.arange(a, a + len(text)) for a, (_, text) in zip(starts, texts, strict=True)])
        targets = torch.tensor([token for _, text in texts for token in text])
        device = self.model.device
        layout = CandidateLayout([0, *accumulate(lengths.tolist())], list(range(len(texts) + 1)), rows=rows.to(device))
        request = LogpsRequest(targets.to(device), layout, **self.head)
        with evaluating(self.model) as model:
            logps = model(ids.to(device), attention_mask=mask.to(device), linear_loss=request).logps
        return logps.float().cpu() / lengths
