"""``cpo-kernels negatives``: what it writes, that training reads it, and that an interruption loses nothing."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest

pytest.importorskip("datasets")  # writes the files of negatives

import tiny_models
import torch
from cli_models import save_model, write_config, write_examples
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpo_kernels.__main__ import main
from cpo_kernels.cli import parts
from cpo_kernels.cli.parsing import parse
from cpo_kernels.cli.train import make_trainer
from cpo_kernels.negatives import similarity_ranks
from cpo_kernels.negatives.autoregressive import Sampling, autoregressive_negatives
from cpo_kernels.negatives.completions import Completion
from cpo_kernels.trainer import CPOConfig, writing
from cpo_kernels.trainer.data import TokenizedExamples
from cpo_kernels.trainer.evaluation import default_sampling

pytestmark = pytest.mark.cpu

COUNT = 3


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    return {"model": save_model(folder / "model"), "data": write_examples(folder / "data.jsonl", 10)}


@pytest.fixture
def config(shared, tmp_path):
    def write(**values) -> str:
        usual = {"negatives_file": str(tmp_path / "negatives.jsonl"), "negatives_count": COUNT, "negatives_part": 4}
        usual |= {"autoregressive_max_new_tokens": 5, "autoregressive_temperature": 0.7, "seed": 3}
        return write_config(tmp_path / "run.yaml", **(shared | usual | values))

    return write


@pytest.fixture
def calls(monkeypatch):
    """The first example of each part that the model writes for; the call numbered ``calls.fail_at`` raises."""

    class Calls(list):
        fail_at = None

    calls, call = Calls(), writing.ModelWriter.__call__

    def counted(self, prompts, keys, count, sampling):
        if len(calls) == calls.fail_at:
            raise KeyboardInterrupt
        calls.append(keys[0])
        return call(self, prompts, keys, count, sampling)

    monkeypatch.setattr(writing.ModelWriter, "__call__", counted)
    return calls


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def drawn(shared) -> list[list[list[int]]]:
    """What the model writes, without the command."""
    tokenizer = AutoTokenizer.from_pretrained(shared["model"])
    model = AutoModelForCausalLM.from_pretrained(shared["model"])
    prompts = tokenizer([row["prompt"] for row in tiny_models.examples(10)])["input_ids"]
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sampling = Sampling(temperature=0.7, max_new_tokens=5, seed=3)
    return autoregressive_negatives(model, prompts, COUNT, sampling=sampling, **special)


def test_the_file_holds_what_the_model_writes(shared, config, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shared["model"])
    assert main(["negatives", config(negatives_format="text")]) == 0
    got = rows(tmp_path / "negatives.jsonl")
    for row, own in zip(got, drawn(shared), strict=True):
        # The texts, put behind their prompt, say what was drawn.
        said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in own]
        assert [row["prompt"] + text for text in row["negatives"]] == [
            f"{row['prompt']} {text}".rstrip() for text in said
        ]
    assert [{name: row[name] for name in ("prompt", "completion")} for row in got] == tiny_models.examples(10)
    assert all(row["kinds"] == ["autoregressive"] * len(row["negatives"]) for row in got)


def test_training_reads_the_file(shared, config, tmp_path, capsys):
    """Draws that were cut off stay without EOS, and those that ended at once are EOS alone."""
    path = config(negatives_file=str(tmp_path / "negatives.parquet"))
    assert main(["negatives", path]) == 0
    table = Dataset.from_parquet(str(tmp_path / "negatives.parquet"))
    eos = AutoTokenizer.from_pretrained(shared["model"]).eos_token_id
    expected = drawn(shared)
    assert table["negatives"][:] == expected
    trainer = make_trainer(parse([path]))
    data = trainer.train_dataset
    assert [[list(ids) for ids in own] for own in data.negatives] == expected
    draws = [ids for own in expected for ids in own]
    assert {ids[-1] == eos for ids in draws} == {True, False}
    assert [eos] in draws
    assert list(data.kinds) == [["autoregressive"] * len(own) for own in expected]
    assert [list(ids) for ids in data.completions] == table["completion"][:]
    assert main(["train", path]) == 0
    assert "saved to" in capsys.readouterr().out


def test_texts_count_as_ended(shared, config, tmp_path):
    path = config(negatives_format="text")
    assert main(["negatives", path]) == 0
    special = (0, 1, 2)  # which no text has
    ended = [[[*(token for token in ids if token not in special), 2] for ids in own] for own in drawn(shared)]
    data = make_trainer(parse([path])).train_dataset
    assert [[list(ids) for ids in own] for own in data.negatives] == ended


def test_max_examples_counts_rows_of_data(shared, config, tmp_path):
    """A row may be several pieces, all of which are read back."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join([" ".join(tiny_models.WORDS[:20])] * 3))
    values = {"prompt_tokens": 4, "completion_tokens": 6, "max_length": 10, "max_examples": 2}
    path = config(data=str(path), **values)
    assert main(["negatives", path]) == 0
    assert len(rows(tmp_path / "negatives.jsonl")) == 4
    assert len(make_trainer(parse([path])).train_dataset) == 4


