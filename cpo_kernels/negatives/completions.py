"""Autoregressive negatives from a server: any completions endpoint that speaks OpenAI's protocol, such as vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from .autoregressive import Sampling
from .seeds import request_seed


class Completion(NamedTuple):
    """One completion that a server wrote.

    Attributes:
        text: without the prompt and without EOS.
        ended: whether the model ended it, rather than the limit of tokens.
    """

    text: str
    ended: bool


class CompletionsEndpoint:
    """A language model behind an endpoint ``/completions``, asked through the ``openai`` package.

    Args:
        url: base URL of the endpoint, such as ``http://localhost:8000/v1``.
        model: its name there.
        api_key: sent to ``url``. None sends a placeholder, which local servers accept, and never a key from the
            environment: that one may be another service's.
        timeout: seconds for one request.
        max_retries: of a request that timed out, could not connect or got status 408, 409, 429 or 500 and above; the
            pauses between grow, or are those that the server asks for.
        workers: requests in flight at once.

    Raises:
        RuntimeError: ``openai`` is not installed.
        ValueError: ``workers`` below 1.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 3,
        workers: int = 8,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        try:
            import openai
        except ImportError as error:
            raise RuntimeError(
                f"completions from {url} need the openai package, which is not installed: pip install openai"
            ) from error
        self.url, self.model, self.workers = url, model, workers
        # ValueError is what an answer that is no JSON gives.
        self._failures = (openai.OpenAIError, ValueError)
        self._client = openai.OpenAI(base_url=url, api_key=api_key or "none", timeout=timeout, max_retries=max_retries)

    def negatives(self, prompts: Sequence[str], count: int, sampling: Sampling | None = None) -> list[list[Completion]]:
        """``count`` completions of each prompt, in their order.

        A request holds as many prompts as make ``sampling.batch_size`` completions, one at least, and a seed that is a
        function of ``sampling.seed`` and of its first prompt's index; whether the same seed gives the same completions
        is up to the server.

        Args:
            prompts: texts; the server tokenises them.
            count: how many completions of each.
            sampling: how to sample; default: :class:`Sampling`'s own.

        Raises:
            ValueError: a negative count.
            RuntimeError: a request that failed for good, or an answer without the completions asked for. The message
                names the URL and the prompts; requests that had not begun are not sent.
        """
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}")
        if count == 0 or not len(prompts):
            return [[] for _ in prompts]
        sampling = sampling or Sampling()
        size = max(1, sampling.batch_size // count)
        with ThreadPoolExecutor(self.workers) as pool:
            requests = [
                pool.submit(self._ask, list(prompts[start : start + size]), start, count, sampling)
                for start in range(0, len(prompts), size)
            ]
            try:
                return [completions for request in requests for completions in request.result()]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, prompts: list[str], first: int, count: int, sampling: Sampling) -> list[list[Completion]]:
        """The completions of some prompts, the first of which has the index ``first``."""
        last = first + len(prompts) - 1
        which = f"prompt {first}" if first == last else f"prompts {first} to {last}"
        try:
            answer = self._client.completions.create(
                model=self.model,
                prompt=prompts,
                n=count,
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=request_seed(sampling.seed, first),
            )
        except self._failures as error:
            raise RuntimeError(
                f"{self.url} gave no completions of {self.model} for {which}: {type(error).__name__}: {error}"
            ) from error
        problem = _problem(answer, len(prompts) * count)
        if problem is not None:
            raise RuntimeError(f"{self.url} answered {which} with {problem}; expected {len(prompts) * count} choices")
        # Those of the first prompt come first; servers number them so, and may send them in the order they ended.
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        completions = [Completion(choice.text, choice.finish_reason == "stop") for choice in choices]
        return [completions[start : start + count] for start in range(0, len(completions), count)]


def _problem(answer: Any, expected: int) -> str | None:
    """What is wrong with an answer that should have so many choices, or None."""
    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list):
        return f"no choices: {str(answer)[:200]!r}"
    if len(choices) != expected:
        return f"{len(choices)} choices"
    if not all(isinstance(getattr(choice, "text", None), str) for choice in choices):
        return "a choice without text"
    numbers = [getattr(choice, "index", None) for choice in choices]
    if sorted(number for number in numbers if isinstance(number, int)) != list(range(expected)):
        return f"choices numbered {str(numbers)[:200]}"
    return None
