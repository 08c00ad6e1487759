"""What the tests of the commands start from: tiny models with their tokenizer, examples, configuration files."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_models
import yaml


def save_model(path: Path, seed: int = 0) -> str:
    """Save a GPT-2 and its tokenizer in one directory."""
    tokenizer = tiny_models.tokenizer()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_models.gpt2(seed, **special).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def write_examples(path: Path, count: int = 24, seed: int = 0) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_models.examples(count, seed)), encoding="utf-8")
    return str(path)


def write_config(path: Path, **values) -> str:
    """Write a configuration that trains for two steps, without any output to the terminal."""
    usual = {
        "output_dir": str(path.with_suffix("")),
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 32,
    }
    path.write_text(yaml.safe_dump(usual | values), encoding="utf-8")
    return str(path)
