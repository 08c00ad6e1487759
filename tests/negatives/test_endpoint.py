"""Servers that answer nonsense, too late, too much, elsewhere, or with the key: one error, named, without secrets."""

from __future__ import annotations

import base64
import json
import logging
import traceback

import pytest

pytest.importorskip("openai")

from raw_server import drip, raw_server, reply

from cpo_kernels.negatives import CompletionsEndpoint
from cpo_kernels.negatives import http_client as http
from cpo_kernels.negatives.endpoint import EndpointError
from cpo_kernels.negatives.secrets import Secrets
from cpo_kernels.trainer.judges import ChatJudge, Question

pytestmark = pytest.mark.cpu
JSON = "Content-Type: application/json\r\n"
OK = f"HTTP/1.1 200 OK\r\n{JSON}".encode()
KEY = "sk-Fj29-xQ'77+/\\aBcD0123456789"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def ask_judge(url: str, **options):
    return dict(ChatJudge(url, "tiny", **options).verdicts([Question(7, "p", "a", "b")]))


def ask_completions(url: str, **options):
    return CompletionsEndpoint(url, "tiny", **options).negatives(["p"], 1)


ASK = {"judge": ask_judge, "completions": ask_completions}
NAMES = {"judge": "pair 7", "completions": "prompt 0"}


def chat(content) -> dict:
    return {"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": content}]}


ANSWERS = {
    "choices are strings": {"choices": ["A", "B"]},
    "choices are a string": {"choices": "A"},
    "choices are numbers": {"choices": [1]},
    "choices are null": {"choices": None},
    "choices hold null": {"choices": [None]},
    "choices hold a list": {"choices": [[]]},
    "choices are an object": {"choices": {"0": {"message": {"content": "A"}}}},
    "no choices": {"choices": []},
    "message is null": chat(None),
    "message is a string": chat("A"),
    "message is a list": chat(["A"]),
    "content is a list": chat({"content": ["A"]}),
    "content is a number": chat({"content": 1}),
    "content is an object": chat({"content": {"text": "A"}}),
    "null": None,
    "a number": 7,
    "a list": [1, 2],
    "a string": "A",
    "an error with status 200": {"error": {"message": "no such model"}},
    "text is null": {"choices": [{"index": 0, "text": None}]},
    "text is a list": {"choices": [{"index": 0, "text": ["a"]}]},
    "index is true": {"choices": [{"index": False, "text": "a"}]},
    "index is infinite": b'{"choices": [{"index": 1e999, "text": "a"}]}',
    "a lone surrogate": b'{"choices": [{"index": 0, "text": "a\\ud800"}]}',
    "no JSON": b"<html>gateway</html>",
    "half of it": b'{"choices": [{"index": 0, "te',
    "nothing": b"",
    "not UTF-8": b'{"choices": [{"index": 0, "text": "\xff\xfe"}]}',
    "nested without end": b'{"choices": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("kind", ASK)
def test_every_malformed_answer_is_the_same_error(kind, answer):
    with (
        raw_server(reply(ANSWERS[answer])) as (url, asked),
        pytest.raises(EndpointError, match=rf"^{url} .*{NAMES[kind]}") as caught,
    ):
        ASK[kind](url, max_retries=0)
    assert len(asked) == 1
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)
    assert caught.value.__context__ is None, "what was handled holds the request with its key"


def test_a_message_without_text_is_no_verdict():
    """As of a model that refuses, or calls a tool."""
    with raw_server(reply(chat({"role": "assistant", "content": None}))) as (url, asked):
        assert ask_judge(url, max_retries=0) == {0: None}
    assert len(asked) == 2


