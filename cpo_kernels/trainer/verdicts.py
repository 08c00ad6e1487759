"""Verdicts of a judge on pairs of continuations: asked in both orders, cached on disk, and summed to a win rate."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_kernels.negatives.progress import progress_bar
from cpo_kernels.negatives.redaction import without_credentials
from cpo_kernels.options import suggests_arguments

from .judges import Judge, Question, Verdict

Z95 = 1.959963984540054  # The 97.5 % quantile of the standard normal distribution.
VALUES = (0.0, 0.5, 1.0)


@suggests_arguments
def judge_pairs(
    judge: Judge,
    prompts: Sequence[str],
    generated: Sequence[str],
    truths: Sequence[str],
    *,
    cache: str | Path | None = None,
    disable_tqdm: bool = False,
) -> list[Verdict]:
    """Judge whether each generated continuation is better than the true one.

    A judge is asked about both orders of a pair, or about one if its attribute ``symmetric`` is true. Verdicts that
    disagree make a tie, so a judge that always prefers the first text gives ties only. Two equal texts are a tie
    without a question, and a question that occurs twice is asked once.

    Args:
        judge: see :mod:`cpo_kernels.trainer.judges`.
        prompts: (P,) texts.
        generated: (P,) texts, one continuation of each prompt.
        truths: (P,) texts, the true continuations.
        cache: a JSONL file that gets every verdict as soon as it is known and is read first, so that an interrupted
            run asks only new questions. Answers without a verdict are in it too, and these questions not asked again.
        disable_tqdm: show no progress bar, which otherwise is shown on a terminal after some seconds.

    Returns:
        (P,) 1 where the generated continuation is better, 0 where the true one is, 0.5 for a tie, None where one of
        the questions has no verdict.

    Raises:
        ValueError: sequences of different lengths, a verdict other than these four, fewer verdicts than questions, a
            cache of another form, or a cache for a judge without an ``identity`` or a name. Errors of the judge pass
            through; verdicts that came before are in the cache.
    """
    if not len(prompts) == len(generated) == len(truths):
        raise ValueError(
            f"expected as many generated and true continuations as prompts, got {len(generated)} and {len(truths)} "
            f"for {len(prompts)} prompts"
        )
    identity = "" if cache is None else judge_identity(judge)
    texts = zip(prompts, generated, truths, strict=True)
    questions = {
        (pair, swapped): Question(pair, prompt, *((truth, text) if swapped else (text, truth)))
        for pair, (prompt, text, truth) in enumerate(texts)
        if text != truth
        for swapped in ((False,) if getattr(judge, "symmetric", False) else (False, True))
    }
    keys = {place: _key(identity, question) for place, question in questions.items()}
    asked = {keys[place]: question for place, question in questions.items()}
    answers = _answers(judge, identity, asked, cache, disable_tqdm)
    verdicts: list[Verdict] = []
    for pair in range(len(prompts)):
        places = [place for place in ((pair, False), (pair, True)) if place in questions]
        verdicts.append(_combine([_oriented(answers[keys[place]], place[1]) for place in places]))
    return verdicts


def judge_identity(judge: Judge) -> str:
    """Return the name under which verdicts of a judge are cached: its ``identity``, or the name of a function.

    URLs in the name lose user and password, since it is written into caches and reports.

    Raises:
        ValueError: a judge without either, such as a lambda, which cannot be told from another one.
    """
    identity = getattr(judge, "identity", None)
    if identity is not None:
        return without_credentials(str(identity))
    name = getattr(judge, "__qualname__", "<lambda>")
    if name.endswith("<lambda>"):
        raise ValueError(
            f"verdicts of {judge!r} cannot be cached: it has no name; give it an attribute `identity`, a string that "
            "names it and changes with it"
        )
    return f"{judge.__module__}.{name}"


def _key(identity: str, question: Question) -> str:
    return hashlib.sha256(json.dumps([identity, *question[1:]]).encode()).hexdigest()


def _answers(
    judge: Judge, identity: str, questions: dict[str, Question], cache: str | Path | None, disable_tqdm: bool
) -> dict[str, Verdict]:
    """Find a verdict for every key, in the cache or by asking the judge."""
    if cache is None:
        return dict(_ask(judge, questions, disable_tqdm))
    known = _read_cache(Path(cache))
    missing = {key: question for key, question in questions.items() if key not in known}
    if missing:
        with Path(cache).open("a", encoding="utf-8") as file:
            for key, verdict in _ask(judge, missing, disable_tqdm):
                known[key] = verdict
                file.write(json.dumps({"key": key, "verdict": verdict, "judge": identity}) + "\n")
                file.flush()
    return known


def _ask(judge: Judge, questions: dict[str, Question], disable_tqdm: bool) -> Iterator[tuple[str, Verdict]]:
    keys, asked = list(questions), list(questions.values())
    many: Callable[..., Any] | None = getattr(judge, "verdicts", None)
    answers = ((i, judge(*q[1:])) for i, q in enumerate(asked)) if many is None else many(asked)
    given = set()
    with progress_bar("Judging", "question", len(asked), disable_tqdm) as bar:
        for index, verdict in answers:
            given.add(index)
            bar.update()
            yield keys[index], _checked(verdict, f"the judge's verdict on pair {asked[index].pair}")
    if len(given) < len(asked):
        raise ValueError(f"the judge answered {len(given)} of {len(asked)} questions; None stands for no verdict")


def _checked(verdict: Any, name: str) -> Verdict:
    if verdict is not None and verdict not in VALUES:
        raise ValueError(f"{name} must be 1, 0.5, 0 or None, got {verdict!r}")
    return None if verdict is None else float(verdict)


def _read_cache(path: Path) -> dict[str, Verdict]:
    """Read the verdicts in a file, by key, and remove a last line that a killed run left unfinished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    known: dict[str, Verdict] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
            known[entry["key"]] = _checked(entry["verdict"], "a cached verdict")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}, is not a cached verdict: {line[:80]!r}; delete the line, and it is asked again"
            ) from error
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return known


