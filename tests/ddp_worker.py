"""One process of the data-parallel run in test_trainer.py: trains, and process 0 saves what came of it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_trainer import parameters, steps, trainer
from tiny_models import examples

if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run = trainer(out, eval_dataset=examples(8, seed=5), optim="sgd", **sizes)
    run.train()
    run.evaluate()
    if run.is_world_process_zero():
        evaluation = [entry for entry in run.state.log_history if "eval_loss" in entry]
        torch.save({"parameters": parameters(run), "steps": steps(run), "evaluation": evaluation}, out / "run.pt")
