"""Judges: both orders, ties, errors of an endpoint, the cache, and likelihoods equal to those of the logits."""

from __future__ import annotations

import json
import math
import re
import sys
import threading

import pytest
import tiny_models
import torch
from stub_endpoint import chat_endpoint

from cpo_kernels.trainer.judges import ChatJudge, LikelihoodJudge, Question, parse_verdict
from cpo_kernels.trainer.verdicts import judge_pairs, win_rate

pytestmark = pytest.mark.cpu

EOS = 2
CONTINUATION = re.compile(r"<continuation_([AB])>\n(.*?)\n</continuation_\1>", re.DOTALL)


def continuations(body: dict) -> dict[str, str]:
    """The texts that a request asks about, by their letters."""
    return dict(CONTINUATION.findall(body["messages"][1]["content"]))


def prefers(word: str):
    """A judge's answer: the continuation with ``word`` in it, or a tie."""

    def answer(body: dict, number: int) -> str:
        having = [letter for letter, text in continuations(body).items() if word in text.split()]
        return having[0] if len(having) == 1 else "tie"

    return answer


def longer(prompt: str, first: str, second: str) -> float:
    return 0.5 if len(first) == len(second) else float(len(first) > len(second))


# Pairs


def test_a_callable_is_asked_in_both_orders():
    asked = []

    def judge(prompt, first, second):
        asked.append((prompt, first, second))
        return longer(prompt, first, second)

    verdicts = judge_pairs(judge, ["p", "q", "r", "s"], ["aa", "b", "c", "same"], ["a", "bb", "d", "same"])
    assert verdicts == [1, 0, 0.5, 0.5]
    pairs = [("p", "aa", "a"), ("q", "b", "bb"), ("r", "c", "d")]
    assert asked == [order for p, g, t in pairs for order in ((p, g, t), (p, t, g))], "equal texts need no judge"


def test_a_symmetric_callable_is_asked_once():
    asked = []

    class Judge:
        symmetric = True

        def __call__(self, prompt, first, second):
            asked.append((first, second))
            return 1.0

    assert judge_pairs(Judge(), ["p", "q"], ["a", "b"], ["c", "d"]) == [1, 1]
    assert asked == [("a", "c"), ("b", "d")]


def test_verdicts_that_depend_on_the_order_are_ties():
    assert judge_pairs(lambda prompt, first, second: 1.0, ["p"], ["a"], ["b"]) == [0.5]
    answers = iter([1.0, 0.5])  # a win in one order and a tie in the other
    assert judge_pairs(lambda *_: next(answers), ["p"], ["a"], ["b"]) == [0.5]


def test_a_pair_without_a_verdict_in_one_order_has_none():
    answers = iter([1.0, None])
    verdicts = judge_pairs(lambda *_: next(answers), ["p"], ["a"], ["b"])
    assert verdicts == [None]
    assert win_rate(verdicts).unjudged == 1


@pytest.mark.parametrize("verdict", [0.7, "A", math.nan, 2])
def test_a_verdict_that_is_none_of_the_four_is_named(verdict):
    with pytest.raises(ValueError, match=r"verdict on pair 1 must be 1, 0.5, 0 or None, got"):
        judge_pairs(lambda p, a, b: verdict if p == "q" else 1, ["p", "q"], ["a", "b"], ["c", "d"])


def test_a_judge_that_leaves_questions_out_is_found_out():
    class Judge:
        symmetric = True

        def verdicts(self, questions):
            yield 1, 0.5

    with pytest.raises(ValueError, match="answered 1 of 2 questions"):
        judge_pairs(Judge(), ["p", "q"], ["a", "b"], ["c", "d"])


def test_sequences_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="got 1 and 2 for 2 prompts"):
        judge_pairs(longer, ["p", "q"], ["a"], ["b", "c"])


# The cache


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    cache, asked = tmp_path / "deeper" / "verdicts.jsonl", []
    texts = (list("pqrs"), ["aa", "b", "cc", "d"], ["a", "bb", "c", "dd"])

    def judge(prompt, first, second, limit=5):
        if len(asked) == limit:
            raise RuntimeError("no more")
        asked.append((prompt, first))
        return longer(prompt, first, second)

    judge.identity = "longer"
    with pytest.raises(RuntimeError, match="no more"):
        judge_pairs(judge, *texts, cache=cache)
    assert len(cache.read_text().splitlines()) == len(asked) == 5
    with cache.open("a") as file:
        file.write('{"key": "0123", "verd')  # killed while it wrote

    def rest(*question):
        return judge(*question, limit=8)

    rest.identity = "longer"
    assert judge_pairs(rest, *texts, cache=cache) == [1, 0, 1, 0]
    assert len(asked) == len(set(asked)) == 8, "nothing is asked twice"
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 8

    def other(*question):
        return 0.5

    other.identity = "another"
    assert judge_pairs(other, *texts, cache=cache) == [0.5] * 4, "another judge has verdicts of its own"
    assert judge_pairs(judge, *texts, cache=cache) == [1, 0, 1, 0]


