"""A server on loopback that answers every request with bytes of the test's choosing, or never ends."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

Script = Callable[[Callable[[bytes], Any], threading.Event], None]


def reply(body: Any, status: str = "200 OK", headers: str = "Content-Type: application/json\r\n") -> Script:
    """Make an HTTP answer; a body other than bytes becomes JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def script(send: Callable[[bytes], Any], closing: threading.Event) -> None:
        # The server ends each connection, and says so: a client that keeps one would race with its end.
        headers_after = f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        send(f"HTTP/1.1 {status}\r\n{headers}{headers_after}".encode() + data)

    return script


def drip(start: bytes, piece: bytes, every: float = 0.02, last: float = 10.0, end: bytes = b"") -> Script:
    """Make a script that sends pieces, each soon after the other, and after ``last`` seconds the ``end``."""

    def script(send: Callable[[bytes], Any], closing: threading.Event) -> None:
        send(start)
        for _ in range(int(last / every)):
            if closing.wait(every):
                return
            send(piece)
        send(end)

    return script


@contextmanager
def raw_server(script: Script) -> Iterator[tuple[str, list[bytes]]]:
    """Yield the base URL of a server, and the list of the requests that it gets."""
    asked: list[bytes] = []
    closing = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with suppress(OSError, ValueError):
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    line = self.rfile.readline()
                    if not line:
                        return
                    head += line
                length = next(int(v.split(b":")[1]) for v in head.lower().split(b"\r\n") if b"content-length" in v)
                asked.append(head + self.rfile.read(length))
                script(self.wfile.write, closing)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, allow_reuse_address, block_on_close = True, True, False

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Ignore errors of a client that gave up."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
        finally:
            closing.set()
            server.shutdown()
            thread.join()
