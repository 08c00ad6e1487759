"""One process of the command under FSDP2 in test_cli.py; says whether what it trains is sharded."""

from __future__ import annotations

import sys

from distributed_worker import let_processors_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from cpo_kernels.__main__ import command
from cpo_kernels.cli import train


class Look(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1 and all(isinstance(parameter, DTensor) for parameter in model.parameters()):
            print("parameters are sharded", flush=True)


if __name__ == "__main__":
    let_processors_shard()
    train._callbacks = lambda settings: [Look()]
    sys.exit(command())
