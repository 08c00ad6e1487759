"""What a checkpoint holds, which one a run goes on from, and what it refuses to go on with."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import tiny_models
import torch
from killed_runs import SURVIVOR as RUN
from trainer_runs import config, parameters, steps, trainer

from cpo_kernels.trainer.files import RECORD, condition, last_complete_checkpoint, whole_file
from cpo_kernels.trainer.run_record import differences, settings_of

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints at steps 2, 4 and 6, which no test changes, and what came of it."""
    folder = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)  # as tests have, which begin after it: sums depend on how many there are
    run = trainer(folder, **RUN)
    run.train()
    return folder, parameters(run), steps(run)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of its directory, killed after step 4."""
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    return tmp_path / "run"


def assert_goes_on(folder: Path, finished, step: int, **options) -> None:
    """The run goes on from this step to the end of the uninterrupted one, bit for bit."""
    resumed = trainer(folder, **(RUN | options))
    assert resumed.find_checkpoint() == str(folder / f"checkpoint-{step}")
    resumed.train(resume_from_checkpoint=True)
    for name, value in finished[1].items():
        assert torch.equal(parameters(resumed)[name], value), name
    assert steps(resumed) == finished[2]


def files_of(checkpoint: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.iterdir())


NEEDED = ["autoregressive-0.json", "config.json", "generation_config.json", "model.safetensors", "optimizer.pt"]
NEEDED += ["rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"]
NEEDED += ["tokenizer.json", "tokenizer_config.json"]


def test_every_file_is_recorded(finished):
    checkpoint = finished[0] / "checkpoint-4"
    record = json.loads((checkpoint / RECORD).read_text())
    assert sorted([*record["files"], RECORD]) == files_of(checkpoint)
    assert set(NEEDED) <= record["files"].keys()
    assert all(record["files"][name]["bytes"] == (checkpoint / name).stat().st_size for name in record["files"])
    assert (record["step"], record["run"]["settings"]["beta"]) == (4, 0.1)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
@pytest.mark.parametrize("name", [*NEEDED, RECORD])
def test_whatever_is_wrong_with_a_checkpoint_it_is_passed_over(folder, name, damage):
    """But for a record that is missing: the files are then those that a checkpoint without one has."""
    path = folder / "checkpoint-4" / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    expected = 4 if (name, damage) == (RECORD, "missing") else 2
    if (name, damage) == (RECORD, "flipped"):  # one digit of a hash, or of what the run was
        return
    assert last_complete_checkpoint(folder) == str(folder / f"checkpoint-{expected}")
    said: list[str] = []
    assert trainer(folder, **RUN).find_checkpoint(say=said.append) == str(folder / f"checkpoint-{expected}")
    if expected == 2:
        assert f"{folder / 'checkpoint-4'} is passed over: " in said[0]
        assert name in said[0] or damage == "missing"
    else:
        assert "has no record of its files, settings and data" in said[0]


def test_a_run_goes_on_from_the_newest_that_is_whole(folder, finished):
    assert_goes_on(folder, finished, 4)
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    assert_goes_on(folder, finished, 2)


def test_what_lacks_state_is_refused_unless_it_is_allowed(folder):
    shutil.rmtree(folder / "checkpoint-2")
    checkpoint = folder / "checkpoint-4"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "autoregressive-0.json"):
        (checkpoint / name).unlink()
    message = "no optimizer, no learning-rate schedule, no random generators, no negatives written ahead"
    for asked in (True, str(checkpoint)):
        with pytest.raises(ValueError, match=f"{message}.*allow_partial_resume goes on without"):
            trainer(folder, **RUN).train(resume_from_checkpoint=asked)
        run = trainer(folder, **RUN, allow_partial_resume=True)
        said: list[str] = []
        assert run.find_checkpoint(asked, say=said.append) == str(checkpoint)
        assert "the run does not go on bit for bit" in said[0]
        run.train(resume_from_checkpoint=asked)
        assert run.state.global_step == 6
        shutil.rmtree(folder / "checkpoint-6")


def test_a_damaged_checkpoint_is_refused_even_so(folder):
    path = folder / "checkpoint-4" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint-4 is damaged: optimizer.pt has 1000 of \d+ bytes; go on from"):
        trainer(folder, **RUN, allow_partial_resume=True).train(resume_from_checkpoint=str(path.parent))


def test_a_checkpoint_of_the_model_alone_is_no_place_to_go_on_from(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trainer(tmp_path, **options).train()
    with pytest.raises(ValueError, match="checkpoint-2 is passed over: it has no optimizer, no learning-rate schedule"):
        trainer(tmp_path, **options).train(resume_from_checkpoint=True)
    run = trainer(tmp_path, **options, allow_partial_resume=True)
    assert run.find_checkpoint() == str(tmp_path / "checkpoint-2")


def without_record(checkpoint: Path) -> Path:
    """The checkpoint as older versions wrote it."""
    (checkpoint / RECORD).unlink()
    return checkpoint


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_older_checkpoints_are_judged_by_names_and_form(folder, name, damage):
    path = without_record(folder / "checkpoint-4") / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
        assert path.suffix not in (".pt", ".pth") or not zipfile.is_zipfile(path)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    assert trainer(folder, **RUN).find_checkpoint() == str(folder / "checkpoint-2")


def test_a_run_goes_on_from_an_older_checkpoint(folder, finished):
    without_record(folder / "checkpoint-4")
    assert_goes_on(folder, finished, 4)


def test_weights_of_which_a_part_is_missing_are_damaged(folder):
    checkpoint = without_record(folder / "checkpoint-4")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    assert condition(checkpoint).damaged == ["model-00002-of-00002.safetensors is missing"]


def test_what_was_never_finished_is_not_there(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"half")
    run = trainer(tmp_path, **RUN)
    assert run.find_checkpoint() is None
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"checkpoint-2 is not a checkpoint: it has no trainer_state.json"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_files_that_another_run_left_do_not_count(folder, finished):
    """Such as negatives of a fourth process, which the resumed run would have read as its own."""
    stale = folder / "checkpoint-6"
    stale.mkdir()
    (stale / "autoregressive-3.json").write_text("[[6, 0, [[1]]]]")
    (stale / "trainer_state.json").write_text("{}")
    trainer(folder, **RUN).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert "autoregressive-3.json" not in files_of(stale)
    assert last_complete_checkpoint(folder) == str(stale)


def test_a_run_at_its_end_takes_no_step(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    run = trainer(tmp_path / "run", **RUN)
    result = run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 6 and "train_loss" not in result.metrics
    assert all(torch.equal(parameters(run)[name], value) for name, value in finished[1].items())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_more_steps_go_on(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    run, said = trainer(tmp_path / "run", **(RUN | {"max_steps": 8})), []
    run.train(resume_from_checkpoint=run.find_checkpoint(say=said.append))
    assert run.state.global_step == 8
    assert said == ["max_steps: 6 before, 8 now; the learning rate follows the new length from here on"]


# Settings and data

CHANGES = {
    "beta": 0.2,
    "num_batch_negatives": 1,
    "num_truncation_negatives": 1,
    "learning_rate": 1e-3,
    "seed": 7,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "margin": 1.0,
    "alpha": 0.25,
    "truncation_weight": 2.0,
    "lr_scheduler_type": "constant",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "length_normalized": True,
    "max_length": 30,
    "prefix_sharing": "off",
    "autoregressive_every": 2,
    "ignore_data_skip": True,
    "optim": "sgd",
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_settings_stop_a_run(folder, name):
    value = CHANGES[name]
    with pytest.raises(
        ValueError, match=rf"is not the one that wrote .*checkpoint-4: .*{name}: .* before, .* now"
    ) as e:
        trainer(folder, **(RUN | {name: value})).find_checkpoint()
    assert "confirm with allow_changed_resume" in str(e.value)
    said: list[str] = []
    trainer(folder, **(RUN | {name: value}), allow_changed_resume=True).find_checkpoint(say=said.append)
    assert said and all("changed as allowed" in text for text in said)


def test_differences_are_listed_together(folder):
    with pytest.raises(ValueError, match=r"beta: 0.1 before, 0.2 now; learning_rate: 0.01 before, 0.001 now"):
        trainer(folder, **RUN, beta=0.2, learning_rate=1e-3).find_checkpoint()


def test_what_does_not_matter_passes(folder, finished, tmp_path):
    harmless = {"logging_first_step": True, "save_total_limit": 5, "run_name": "other", "disable_tqdm": True}
    harmless |= {"per_device_eval_batch_size": 3, "dataloader_num_workers": 0, "log_on_each_node": False}
    harmless |= {"eval_delay": 2, "reference_cache": str(tmp_path / "cache"), "allow_partial_resume": True}
    assert_goes_on(folder, finished, 4, **harmless)


def test_a_setting_counts_unless_the_table_says_that_it_does_not(tmp_path):
    settings = settings_of(config(tmp_path))
    assert {"beta", "objective", "learning_rate", "backend", "bf16", "fsdp", "data_seed"} <= settings.keys()
    assert not {"logging_steps", "save_steps", "eval_steps", "hub_token", "output_dir"} & settings.keys()
    watched = settings_of(
        config(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1)
    )
    assert watched["eval_steps"] == 1


def shuffled(examples: list) -> list:
    return random.Random(1).sample(examples, len(examples))


DATA = {
    "order": (shuffled, "same prompts and completions in another order"),
    "fewer": (lambda rows: rows[:-1], "the training data is another: 16 examples before, 15 now"),
    "other": (
        lambda rows: [*rows[:-1], {"prompt": "the", "completion": " mat"}],
        "the training data is another: 16 .* 16",
    ),
    "negatives": (lambda rows: [row | {"negatives": [" the mat"]} for row in rows], "other negatives, ranks or kinds"),
}


@pytest.mark.parametrize(("change", "message"), DATA.values(), ids=DATA)
def test_changed_data_stop_a_run(folder, change, message):
    examples = change(tiny_models.examples(16))
    with pytest.raises(ValueError, match=message):
        trainer(folder, examples=examples, **RUN).train(resume_from_checkpoint=True)
    said: list[str] = []
    trainer(folder, examples=examples, **RUN, allow_changed_resume=True).find_checkpoint(say=said.append)
    assert len(said) == 1


def test_frozen_weights_under_adapters_are_the_same_without_a_reference_too(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "objective": "simpo"}
    trainer(tmp_path, tiny_models.adapted(), **options).train()
    trainer(tmp_path, tiny_models.adapted(), **options).find_checkpoint()
    other = tiny_models.llama()
    other.lm_head.weight.data[3, 3] += 1
    with pytest.raises(ValueError, match="the frozen weights under the adapters are not those"):
        trainer(tmp_path, tiny_models.adapted(other), **options).find_checkpoint()
    with pytest.raises(ValueError, match=r"model.default lora_alpha: 8 before, 3 now"):
        trainer(tmp_path, tiny_models.adapted(lora_alpha=3), **options).find_checkpoint()


def test_weights_that_change_before_training_are_the_reference_that_is_recorded(tmp_path):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    base = tiny_models.llama()
    run = trainer(tmp_path, tiny_models.adapted(base), **options)
    base.lm_head.weight.data[3, 3] += 1
    run.train()
    changed = tiny_models.llama()
    changed.lm_head.weight.data[3, 3] += 1
    trainer(tmp_path, tiny_models.adapted(changed), **options).find_checkpoint()
    with pytest.raises(ValueError, match="the reference of this trainer is not the one"):
        trainer(tmp_path, tiny_models.adapted(), **options).find_checkpoint()


def test_only_what_both_records_say_is_compared():
    before, now = {"settings": {"max_steps": 3, "gone": 1}, "processes": 2}, {"settings": {"max_steps": 3, "new": 2}}
    assert differences(before, now | {"processes": 2}) == ([], [])
    assert differences(before, now | {"processes": 1}) == (["processes: 2 before, 1 now"], [])


def test_a_run_older_than_the_mean_field_fraction_replaced_every_token():
    before, now = ({"settings": {"num_mean_field_negatives": 2} | own} for own in ({}, {"mean_field_fraction": 0.25}))
    assert differences(before, now) == (["mean_field_fraction: 1.0 before, 0.25 now"], [])
    now["settings"]["mean_field_fraction"] = 1
    assert differences(before, now) == ([], [])
    without = {"num_mean_field_negatives": 0}
    assert differences({"settings": without}, {"settings": without | {"mean_field_fraction": 0.25}}) == ([], [])


# Files


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "scores"
    with whole_file(path) as first, whole_file(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_cache_names_itself(tmp_path, damage):
    options = {"reference": "precomputed", "resample_negatives": False, "reference_cache": str(tmp_path / "cache")}
    trainer(tmp_path, **options)
    (path,) = (tmp_path / "cache").iterdir()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data[:60] if damage == "cut" else data)
    with pytest.raises(ValueError, match=f"the reference scores in {path} .*; delete the file, and they are computed"):
        trainer(tmp_path, **options)
    path.unlink()
    trainer(tmp_path, **options)


def test_no_secret_reaches_the_disk(tmp_path):
    secrets = {"hub_token": "s3cr3t", "autoregressive_url": "http://me:s3cr3t@host/v1"}
    options = {"autoregressive_model": "m", "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    run = trainer(tmp_path, **options, **secrets)
    run.train()
    run.save_model()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.bin", RECORD} <= {path.name for path in files}
    assert not [path for path in files if b"s3cr3t" in path.read_bytes()]
    for file in files:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as parts:
                assert not any(b"s3cr3t" in parts.read(name) for name in parts.namelist())
    args = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (args.hub_token, args.autoregressive_url) == (None, "http://host/v1")
    assert "s3cr3t" not in f"{run.args} {run.args!r} {run.args.to_json_string()} {run.args.to_sanitized_dict()}"
    assert run.args.hub_token == "s3cr3t"  # which a push needs
