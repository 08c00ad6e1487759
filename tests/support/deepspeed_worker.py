"""One of the two processes of test_trainer_deepspeed.py: trains every case; process 0 saves what came of them."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from accelerate.state import AcceleratorState
from deepspeed_cases import CASES, ROUNDED, Case, deepspeed_settings, make_trainer
from safetensors.torch import load_file
from torch import distributed
from trainer_runs import steps
from transformers import TrainerCallback

from cpo_kernels.__main__ import main as command
from cpo_kernels.models.sharded import gathered

# It would be compiled: messages through shared memory, in place of gloo's.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Interrupt(TrainerCallback):
    """Ends a run after its first step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def train(case: Case, folder: Path, output: Path) -> dict[str, Any]:
    """Train a case; two processes with two accumulated batches of two take steps of eight examples."""
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options = batches | {"deepspeed": deepspeed_settings(case.stage)}
    run = make_trainer(case, folder, output, **options)
    if case.resumed:
        run.add_callback(Interrupt())
    run.train()
    if case.resumed:
        AcceleratorState._reset_state(reset_partial_state=True)
        run = make_trainer(case, folder, output, **options)
        run.train(resume_from_checkpoint=True)
    evaluation = run.evaluate()
    sharded = all(hasattr(parameter, "ds_id") for parameter in run.model.parameters())
    parameters = {}
    for name, parameter in run.model.named_parameters():
        with gathered(parameter):
            parameters[name] = parameter.detach().float().clone()
    run.save_model()
    return {"parameters": parameters, "steps": steps(run), "evaluation": evaluation, "sharded": sharded}


def main(folder: Path, wanted: str = "") -> None:
    results: dict[str, Any] = {}
    for name, case in (CASES | ROUNDED).items():
        if wanted not in name:
            continue
        output = folder / name.replace(",", "").replace(" ", "-")
        try:
            results[name] = train(case, folder, output)
        except Exception:
            results[name] = traceback.format_exc()
            print(name, results[name], flush=True)
        if case.ensemble and (output / "ensemble").is_dir():
            results["ensemble"] = load_file(output / "ensemble" / "model.safetensors")
        gc.collect()
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.save(results, folder / f"{distributed.get_rank()}.pt")
    options = {"output_dir": folder / "command", "deepspeed": folder / "zero3.json"}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert command(["train", str(folder / "CONFIG.yaml"), *given]) == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    main(Path(sys.argv[1]), *sys.argv[2:])
    distributed.destroy_process_group()
