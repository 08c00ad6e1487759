"""A stub of an OpenAI-compatible chat endpoint on loopback, and what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ERROR = {"error": {"message": "stub"}}


class ChatEndpoint:
    """An endpoint that answers each request with what ``answer(body, number)`` returns.

    A string is the content of the chat message, an int an HTTP status, a float seconds to wait before ``tie``, a
    dictionary the response's JSON as it is, and bytes the whole body.
    """

    def __init__(self, answer: Callable[[dict, int], Any]) -> None:
        self.answer = answer
        self.bodies: list[dict] = []
        self.headers: list[Mapping[str, str]] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.bodies.append(body)
            self.headers.append(handler.headers)
            number = len(self.bodies) - 1
        answer = self.answer(body, number)
        if isinstance(answer, float):
            self.closing.wait(answer)
            answer = "tie"
        status = answer if isinstance(answer, int) else 200
        if isinstance(answer, str):
            message = {"role": "assistant", "content": answer}
            answer = {
                "id": "chat",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            }
        data = answer if isinstance(answer, bytes) else json.dumps(answer if status == 200 else ERROR).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


@contextmanager
def chat_endpoint(answer: Callable[[dict, int], Any]) -> Iterator[tuple[str, ChatEndpoint]]:
    """Yield base URL and endpoint, which runs in its own thread until the block ends."""
    endpoint = ChatEndpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # the client gave up waiting
                endpoint.respond(self)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", endpoint
    finally:
        endpoint.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
