"""CPOTrainer under DeepSpeed's ZeRO-2 and ZeRO-3, two gloo processes against one without it: `make test-deepspeed`."""

from __future__ import annotations

import deepspeed_cases
import pytest
import torch
from deepspeed_cases import CASES, NEEDS_DEEPSPEED, ROUNDED, make_trainer
from processes import run_script
from project import SUPPORT
from safetensors.torch import load_file
from trainer_runs import parameters, steps

from cpo_kernels.__main__ import main

pytestmark = [pytest.mark.cpu, NEEDS_DEEPSPEED]
TIMES = {"total_flos", "runtime", "samples_per_second", "steps_per_second", "train_runtime", "epoch"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    deepspeed_cases.save_inputs(folder)
    run_script(SUPPORT / "deepspeed_worker.py", str(folder), processes=2)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def measured(entry: dict[str, float], without: str = "-") -> dict[str, float]:
    """Return the metrics of a step or an evaluation, without times and those whose names begin with ``without``."""
    named = {name: value for name, value in entry.items() if not name.startswith(without)}
    return {name: value for name, value in named.items() if name.removeprefix("eval_") not in TIMES}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name, runs, folder, tmp_path):
    case = CASES[name]
    for run in runs:
        assert not isinstance(run[name], str), run[name]
        assert run[name]["sharded"] == (case.stage == 3)
    one = make_trainer(case, folder, tmp_path, per_device_train_batch_size=8)
    one.train()
    evaluation = measured(one.evaluate())
    assert len(evaluation) > 8
    for run in (run[name] for run in runs):
        wanted, got = steps(one), run["steps"]
        assert len(wanted) == len(got) == one.args.max_steps
        for step, (want, have) in enumerate(zip(wanted, got, strict=True)):
            # With the model itself as reference, the first accuracies would compare roundings of zero.
            without = "accuracy" if step == 0 and not case.given_reference else "-"
            assert measured(have, without) == pytest.approx(measured(want, without), rel=1e-5, abs=1e-6)
        assert measured(run["evaluation"]) == pytest.approx(evaluation, rel=1e-5, abs=1e-6)
        for key, value in parameters(one).items():
            torch.testing.assert_close(
                run["parameters"][key], value, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )
    if case.ensemble:
        whole = load_file(tmp_path / "ensemble" / "model.safetensors")
        torch.testing.assert_close(runs[0]["ensemble"], whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROUNDED)
def test_in_bfloat16_the_reference_is_rounded_as_the_model_is(name, runs):
    """And log-likelihoods are not rounded at all: one of -40 would be off by 0.1."""
    for run in runs:
        assert not isinstance(run[name], str), run[name]
        (step,) = run[name]["steps"]
        assert abs(step["rewards/chosen"]) < 1e-4
        assert abs(step["rewards/rejected"]) < 1e-4


def test_the_command(folder, tmp_path):
    """It loads the model as shards and saves it whole."""
    given = ["--output_dir", str(tmp_path), "--per_device_train_batch_size", "8"]
    assert main(["train", str(folder / "CONFIG.yaml"), *given]) == 0
    saved, wanted = (load_file(where / "model.safetensors") for where in (folder / "command", tmp_path))
    assert saved.keys() == wanted.keys()
    torch.testing.assert_close(saved, wanted, rtol=1e-5, atol=1e-6)
