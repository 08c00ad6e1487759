"""Training runs that are killed in the middle."""

from __future__ import annotations

import time

from transformers import TrainerCallback

# Negatives of every kind, windows of three steps, accumulation: all that a resumed run has to find as it was.
SURVIVOR = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_mean_field_negatives": 1,
    "mean_field_source": "model",
    "num_autoregressive_negatives": 1,
    "autoregressive_every": 3,
}


def slow_down(seconds: float = 0.8) -> TrainerCallback:
    """Make a callback that leaves time to be killed between two steps."""

    class Slow(TrainerCallback):
        def on_step_end(self, *_, **__):
            time.sleep(seconds)

    return Slow()
