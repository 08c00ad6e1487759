"""The command on data of token ids, with a model that has no tokenizer."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("datasets")

import tiny_models
from cli_models import write_config

from cpo_kernels.__main__ import main

pytestmark = pytest.mark.cpu


@pytest.fixture
def config(tmp_path):
    tiny_models.llama().save_pretrained(tmp_path / "model")
    tokenizer = tiny_models.tokenizer()
    rows = [{name: tokenizer(text)["input_ids"] for name, text in row.items()} for row in tiny_models.examples(10)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**values) -> str:
        usual = {"model": str(tmp_path / "model"), "tokenizer": "none", "data": str(data), "eval_fraction": 0.2}
        usual |= {"negatives_count": 2, "num_autoregressive_negatives": 1}
        return write_config(tmp_path / "run.yaml", **(usual | values))

    return write


def test_train_and_evaluate_without_a_tokenizer(config, tmp_path):
    assert main(["train", config()]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "tokenizer_config.json").exists()
    assert main(["evaluate", config()]) == 0
    report = json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text())
    assert report["generated"]["count"] == report["truths"]["count"] == 2
    assert report["trained_on"] == 0


def test_negatives_are_written_and_read_without_a_tokenizer(config, tmp_path):
    path = tmp_path / "negatives.jsonl"
    options = {"negatives_file": str(path), "negatives_ranking": "similarity"}
    assert main(["negatives", config(**options)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 8 and all(row["completion"][-1] == 2 for row in rows)
    assert all(1 <= len(row["negatives"]) <= 2 and all(row["negatives"]) for row in rows)
    assert main(["train", config(**options, num_autoregressive_negatives=0)]) == 0


def test_text_and_a_server_are_refused_in_a_sentence(config, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"prompt": "the cat", "completion": " sat"}) + "\n")
    for command in (["train"], ["negatives", "--negatives_file", str(tmp_path / "n.jsonl")]):
        assert main([command[0], config(data=str(text), eval_fraction=0.0), *command[1:]]) == 2
        assert "holds text, str 'the cat', and there is no tokenizer" in capsys.readouterr().err
    server = {"autoregressive_url": "http://localhost:1/v1", "autoregressive_model": "m"}
    assert main(["negatives", config(**server), "--negatives_file", str(tmp_path / "n.jsonl")]) == 2
    assert "reads and writes text; pass the tokenizer" in capsys.readouterr().err