STATUSES = ["301 Moved Permanently", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"]
STATUSES += ["400 Bad Request", "401 Unauthorized", "404 Not Found", "500 Internal Server Error", "999 Odd"]


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("kind", ASK)
def test_every_status_is_an_error_and_no_redirection_is_followed(kind, status):
    """It may lead anywhere, with the prompts."""
    with raw_server(reply(chat({"content": "A"}))) as (elsewhere, asked_there):
        headers = f"Location: {elsewhere}/chat/completions\r\n{JSON}"
        with (
            raw_server(reply({"error": "moved"}, status, headers)) as (url, asked),
            pytest.raises(EndpointError, match=rf"^{url} gave no .*{NAMES[kind]}: .*{status[:3]}"),
        ):
            ASK[kind](url, max_retries=0)
    assert len(asked) == 1 and asked_there == []


LENGTH = b"Content-Length: 1000000\r\n\r\n"
LATE = {
    "a body": drip(OK + LENGTH, b" "),
    "a body that ends well": drip(
        OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", end=b"2\r\n{}\r\n0\r\n\r\n"
    ),
    "chunks": drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "headers": drip(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"a"),
    "many headers": drip(OK, b"X-Slow: a\r\n"),
    "an error's body": drip(b"HTTP/1.1 500 Oops\r\n" + LENGTH, b" "),
    "nothing": drip(b"", b""),
}


@pytest.mark.parametrize("kind", ASK)
@pytest.mark.parametrize("late", LATE)
def test_the_timeout_is_that_of_the_whole_request(kind, late):
    """Every read of these ends long before it."""
    with (
        raw_server(LATE[late]) as (url, asked),
        pytest.raises(EndpointError, match=rf"^{url} gave no .*{NAMES[kind]}: APITimeoutError"),
    ):
        ASK[kind](url, max_retries=1, timeout=0.3)
    assert len(asked) == 2, "and it is tried again"


def test_an_answer_that_is_too_long_is_not_read(monkeypatch):
    monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 100_000)
    body = json.dumps({"choices": [{"index": 0, "text": "a" * 99_000, "finish_reason": "stop"}]}).encode()
    with raw_server(reply(body)) as (url, _):
        assert len(ask_completions(url)[0][0].text) == 99_000
    endless = drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"8000\r\n" + b" " * 0x8000 + b"\r\n", every=0.001)
    with (
        raw_server(endless) as (url, _),
        pytest.raises(EndpointError, match=f"^{url} gave no .*an answer of more than 100000 bytes"),
    ):
        ask_completions(url, max_retries=0)


def test_whoever_stops_asking_waits_for_nothing():
    """Ctrl-C reaches the generator in this way."""
    with raw_server(drip(OK + LENGTH, b" ")) as (url, asked):

        class Stop(KeyboardInterrupt):
            pass

        judge = ChatJudge(url, "tiny", timeout=200.0, workers=2)

        async def ask(client, job):
            if job == 0:
                return "soon"
            return await client.completions.create(model="tiny", prompt="p")

        answers = judge._in_flight(ask, range(5))
        assert next(answers) == (0, "soon")
        with pytest.raises(Stop):
            answers.throw(Stop())
    assert len(asked) <= 2


@pytest.mark.filterwarnings("ignore:coroutine")  # the one that was to run in the loop
def test_an_event_loop_that_cannot_start_is_an_error(monkeypatch):
    def no_loop():
        raise OSError("too many open files")

    monkeypatch.setattr("asyncio.events.new_event_loop", no_loop)
    with pytest.raises(OSError, match="too many open files"):
        ask_judge("http://localhost:1/v1")


# Secrets


def everything(error: BaseException) -> str:
    """All that a log or a pickle could take from an error."""
    texts, seen = [], [error]
    while seen:
        one = seen.pop()
        texts += [str(one), repr(one), repr(one.args), repr(vars(one)), "".join(traceback.format_exception(one))]
        seen += [other for other in (one.__cause__, one.__context__) if other is not None]
    return "\n".join(texts)


