"""A server that speaks OpenAI's protocol, such as vLLM's: how it is reached, asked many things at once, and fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, TypeVar

Job = TypeVar("Job")
Answer = TypeVar("Answer")


class Endpoint:
    """A model behind a server, asked through the ``openai`` package.

    Args:
        url: base URL of the server, such as ``http://localhost:8000/v1``.
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
                f"{type(self).__name__} asks {url} through the openai package, which is not installed: "
                "pip install openai"
            ) from error
        self.url, self.model, self.workers = url, model, workers
        # ValueError is what an answer that is no JSON gives.
        self._failures = (openai.OpenAIError, ValueError)
        self._client = openai.OpenAI(base_url=url, api_key=api_key or "none", timeout=timeout, max_retries=max_retries)

    def _request(self, create: Callable[..., Any], what: str, **body: Any) -> Any:
        """Send one request; raises ``RuntimeError`` saying that the server gave no ``what`` if it failed for good."""
        try:
            return create(model=self.model, **body)
        except self._failures as error:
            raise RuntimeError(f"{self.url} gave no {what}: {type(error).__name__}: {error}") from error

    def _in_flight(self, ask: Callable[[Job], Answer], jobs: Sequence[Job]) -> Iterator[tuple[int, Answer]]:
        """Ask for many jobs, ``workers`` at once, and yield (index, answer) as they come.

        After an error nothing more is sent; what was in flight beside it is yielded before it is raised.
        """
        waiting = iter(enumerate(jobs))
        running: dict[Future[Answer], int] = {}
        failure: BaseException | None = None
        with ThreadPoolExecutor(self.workers) as pool:
            while True:
                if failure is None:
                    for index, job in islice(waiting, self.workers - len(running)):
                        running[pool.submit(ask, job)] = index
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index, error = running.pop(future), future.exception()
                    if error is None:
                        yield index, future.result()
                    failure = failure or error
        if failure is not None:
            raise failure