def _oriented(verdict: Verdict, swapped: bool) -> Verdict:
    return 1 - verdict if swapped and verdict is not None else verdict


def _combine(verdicts: Sequence[Verdict]) -> Verdict:
    """Combine the verdicts on the orders of a pair; no verdicts mean that the texts are equal."""
    if None in verdicts:
        return None
    return verdicts[0] if len(set(verdicts)) == 1 else 0.5


@dataclass(frozen=True)
class WinRate:
    """How often one side wins, ties counted half, with a 95 % interval.

    Attributes:
        rate: ``(wins + ties / 2) / (wins + ties + losses)``; NaN where nothing was judged.
        low, high: ends of the interval, in [0, 1].
        wins, ties, losses: numbers of judged pairs.
        unjudged: number of pairs without a verdict, which do not enter the rate.
    """

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    unjudged: int = 0


@suggests_arguments
def win_rate(judgements: Sequence[Verdict]) -> WinRate:
    """Compute the win rate over independent pairs.

    With w wins and l losses of n, the rate is ``(1 + d) / 2`` for the difference of paired proportions
    ``d = (w - l) / n``. The interval is the score interval of that difference (Tango, Statistics in Medicine 17,
    1998, 891-908). Without ties it is Wilson's; with ties it is narrower, as their verdicts vary less.

    Args:
        judgements: what :func:`judge_pairs` returns.

    Raises:
        ValueError: a judgement other than 1, 0.5, 0 or None.
    """
    verdicts = [_checked(judgement, f"judgement {index}") for index, judgement in enumerate(judgements)]
    wins, ties, losses, unjudged = (verdicts.count(value) for value in (1.0, 0.5, 0.0, None))
    judged = wins + ties + losses
    if not judged:
        return WinRate(math.nan, 0.0, 1.0, 0, 0, 0, unjudged)
    low, high = _score_interval(wins, losses, judged)
    return WinRate((wins + ties / 2) / judged, (1 + low) / 2, (1 + high) / 2, wins, ties, losses, unjudged)


def _score_interval(wins: int, losses: int, n: int) -> tuple[float, float]:
    """Compute Tango's interval of (wins - losses) / n: the differences that the score test at 5 % does not reject."""

    def kept(difference: float) -> bool:
        # The likeliest probability of a loss under this difference is a root of a x^2 + b x + c.
        a, c = 2 * n, -losses * difference * (1 - difference)
        b = (2 * n - wins + losses) * difference - wins - losses
        loss = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = max(0.0, n * (2 * loss + difference * (1 - difference)))
        return (wins - losses - n * difference) ** 2 <= Z95**2 * variance

    def end(outside: float) -> float:
        inside = (wins - losses) / n
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if kept(middle) else (inside, middle)
        return inside

    return end(-1.0), end(1.0)
