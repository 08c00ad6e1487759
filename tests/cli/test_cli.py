"""``cpo-kernels train``, ``evaluate`` and ``ensemble``, in process and on tiny models."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from cli_models import save_model, write_config, write_examples
from processes import run_script
from project import ROOT, SUPPORT
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from cpo_kernels import CPOConfig, CPOTrainer
from cpo_kernels.__main__ import main
from cpo_kernels.cli.inputs import Inputs
from cpo_kernels.cli.parsing import parse
from cpo_kernels.cli.processes import leave_process_group
from cpo_kernels.cli.train import make_trainer

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A model and examples, which no test changes."""
    folder = tmp_path_factory.mktemp("shared")
    return {"model": save_model(folder / "model"), "data": write_examples(folder / "data.jsonl")}


def weights(path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# Training


def test_train_is_the_trainer(shared, tmp_path, capsys):
    """The command gives the weights that the trainer gives, and leaves what it was told beside them."""
    config = write_config(tmp_path / "run.yaml", **shared, num_batch_negatives=3)
    assert main(["train", config, "--num_batch_negatives", "2", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert "train_loss" in out
    assert f"saved to {tmp_path / 'run'}" in out

    arguments = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 32, "seed": 5}
    arguments |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    trainer = CPOTrainer(
        AutoModelForCausalLM.from_pretrained(shared["model"], dtype=torch.float32),
        CPOConfig(output_dir=str(tmp_path / "other"), num_batch_negatives=2, **arguments),
        train_dataset=tiny_models.examples(24),
        processing_class=AutoTokenizer.from_pretrained(shared["model"]),
    )
    trainer.train()
    assert_equal(weights(tmp_path / "run"), trainer.model.state_dict())
    assert AutoTokenizer.from_pretrained(tmp_path / "run")("the cat")["input_ids"] == [3, 5]
    metrics = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert metrics["train_loss"] == pytest.approx(trainer.state.log_history[-1]["train_loss"], abs=0)

    kept = yaml.safe_load((tmp_path / "run" / "cpo_kernels.yaml").read_text())
    assert (kept["num_batch_negatives"], kept["data"]) == (2, shared["data"])
    again = str(tmp_path / "run" / "cpo_kernels.yaml")
    assert main(["train", again, "--output_dir", str(tmp_path / "again")]) == 0
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "again"))


def test_no_command_needs_a_length(shared, tmp_path):
    """The model has 64 positions, and examples are longer; the finished run is known as the same one."""
    rows = [{"prompt": "the cat " * 40, "completion": f"{word} sat " * 40} for word in tiny_models.WORDS[:8]]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": shared["model"], "data": str(tmp_path / "long.jsonl"), "max_length": None, "eval_fraction": 0.25}
    config = write_config(tmp_path / "run.yaml", **values, per_device_train_batch_size=2, eval_max_new_tokens=2)
    file = str(tmp_path / "negatives.jsonl")
    assert main(["negatives", config, "--negatives_file", file, "--autoregressive_max_new_tokens", "2"]) == 0
    written = [json.loads(line) for line in Path(file).read_text().splitlines()]
    assert {(len(row["prompt"]), len(row["completion"])) for row in written} == {(32, 32)}
    assert main(["train", config]) == 0
    assert main(["train", config]) == 0
    assert main(["evaluate", config]) == 0
    assert main(["train", config, "--tiny"]) == 0


