"""Commands given again: a finished run, a finished file, an evaluation of what was trained on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import yaml
from cli_models import save_model, write_config, write_examples
from processes import run_script
from project import SUPPORT
from transformers import AutoModelForCausalLM

from cpo_kernels.__main__ import main
from cpo_kernels.negatives.redaction import without_credentials, without_secrets
from cpo_kernels.trainer.files import RECORD

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    return {"model": save_model(folder / "model"), "data": write_examples(folder / "data.jsonl")}


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory):
    """A finished run of two steps with a checkpoint at each, which no test changes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", write_config(folder / "run.yaml", **shared, save_steps=1)]) == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, and the configuration that made it."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def config(shared, tmp_path):
    return lambda **values: write_config(tmp_path / "run.yaml", **(shared | {"save_steps": 1} | values))


def snapshot(folder) -> dict:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def weights(path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


HARMLESS = [[], ["--logging_steps", "1"], ["--save_steps", "2"], ["--max_steps", "1"], ["--eval_generations", "3"]]


@pytest.mark.parametrize("arguments", HARMLESS, ids=" ".join)
@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_finished_run_is_left_alone(run, config, capsys, arguments, checkpoints):
    if not checkpoints:
        for number in (1, 2):
            shutil.rmtree(run / f"checkpoint-{number}")
    before = snapshot(run)
    assert main(["train", config(), *arguments]) == 0
    assert "has finished after 2 of 2 steps: nothing is changed" in capsys.readouterr().out
    assert snapshot(run) == before


def test_a_run_that_an_older_version_finished_is_left_alone(run, config, capsys):
    (run / RECORD).unlink()
    before = snapshot(run)
    assert main(["train", config()]) == 0
    assert "has finished" in capsys.readouterr().out
    assert snapshot(run) == before


OTHER = {
    "beta": ["--beta", "0.2"],
    "num_batch_negatives": ["--num_batch_negatives", "3"],
    "learning_rate": ["--learning_rate", "0.1"],
    "objective": ["--objective", "simpo"],
    "max_examples": ["--max_examples", "20"],
    "lora_r": ["--lora_r", "2"],
}


@pytest.mark.parametrize("name", OTHER)
def test_other_settings_are_not_written_over_a_finished_run(run, config, capsys, name):
    before = snapshot(run)
    assert main(["train", config(), *OTHER[name]]) == 2
    said = capsys.readouterr().err
    assert "has finished, with other settings: " in said and f"{name}: " in said and "--resume none" in said
    assert snapshot(run) == before


def test_more_steps_are_taken(run, config, capsys):
    assert main(["train", config(), "--max_steps", "3"]) == 0
    said = capsys.readouterr()
    assert f"going on from {run / 'checkpoint-2'}" in said.out
    assert "warning: max_steps: 2 before, 3 now" in said.err
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 3


def test_more_epochs_are_taken(config, tmp_path, capsys):
    path = config(max_steps=-1, num_train_epochs=1)
    for arguments in ([], ["--num_train_epochs", "2"]):
        assert main(["train", path, *arguments]) == 0
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 12
    assert "going on from" in capsys.readouterr().out
    assert main(["train", path, "--num_train_epochs", "2"]) == 0
    assert "has finished after 12 of 12 steps" in capsys.readouterr().out


def test_steps_in_place_of_epochs_and_back(run, config, capsys):
    """Two steps of six are a third of an epoch."""
    for arguments, more in (["--num_train_epochs", "0.3"], False), (["--num_train_epochs", "0.5"], True):
        assert main(["train", config(max_steps=-1), *arguments]) == 0
        said = capsys.readouterr().out
        assert ("going on from" in said) == more and ("has finished" in said) != more
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 3


def test_more_steps_need_a_checkpoint(run, config, capsys):
    for number in (1, 2):
        shutil.rmtree(run / f"checkpoint-{number}")
    before = snapshot(run)
    assert main(["train", config(), "--max_steps", "3"]) == 2
    assert "left no checkpoint to take more from" in capsys.readouterr().err
    assert snapshot(run) == before


@pytest.mark.parametrize("damage", ["missing", "cut", "killed"])
def test_a_model_that_is_not_whole_is_made_again_without_a_step(run, config, trained, capsys, damage):
    """Killed: after the last checkpoint and before the model was saved."""
    path = run / "model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.unlink()
    if damage == "killed":
        (run / RECORD).unlink()
        (run / "trainer_state.json").unlink()
    assert main(["train", config()]) == 0
    assert f"going on from {run / 'checkpoint-2'}" in capsys.readouterr().out
    assert all(torch.equal(value, weights(trained)[name]) for name, value in weights(run).items())
    assert "train_loss" not in json.loads((run / "all_results.json").read_text())
    assert main(["train", config()]) == 0
    assert "has finished" in capsys.readouterr().out


def test_a_run_begins_anew_when_asked(run, config, capsys):
    assert main(["train", config(), "--resume", "none", "--learning_rate", "0.05"]) == 0
    assert "going on" not in capsys.readouterr().out
    assert json.loads((run / RECORD).read_text())["run"]["settings"]["learning_rate"] == 0.05


def test_what_was_passed_over_is_said(run, config, capsys):
    (run / RECORD).unlink()
    (run / "trainer_state.json").unlink()
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    assert main(["train", config()]) == 0
    said = capsys.readouterr()
    assert f"going on from {run / 'checkpoint-1'}" in said.out
    assert f"warning: {run / 'checkpoint-2'} is passed over: it has no optimizer" in said.err


def test_state_that_is_lacking_is_an_error_unless_it_is_allowed(run, config, capsys):
    (run / RECORD).unlink()
    (run / "trainer_state.json").unlink()
    for number in (1, 2):
        (run / f"checkpoint-{number}" / "rng_state.pth").unlink()
    before = snapshot(run)
    for arguments in ([], ["--resume", str(run / "checkpoint-1")]):
        assert main(["train", config(), *arguments]) == 2
        assert "no random generators" in capsys.readouterr().err
    assert snapshot(run) == before
    assert main(["train", config(), "--resume", str(run / "checkpoint-1"), "--allow-partial-resume"]) == 0
    assert "the run does not go on bit for bit" in capsys.readouterr().err


def test_half_a_first_checkpoint_begins_anew(config, tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    assert main(["train", config()]) == 0
    said = capsys.readouterr()
    assert "checkpoint-1 is passed over" in said.err and "going on" not in said.out


def test_changed_data_and_settings_stop_a_run(run, config, shared, tmp_path, capsys):
    (run / RECORD).unlink()
    (run / "trainer_state.json").unlink()
    shutil.rmtree(run / "checkpoint-2")
    lines = Path(shared["data"]).read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(reversed(lines)))
    changed = ["--data", str(tmp_path / "other.jsonl"), "--beta", "0.2"]
    before = snapshot(run)
    assert main(["train", config(), *changed]) == 2
    said = capsys.readouterr().err
    assert "the same prompts and completions in another order; beta: 0.1 before, 0.2 now" in said
    assert snapshot(run) == before
    assert main(["train", config(), *changed, "--allow_changed_resume"]) == 0
    assert f"going on from {run / 'checkpoint-1'}" in capsys.readouterr().out


# Evaluation


@pytest.mark.parametrize("checkpoint", [None, "checkpoint-2"])
def test_examples_that_were_trained_on_are_told(run, config, capsys, checkpoint):
    arguments = ["--eval_fraction", "0.25", "--eval_generations", "0"]
    arguments += ["--checkpoint", str(run / checkpoint)] if checkpoint else []
    assert main(["evaluate", config(), *arguments]) == 0
    assert "was trained on 6 of these 6 examples" in capsys.readouterr().err
    assert json.loads((run / "evaluation" / "report.json").read_text())["trained_on"] == 6
    assert "was trained on 6 of these 6 examples" in (run / "evaluation" / "report.md").read_text()


def test_examples_that_were_held_out_are_not(config, tmp_path, capsys):
    path = config(eval_fraction=0.25)
    assert main(["train", path]) == 0
    assert main(["evaluate", path, "--eval_generations", "0"]) == 0
    assert "trained on" not in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text())["trained_on"] == 0


