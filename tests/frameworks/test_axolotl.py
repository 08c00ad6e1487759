"""axolotl's own `train` with the plugin and without: `make test-frameworks` installs axolotl and runs this file."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl", reason="needs axolotl: make test-frameworks")
# Read when what follows is imported: nothing is sent, and nothing is asked of a model hub.
os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
import tiny_models
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets, load_preference_datasets
from axolotl.integrations.base import PluginManager
from axolotl.train import train
from axolotl.utils.dict import DictDefault

from cpo_kernels.integrations import axolotl_trainers

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(1800)]
PLUGIN = "cpo_kernels.integrations.axolotl.FusedLossPlugin"
SETTINGS: dict[str, Any] = {
    "sequence_len": 64,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "num_epochs": 1,
    "learning_rate": 0.05,
    "optimizer": "sgd",  # Adam would turn the rounding of a gradient that is 0 into a step
    "lr_scheduler": "constant",
    "logging_steps": 1,
    "val_set_size": 0,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    "dataset_processes": 1,
    "seed": 1,
}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]}
TEXTS = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
FORMATS = {"prompt_format": "{prompt}", "chosen_format": "{chosen}", "rejected_format": "{rejected}"}
# What a run logs besides losses: time, memory, and what needs logits.
LEFT_OUT = ("runtime", "per_second", "memory", "flos", "entropy", "mean_token_accuracy", "tokens/", "ppl", "tps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with its tokenizer, and instructions and preferences of one word a token."""
    path = tmp_path_factory.mktemp("axolotl")
    tokenizer = tiny_models.tokenizer()
    tokenizer.save_pretrained(path / "model")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tiny_models.llama(**special).save_pretrained(path / "model")
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(tiny_models.WORDS, k=rng.randint(low, high)))

    sft = [{"instruction": text(2, 6), "input": "", "output": text(3, 9)} for _ in range(32)]
    pairs = [{"prompt": text(2, 6) + " ", "chosen": text(3, 9), "rejected": text(3, 9)} for _ in range(32)]
    for name, rows in (("sft", sft), ("pairs", pairs)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(folder: Path, **own: Any) -> DictDefault:
    """A configuration as a user's file has it, of SFT or, with ``rl``, of preferences."""
    name = "pairs" if own.get("rl") else "sft"
    kind = {"type": TEXTS | FORMATS, "split": "train"} if own.get("rl") else {"type": "alpaca"}
    data = {"path": str(folder / f"{name}.jsonl"), "ds_type": "json", **kind}
    paths = {"base_model": str(folder / "model"), "output_dir": str(folder / "out"), "datasets": [data]}
    paths["dataset_prepared_path"] = str(folder / f"prepared-{name}")
    return DictDefault(SETTINGS | paths | own)


def run(folder: Path, **own: Any) -> Any:
    """Return the trainer of a finished run."""
    PluginManager.get_instance().plugins.clear()
    cfg = load_cfg(settings(folder, **own))
    load = load_preference_datasets if cfg.rl else load_datasets
    torch.manual_seed(0)
    return train(cfg=cfg, dataset_meta=load(cfg=cfg, cli_args=TrainerCliArgs()))[2]


def logged(trainer: Any) -> list[dict[str, float]]:
    """Return what was logged; before anything is learned rewards are 0, and which is larger is rounding."""
    rows = trainer.state.log_history
    for row in rows:
        if abs(row.get("rewards/margins", 1.0)) < 1e-5:
            row.pop("rewards/accuracies")
    return [{name: value for name, value in row.items() if not any(p in name for p in LEFT_OUT)} for row in rows]


RUNS = {
    "sft": {},
    "sft, packed": {"sample_packing": True, "pad_to_sequence_len": True, "micro_batch_size": 1},
    "dpo": {"rl": "dpo", "rl_beta": 0.3},
    "ipo": {"rl": "ipo", "rl_beta": 0.3},
    "simpo": {"rl": "simpo", "rl_beta": 0.3, "simpo_gamma": 0.2, "cpo_alpha": 0.5},
    "dpo, precomputed": {"rl": "dpo", "rl_beta": 0.3, "precompute_ref_log_probs": True},
    "dpo, lora": {"rl": "dpo", "rl_beta": 0.3, **LORA},
    # Last: axolotl's kernels for adapters, of SFT, change the attention of all models that the process loads after it.
    "sft, lora": LORA,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_logs_what_it_logs_without_the_plugin(name, folder):
    stock, ours = run(folder, **RUNS[name]), run(folder, plugins=[PLUGIN], **RUNS[name])
    expected, found = logged(stock), logged(ours)
    assert len(expected) == SETTINGS["max_steps"] + 1
    assert isinstance(ours, type(stock)) and type(ours).__module__ == axolotl_trainers.__name__
    for before, after in zip(expected, found, strict=True):
        assert after == pytest.approx(before, rel=1e-4, abs=1e-5)
    weights = dict(ours.model.named_parameters())
    for key, value in stock.model.named_parameters():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"rl": "kto"}, "rl='kto' has no fused loss here; expected none, or one of dpo, ipo, simpo"),
        ({"chunked_cross_entropy": True}, "chunked_cross_entropy=True computes the loss otherwise"),
        ({"trainer_cls": "mine.Trainer"}, "trainer_cls='mine.Trainer' has a loss of its own"),
    ],
)
def test_refusals(own, message, folder):
    PluginManager.get_instance().plugins.clear()
    with pytest.raises(ValueError, match=message):
        load_cfg(settings(folder, plugins=[PLUGIN], **own))
