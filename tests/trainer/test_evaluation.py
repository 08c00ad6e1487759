"""Evaluation: generation statistics and win rates against independent counts, and whole reports of tiny models."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import asdict

import pytest
import tiny_models
import torch

from cpo_kernels import CPOConfig, CPOTrainer
from cpo_kernels.trainer.evaluation import evaluate, generation_statistics, win_rate

pytestmark = pytest.mark.cpu

EOS = 2


# Generations


def test_lengths_and_ends():
    stats = generation_statistics([[5, 6, EOS], [7, EOS, 9, 9], [3, 4, 5, 6], [EOS]], EOS)
    assert (stats.count, stats.mean_length, stats.median_length, stats.ended) == (4, 7 / 4, 1.5, 3 / 4)


def test_repetition_by_hand():
    # of 1 2 1 2 1: unigrams 2 of 5 distinct, bigrams (12 21 12 21) 2 of 4, trigrams (121 212 121) 2 of 3, 2 of 2
    stats = generation_statistics([[1, 2, 1, 2, 1], [3]])
    assert stats.repetition == pytest.approx({1: (3 / 5 + 0) / 2, 2: 2 / 4, 3: 1 / 3, 4: 0.0})
    assert stats.distinct == pytest.approx({1: 3 / 6, 2: 2 / 4, 3: 2 / 3, 4: 1.0})
    assert stats.ended is None


def test_repetition_of_random_texts():
    rng = random.Random(0)
    texts = [[rng.randrange(6) for _ in range(rng.randrange(1, 30))] for _ in range(40)]
    stats = generation_statistics(texts)
    for n in (1, 2, 3, 4):
        counts = [Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in texts]
        own = [1 - len(c) / c.total() for c in counts if c]
        assert stats.repetition[n] == pytest.approx(sum(own) / len(own))
        total = sum(counts, Counter())
        assert stats.distinct[n] == pytest.approx(len(total) / total.total())


def test_nothing_generated_is_nan_not_zero():
    stats = generation_statistics([], EOS)
    assert math.isnan(stats.mean_length) and math.isnan(stats.repetition[1]) and stats.ended is None
    empty = generation_statistics([[EOS], []], EOS)
    assert (empty.mean_length, empty.ended) == (0, 0.5)
    assert math.isnan(empty.distinct[1])


# Win rates


def counts(wins: int, ties: int, losses: int) -> list[float]:
    return [1.0] * wins + [0.5] * ties + [0.0] * losses


def test_ties_count_half_and_the_unjudged_not_at_all():
    rate = win_rate([*counts(5, 4, 1), None, None])
    assert (rate.wins, rate.ties, rate.losses, rate.unjudged) == (5, 4, 1, 2)
    assert rate.rate == 0.7
    assert rate.low < rate.rate < rate.high


@pytest.mark.parametrize(("wins", "n"), [(0, 7), (7, 7), (1, 1), (3, 10), (41, 100), (500, 1000), (999, 1000)])
def test_without_ties_the_interval_is_wilson_s(wins, n):
    z, p = 1.959963984540054, wins / n
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    rate = win_rate(counts(wins, 0, n - wins))
    expected = ((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n))
    assert (rate.low, rate.high) == pytest.approx(expected, abs=1e-7)


def score_statistic(wins: int, ties: int, losses: int, rate: float) -> float:
    """|z| of the score test of a win rate, its likelihood maximised over the tie probability on a grid."""
    n, d = wins + ties + losses, 2 * rate - 1
    low, high = max(0.0, -d), (1 - d) / 2  # of the probability of a loss
    grid = [low + (high - low) * i / 100_000 for i in range(100_001)]

    def term(count: int, p: float) -> float:
        return 0.0 if count == 0 else count * math.log(p) if p > 0 else -math.inf

    loss = max(grid, key=lambda q: term(wins, q + d) + term(losses, q) + term(ties, 1 - 2 * q - d))
    return abs(wins - losses - n * d) / math.sqrt(n * (2 * loss + d - d * d))


@pytest.mark.parametrize("observed", [(5, 4, 1), (10, 60, 30), (0, 9, 3), (0, 20, 0), (1, 0, 2)])
def test_the_interval_s_ends_are_where_the_score_test_rejects(observed):
    rate = win_rate(counts(*observed))
    for end in (rate.low, rate.high):
        assert score_statistic(*observed, end) == pytest.approx(1.959964, abs=2e-3)


def coverage(n: int, win: float, tie: float) -> float:
    """Probability that the interval of n pairs holds the true rate: the sum over all outcomes."""
    loss, total = 1 - win - tie, 0.0
    for wins in range(n + 1):
        for ties in range(n + 1 - wins):
            losses = n - wins - ties
            ways = math.comb(n, wins) * math.comb(n - wins, ties)
            probability = ways * win**wins * tie**ties * loss**losses
            if probability > 1e-9:
                rate = win_rate(counts(wins, ties, losses))
                total += probability * (rate.low <= win + tie / 2 <= rate.high)
    return total


@pytest.mark.parametrize(
    ("n", "win", "tie"),
    [
        (20, 0.3, 0.4),
        (40, 0.25, 0.5),
        (40, 0.5, 0.0),
        (40, 0.1, 0.2),
        (40, 0.05, 0.3),
        (80, 0.05, 0.85),
        (80, 0.3, 0.1),
    ],
)
def test_the_interval_covers_about_95_percent(n, win, tie):
    assert 0.93 <= coverage(n, win, tie) <= 0.98


def test_no_verdicts_are_no_win_rate():
    rate = win_rate([None, None])
    assert math.isnan(rate.rate)
    assert (rate.low, rate.high, rate.unjudged) == (0, 1, 2)


def test_a_judgement_that_is_none_of_the_four_is_named():
    with pytest.raises(ValueError, match=r"judgement 1 must be 1, 0.5, 0 or None, got 0.75"):
        win_rate([1.0, 0.75])


# Reports


def config(path, **options) -> CPOConfig:
    defaults = {
        "per_device_eval_batch_size": 8,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 32,
        "num_batch_negatives": 2,
        "num_truncation_negatives": 2,
    }
    return CPOConfig(output_dir=str(path), **(defaults | options))


def longer(prompt: str, first: str, second: str) -> float:
    difference = len(first.split()) - len(second.split())
    return 0.5 if difference == 0 else float(difference > 0)


def test_a_report_of_a_model(tmp_path):
    model, tokenizer, examples = tiny_models.gpt2().train(), tiny_models.tokenizer(), tiny_models.examples(12)
    report = evaluate(model, tokenizer, examples, config=config(tmp_path), judge=longer)
    assert model.training

    trainer = CPOTrainer(
        tiny_models.gpt2(),
        config(tmp_path, reference="none", length_normalized=True),
        eval_dataset=examples,
        processing_class=tokenizer,
    )
    expected = trainer.evaluate()
    for name in ("perplexity", "accuracy/batch", "accuracy/truncation"):
        assert report.metrics[name] == expected[f"eval_{name}"], name

    truths = trainer.eval_dataset.completions
    assert report.examples == report.generated.count == report.truths.count == 12
    assert report.truths == generation_statistics(truths, EOS)
    assert report.sampling.max_new_tokens == max(map(len, truths))
    rate = report.win_rate
    assert rate.wins + rate.ties + rate.losses == 12 and rate.unjudged == 0


def test_perplexity_is_that_of_the_logits(tmp_path):
    model, tokenizer, examples = tiny_models.llama(), tiny_models.tokenizer(), tiny_models.examples(7)
    report = evaluate(model, tokenizer, examples, config=config(tmp_path), generate=False)
    assert (report.generated, report.win_rate) == (None, None)
    nll, tokens = 0.0, 0
    for example in examples:
        prompt, text = (tokenizer(example[name])["input_ids"] for name in ("prompt", "completion"))
        ids = torch.tensor([[*prompt, *text, EOS]])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        nll, tokens = nll - float(logps[len(prompt) - 1 :].sum()), tokens + len(text) + 1
    assert report.metrics["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_accuracy_with_a_reference_is_that_of_the_ratios(tmp_path):
    examples, tokenizer = tiny_models.examples(12), tiny_models.tokenizer()
    plain = evaluate(tiny_models.gpt2(), tokenizer, examples, config=config(tmp_path), generate=False)
    reference = tiny_models.gpt2(seed=1)
    report = evaluate(
        tiny_models.gpt2(), tokenizer, examples, config=config(tmp_path), ref_model=reference, generate=False
    )
    trainer = CPOTrainer(
        tiny_models.gpt2(),
        config(tmp_path),
        eval_dataset=examples,
        processing_class=tokenizer,
        ref_model=tiny_models.gpt2(seed=1),
    )
    assert report.metrics["accuracy/batch"] == trainer.evaluate()["eval_accuracy/batch"]
    assert report.metrics["perplexity"] == plain.metrics["perplexity"]
    assert report.metrics["contrastive_loss"] != plain.metrics["contrastive_loss"]


GIVEN = [example | {"negatives": ["ran ran", "the fish"], "ranks": [1, 2]} for example in tiny_models.examples(8)]


@pytest.mark.parametrize(
    ("options", "examples", "kinds"),
    [
        ({"num_mean_field_negatives": 2}, 8, {"batch", "truncation", "mean_field"}),
        ({"num_autoregressive_negatives": 1}, 8, {"batch", "truncation", "autoregressive"}),
        ({"num_batch_negatives": 0, "num_truncation_negatives": 0}, GIVEN, {"given"}),
        ({"ranking": "similarity"}, 8, {"batch", "truncation"}),
        ({"reference": "precomputed", "resample_negatives": False}, 8, {"batch", "truncation"}),
        ({"objective": "simpo", "num_truncation_negatives": 0}, 8, {"batch"}),
        (
            {"objective": "dpo", "loss_type": "hinge", "num_batch_negatives": 1, "num_truncation_negatives": 0},
            8,
            {"batch"},
        ),
    ],
)
def test_accuracy_for_every_kind_of_negative_without_a_reference(tmp_path, options, examples, kinds):
    examples = tiny_models.examples(examples) if isinstance(examples, int) else examples
    report = evaluate(
        tiny_models.gpt2(), tiny_models.tokenizer(), examples, config=config(tmp_path, **options), generate=False
    )
    found = {name for name in report.metrics if name.startswith("accuracy/")}
    assert found == {f"accuracy/{kind}" for kind in kinds}
    assert all(0 <= report.metrics[name] <= 1 for name in found)


def test_a_model_trained_without_a_contrast_is_contrasted_all_the_same(tmp_path):
    options = {"alpha": 0.0, "num_batch_negatives": None, "num_truncation_negatives": None}
    settings = config(tmp_path, **options)
    report = evaluate(
        tiny_models.gpt2(), tiny_models.tokenizer(), tiny_models.examples(8), config=settings, generate=False
    )
    assert {"accuracy/batch", "accuracy/truncation"} <= set(report.metrics)
    assert settings.num_batch_negatives == config(tmp_path, **options).num_batch_negatives, "left as it was"


def test_generations_are_a_function_of_the_seed_and_their_number_is_kept_to(tmp_path):
    def draw(seed: int):
        settings = config(tmp_path, seed=seed)
        asked = []

        def judge(prompt, first, second):
            asked.append((prompt, first, second))
            return 1.0

        report = evaluate(
            tiny_models.gpt2(), tiny_models.tokenizer(), tiny_models.examples(12), config=settings,
            judge=judge, num_generations=5,
        )  # fmt: skip
        assert report.generated.count == report.truths.count == 5
        return asked

    assert draw(0) == draw(0) != draw(1)


def test_an_interrupted_evaluation_generates_and_asks_nothing_twice(tmp_path, monkeypatch):
    examples, tokenizer, directory = tiny_models.examples(10), tiny_models.tokenizer(), tmp_path / "eval"
    asked = []

    class Judge:
        identity = "longer"
        limit = 7

        def __call__(self, *question):
            if len(asked) == self.limit:
                raise RuntimeError("no more")
            asked.append(question)
            return longer(*question)

    judge = Judge()

    def run(directory=directory):
        settings = config(tmp_path)
        return evaluate(tiny_models.gpt2(), tokenizer, examples, config=settings, judge=judge, directory=directory)

    with pytest.raises(RuntimeError, match="no more"):
        run()

    def fail(*args, **kwargs):
        raise AssertionError("generated twice")

    with monkeypatch.context() as patch:
        patch.setattr("cpo_kernels.trainer.writing.autoregressive_negatives", fail)
        judge.limit = None
        report = run()
        assert len(asked) == len(set(asked))
        count = len(asked)
        assert run().to_dict()["win_rate"] == report.to_dict()["win_rate"]
        assert len(asked) == count
    fresh = run(directory=None)
    assert fresh.win_rate == report.win_rate and fresh.generated == report.generated


def test_a_report_is_json_and_markdown(tmp_path):
    report = evaluate(
        tiny_models.gpt2(), tiny_models.tokenizer(), tiny_models.examples(6), config=config(tmp_path), judge=longer
    )
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["metrics"]["perplexity"] == report.metrics["perplexity"]
    assert plain["win_rate"] == asdict(report.win_rate)
    assert plain["generated"]["repetition"]["2"] == report.generated.repetition[2]
    text = report.markdown()
    assert f"| perplexity | {report.metrics['perplexity']:.3f} |" in text
    assert "| accuracy against batch negatives |" in text and "| rep-4 |" in text
    assert f"{report.win_rate.wins} wins" in text and "95 % interval" in text
    assert text.endswith("Judge: test_evaluation.longer.\n")


def test_a_judge_without_verdicts_loses_no_report(tmp_path):
    report = evaluate(
        tiny_models.gpt2(), tiny_models.tokenizer(), tiny_models.examples(4), config=config(tmp_path),
        judge=lambda *_: None,
    )  # fmt: skip
    assert report.to_dict()["win_rate"]["rate"] is None
    assert "a callable without a name came to no verdict" in report.markdown()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": longer, "generate": False}, "expected generate=True"),
        ({"judge": lambda *_: 1, "directory": "eval"}, "give it an attribute `identity`"),
        ({"num_generations": 0}, "num_generations must be at least 1, got 0"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(CPOTrainer, "evaluate", None)  # told before anything is computed
    with pytest.raises(ValueError, match=message):
        evaluate(
            tiny_models.gpt2(), tiny_models.tokenizer(), tiny_models.examples(4), config=config(tmp_path), **options
        )
