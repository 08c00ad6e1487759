"""One process of the distributed runs in test_trainer.py: trains, and process 0 saves what came of it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tiny_models import adapted, llama
from torch.distributed.tensor import DTensor
from trainer_runs import DISTRIBUTED, held_out, steps, trainer

from cpo_kernels.cli.processes import leave_process_group


def let_processors_shard() -> None:
    """Make accelerate shard parameters on the CPU too, where it silently takes DDP although torch can do both."""
    initialize = AcceleratorState.__init__

    def patched(self: AcceleratorState, *args: object, **kwargs: object) -> None:
        if not AcceleratorState._shared_state and PartialState().distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        initialize(self, *args, **kwargs)

    AcceleratorState.__init__ = patched


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def main(out: Path, how: str) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **DISTRIBUTED}
    options["resample_negatives"] = how == "fsdp2"
    if how == "fsdp2":
        let_processors_shard()
        options |= {"fsdp": True}
        options |= {"fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    run = trainer(out, ref_model=llama(seed=1), eval_dataset=held_out(), **options)
    run.train()
    run.evaluate()
    sharded = all(
        any(isinstance(parameter, DTensor) for parameter in model.parameters()) for model in (run.model, run.ref_model)
    )
    adapted_losses = None
    if how == "fsdp2":  # accelerate rounds there, and the reference is a pass with the adapters off
        adapted_run = trainer(out, adapted(llama()), bf16=True, **options)
        adapted_run.train()
        adapted_losses = [entry["loss"] for entry in steps(adapted_run)]
    parameters = {name: whole(parameter) for name, parameter in run.model.named_parameters()}
    if run.is_world_process_zero():
        evaluation = [entry for entry in run.state.log_history if "eval_loss" in entry]
        result = {"parameters": parameters, "steps": steps(run), "evaluation": evaluation, "sharded": sharded}
        result["adapted_losses"] = adapted_losses
        torch.save(result, out / "run.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
    leave_process_group()
