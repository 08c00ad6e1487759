"""Completions from a server: a stub on loopback that answers, is late, fails, or answers nonsense."""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("openai")

from cpo_kernels.negatives import Completion, CompletionsEndpoint, Sampling

pytestmark = pytest.mark.cpu


class Stub(ThreadingHTTPServer):
    """Answers prompt P's sample k with "P/k", ended for even k; ``script`` is asked first.

    ``script(request, number)`` returns None, or (status, body) with a body of bytes or of what becomes JSON.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = lambda request, number: None
        self.requests, self.keys, self.paths = [], [], []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that gave up is no news."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, request = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append(request)
            server.keys.append(self.headers["Authorization"])
            server.paths.append(self.path)
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            status, body = server.script(request, number) or (200, answer(request))
        finally:
            with server.lock:
                server.in_flight -= 1
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "5")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Nothing on the terminal."""


def answer(request) -> dict:
    """In the wrong order, as servers do that send what ends first."""
    choices = [
        {"index": p * request["n"] + k, "text": f"{prompt}/{k}", "finish_reason": "length" if k % 2 else "stop"}
        for p, prompt in enumerate(request["prompt"])
        for k in range(request["n"])
    ]
    return {"id": "1", "object": "text_completion", "created": 0, "model": request["model"], "choices": choices[::-1]}


@pytest.fixture
def stub(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


PROMPTS = ["a", "b", "c", "d", "e"]


def test_completions_come_in_the_order_of_the_prompts(stub):
    """Two prompts a request, the first of which is answered last."""
    stub.script = lambda request, number: time.sleep(0.2 if request["prompt"][0] == "a" else 0.0)
    sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=11, batch_size=7, seed=5)
    endpoint = CompletionsEndpoint(stub.url, "tiny", api_key="secret")
    got = endpoint.negatives(PROMPTS, 3, sampling)
    assert got == [
        [Completion(f"{p}/0", True), Completion(f"{p}/1", False), Completion(f"{p}/2", True)] for p in PROMPTS
    ]
    asked = sorted(stub.requests, key=lambda request: request["prompt"])
    assert [request["prompt"] for request in asked] == [["a", "b"], ["c", "d"], ["e"]]
    assert set(stub.paths) == {"/v1/completions"}
    assert set(stub.keys) == {"Bearer secret"}
    for request in asked:
        sent = {name: request[name] for name in ("model", "n", "max_tokens", "temperature", "top_p")}
        assert sent == {"model": "tiny", "n": 3, "max_tokens": 11, "temperature": 0.7, "top_p": 0.9}
    seeds = [request["seed"] for request in asked]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)
    stub.requests.clear()
    endpoint.negatives(PROMPTS, 3, sampling)
    assert sorted(request["seed"] for request in stub.requests) == sorted(seeds)


def test_no_key_of_another_service_is_sent(stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "another service's")
    CompletionsEndpoint(stub.url, "tiny").negatives(["a"], 1)
    assert stub.keys == ["Bearer none"]


def test_requests_run_side_by_side_up_to_a_limit(stub):
    stub.script = lambda request, number: time.sleep(0.1)
    CompletionsEndpoint(stub.url, "tiny", workers=3).negatives([str(i) for i in range(9)], 1, Sampling(batch_size=1))
    assert stub.most_in_flight == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(stub, status):
    stub.script = lambda request, number: (status, {"error": {"message": "busy"}}) if number < 2 else None
    got = CompletionsEndpoint(stub.url, "tiny").negatives(["a"], 2)
    assert [completion.text for completion in got[0]] == ["a/0", "a/1"]
    assert len(stub.requests) == 3


def test_retries_end(stub):
    stub.script = lambda request, number: (500, {"error": {"message": "out of memory"}})
    with pytest.raises(RuntimeError, match=rf"{stub.url} gave no completions of tiny for prompt 0: .*out of memory"):
        CompletionsEndpoint(stub.url, "tiny", max_retries=2).negatives(["a"], 2)
    assert len(stub.requests) == 3


def test_a_late_answer_is_an_error(stub):
    stub.script = lambda request, number: time.sleep(0.5)
    with pytest.raises(RuntimeError, match="for prompt 0: APITimeoutError"):
        CompletionsEndpoint(stub.url, "tiny", timeout=0.1, max_retries=0).negatives(["a"], 1)


def test_a_late_answer_is_asked_for_again(stub):
    stub.script = lambda request, number: time.sleep(0.5) if number == 0 else None
    got = CompletionsEndpoint(stub.url, "tiny", timeout=0.25, max_retries=1).negatives(["a"], 1)
    assert got == [[Completion("a/0", True)]]


def test_a_permanent_error_names_its_prompts_and_stops(stub):
    def script(request, number):
        if "c" in request["prompt"]:
            return 400, {"error": {"message": "prompt too long"}}
        time.sleep(0.05)

    stub.script = script
    endpoint = CompletionsEndpoint(stub.url, "tiny", workers=1)
    prompts = PROMPTS + [f"later {i}" for i in range(20)]
    with pytest.raises(RuntimeError, match=r"for prompts 2 to 3: BadRequestError: .*prompt too long"):
        endpoint.negatives(prompts, 2, Sampling(batch_size=4))
    assert sum("c" in request["prompt"] for request in stub.requests) == 1
    assert len(stub.requests) < 6


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(RuntimeError, match=r"http://127.0.0.1:9/v1 gave no completions .* prompt 0: APIConnection"):
        CompletionsEndpoint("http://127.0.0.1:9/v1", "tiny", max_retries=0).negatives(["a"], 1)


NONSENSE = {
    "too few": (lambda a: {**a, "choices": a["choices"][:3]}, "with 3 choices; expected 4 choices"),
    "too many": (lambda a: {**a, "choices": a["choices"] * 2}, "with 8 choices; expected 4 choices"),
    "none": (lambda a: {"object": "error", "message": "no such model"}, "no choices: .*no such model"),
    "not a list": (lambda a: {**a, "choices": "four"}, "no choices"),
    "no text": (lambda a: {**a, "choices": [{"index": i} for i in range(4)]}, "a choice without text"),
    "the same twice": (
        lambda a: {**a, "choices": [c | {"index": c["index"] % 2} for c in a["choices"]]},
        r"choices numbered \[1, 0, 1, 0\]",
    ),
    "no JSON": (lambda a: b"<html>gateway</html>", "JSONDecodeError"),
    "no object": (lambda a: ["four"], "no choices"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_named(stub, name):
    change, message = NONSENSE[name]
    stub.script = lambda request, number: (200, change(answer(request)))
    with pytest.raises(RuntimeError, match=rf"{stub.url} .*prompts 0 to 1.*{message}"):
        CompletionsEndpoint(stub.url, "tiny").negatives(["a", "b"], 2)
    assert len(stub.requests) == 1


def test_nothing_asked_for(stub):
    endpoint = CompletionsEndpoint(stub.url, "tiny")
    assert endpoint.negatives(["a", "b"], 0) == [[], []]
    assert endpoint.negatives([], 3) == []
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        endpoint.negatives(["a"], -1)
    assert stub.requests == []


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(RuntimeError, match=r"CompletionsEndpoint asks http://x/v1 .* pip install openai"):
        CompletionsEndpoint("http://x/v1", "tiny")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        CompletionsEndpoint("http://x/v1", "tiny", workers=0)