@pytest.mark.parametrize("bars", [False, True])
def test_metrics_are_lines_and_a_table(shared, tmp_path, capsys, monkeypatch, bars):
    """One line a log, one line a metric at the end; the numbers are those of the records."""
    config = write_config(tmp_path / "run.yaml", **shared, eval_fraction=0.25, logging_steps=1, eval_strategy="steps")
    if bars:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["train", config, "--disable_tqdm", str(not bars), "--eval_steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "{" not in out
    lines = out.splitlines()
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    steps = [line for line in lines if line.startswith("step ")]
    logged = [entry for entry in history if "train_runtime" not in entry][: len(steps)]
    assert [line.split("  ")[0] for line in steps] == ["step 1/2", "step 1/2", "step 2/2", "step 2/2"]
    for line, entry in zip(steps, logged, strict=True):
        name = "eval_loss" if "eval_loss" in entry else "loss"
        assert f"  {name} {entry[name]:.4g}  " in line
    metrics = json.loads((tmp_path / "run" / "all_results.json").read_text())
    for name, value in metrics.items():
        (line,) = [line for line in lines if line.split()[0] == name]
        assert float(line.split()[1]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("use_cpu", [True, False])
def test_no_library_warns_of_what_the_command_does(shared, tmp_path, caplog, use_cpu):
    """Of a LoRA run with checkpoints and evaluation; on the default device, for which there may be no pinned memory."""
    values = {"eval_fraction": 0.25, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    values |= {
        "eval_max_new_tokens": 2,
        "lora_r": 2,
        "lora_targets": ["c_attn"],
        "gradient_checkpointing": True,
        "use_cpu": use_cpu,
    }
    config = write_config(tmp_path / "run.yaml", **shared, **values)
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert main(["train", config]) == 0
            assert main(["evaluate", config]) == 0
    finally:
        transformers_log.removeHandler(caplog.handler)
    assert [str(own.message) for own in warned if own.category is not DeprecationWarning] == []
    assert "attention_mask" not in caplog.text


def test_what_is_kept_of_a_run_holds_no_secrets(shared, tmp_path):
    """output_dir is what push_to_hub uploads."""
    values = {"hub_token": "secret", "fsdp_config": {"version": 2, "api_key": "secret"}, "max_length": 24}
    config = write_config(tmp_path / "run.yaml", **shared, **values)
    assert main(["train", config]) == 0
    text = (tmp_path / "run" / "cpo_kernels.yaml").read_text()
    assert "secret" not in text
    kept = yaml.safe_load(text)
    assert "hub_token" not in kept
    assert (kept["fsdp_config"], kept["max_length"]) == ({"version": 2}, 24)


def test_train_goes_on_where_it_was(shared, tmp_path, capsys):
    """From the last checkpoint that was written to its end, and to the weights of an uninterrupted run."""
    config = write_config(tmp_path / "run.yaml", **shared, max_steps=4, save_steps=1)
    assert main(["train", config]) == 0
    whole = weights(tmp_path / "run")
    run = tmp_path / "run"
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "checkpoint-4")
    (run / "checkpoint-3" / "trainer_state.json").unlink()  # killed while it wrote
    capsys.readouterr()
    assert main(["train", config]) == 0
    assert f"going on from {run / 'checkpoint-2'}" in capsys.readouterr().out
    assert_equal(weights(run), whole)

    shutil.rmtree(run / "checkpoint-4")
    assert main(["train", config, "--resume", str(run / "checkpoint-1")]) == 0
    assert_equal(weights(run), whole)
    capsys.readouterr()
    assert main(["train", config, "--resume", "none"]) == 0
    assert "going on" not in capsys.readouterr().out
    assert_equal(weights(run), whole)
    assert main(["train", config, "--resume", str(tmp_path)]) == 2
    assert "is not a checkpoint: it has no trainer_state.json" in capsys.readouterr().err


def test_evaluation_along_a_run_and_at_its_end(shared, tmp_path):
    config = write_config(tmp_path / "run.yaml", **shared, eval_strategy="steps", eval_steps=1, eval_fraction=0.25)
    assert main(["train", config]) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [1, 2, 2]
    metrics = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert metrics["eval_perplexity"] > 1
    assert {"eval_accuracy/batch", "eval_accuracy/truncation"} <= metrics.keys()


def test_what_is_held_out_is_not_trained_on(shared, tmp_path):
    inputs = Inputs(parse([write_config(tmp_path / "run.yaml", **shared, eval_fraction=0.25)]))
    train, held_out = inputs.train_examples(), inputs.eval_examples()
    assert (len(train), len(held_out)) == (18, 6)
    whole = tiny_models.examples(24)
    assert sorted(map(str, [*train, *held_out])) == sorted(map(str, whole))
    assert inputs.eval_examples() == held_out


def test_no_more_than_max_eval_examples_are_held_out(shared, tmp_path):
    """The first rows, in their order, of what is held out either way."""
    rows = tiny_models.examples(4, seed=9)
    for values in ({"eval_fraction": 0.25}, {"eval_data": write_examples(tmp_path / "held_out.jsonl", 4, seed=9)}):
        whole, two, many = (
            Inputs(parse([write_config(tmp_path / "run.yaml", **shared, **values, **limit)]))
            for limit in ({}, {"max_eval_examples": 2}, {"max_eval_examples": 99})
        )
        expected = rows if "eval_data" in values else whole.eval_examples()
        assert list(two.eval_examples()) == list(expected[:2])
        assert list(many.eval_examples()) == list(expected)
        if "eval_fraction" in values:  # the rest of what is held out is not trained on either
            assert two.train_examples() == whole.train_examples()


def test_the_revision_is_that_of_the_model(shared, tmp_path):
    """A cache of the hub with two revisions of one name; a tokenizer of another name has none of them."""
    repository = tmp_path / "hub" / "models--some--name"
    for number, reference in enumerate(("main", "older")):
        commit = str(number) * 40
        save_model(repository / "snapshots" / commit, seed=number)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
    values = {"model": "some/name", "data": shared["data"], "revision": "older", "tokenizer": shared["model"]}
    config = write_config(tmp_path / "run.yaml", **values)
    program = (
        "import sys; from cpo_kernels.cli.inputs import Inputs; from cpo_kernels.cli.parsing import parse\n"
        "config, folder = sys.argv[1:]\n"
        "for revision in 'older', 'main':\n"
        "    options = [] if revision == 'older' else ['--revision', revision]\n"
        "    inputs = Inputs(parse([config, *options]))\n"
        "    inputs.tokenizer\n"
        "    inputs.model().save_pretrained(f'{folder}/{revision}')"
    )
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}  # which are read once
    run = subprocess.run(
        [sys.executable, "-c", program, config, str(tmp_path)],
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for revision, seed in ("older", 1), ("main", 0):
        assert_equal(weights(tmp_path / revision), weights(repository / "snapshots" / (str(seed) * 40)))


def test_an_ensemble_at_the_end(shared, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    config = write_config(tmp_path / "run.yaml", **shared, ensemble_with=other, ensemble_alpha=0.25)
    assert main(["train", config]) == 0
    trained, second, mixed = (weights(path) for path in (tmp_path / "run", other, tmp_path / "run" / "ensemble"))
    for name in trained:
        torch.testing.assert_close(mixed[name], 0.25 * trained[name] + 0.75 * second[name], rtol=0, atol=1e-7)


def test_adapters_are_trained_and_evaluated(shared, tmp_path, capsys):
    config = write_config(tmp_path / "run.yaml", **shared, lora_r=2, lora_targets=["c_attn"], eval_fraction=0.25)
    assert main(["train", config]) == 0
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (saved["r"], saved["target_modules"]) == (2, ["c_attn"])
    assert main(["evaluate", config, "--eval_generations", "0"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_splits_of_a_saved_data_set(shared, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = tiny_models.examples(24)
    splits = {"train": datasets.Dataset.from_list(rows[:20]), "test": datasets.Dataset.from_list(rows[20:])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    values = {"model": shared["model"], "data": str(tmp_path / "saved"), "eval_split": "test"}
    inputs = Inputs(parse([write_config(tmp_path / "run.yaml", **values)]))
    assert list(inputs.train_examples()) == rows[:20]
    assert list(inputs.eval_examples()) == rows[20:]


def test_documents_are_trained_on_in_pieces(shared, tmp_path):
    """Only the end of a document gets EOS; a piece from within one fills ``max_length``."""
    words = tiny_models.WORDS * 2
    (tmp_path / "text.txt").write_text("\n\n".join([" ".join(words), " ".join(words[:11])]))
    values = {"model": shared["model"], "data": str(tmp_path / "text.txt"), "prompt_tokens": 4, "completion_tokens": 6}
    config = write_config(tmp_path / "run.yaml", **values, max_length=10)
    data = make_trainer(parse([config])).train_dataset
    ids = AutoTokenizer.from_pretrained(shared["model"])(" ".join(words))["input_ids"]
    assert [[*p, *c] for p, c in zip(data.prompts, data.completions, strict=True)] == [
        *(ids[start : start + 10] for start in range(0, 40, 10)),
        ids[:10],
    ]
    assert main(["train", config]) == 0


MISTAKES = {
    "no data": ({"data": None}, "data is not given"),
    "no model": ({"model": None}, "model is not given"),
    "no such file": ({"data": "none.jsonl"}, "there is no file none.jsonl"),
    "no held-out": ({"eval_strategy": "steps"}, "eval_strategy='steps' needs held-out examples"),
    "no splits": ({"eval_split": "test"}, "has no splits; give eval_data or eval_fraction"),
    "no negatives": (
        {"negatives_file": "none.jsonl"},
        "there is no negatives_file none.jsonl; `cpo-kernels negatives`",
    ),
    "no prompts": ({"columns": {"prompt": "question"}}, "data.jsonl:1 has no 'question', which columns takes"),
    "too long": ({"max_length": 999}, "max_length=999 exceeds the 64 positions"),
    "dtype": ({"torch_dtype": "float12"}, "--torch_dtype/--torch-dtype: invalid choice: 'float12'"),
    "adapters": ({"lora_r": 2, "lora_targets": ["nothing"]}, "nothing"),
    "tiny": ({"model": "some/name", "tiny": True}, "--tiny cannot ask the hub what family 'some/name' is of"),
    "family": ({"tiny_model": {"model_type": "magic"}, "tiny": True}, "transformers knows no model_type 'magic'"),
    "tiny type": ({"tiny_model": {"n_layer": 1}, "tiny": True}, "tiny_model must name a model_type"),
}


@pytest.mark.parametrize(("values", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_before_the_first_step(shared, tmp_path, capsys, values, message):
    values = {name: value for name, value in (shared | values).items() if value is not None}
    assert main(["train", write_config(tmp_path / "run.yaml", **values)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "negatives"])
def test_a_model_that_cannot_be_read_is_told(shared, tmp_path, capsys, monkeypatch, command):
    def refuse(model, **options):
        raise RuntimeError("no head is known of this model")

    modules = {"train": "trainer.trainer", "evaluate": "cli.evaluate", "negatives": "cli.parts"}
    monkeypatch.setattr(f"cpo_kernels.{modules[command]}.attach_linear_loss", refuse)
    config = write_config(tmp_path / "run.yaml", **shared, eval_fraction=0.25, checkpoint=shared["model"])
    arguments = ["--negatives_ranking", "similarity", "--negatives_file", str(tmp_path / "n.jsonl")]
    assert main([command, config, *(arguments if command == "negatives" else [])]) == 2
    assert f"cpo-kernels {command}: no head is known of this model" in capsys.readouterr().err


def test_prefixes_that_cannot_be_shared_are_told(shared, tmp_path, capsys):
    """Bloom's positions do not restart."""
    tokenizer = AutoTokenizer.from_pretrained(shared["model"])
    BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "bloom"
    )
    tokenizer.save_pretrained(tmp_path / "bloom")
    values = {"model": str(tmp_path / "bloom"), "data": shared["data"], "prefix_sharing": "required"}
    assert main(["train", write_config(tmp_path / "run.yaml", **values)]) == 2
    assert "cpo-kernels train: BloomForCausalLM cannot share prefixes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("4", "must be a string"),
        ("[4, 99999]", "has the token id 99999; expected ids of at least 0 and below"),
        ('"a \\ud800"', "holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_names_itself(shared, tmp_path, capsys, value, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "the", "completion": "cat"}\n{"prompt": "the", "completion": ' + value + "}\n")
    assert main(["train", write_config(tmp_path / "run.yaml", model=shared["model"], data=str(path))]) == 2
    assert f"bad.jsonl:2: 'completion' of example 1 {message}" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes(shared, tmp_path, how):
    """`torchrun -m cpo_kernels train`: the weights of one process, to rounding, and one report."""
    sizes = {"per_device_train_batch_size": 2, "optim": "sgd", "save_strategy": "no"}
    sharding = {"fsdp": True, "fsdp_config": {"version": 2}} if how == "fsdp2" else {}
    config = write_config(tmp_path / "two.yaml", **shared, **sizes, **sharding)
    if sharding:
        printed = run_script(SUPPORT / "sharded_command.py", "train", config, processes=2)
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [*launch, "-m", "cpo_kernels", "train", config]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        printed = run.stdout
    assert printed.count("saved to") == 1
    assert printed.count("parameters are sharded") == (2 if sharding else 0)
    one = write_config(tmp_path / "one.yaml", **shared, **(sizes | {"per_device_train_batch_size": 4}))
    assert main(["train", one]) == 0
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-6)


def test_what_lies_in_cycles_goes_before_the_group_does(tmp_path):
    """A trainer does, and with it the DDP wrapper."""

    class Cycle:
        def __init__(self):
            self.itself = self

    alive = []
    leave_process_group()  # nothing to leave
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    weakref.finalize(Cycle(), lambda: alive.append(distributed.is_initialized()))
    leave_process_group()
    assert alive == [True] and not distributed.is_initialized()


# Evaluation


def test_evaluate(shared, tmp_path, capsys, monkeypatch):
    """Scores, generations and verdicts, as JSON and Markdown; asked again, the judge has nothing to say anew."""
    (tmp_path / "own_judge.py").write_text(
        "asked = []\n"
        "def longer(prompt, first, second):\n"
        "    asked.append(prompt)\n"
        "    return 0.5 + 0.5 * ((len(first) > len(second)) - (len(first) < len(second)))\n"
        "longer.symmetric, longer.identity = True, 'longer'\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "run.yaml", **shared, eval_fraction=0.25, eval_max_new_tokens=4)
    assert main(["evaluate", config]) == 2
    assert "there is no trained model in output_dir" in capsys.readouterr().err
    assert main(["train", config]) == 0
    capsys.readouterr()
    assert main(["evaluate", config, "--judge", "own_judge:longer"]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "run" / "evaluation"
    report = json.loads((folder / "report.json").read_text())
    assert report["examples"] == 6
    assert report["checkpoint"] == str(tmp_path / "run")
    rate = report["win_rate"]
    assert rate["wins"] + rate["ties"] + rate["losses"] == 6
    trained = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert report["metrics"]["perplexity"] == pytest.approx(trained["eval_perplexity"], rel=1e-5)
    text = (folder / "report.md").read_text()
    assert "Win rate against the ground truth" in text
    assert "| perplexity |" in printed

    import own_judge

    asked = len(own_judge.asked)
    assert asked == 6
    assert main(["evaluate", config, "--judge", "own_judge:longer"]) == 0
    assert len(own_judge.asked) == asked
    for name, message in (
        ("own_judge:none", "there is no own_judge:none"),
        ("own_judge:number", "is of type int, not a function"),
    ):
        assert main(["evaluate", config, "--judge", name]) == 2
        assert message in capsys.readouterr().err


def test_a_small_nucleus_leaves_the_likeliest_token(shared, tmp_path):
    """With eval_top_p next to 0 the continuations are greedy, computed here token by token."""
    values = {"eval_data": write_examples(tmp_path / "held_out.jsonl", 4, seed=9), "checkpoint": shared["model"]}
    config = write_config(tmp_path / "run.yaml", **shared, **values, eval_max_new_tokens=5, eval_top_p=1e-6)
    assert main(["evaluate", config]) == 0
    model = AutoModelForCausalLM.from_pretrained(shared["model"])
    tokenizer = AutoTokenizer.from_pretrained(shared["model"])
    want = []
    for row in tiny_models.examples(4, seed=9):
        prompt = text = tokenizer(row["prompt"])["input_ids"]
        while len(text) < len(prompt) + 5 and (len(text) == len(prompt) or text[-1] != tokenizer.eos_token_id):
            text = [*text, int(model(torch.tensor([text])).logits[0, -1].argmax())]
        want.append(text[len(prompt) :])
    folder = tmp_path / "run" / "evaluation"
    assert json.loads((folder / "generations.json").read_text())["completions"] == want
    assert json.loads((folder / "report.json").read_text())["sampling"]["top_p"] == 1e-6
    assert main(["evaluate", config, "--eval_top_p", "1"]) == 0
    assert json.loads((folder / "generations.json").read_text())["completions"] != want


def test_a_chat_endpoint_judges(shared, tmp_path, monkeypatch, capsys):
    class Judge:
        symmetric, identity = True, "chat"

        def __init__(self, url, model, api_key):
            assert (url, model, api_key) == ("http://127.0.0.1:1/v1", "big", "secret")

        def __call__(self, prompt, first, second):
            return 1.0

    monkeypatch.setattr("cpo_kernels.cli.evaluate.ChatJudge", Judge)
    monkeypatch.setenv("CPO_KERNELS_JUDGE_KEY", "secret")
    config = write_config(tmp_path / "run.yaml", **shared, eval_fraction=0.25, eval_max_new_tokens=4)
    arguments = ["--checkpoint", shared["model"], "--judge", "chat", "--judge_url", "http://127.0.0.1:1/v1"]
    assert main(["evaluate", config, *arguments, "--judge_model", "big"]) == 0
    assert "100.0 %" in capsys.readouterr().out


def test_evaluate_another_checkpoint_by_likelihood(shared, tmp_path, capsys):
    values = {"eval_data": write_examples(tmp_path / "held_out.jsonl", 4, seed=9), "eval_generations": 2}
    config = write_config(tmp_path / "run.yaml", **shared, **values, eval_max_new_tokens=4)
    arguments = ["--checkpoint", shared["model"], "--judge", "likelihood", "--eval_reference", "true"]
    assert main(["evaluate", config, *arguments, "--eval_dir", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["examples"] == 4
    assert report["generated"]["count"] == 2
    assert report["win_rate"]["unjudged"] == 0
    assert report["metrics"]["rewards/chosen"] == 0  # the model is its own reference
    capsys.readouterr()
    assert main(["evaluate", write_config(tmp_path / "run.yaml", **shared), *arguments]) == 2
    assert "there are no held-out examples" in capsys.readouterr().err


# Ensembles


def test_ensemble(tmp_path, capsys):
    first, second = save_model(tmp_path / "cpo", seed=0), save_model(tmp_path / "mle", seed=1)
    out = tmp_path / "both"
    assert main(["ensemble", first, second, str(out), "--alpha", "0.25"]) == 0
    mixed, one, two = weights(out), weights(first), weights(second)
    for name in mixed:
        torch.testing.assert_close(mixed[name], 0.25 * one[name] + 0.75 * two[name], rtol=0, atol=1e-7)
    assert main(["ensemble", first, second, str(out), "--alpha", "2"]) == 2
    assert "alpha must be in [0, 1], got 2.0" in capsys.readouterr().err
    assert main(["ensemble", first, str(tmp_path / "none"), str(out)]) == 2
    with pytest.raises(SystemExit) as end:
        main(["ensemble", "--help"])
    assert end.value.code == 0
    assert "cpo-kernels ensemble runs/cpo runs/mle runs/both --alpha 0.5" in capsys.readouterr().out


# Recipes

RECIPES = sorted(ROOT.glob("examples/recipes/*.yaml"))


def test_recipes_write_where_git_looks_away():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    for recipe in RECIPES:
        output = Path(yaml.safe_load(recipe.read_text(encoding="utf-8"))["output_dir"])
        assert f"/{output.parts[0]}/" in ignored


def test_there_is_a_recipe_for_each_of_the_papers_settings():
    names = [path.stem for path in RECIPES]
    assert names == ["gpt2-xl-dolly", "gpt2-xl-wikipedia", "open-llama-3b-dolly", "open-llama-3b-wikipedia"]


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_recipes_run_dry(recipe, tmp_path, capsys, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", None)  # whoever asks the hub fails
    assert main(["train", str(recipe), "--tiny", "--disable_tqdm", "true"]) == 0
    out = tmp_path / "runs" / f"{recipe.stem}-tiny"
    family = "gpt2" if recipe.stem.startswith("gpt2") else "llama"
    assert json.loads((out / "config.json").read_text())["model_type"] == family
    metrics = json.loads((out / "all_results.json").read_text())
    kinds = {name.partition("/")[2] for name in metrics if name.startswith("eval_accuracy/")}
    assert kinds == ({"autoregressive"} if recipe.stem.endswith("dolly") else {"batch", "mean_field", "truncation"})
    assert main(["evaluate", str(recipe), "--tiny", "--disable_tqdm", "true"]) == 0
    assert (out / "evaluation" / "report.md").is_file()


def test_conversations_run_dry(tmp_path, monkeypatch, capsys):
    """Preferences among several answers; the tokenizer of a dry run has a chat template."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What color is the {thing}?"}],
            "chosen": [{"role": "assistant", "content": "Blue."}],
            "rejected": [[{"role": "assistant", "content": "Red."}], [{"role": "assistant", "content": "Square."}]],
            "ranks": [1, 2],
        }
        for thing in ("sky", "sea", "car", "door")
    ]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(tmp_path / "run.yaml", model="some/name", tiny_model={"model_type": "llama"}, tiny=True)
    arguments = ["--data", "chat.jsonl", "--negatives_file", "more.parquet"]
    assert main(["train", config, *arguments[:2]]) == 0
    assert main(["negatives", config, *arguments]) == 0
    assert "wrote 8 negatives of 4 examples to more.parquet" in capsys.readouterr().out
    assert main(["train", config, *arguments]) == 0


def test_a_file_stands_in_for_the_hub(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.load_dataset", None)
    values = {"data": "some/data", "tiny_data": write_examples(tmp_path / "data.jsonl"), "tiny": True}
    config = write_config(tmp_path / "run.yaml", model="some/name", tiny_model={"model_type": "qwen3"}, **values)
    assert main(["train", config]) == 0
    assert json.loads((tmp_path / "run-tiny" / "config.json").read_text())["model_type"] == "qwen3"


def test_a_recipe_runs_dry_with_negatives_ahead_of_time(tmp_path, monkeypatch, capsys):
    """The two commands that the recipe's comment names."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    recipe = str(RECIPES[0])
    arguments = ["--tiny", "--disable_tqdm", "true", "--negatives_file", "runs/negatives.parquet"]
    assert main(["negatives", recipe, *arguments, "--negatives_ranking", "similarity"]) == 0
    assert main(["train", recipe, *arguments, "--num_autoregressive_negatives", "0", "--ranking", "none"]) == 0
    assert "saved to runs/gpt2-xl-dolly-tiny" in capsys.readouterr().out
