"""Whole runs: killed and resumed, with adapters, with checkpointed activations, and the rest of what Trainer offers."""

from __future__ import annotations

import copy
import json
import signal
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from killed_runs import SURVIVOR
from processes import start_script
from project import SUPPORT
from safetensors.torch import load_file
from trainer_runs import parameters, steps, trainer
from trainer_steps import NONE, candidates, dense_logps, micro_batch

from cpo_kernels import contrastive_loss
from cpo_kernels.trainer.files import last_complete_checkpoint

pytestmark = pytest.mark.cpu


def test_a_run_killed_in_the_middle_ends_as_if_nothing_had_happened(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = trainer(tmp_path / "whole", **SURVIVOR)
    whole.train()
    killed = tmp_path / "killed"
    process = start_script(SUPPORT / "killed_worker.py", str(killed), output=tmp_path / "output.txt")
    deadline = time.monotonic() + 120
    while last_complete_checkpoint(killed) is None and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
    resumed = trainer(killed, **SURVIVOR)
    resumed.train(resume_from_checkpoint=True)
    torch.set_num_threads(threads)
    for name, value in parameters(whole).items():
        assert torch.equal(parameters(resumed)[name], value), name
    assert steps(resumed) == steps(whole)


def test_half_a_checkpoint_is_passed_over(tmp_path):
    run = trainer(tmp_path, **SURVIVOR)
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        run.train(resume_from_checkpoint=True)
    run.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    resumed = trainer(tmp_path, **SURVIVOR)
    resumed.train(resume_from_checkpoint=True)
    assert steps(resumed) == steps(run)


# Adapters


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["body", "body and head"])
def test_the_reference_of_adapters_is_the_model_without_them(tmp_path, targets):
    base = tiny_models.llama()
    model = tiny_models.adapted(copy.deepcopy(base), target_modules=targets)
    dense = copy.deepcopy(model)
    run = trainer(tmp_path, model, beta=0.5, **(NONE | {"num_batch_negatives": 2}))
    assert run.ref_model is None and run.reference.adapters
    inputs = micro_batch(run, [0, 3])
    out = run._forward(run.model, inputs)
    ratios = []
    for index, group in zip((0, 3), candidates(run, inputs), strict=True):
        prompt = run.train_dataset.prompts[index]
        ratios.append(torch.stack([dense_logps(dense, prompt, c) - dense_logps(base, prompt, c) for c in group]))
    torch.testing.assert_close(out.rewards, 0.5 * torch.cat(ratios), rtol=1e-4, atol=1e-5)
    want = contrastive_loss(torch.stack(ratios), beta=0.5)
    torch.testing.assert_close(out.contrastive_loss, want, rtol=1e-5, atol=1e-6)


def test_adapters_alone_are_trained_saved_and_resumed(tmp_path):
    kwargs = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, tiny_models.adapted(), **kwargs)
    start = parameters(whole)
    whole.train()
    moved = {name for name, value in parameters(whole).items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if "lora_" in name}
    assert set(load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors"))
    resumed = trainer(tmp_path, tiny_models.adapted(), **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in parameters(whole).items():
        assert torch.equal(parameters(resumed)[name], value), name
    with pytest.raises(ValueError, match="reference of this trainer is not the one"):
        other = trainer(tmp_path, tiny_models.adapted(tiny_models.llama(seed=1)), **kwargs)
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# What comes with transformers.Trainer


@pytest.mark.parametrize("sharing", ["off", "required"])
def test_checkpointed_activations_give_the_same_run(tmp_path, sharing):
    runs = []
    for checkpointing in (False, True):
        options = {"gradient_checkpointing": checkpointing, "prefix_sharing": sharing, "optim": "sgd"}
        runs.append(trainer(tmp_path, num_mean_field_negatives=1, **options))
        runs[-1].train()
    for name, value in parameters(runs[0]).items():
        torch.testing.assert_close(parameters(runs[1])[name], value, rtol=1e-5, atol=1e-6)


def test_the_best_model_by_an_evaluated_metric_is_kept(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy/batch", "greater_is_better": True}
    run = trainer(tmp_path, eval_dataset=tiny_models.examples(8, seed=5), **options)
    run.train()
    seen = [entry["eval_accuracy/batch"] for entry in run.state.log_history if "eval_accuracy/batch" in entry]
    assert run.state.best_metric == max(seen)
    best = load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(parameters(run)[name], value) for name, value in best.items())


def test_tensorboard_gets_every_metric(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    run = trainer(tmp_path, report_to="tensorboard")
    run.train()
    (file,) = (tmp_path / "logs").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    for name in ("loss", "nll_loss", "contrastive_loss", "accuracy/truncation", "rewards/chosen"):
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx([entry[name] for entry in steps(run)], rel=1e-6)


def test_progress_is_shown_and_the_log_is_kept(tmp_path, capsys):
    run = trainer(tmp_path, disable_tqdm=False, save_strategy="steps", save_steps=3)
    run.train()
    assert "3/3" in capsys.readouterr().err
    history = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [entry["loss"] for entry in history if "loss" in entry] == [entry["loss"] for entry in steps(run)]
