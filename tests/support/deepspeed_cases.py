"""What two processes train under DeepSpeed in deepspeed_worker.py, and one process without it in the test."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from cli_models import save_model, write_config, write_examples
from torch import nn
from trainer_runs import DISTRIBUTED, config, held_out
from transformers import AutoModelForCausalLM

from cpo_kernels import CPOTrainer
from cpo_kernels.trainer import EnsembleCallback

NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is no dependency and has no wheels: make test-deepspeed"
)
KEPT = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
SCORED = {"reference": "precomputed", "resample_negatives": False}
DATA_ALONE = {"optim": "sgd", "max_steps": 2, "beta": 0.5}


@dataclass(frozen=True)
class Case:
    """A run under ZeRO of some stage.

    Args:
        stage: of ZeRO.
        options: of the configuration.
        model: makes the model; None for one that is loaded, which transformers shards under ZeRO-3.
        given_reference: whether a reference is given; without one it is the model as it was at the start.
        examples: how many there are to train on.
        resumed: whether the run is interrupted after a step.
        ensemble: whether an ensemble is written at the end.
    """

    stage: int
    options: dict[str, Any] = field(default_factory=dict)
    model: Any = tiny_models.llama
    given_reference: bool = False
    examples: int = 16
    resumed: bool = False
    ensemble: bool = False


def trains_a_norm() -> nn.Module:
    """Make a model that trains more than its adapters."""
    model = tiny_models.adapted()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


CASES = {
    "every negative, ZeRO-2": Case(2, {**DISTRIBUTED, "resample_negatives": False}, given_reference=True),
    "every negative, ZeRO-3": Case(3, {**DISTRIBUTED, "resample_negatives": True}, given_reference=True, ensemble=True),
    "loaded and tied, ZeRO-2": Case(2, {**DATA_ALONE, **KEPT}, model=None, resumed=True),
    "loaded and tied, ZeRO-3": Case(3, {**DATA_ALONE, **KEPT}, model=None, resumed=True),
    "adapters, ZeRO-2": Case(2, DATA_ALONE, model=trains_a_norm),
    "adapters, ZeRO-3": Case(3, {**DATA_ALONE, "num_mean_field_negatives": 1}, model=tiny_models.adapted),
    # 17 examples: one process scores one more than the other.
    "scored before, ZeRO-3": Case(3, DATA_ALONE | SCORED, model=None, examples=17),
    "adapters scored before, ZeRO-3": Case(3, DATA_ALONE | SCORED, model=tiny_models.adapted),
}
# In bfloat16 a model and its reference, computed alike, agree before the first step.
ROUNDED = {
    f"{name}, ZeRO-{stage}": Case(stage, {"bf16": True, "max_steps": 1, **options})
    for stage in (2, 3)
    for name, options in (("frozen", {}), ("precomputed", SCORED))
}


def save_inputs(folder: Path) -> None:
    """Save the model that cases load, and what the command is given."""
    data = write_examples(folder / "data.jsonl")
    write_config(folder / "CONFIG.yaml", model=save_model(folder / "loaded", seed=4), data=data, optim="sgd")
    tiny_models.llama(seed=2).save_pretrained(folder / "other")
    (folder / "zero3.json").write_text(json.dumps(deepspeed_settings(3)))


def deepspeed_settings(stage: int) -> dict[str, Any]:
    """Return a configuration of DeepSpeed in the form that the documentation shows."""
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {name: "auto" for name in auto} | {
        "bf16": {"enabled": "auto"},
        # 0: no parameter is too small to be sharded.
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def make_trainer(case: Case, folder: Path, output: Path, **options: Any) -> CPOTrainer:
    """Make the trainer of a case in any number of processes."""
    args = config(output, **case.options, **options)  # first: transformers shards what is loaded after it
    load = AutoModelForCausalLM.from_pretrained
    made = load(folder / "loaded") if case.model is None else case.model()
    return CPOTrainer(
        made,
        args,
        train_dataset=tiny_models.examples(case.examples),
        eval_dataset=held_out(),
        processing_class=tiny_models.tokenizer(),
        ref_model=tiny_models.llama(seed=1) if case.given_reference else None,
        callbacks=[EnsembleCallback(load(folder / "other"), 0.3)] if case.ensemble else None,
    )
