"""Autoregressive negatives from a server: any completions endpoint that speaks OpenAI's protocol, such as vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cpo_kernels.options import suggests_arguments

from .autoregressive import Sampling
from .endpoint import Endpoint, EndpointError
from .progress import progress_bar
from .seeds import request_seed


class Completion(NamedTuple):
    """One completion that a server wrote.

    Attributes:
        text: without the prompt and without EOS.
        ended: whether the model ended it; False where the limit of tokens cut it off.
    """

    text: str
    ended: bool


@suggests_arguments
class CompletionsEndpoint(Endpoint):
    """A language model behind an endpoint ``/completions``; see :class:`~.endpoint.Endpoint` for its arguments.

    Attributes:
        disable_tqdm: set it to show no progress bar, which otherwise is shown on a terminal after some seconds.
    """

    disable_tqdm = False

    def negatives(self, prompts: Sequence[str], count: int, sampling: Sampling | None = None) -> list[list[Completion]]:
        """Ask for ``count`` completions of each prompt, in their order.

        A request holds as many prompts as make ``sampling.batch_size`` completions, at least one, and a seed that is a
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
        starts = range(0, len(prompts), size)

        async def ask(client: Any, start: int) -> list[list[Completion]]:
            return await self._ask(client, list(prompts[start : start + size]), start, count, sampling)

        answers: dict[int, list[list[Completion]]] = {}
        with progress_bar("Asking for completions", "prompt", len(prompts), self.disable_tqdm) as bar:
            for place, completions in self._in_flight(ask, starts):
                answers[place] = completions
                bar.update(len(completions))
        return [completions for place in range(len(starts)) for completions in answers[place]]

    async def _ask(
        self, client: Any, prompts: list[str], first: int, count: int, sampling: Sampling
    ) -> list[list[Completion]]:
        """Ask for the completions of some prompts, the first of which has the index ``first``."""
        last = first + len(prompts) - 1
        which = f"prompt {first}" if first == last else f"prompts {first} to {last}"
        answer = await self._request(
            client.completions.create,
            f"completions of {self.model} for {which}",
            prompt=prompts,
            n=count,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request_seed(sampling.seed, first),
        )
        problem = self._problem(answer, len(prompts) * count)
        if problem is not None:
            expected = len(prompts) * count
            raise EndpointError(f"{self.url} answered {which} with {problem}; expected {expected} choices")
        # Servers number the choices prompt by prompt, but may send them in the order in which they ended.
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        completions = [Completion(choice.text, choice.finish_reason == "stop") for choice in choices]
        return [completions[start : start + count] for start in range(0, len(completions), count)]

    def _problem(self, answer: Any, expected: int) -> str | None:
        """Say what is wrong with an answer that should have ``expected`` choices; None if nothing is."""
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list):
            return f"no choices: {self._quoted(answer)!r}"
        if len(choices) != expected:
            return f"{len(choices)} choices"
        texts: list[Any] = [getattr(choice, "text", None) for choice in choices]
        if not all(isinstance(text, str) for text in texts):
            return "a choice without text"
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            return "a text that is not Unicode (it has a lone surrogate)"
        numbers = [getattr(choice, "index", None) for choice in choices]
        if sorted(number for number in numbers if type(number) is int) != list(range(expected)):
            return f"choices numbered {self._quoted(numbers)}"
        return None