def test_evaluation_of_other_data_counts_what_it_shares_with_training(run, config, tmp_path, capsys):
    (tmp_path / "some.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*tiny_models.examples(2), *tiny_models.examples(3, seed=9)])
    )
    assert main(["evaluate", config(), "--eval_data", str(tmp_path / "some.jsonl"), "--eval_generations", "0"]) == 0
    assert "was trained on 2 of these 5 examples" in capsys.readouterr().err


def test_an_older_run_is_judged_by_its_configuration(run, config, capsys):
    (run / "trained_examples.npy").unlink()
    arguments = ["--eval_fraction", "0.25", "--eval_generations", "0"]
    assert main(["evaluate", config(), *arguments]) == 0
    assert "was trained with eval_fraction=0, not 0.25" in capsys.readouterr().err
    kept = yaml.safe_load((run / "cpo_kernels.yaml").read_text())
    (run / "cpo_kernels.yaml").write_text(yaml.safe_dump(kept | {"eval_fraction": 0.25}))
    assert main(["evaluate", config(), *arguments]) == 0
    assert "warning" not in capsys.readouterr().err


def test_trained_examples_are_known_by_their_tokens(run):
    known = np.load(run / "trained_examples.npy")
    assert known.dtype == np.uint64 and len(known) == len(set(known.tolist())) == 24