def test_a_question_that_occurs_twice_is_asked_once():
    asked = []

    def judge(*question):
        asked.append(question)
        return longer(*question)

    assert judge_pairs(judge, ["p"] * 3, ["aa"] * 3, ["a"] * 3) == [1, 1, 1]
    assert len(asked) == 2


def test_a_cache_that_is_none_is_named_and_kept(tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    cache.write_text('{"key": "a", "verdict": 1.0}\nsomething else\n')
    with pytest.raises(ValueError, match=r"verdicts.jsonl, line 2, is not a cached verdict"):
        judge_pairs(longer, ["p"], ["a"], ["b"], cache=cache)
    assert cache.read_text().endswith("something else\n")


def test_a_judge_without_a_name_cannot_be_cached(tmp_path):
    with pytest.raises(ValueError, match="give it an attribute `identity`"):
        judge_pairs(lambda *_: 1, ["p"], ["a"], ["b"], cache=tmp_path / "verdicts.jsonl")
    judge_pairs(longer, ["p"], ["a"], ["b"], cache=tmp_path / "verdicts.jsonl")
    assert '"judge": "test_judges.longer"' in (tmp_path / "verdicts.jsonl").read_text()


# A chat endpoint


def chat(url: str, **options) -> ChatJudge:
    pytest.importorskip("openai")
    return ChatJudge(url, "stub", **({"timeout": 10.0, "max_retries": 2} | options))


def test_a_chat_judge_compares_what_it_is_given():
    with chat_endpoint(prefers("good")) as (url, endpoint):
        verdicts = judge_pairs(chat(url), ["p", "q", "r"], ["a good one", "bad", "so"], ["bad", "a good two", "and so"])
    assert verdicts == [1, 0, 0.5]
    assert len(endpoint.bodies) == 6
    orders = {(texts["A"], texts["B"]) for texts in map(continuations, endpoint.bodies)}
    assert orders == {
        ("a good one", "bad"), ("bad", "a good one"), ("bad", "a good two"), ("a good two", "bad"),
        ("so", "and so"), ("and so", "so"),
    }  # fmt: skip
    assert all(body["model"] == "stub" and body["temperature"] == 0 for body in endpoint.bodies)
    assert all("<prompt>\n" in body["messages"][1]["content"] for body in endpoint.bodies)


def test_a_judge_that_always_says_a_gives_ties():
    with chat_endpoint(lambda body, number: "A") as (url, endpoint):
        verdicts = judge_pairs(chat(url), list("pqrst"), ["x"] * 5, ["y"] * 5)
    assert verdicts == [0.5] * 5
    assert len(endpoint.bodies) == 10


def test_requests_run_beside_each_other():
    workers = threading.Barrier(4)

    def answer(body, number):
        workers.wait(timeout=10)  # until four requests are in flight
        return "A"

    with chat_endpoint(answer) as (url, endpoint):
        assert judge_pairs(chat(url, workers=4), list("pqrs"), ["x"] * 4, ["y"] * 4) == [0.5] * 4
    assert len(endpoint.bodies) == 8


def test_a_key_of_the_environment_is_not_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with chat_endpoint(lambda body, number: "tie") as (url, endpoint):
        chat(url)("p", "a", "b")
        chat(url, api_key="mine")("p", "a", "b")
    assert [headers["Authorization"] for headers in endpoint.headers] == ["Bearer none", "Bearer mine"]


def test_an_answer_that_is_no_verdict_is_asked_for_once_more():
    def answer(body, number):
        return "I prefer the first one." if number == 0 else "**A**."

    with chat_endpoint(answer) as (url, endpoint):
        assert chat(url)("p", "a", "b") == 1.0
    roles = [message["role"] for message in endpoint.bodies[1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert endpoint.bodies[1]["messages"][2]["content"] == "I prefer the first one."


def test_answers_that_are_no_verdicts_are_no_wins(tmp_path):
    cache = tmp_path / "verdicts.jsonl"

    def answer(body, number):
        return "Both have merits." if "muddle" in continuations(body).values() else prefers("good")(body, number)

    with chat_endpoint(answer) as (url, endpoint):
        judge = chat(url)
        verdicts = judge_pairs(judge, ["p", "q"], ["muddle", "good"], ["x", "y"], cache=cache)
        assert verdicts == [None, 1]
        assert len(endpoint.bodies) == 2 * 2 + 2
        assert judge_pairs(judge, ["p", "q"], ["muddle", "good"], ["x", "y"], cache=cache) == verdicts
        assert len(endpoint.bodies) == 6, "verdicts that are missing are paid for as well"
    rate = win_rate(verdicts)
    assert (rate.wins, rate.ties, rate.losses, rate.unjudged, rate.rate) == (1, 0, 0, 1, 1.0)


@pytest.mark.parametrize("status", [500, 429])
def test_a_request_that_failed_is_tried_again(status):
    with chat_endpoint(lambda body, number: status if number == 0 else "B") as (url, endpoint):
        assert chat(url)("p", "a", "b") == 0.0
    assert len(endpoint.bodies) == 2


def test_a_request_that_takes_too_long_is_tried_again():
    with chat_endpoint(lambda body, number: 5.0 if number == 0 else "A") as (url, endpoint):
        assert chat(url, timeout=0.3)("p", "a", "b") == 1.0
    assert len(endpoint.bodies) == 2


def test_a_time_out_names_url_and_pair():
    with (
        chat_endpoint(lambda body, number: 5.0) as (url, _),
        pytest.raises(RuntimeError, match=rf"{url} gave no verdict of stub on pair 0: APITimeoutError"),
    ):
        judge_pairs(chat(url, timeout=0.2, max_retries=0), ["p"], ["a"], ["b"])


def test_an_endpoint_that_is_not_there_is_named():
    with chat_endpoint(lambda body, number: "tie") as (url, _):
        pass
    with pytest.raises(RuntimeError, match=f"{url} gave no verdict .* APIConnectionError"):
        chat(url, max_retries=0)("p", "a", "b")


def test_a_response_without_choices_is_named():
    with (
        chat_endpoint(lambda body, number: {"detail": "no such model"}) as (url, _),
        pytest.raises(RuntimeError, match=r"answered without choices on pair 3.*no such model"),
    ):
        list(chat(url).verdicts([Question(3, "p", "a", "b")]))


def test_an_answer_that_is_no_json_is_named():
    with (
        chat_endpoint(lambda body, number: b"<html>") as (url, _),
        pytest.raises(RuntimeError, match=f"{url} gave no verdict of stub on pair 0: JSONDecodeError"),
    ):
        chat(url, max_retries=0)("p", "a", "b")


def test_what_was_answered_before_an_error_is_not_asked_again(tmp_path):
    cache, broken = tmp_path / "verdicts.jsonl", True
    texts = ([f"p{i}" for i in range(6)], ["good"] * 6, ["bad"] * 6)

    def answer(body, number):
        if broken and "<prompt>\np3\n" in body["messages"][1]["content"]:
            return 400  # for good: not retried
        return prefers("good")(body, number)

    with chat_endpoint(answer) as (url, endpoint):
        with pytest.raises(RuntimeError, match="on pair 3: BadRequestError"):
            judge_pairs(chat(url, workers=3), *texts, cache=cache)
        failed = sum("<prompt>\np3\n" in body["messages"][1]["content"] for body in endpoint.bodies)
        answered = len(endpoint.bodies) - failed
        assert len(cache.read_text().splitlines()) == answered >= 6, "also what was in flight"
        broken = False
        assert judge_pairs(chat(url, workers=3), *texts, cache=cache) == [1] * 6
        assert len(endpoint.bodies) - failed == 12


def test_the_identity_of_a_chat_judge_is_what_it_asks():
    pytest.importorskip("openai")
    judge = ChatJudge("http://localhost:1/v1", "m")
    same = ChatJudge("http://localhost:1/v1", "m", api_key="k", workers=1, timeout=1.0)
    others = [
        ChatJudge("http://localhost:2/v1", "m"),
        ChatJudge("http://localhost:1/v1", "n"),
        ChatJudge("http://localhost:1/v1", "m", instructions="Answer A, B or tie."),
        ChatJudge("http://localhost:1/v1", "m", options={"temperature": 1}),
    ]
    assert judge.identity == same.identity
    assert len({judge.identity, *(other.identity for other in others)}) == 5


def test_a_chat_judge_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(RuntimeError, match="pip install openai"):
        ChatJudge("http://localhost:1/v1", "m")


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A", 1), ("b", 0), ("tie", 0.5), ("Tie.", 0.5), ("[[B]]", 0), (" **A**\n", 1), ("(a)", 1),
        ("", None), ("A or B", None), ("AB", None), ("A tie", None), ("Answer: A", None), ("Continuation A", None),
    ],
)  # fmt: skip
def test_verdicts_are_parsed_strictly(answer, verdict):
    assert parse_verdict(answer) == verdict


# A local model's likelihood


def dense_mean(model, prompt: list[int], text: list[int]) -> float:
    """Log-likelihood per token from the logits of one text."""
    ids = torch.tensor([[*prompt, *text]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return float(logps[len(prompt) - 1 :].mean())


def words(text: str) -> list[int]:
    return tiny_models.tokenizer().convert_tokens_to_ids(text.split())


def test_likelihoods_are_those_of_the_logits():
    model, examples = tiny_models.llama().eval(), tiny_models.examples(12)
    judge = LikelihoodJudge(model, tiny_models.tokenizer(), batch_size=5)
    others = [example["completion"] for example in examples[1:] + examples[:1]]
    verdicts = judge_pairs(judge, [e["prompt"] for e in examples], others, [e["completion"] for e in examples])
    expected = [
        dense_mean(model, words(e["prompt"]), [*words(other), EOS])
        > dense_mean(model, words(e["prompt"]), [*words(e["completion"]), EOS])
        for e, other in zip(examples, others, strict=True)
    ]
    assert verdicts == expected
    assert 0 < sum(expected) < len(expected)
    texts = [(words(e["prompt"]), [*words(other), EOS]) for e, other in zip(examples, others, strict=True)]
    torch.testing.assert_close(judge._scores(texts), torch.tensor([dense_mean(model, *text) for text in texts]))


def test_swapping_a_likelihood_judge_turns_its_verdict():
    judge = LikelihoodJudge(tiny_models.gpt2(), tiny_models.tokenizer())
    assert judge("the cat", "sat on", "ran") == 1 - judge("the cat", "ran", "sat on") != 0.5
    assert judge("the cat", "sat on", "sat on") == 0.5


def test_empty_and_long_texts_have_a_likelihood():
    model = tiny_models.gpt2().eval()
    judge = LikelihoodJudge(model, tiny_models.tokenizer(), max_length=8)
    prompt, long = "the cat sat on a mat", "and then slept near the river under a tree"
    kept = words(prompt)[-4:]
    empty, cut = dense_mean(model, kept, [EOS]), dense_mean(model, kept, words(long)[:4])
    assert judge(prompt, "", long) == float(empty > cut)
    start = dense_mean(model, [1], [*words("ran"), EOS])
    assert judge("", "", "ran") == float(dense_mean(model, [1], [EOS]) > start), "BOS stands for an empty prompt"


def test_a_likelihood_judge_leaves_the_mode_of_its_model():
    model = tiny_models.gpt2(resid_pdrop=0.5).train()
    judge = LikelihoodJudge(model, tiny_models.tokenizer())
    scores = [judge._scores([(words("the"), words("cat sat"))]) for _ in range(2)]
    assert torch.equal(*scores), "dropout is off"
    assert model.training


def test_the_identity_of_a_likelihood_judge_follows_its_parameters():
    tokenizer = tiny_models.tokenizer()
    first, again, other = (LikelihoodJudge(tiny_models.gpt2(seed), tokenizer).identity for seed in (0, 0, 1))
    assert first == again != other


def test_a_likelihood_that_is_nan_is_an_error():
    model = tiny_models.gpt2()
    judge = LikelihoodJudge(model, tiny_models.tokenizer())
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match="log-likelihood of pair 0 is NaN"):
        judge("the", "cat", "dog")


@pytest.mark.parametrize(
    ("options", "message"), [({"batch_size": 0}, "batch_size .* got 0"), ({"max_length": 1}, "max_length .* got 1")]
)
def test_bad_options_of_a_likelihood_judge(options, message):
    with pytest.raises(ValueError, match=message):
        LikelihoodJudge(tiny_models.gpt2(), tiny_models.tokenizer(), **options)


def test_a_likelihood_judge_needs_eos():
    with pytest.raises(ValueError, match="no EOS token"):
        LikelihoodJudge(tiny_models.gpt2(), tiny_models.tokenizer(eos_token=None))
