"""What a sharded reference needs: as many passes in every process, shapes of the whole, numbers that nobody rounds.

The runs of two processes are in test_trainer.py (FSDP2) and test_trainer_deepspeed.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from trainer_runs import trainer
from transformers.integrations import deepspeed as of_transformers

from cpo_kernels.models.sharded import gathered, whole_shape
from cpo_kernels.trainer import precomputed, zero
from cpo_kernels.trainer.batch import ContrastBatch
from cpo_kernels.trainer.ensemble import check_alike

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("examples", [3, 16, 17])
def test_processes_score_in_as_many_passes(tmp_path, monkeypatch, examples):
    """Of 17 examples one process has 9, in batches of 8: the other makes a second pass too, and drops what it gives."""
    written, passes = [], []
    monkeypatch.setattr(precomputed, "gather_object", lambda own: written.extend(own) or own)
    for index in range(2):
        accelerator = SimpleNamespace(
            process_index=index, num_processes=2, is_local_main_process=False, is_main_process=False
        )
        calls = []

        def score(indices, calls=calls):
            assert len(indices) > 0
            calls.append(list(indices))
            return [torch.tensor([-float(i)]) for i in indices]

        precomputed._compute(tmp_path / "scores", examples, 8, score, accelerator, disable_tqdm=True)
        passes.append(len(calls))
    assert passes[0] == passes[1] == -(-examples // 16)
    assert sorted(written) == [(i, [-float(i)]) for i in range(examples)]


def test_a_reference_that_has_read_all_reads_it_again_where_others_may_have_to(tmp_path, monkeypatch):
    run = trainer(tmp_path, num_mean_field_negatives=1)
    batch = run._batches.build(run.train_dataset, [0, 1], 0, contrast=True)
    known = {"ref_logps": torch.zeros(len(batch.segments))}
    monkeypatch.setattr(ContrastBatch, "reference_tensors", lambda self: known)
    for synced in (False, True):
        run._negatives.sources.synced_gpus = synced
        assert ("ref_logps" in run._batches.inputs(batch, 2, 8)) == (not synced)


def test_log_likelihoods_are_not_rounded_on_their_way_to_the_device(tmp_path):
    run = trainer(tmp_path)
    run.is_deepspeed_enabled = True  # where Trainer casts what is floating point to the dtype of the model
    logps = torch.tensor([-123.456])
    inputs = run._prepare_input({"unread": {"ref_logps": logps}, "cu_tokens": [0, 4]})
    assert torch.equal(inputs["unread"]["ref_logps"], logps)
    assert inputs["unread"]["ref_logps"].dtype == torch.float32
    assert inputs["cu_tokens"] == [0, 4]


def test_an_emptied_parameter_has_the_shape_of_the_whole():
    emptied = torch.nn.Parameter(torch.empty(0))
    emptied.ds_shape = torch.Size([4, 3])
    assert whole_shape(emptied) == (4, 3)
    check_alike({"weight": emptied}, {"weight": torch.ones(4, 3)})
    with pytest.raises(ValueError, match=r"'weight' is torch.float32 \(4, 3\) in the first model and .* \(4, 2\)"):
        check_alike({"weight": emptied}, {"weight": torch.ones(4, 2)})
    with gathered(torch.ones(2)):  # nothing to bring
        pass


def test_a_reference_is_configured_as_the_model_without_what_trains_it():
    given = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR"},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": {}, "reduce_bucket_size": "auto", "overlap_comm": True},
    }
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=given)))
    found = zero._without_training(accelerator)
    assert found == {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "overlap_comm": True}}
    given["zero_optimization"]["stage"] = 2
    assert zero._without_training(accelerator)["zero_optimization"]["stage"] == 0
    assert "optimizer" in given


def test_models_beside_the_trained_one_are_loaded_whole():
    """An ensemble's other model and a sentence encoder are loaded in one process, and no engine runs them."""

    class Settings:
        def is_zero3(self):
            return True

    settings = Settings()  # kept: transformers refers to it weakly
    of_transformers.set_hf_deepspeed_config(settings)
    try:
        assert of_transformers.is_deepspeed_zero3_enabled()
        with pytest.raises(RuntimeError), zero.loading_whole():
            assert not of_transformers.is_deepspeed_zero3_enabled()
            raise RuntimeError
        assert of_transformers.is_deepspeed_zero3_enabled()
    finally:
        of_transformers.unset_hf_deepspeed_config()


def test_a_copy_keeps_values_and_ties():
    model = tiny_models.gpt2()
    copied = zero.copy_model(model)
    assert copied.lm_head.weight is copied.transformer.wte.weight
    assert all(torch.equal(a, b) and a is not b for a, b in zip(model.parameters(), copied.parameters(), strict=True))
