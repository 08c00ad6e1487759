"""Trainers of tiny models, and what came of their steps."""

from __future__ import annotations

import tiny_models
import torch

from cpo_kernels import CPOConfig, CPOTrainer


def config(path, **kwargs) -> CPOConfig:
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_length": 32,
        "num_batch_negatives": 2,
        "num_truncation_negatives": 2,
    }
    return CPOConfig(output_dir=str(path), **(defaults | kwargs))


def trainer(
    path,
    model=None,
    examples=None,
    callbacks=None,
    ref_model=None,
    eval_dataset=None,
    loss_fn=None,
    tokenizer=None,
    **kwargs,
) -> CPOTrainer:
    return CPOTrainer(
        tiny_models.llama() if model is None else model,
        config(path, **kwargs),
        train_dataset=tiny_models.examples(16) if examples is None else examples,
        eval_dataset=eval_dataset,
        processing_class=tiny_models.tokenizer() if tokenizer is None else tokenizer,
        ref_model=ref_model,
        callbacks=callbacks,
        loss_fn=loss_fn,
    )


def steps(run: CPOTrainer) -> list[dict]:
    """Return the logged steps of a run."""
    return [entry for entry in run.state.log_history if "loss" in entry]


def parameters(run: CPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


# What two processes train in distributed_worker.py: negatives of every kind.
DISTRIBUTED = {
    "optim": "sgd",
    "num_mean_field_negatives": 1,
    "num_autoregressive_negatives": 1,
    "beta": 0.5,
    "autoregressive_every": 2,
    "max_steps": 4,
}


def held_out() -> list[dict]:
    """Make examples half of which bring negatives, so that two processes in turn get all of those on one side."""
    examples = tiny_models.examples(8, seed=5)
    return [example | ({"negatives": ["ran on", "sat"]} if i % 4 < 2 else {}) for i, example in enumerate(examples)]
