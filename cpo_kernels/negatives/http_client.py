"""An HTTP client for the ``openai`` package with limits of time and size for an answer, and without redirections."""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

MAX_ANSWER_BYTES = 64 * 2**20
ENCODED = ("content-encoding", "content-length", "transfer-encoding")


def bounded_client(openai: Any, seconds: float, login: tuple[str, str] | None) -> Any:
    """Make an asynchronous client that reads an answer whole, within ``seconds`` and :data:`MAX_ANSWER_BYTES`.

    The timeouts of HTTP libraries hold for every single read, so a body that comes byte by byte never exceeds them. An
    answer that takes longer raises the library's own timeout error, which ``openai`` retries.

    Args:
        openai: the package ``openai``, whose HTTP library may be httpx or httpx2.
        seconds: from the connection to the last byte.
        login: user and password to send, or None.
    """
    kind: Any = openai.DefaultAsyncHttpxClient
    base = next(own for own in kind.__mro__ if own.__name__ == "AsyncClient")
    library: Any = importlib.import_module(base.__module__.partition(".")[0])

    class BoundedClient(kind):
        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            """Send a request, and return the answer with its body."""
            try:
                return await asyncio.wait_for(self._read(request, options), seconds)
            except asyncio.TimeoutError:
                raise library.ReadTimeout(f"no whole answer within {seconds:g} s", request=request) from None

        async def _read(self, request: Any, options: dict[str, Any]) -> Any:
            response = await super().send(request, stream=True, **options)
            body = bytearray()
            try:
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > MAX_ANSWER_BYTES:
                        raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
            finally:
                await response.aclose()
            headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in ENCODED]
            return library.Response(response.status_code, headers=headers, content=bytes(body), request=request)

    return BoundedClient(timeout=seconds, follow_redirects=False, auth=login)