def test_ranks_are_those_of_the_hidden_states(shared, config, tmp_path):
    """Means of the model's hidden states over the rows that predict a candidate, one candidate at a time."""
    path = config(negatives_ranking="similarity")
    assert main(["negatives", path]) == 0
    model = AutoModelForCausalLM.from_pretrained(shared["model"])
    for row in rows(tmp_path / "negatives.jsonl"):
        means = []
        for candidate in (row["completion"], *row["negatives"]):
            ids = torch.tensor([[*row["prompt"], *candidate[:-1]]])
            with torch.no_grad():
                hidden = model.transformer(ids).last_hidden_state[0]
            means.append(hidden[len(row["prompt"]) - 1 :].mean(0))
        assert row["ranks"] == similarity_ranks(torch.stack(means), [0, len(means)])[1:]


def test_negatives_that_examples_bring_are_kept(config, tmp_path):
    path = tmp_path / "data.jsonl"
    own = [row | {"negatives": ["the mat"], "ranks": [2]} for row in tiny_models.examples(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in own))
    assert main(["negatives", config(data=str(path), negatives_count=1, negatives_format="text")]) == 0
    for row in rows(tmp_path / "negatives.jsonl"):
        assert row["negatives"][0] == "the mat"
        assert row["kinds"] == ["given", "autoregressive"][: len(row["kinds"])]
        assert row["ranks"] == [2, 3][: len(row["kinds"])]


@pytest.mark.parametrize("negatives_format", ["ids", "text"])
def test_the_ground_truth_is_left_out(config, tmp_path, monkeypatch, capsys, negatives_format):
    """An example that is left without any negatives is told of."""
    path = config(max_examples=1, negatives_format=negatives_format)
    tokenizer = tiny_models.tokenizer()
    truth = tokenizer(tiny_models.examples(1)[0]["completion"])["input_ids"]
    eos = tokenizer.eos_token_id
    monkeypatch.setattr(
        writing.ModelWriter,
        "__call__",
        lambda self, prompts, keys, count, sampling: [[truth, [*truth, eos]] for _ in prompts],
    )
    assert main(["negatives", path]) == 0
    assert "1 examples got none: what was written for them was the ground truth itself" in capsys.readouterr().out
    assert [row["negatives"] for row in rows(tmp_path / "negatives.jsonl")] == [[]]


# Interruptions


def test_an_interruption_loses_nothing(config, calls, tmp_path):
    """Parts that are there are not written again, and the file is that of an uninterrupted call."""
    whole = tmp_path / "whole.jsonl"
    assert main(["negatives", config(), "--negatives_file", str(whole)]) == 0
    assert calls == [0, 4, 8]
    calls.clear()
    calls.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        main(["negatives", config()])
    assert not (tmp_path / "negatives.jsonl").exists()
    calls.clear()
    calls.fail_at = None
    assert main(["negatives", config()]) == 0
    assert calls == [8]
    assert (tmp_path / "negatives.jsonl").read_text() == whole.read_text()


