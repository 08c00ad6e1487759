"""A server that speaks OpenAI's protocol, such as vLLM's: its address, concurrent requests, and its failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from .http_client import bounded_client
from .secrets import Secrets

Job = TypeVar("Job")
Answer = TypeVar("Answer")


class EndpointError(RuntimeError):
    """Raised where a server gives no answer or a wrong one; the message holds no key."""


class Endpoint:
    """A model behind a server, asked through the ``openai`` package.

    Args:
        url: base URL of the server, such as ``http://localhost:8000/v1``. A user and a password in it are sent to the
            server and kept out of ``url``, messages and logs. A redirection is an error.
        model: the name that the server has for the model.
        api_key: sent to ``url``. None sends a placeholder, which local servers accept, and never a key from the
            environment, which may belong to another service.
        timeout: seconds for one request, from the connection to the last byte of the answer.
        max_retries: most retries of a request that timed out, could not connect or got status 408, 409, 429 or 500 and
            above, after growing pauses, or those that the server asks for.
        workers: requests in flight at once.

    Raises:
        RuntimeError: ``openai`` is not installed.
        ValueError: ``workers`` below 1, a ``timeout`` that is not positive, or an invalid URL or one with a query.
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
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
        self.url, self._login = _without_login(url)
        try:
            import openai
        except ImportError as error:
            raise RuntimeError(
                f"{type(self).__name__} asks {self.url} through the openai package, which is not installed: "
                "pip install openai"
            ) from error
        self.model, self.workers, self.timeout, self.max_retries = model, workers, timeout, max_retries
        self._openai, self._secrets = openai, Secrets(api_key, self._login)
        self._api_key = api_key

    def _client(self) -> Any:
        """Make a client for use in one event loop."""
        return self._openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self._api_key or "none",
            max_retries=self.max_retries,
            timeout=self.timeout,
            http_client=bounded_client(self._openai, self.timeout, self._login),
        )

    async def _request(self, create: Callable[..., Any], what: str, **body: Any) -> Any:
        """Send one request; raise :class:`EndpointError`, which says that the server gave no ``what``, if it fails."""
        try:
            return await create(model=self.model, **body)
        except Exception as error:  # parsing an answer may raise anything
            problem = f"{type(error).__name__}: {self._quoted(error)}"
            if type(error) is self._openai.APIConnectionError and error.__cause__ is not None:
                problem += f" ({type(error.__cause__).__name__}: {self._quoted(error.__cause__)})"
        # Raised outside of the handler, whose error would be chained to it and holds the request with its key.
        raise EndpointError(f"{self.url} gave no {what}: {problem}")

    def _quoted(self, thing: object) -> str:
        """Quote what a server said, short and without keys, for a message."""
        return self._secrets.hidden_in(str(thing))

    def _in_flight(
        self, ask: Callable[[Any, Job], Awaitable[Answer]], jobs: Sequence[Job]
    ) -> Iterator[tuple[int, Answer]]:
        """Ask for many jobs, ``workers`` at once, and yield (index, answer) as they come.

        After an error no request is sent; answers to those in flight are yielded before the error is raised. A caller
        that stops iterating, as by Ctrl-C, does not wait for requests.

        Args:
            ask: called with a client and a job, in a separate thread.
            jobs: the arguments of the requests.
        """
        answers: SimpleQueue[tuple[int, Answer] | None] = SimpleQueue()
        failures: list[BaseException] = []
        running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = []
        waiting = iter(enumerate(jobs))

        async def work(client: Any) -> None:
            for index, job in waiting:
                if failures:
                    return
                try:
                    answers.put((index, await ask(client, job)))
                except Exception as error:
                    failures.append(error)

        async def work_together() -> None:
            task = asyncio.current_task()
            assert task is not None
            running.append((asyncio.get_running_loop(), task))
            async with self._client() as client:
                await asyncio.gather(*(work(client) for _ in range(min(self.workers, len(jobs)))))

        def run() -> None:
            try:
                asyncio.run(work_together())
            except BaseException as error:  # a loop that cannot start, or that ends while the interpreter does
                failures.append(error)
            finally:
                answers.put(None)

        threading.Thread(target=run, daemon=True).start()
        try:
            while (answer := answers.get()) is not None:
                yield answer
        except BaseException:
            for loop, task in running:
                loop.call_soon_threadsafe(task.cancel)
            raise
        if failures:
            raise failures[0]


def _without_login(url: str) -> tuple[str, tuple[str, str] | None]:
    """Split a URL into one without user and password, and a pair of user and password or None."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        shown = parts._replace(netloc=host, query="", fragment="").geturl()
        port = parts.port
    except ValueError:
        raise ValueError("url is not a URL; expected one such as http://localhost:8000/v1") from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise ValueError(f"url must be one such as http://localhost:8000/v1, got {shown!r}")
    if parts.query or parts.fragment:
        raise ValueError(f"url must end with its path, got {shown!r} and a query behind it; give a key as api_key")
    if parts.username is None and parts.password is None:
        return shown, None
    return shown, (unquote(parts.username or ""), unquote(parts.password or ""))