ECHOES = {
    "as it is": KEY,
    "upper case": KEY.upper(),
    "its beginning": KEY[:-4],
    "its end": KEY[4:],
    "in a long text": "x" * 190 + KEY + "y" * 5000,
    "over the cut": "x" * 290 + KEY,
}


@pytest.mark.parametrize("kind", ASK)
@pytest.mark.parametrize("how", ECHOES)
@pytest.mark.parametrize("status", ["401 Unauthorized", "500 Oops", "200 OK"])
def test_a_key_that_a_server_repeats_is_in_no_message(kind, how, status, caplog):
    caplog.set_level(logging.DEBUG)
    script = reply({"error": {"message": f"wrong key {ECHOES[how]}"}}, status)
    with (
        raw_server(script) as (url, asked),
        pytest.raises(EndpointError, match="" if "cut" in how or "long" in how else r"\*\*\*") as caught,
    ):
        ASK[kind](url, max_retries=0, api_key=KEY)
    assert KEY.encode() in asked[0], "it was sent"
    text = (everything(caught.value) + caplog.text).lower()
    shown = [KEY[i : i + 8] for i in range(len(KEY) - 7) if KEY[i : i + 8].lower() in text]
    assert not shown


@pytest.mark.parametrize("kind", ASK)
def test_user_and_password_of_a_url_are_sent_and_never_shown(kind, caplog):
    caplog.set_level(logging.DEBUG)
    basic = base64.b64encode(b"somebody:pass/word").decode()
    with raw_server(reply({"error": f"Basic {basic} of somebody with pass/word"}, "403 No")) as (url, asked):
        secret = url.replace("http://", "http://somebody:pass%2Fword@")
        made = {"judge": ChatJudge, "completions": CompletionsEndpoint}[kind](secret, "tiny")
        assert made.url == url
        with pytest.raises(EndpointError, match=f"^{url} gave no") as caught:
            ASK[kind](secret, max_retries=0)
    assert f"Authorization: Basic {basic}".lower().encode() in asked[0].lower()
    shown = everything(caught.value) + caplog.text + repr(vars(made)["_secrets"]) + repr(made)
    shown += getattr(made, "identity", "")
    assert not [own for own in ("somebody", "pass/word", "pass%2F", basic) if own.lower() in shown.lower()]


def test_headers_that_a_judge_sends_are_secrets_too():
    options = {"extra_headers": {"X-Token": "tok-0123456789"}}
    with (
        raw_server(reply({"error": {"message": "tok-0123456789 is not known"}}, "403 No")) as (url, asked),
        pytest.raises(EndpointError, match=r"\*\*\* is not known"),
    ):
        ask_judge(url, max_retries=0, options=options)
    assert b"tok-0123456789" in asked[0]


def test_what_is_no_secret_is_shown():
    secrets = Secrets("sk-abc", None)
    assert (
        secrets.hidden_in("model 'gpt-x' was not\nfound,  \x1b[31mtry sk-abd")
        == "model 'gpt-x' was not found, [31mtry sk-abd"
    )
    assert secrets.hidden_in("sk-abc, SK-ABC") == "***, ***"
    assert Secrets(None, None).hidden_in("none") == "none"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "url must be one such as http"),
        ("ftp://host/v1", "got 'ftp://host/v1'"),
        ("http:///v1", "url must be one such as"),
        ("http://me:hunter22@host:x/v1", "url is not a URL"),
        (
            "http://me:hunter22@host/v1?api_key=hunter22",
            "got 'http://host/v1' and a query behind it; give a key as api_key",
        ),
    ],
)
def test_a_url_that_is_none_is_named_without_its_secrets(url, message):
    with pytest.raises(ValueError, match=message) as caught:
        CompletionsEndpoint(url, "tiny")
    assert "hunter22" not in everything(caught.value)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_that_is_none(timeout):
    with pytest.raises(ValueError, match="timeout must be above 0 seconds"):
        CompletionsEndpoint("http://localhost/v1", "tiny", timeout=timeout)
