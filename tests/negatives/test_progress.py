"""Progress bars: on a terminal, of slow work, unless they are switched off."""

from __future__ import annotations

import io
import json

import pytest
import tiny_models
from cli_models import save_model, write_config, write_examples
from trainer_runs import trainer

from cpo_kernels.__main__ import main
from cpo_kernels.negatives import Sampling, autoregressive_negatives
from cpo_kernels.trainer import judge_pairs, tokenize_examples
from cpo_kernels.trainer.loading import load_examples

pytestmark = pytest.mark.cpu


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch, delay: float = 0.0) -> Terminal:
    """Put a terminal in place of the error stream, in the test itself since pytest puts its own there before."""
    monkeypatch.setattr("cpo_kernels.negatives.progress.DELAY", delay)
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def read(path, **options):
    load_examples(write_examples(path / "data.jsonl", 6), **options)


def tokenise(path, **options):
    tokenize_examples(tiny_models.examples(6), tiny_models.tokenizer(), max_length=32, max_prompt_length=16, **options)


def generate(path, **options):
    short = Sampling(max_new_tokens=4)
    special = {"eos_token_id": 2, "pad_token_id": 0, "sampling": short}
    autoregressive_negatives(tiny_models.llama(), [[3, 4], [5]], 3, **special, **options)


def judge(path, **options):
    judge_pairs(lambda prompt, first, second: 1.0, ["a"] * 6, list("bcdefg"), ["x"] * 6, **options)


def score(path, **options):
    quiet = options.get("disable_tqdm", False)
    trainer(path, reference="precomputed", resample_negatives=False, disable_tqdm=quiet, eval_dataset=None)


WORK = {
    "Reading examples": (read, "6/6", "row/s"),
    "Tokenising": (tokenise, "6/6", "example/s"),
    "Generating": (generate, "6/6", "text/s"),
    "Judging": (judge, "12/12", "question/s"),
    "Reference scores": (score, "16/16", "example/s"),
}


@pytest.mark.parametrize("what", WORK)
def test_a_bar_shows_how_far_and_how_fast(what, monkeypatch, tmp_path):
    terminal = on_terminal(monkeypatch)
    work, count, rate = WORK[what]
    work(tmp_path)
    shown = terminal.getvalue()
    assert f"{what}: 100%" in shown
    assert count in shown and rate in shown.replace("s/example", "example/s")


@pytest.mark.parametrize("what", WORK)
def test_no_bar_where_it_is_switched_off(what, monkeypatch, tmp_path):
    terminal = on_terminal(monkeypatch)
    WORK[what][0](tmp_path, disable_tqdm=True)
    assert "%" not in terminal.getvalue()


@pytest.mark.parametrize("what", WORK)
def test_no_bar_in_a_file(what, monkeypatch, tmp_path):
    on_terminal(monkeypatch)
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    WORK[what][0](tmp_path)
    assert log.getvalue() == ""


def test_no_bar_of_short_work(monkeypatch, tmp_path):
    terminal = on_terminal(monkeypatch, delay=60.0)
    tokenise(tmp_path)
    judge(tmp_path)
    assert terminal.getvalue() == ""


def test_a_command_shows_and_hides_bars(monkeypatch, tmp_path):
    """Negatives ahead of time, part by part."""
    terminal = on_terminal(monkeypatch)
    values = {"model": save_model(tmp_path / "model"), "data": write_examples(tmp_path / "data.jsonl", 6)}
    config = write_config(tmp_path / "run.yaml", **values, disable_tqdm=False, autoregressive_max_new_tokens=2)
    file = tmp_path / "negatives.jsonl"
    arguments = ["--negatives_file", str(file), "--negatives_part", "4"]
    assert main(["negatives", config, *arguments]) == 0
    assert "Writing negatives: 100%" in terminal.getvalue() and "6/6" in terminal.getvalue()
    terminal.truncate(0)
    assert main(["negatives", config, *arguments, "--overwrite", "--seed", "3", "--disable_tqdm", "true"]) == 0
    assert "Writing negatives" not in terminal.getvalue()
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 6