@pytest.mark.parametrize("command", ["evaluate", "ensemble"])
def test_weights_that_are_cut_off_name_their_file(run, config, capsys, command):
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    arguments = {
        "evaluate": [config(), "--eval_fraction", "0.25", "--eval_generations", "0"],
        "ensemble": [str(run), str(run), str(run / "both")],
    }
    assert main([command, *arguments[command]]) == 2
    said = capsys.readouterr().err
    (last,) = said.splitlines()[-1:]
    assert last.startswith(f"cpo-kernels {command}: {path} has ") and last.endswith("copy or train the model again")
    assert "Traceback" not in said


# Secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pass@host:8000/v1", "http://host:8000/v1"),
        ("https://token@host/v1", "https://host/v1"),
        ("https://u:p@ss@host/v1?a=b@c", "https://host/v1?a=b@c"),
        ("hf://u:p@host/x and s3://k:v@h", "hf://host/x and s3://h"),
        ("https://host/v1?api_key=abc&n=1", "https://host/v1?api_key=&n=1"),
        ("https://host/v1?n=1&access_token=abc#f", "https://host/v1?n=1&access_token=#f"),
        ("mail me@host about http://host/a@b", "mail me@host about http://host/a@b"),
        ("plain", "plain"),
    ],
)
def test_urls_lose_their_credentials(text, shown):
    assert without_credentials(text) == shown


def test_secrets_are_left_out_at_any_depth():
    values = {"hub_token": "x", "API_KEY": "x", "a": [{"password": "x", "b": ("http://u:p@h", 1)}], "n_tokens": 3}
    assert without_secrets(values) == {"a": [{"b": ("http://h", 1)}], "n_tokens": 3}


def test_no_secret_of_a_configuration_reaches_output_dir(config, tmp_path):
    secrets = {"hub_token": "s3cr3t", "autoregressive_url": "http://me:s3cr3t@host/v1", "autoregressive_model": "m"}
    secrets |= {"judge_url": "https://host/v1?api_key=s3cr3t", "fsdp_config": {"api_key": "s3cr3t"}}
    assert main(["train", config(**secrets)]) == 0
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file() and b"s3cr3t" in p.read_bytes()]
    kept = yaml.safe_load((tmp_path / "run" / "cpo_kernels.yaml").read_text())
    assert (kept["autoregressive_url"], kept["judge_url"]) == ("http://host/v1", "https://host/v1?api_key=")


# Two runs at once


def test_two_runs_share_a_cache_of_reference_scores(shared, tmp_path):
    cache = {"reference": "precomputed", "resample_negatives": False, "reference_cache": str(tmp_path / "cache")}
    runs = [write_config(tmp_path / f"run{i}.yaml", **shared, **cache, save_strategy="no") for i in range(2)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "cpo_kernels", "train"]
    started = [subprocess.Popen([*command, run], env=environment, stderr=subprocess.PIPE, text=True) for run in runs]
    for process in started:
        assert process.wait() == 0, process.stderr.read()
    assert len([*(tmp_path / "cache").iterdir()]) == 1
    first, second = (weights(tmp_path / f"run{i}") for i in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_two_processes_go_on_where_they_were(shared, tmp_path):
    """To the weights of two processes that were not interrupted; one process is another run."""
    values = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "dataloader_num_workers": 0}
    config = write_config(tmp_path / "run.yaml", **shared, **values)
    run = tmp_path / "run"
    command = SUPPORT / "command_worker.py", "train", config
    run_script(*command, processes=2)
    whole = weights(run)
    record = json.loads((run / "checkpoint-2" / RECORD).read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= record["files"].keys()
    (run / "model.safetensors").unlink()
    (run / "checkpoint-4" / "rng_state_1.pth").unlink()
    said = run_script(*command, processes=2)
    assert said.count("checkpoint-4 is passed over: it has no random generators") == 1
    assert said.count(f"going on from {run / 'checkpoint-2'}") == 1
    assert all(torch.equal(value, weights(run)[name]) for name, value in whole.items())
    assert main(["train", config, "--resume", str(run / "checkpoint-2"), "--allow_partial_resume"]) == 2