def test_a_finished_file_is_left_alone(config, calls, tmp_path, capsys):
    assert main(["negatives", config()]) == 0
    calls.clear()
    before = (tmp_path / "negatives.jsonl").stat().st_mtime_ns
    assert main(["negatives", config()]) == 0
    assert calls == []
    assert (tmp_path / "negatives.jsonl").stat().st_mtime_ns == before
    assert "is complete" in capsys.readouterr().out
    assert main(["negatives", config(seed=4)]) == 2  # other negatives are asked for
    assert "--overwrite" in capsys.readouterr().err
    assert calls == []
    assert main(["negatives", config(seed=4), "--overwrite"]) == 0
    assert calls == [0, 4, 8]


def test_a_file_is_replaced_only_when_that_is_asked_for(config, calls, tmp_path, capsys):
    """One of somebody else, and one that was changed since it was finished."""
    path = tmp_path / "negatives.jsonl"
    path.write_text("mine\n")
    assert main(["negatives", config()]) == 2
    assert f"{path} is there already, and was not written by this command; give another" in capsys.readouterr().err
    assert (path.read_text(), calls) == ("mine\n", [])
    assert main(["negatives", config(), "--overwrite"]) == 0
    whole = path.read_text()
    path.write_text(whole[:100])
    assert main(["negatives", config()]) == 2
    assert f"{path} is finished, but was changed since; give another" in capsys.readouterr().err
    assert path.read_text() == whole[:100]
    assert main(["negatives", config(), "--overwrite"]) == 0
    assert path.read_text() == whole


def test_a_call_that_is_killed_before_it_says_so_is_finished_by_the_next(config, calls, tmp_path, monkeypatch):
    monkeypatch.setattr("cpo_kernels.cli.negatives.hash_file", lambda path: [][0])
    with pytest.raises(IndexError):
        main(["negatives", config()])
    whole = (tmp_path / "negatives.jsonl").read_text()
    monkeypatch.undo()
    assert main(["negatives", config()]) == 0
    assert (tmp_path / "negatives.jsonl").read_text() == whole


def test_what_another_call_has_finished_meanwhile_is_left_alone(config, calls, tmp_path, monkeypatch, capsys):
    path, again = tmp_path / "negatives.jsonl", []
    write = parts.Job.write

    def interrupted(job, part):
        written = write(job, part)
        if part.start == 8 and not again:  # the others are removed meanwhile
            again.append(1)
            assert main(["negatives", config()]) == 0
            again.append(path.read_text())
        return written

    monkeypatch.setattr(parts.Job, "write", interrupted)
    assert main(["negatives", config()]) == 0
    assert "is complete: another call has written it meanwhile" in capsys.readouterr().out
    assert path.read_text() == again[1]


