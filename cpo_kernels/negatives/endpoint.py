"""A server that speaks OpenAI's protocol, such as vLLM's: how it is reached, asked many things at once, and fails."""

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
    """A server did not answer, or not with what it was asked for; the message holds no key."""


class Endpoint:
    """A model behind a server, asked through the ``openai`` package.

    Args:
        url: base URL of the server, such as ``http://localhost:8000/v1``. A user and a password in it are sent to the
            server and kept out of ``url``, messages and logs. It is not left: a redirection is an error.
        model: its name there.
        api_key: sent to ``url``. None sends a placeholder, which local servers accept, and never a key from the
            environment: that one may be another service's.
        timeout: seconds for one request, from the connection to the last byte of the answer.
        max_retries: of a request that timed out, could not connect or got status 408, 409, 429 or 500 and above; the
            pauses between grow, or are those that the server asks for.
        workers: requests in flight at once.

    Raises:
        RuntimeError: ``openai`` is not installed.
        ValueError: ``workers`` below 1, a ``timeout`` that is not positive, or a URL that is none or has a query.
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
        """Make a client, which belongs to one event loop."""
        return self._openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self._api_key or "none",
            max_retries=self.max_retries,
            timeout=self.timeout,
            http_client=bounded_client(self._openai, self.timeout, self._login),
        )

    async def _request(self, create: Callable[..., Any], what: str, **body: Any) -> Any:
        """Send one request; raises :class:`EndpointError` saying that the server gave no ``what`` if it failed."""
        try:
            return await create(model=self.model, **body)
        except Exception as error:  # whatever an answer can do to a parser
            problem = f"{type(error).__name__}: {self._quoted(error)}"
            if type(error) is self._openai.APIConnectionError and error.__cause__ is not None:
                problem += f" ({type(error.__cause__).__name__}: {self._quoted(error.__cause__)})"
        # Not from within the handler: the error that it handled holds the request with its key.
        raise EndpointError(f"{self.url} gave no {what}: {problem}")

    def _quoted(self, thing: object) -> str:
        """Quote what a server said, short and without keys, for a message."""
        return self._secrets.hidden_in(str(thing))

    def _in_flight(
        self, ask: Callable[[Any, Job], Awaitable[Answer]], jobs: Sequence[Job]
    ) -> Iterator[tuple[int, Answer]]:
        """Ask for many jobs, ``workers`` at once, and yield (index, answer) as they come.

        After an error nothing more is sent; what was in flight beside it is yielded before it is raised. Whoever stops
        asking, as Ctrl-C does, waits for nothing.

        Args:
            ask: of a client and a job, called in a thread of its own.
            jobs: what to ask.
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
            try:
                async with self._client() as client:
                    await asyncio.gather(*(work(client) for _ in range(min(self.workers, len(jobs)))))
            except BaseException as error:
                failures.append(error)
            finally:
                answers.put(None)

        thread = threading.Thread(target=lambda: asyncio.run(work_together()), daemon=True)
        thread.start()
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
    """Split a URL into itself without user and password, and those."""
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