def test_a_mended_line_costs_its_part(config, calls, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    good = [json.dumps(row) for row in tiny_models.examples(10)]
    path.write_text("\n".join(good))
    calls.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        main(["negatives", config(data=str(path))])
    path.write_text("\n".join([*good[:5], '{"prompt": "the"}', *good[6:]]))
    calls.clear()
    calls.fail_at = None
    assert main(["negatives", config(data=str(path))]) == 2
    assert "data.jsonl:6: example 5 has no 'completion'" in capsys.readouterr().err
    assert calls == []
    path.write_text("\n".join([*good[:5], json.dumps({"prompt": "the cat", "completion": "ran on"}), *good[6:]]))
    assert main(["negatives", config(data=str(path))]) == 0
    assert calls == [4, 8]


# A server


class Server:
    """In place of ``CompletionsEndpoint``: it answers with the prompt and its number, and fails when told to."""

    asked: ClassVar[list[tuple[list[str], int, int]]] = []
    fails = False
    key: str | None = None

    def __init__(self, url, model, api_key=None):
        self.url, self.model = url, model
        Server.key = api_key

    def negatives(self, prompts, count, sampling):
        if Server.fails and len(Server.asked) == 1:
            raise RuntimeError(f"{self.url} gave no completions of {self.model} for prompt 0: time-out")
        Server.asked.append((list(prompts), count, sampling.seed))
        return [[Completion(f"the {prompt}", ended=k == 0) for k in range(count)] for prompt in prompts]


def test_a_server_writes(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writing, "CompletionsEndpoint", Server)
    monkeypatch.setenv("CPO_KERNELS_COMPLETIONS_KEY", "secret")
    Server.asked, Server.fails = [], True
    path = config(autoregressive_url="http://127.0.0.1:1/v1", autoregressive_model="big", negatives_count=2)
    assert main(["negatives", path]) == 2
    assert "http://127.0.0.1:1/v1 gave no completions of big for prompt 0: time-out" in capsys.readouterr().err
    Server.fails = False
    assert main(["negatives", path]) == 0
    prompts = [row["prompt"] for row in tiny_models.examples(10)]
    assert [(asked[0], asked[1]) for asked in Server.asked] == [(prompts[i : i + 4], 2) for i in (0, 4, 8)]
    assert len({seed for _, _, seed in Server.asked}) == 3
    assert Server.key == "secret"
    tokenizer = tiny_models.tokenizer()
    texts = [tokenizer(f"the {prompt}")["input_ids"] for prompt in prompts]
    got = rows(tmp_path / "negatives.jsonl")
    assert [row["negatives"] for row in got] == [[[*text, tokenizer.eos_token_id], text] for text in texts]


def test_a_server_is_asked_with_the_texts_of_the_prompts(shared, tmp_path, monkeypatch):
    """With special tokens that are part of a prompt, without the BOS that the server adds, and not with what is cut."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]})
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    prompts = tokenizer(["<user> the cat", "a dog ran over the mat", ""])["input_ids"]
    assert {ids[0] for ids in prompts} == {bos[1]}
    data = TokenizedExamples([*prompts, prompts[0][1:]], [[5, 6]] * 4)
    expected = ["<user> the cat", "a dog ran over the mat", "", "<user> the cat"]

    monkeypatch.setattr(writing, "CompletionsEndpoint", Server)
    options = {"autoregressive_url": "http://127.0.0.1:1/v1", "autoregressive_model": "big", "use_cpu": True}
    config = CPOConfig(output_dir=str(tmp_path), max_length=32, **options)
    Server.asked, Server.fails = [], False
    writing.EndpointWriter(config, tokenizer)(data.prompts, range(4), 2, writing.sampling_of(config, data))
    assert [asked[0] for asked in Server.asked] == [expected]
    # What the server tokenises is what training sees.
    assert tokenizer(expected)["input_ids"] == [*prompts, prompts[0]]


def test_a_bos_that_the_tokenizer_does_not_add_is_sent():
    """Such as that of an empty prompt, which no server continues."""
    assert writing.prompt_texts(tiny_models.tokenizer(), [[1], [1, 3], [3]]) == ["<s>", "<s> the", "the"]


def test_a_configuration_without_a_server_has_no_endpoint(tmp_path):
    with pytest.raises(ValueError, match="expected autoregressive_url and autoregressive_model, got None and None"):
        writing.EndpointWriter(CPOConfig(output_dir=str(tmp_path), use_cpu=True), tiny_models.tokenizer())


def test_a_continuation_has_room_behind_the_longest_prompt(tmp_path):
    data = TokenizedExamples([[3] * 4, [3] * 7], [[4] * 9, [4] * 2])
    for max_length, room in ((20, 13), (12, 5), (7, 1)):
        config = CPOConfig(output_dir=str(tmp_path), use_cpu=True, max_length=max_length, max_prompt_length=6)
        assert writing.room_for(config, data) == room
        assert writing.sampling_of(config, data).max_new_tokens == min(room, 9)
        assert default_sampling(data, config).max_new_tokens == min(room, 9)


def test_a_server_needs_an_embedding_model_for_ranks(config, monkeypatch, capsys):
    monkeypatch.setattr(writing, "CompletionsEndpoint", Server)
    path = config(autoregressive_url="http://127.0.0.1:1/v1", autoregressive_model="big")
    assert main(["negatives", path, "--negatives_ranking", "similarity"]) == 2
    assert "negatives_ranking='similarity' needs an embedding_model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"negatives_file": None}, "negatives_file is not given"),
        ({"negatives_file": "n.csv"}, "negatives_file must end with .parquet or .jsonl, got n.csv"),
        ({"data": "none.jsonl"}, "there is no file none.jsonl"),
    ],
)
def test_mistakes(config, capsys, values, message):
    assert main(["negatives", config(**values)]) == 2
    assert message in capsys.readouterr().err
