"""The loss inside `forward` under DDP or FSDP2, so that their hooks see the head.

`torchrun --standalone --nproc-per-node=2 examples/plugging_in/distributed.py [--fsdp2]`; seconds on a CPU (gloo).
"""

from __future__ import annotations

import argparse

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from cpo_kernels import CandidateLayout
from cpo_kernels.models import CPORequest, attach_linear_loss

WORDS, CANDIDATES, SHOWN, LENGTH = 31, 4, 3, 8


def make_batch(groups: int) -> tuple[torch.Tensor, CPORequest]:
    """Arithmetic progressions, the first candidate of each group the true one."""
    start, step = torch.randint(WORDS, (groups, 1, 1)), torch.randint(1, 4, (groups, 1, 1))
    terms = (start + step * torch.arange(LENGTH)).repeat(1, CANDIDATES, 1)
    place = torch.randint(SHOWN, LENGTH, (groups, CANDIDATES - 1, 1))
    terms[:, 1:].scatter_add_(2, place, torch.randint(1, WORDS, place.shape))
    terms = (terms % WORDS).flatten(0, 1)
    targets = terms[:, 1:].clone()
    targets[:, : SHOWN - 1] = -100
    rows, length = targets.shape
    layout = CandidateLayout(list(range(0, rows * length + 1, length)), list(range(0, rows + 1, CANDIDATES)))
    return terms[:, :-1], CPORequest(targets.flatten(), layout, beta=1.0, mle_weight=0.1)


def train(sharded: bool) -> None:
    """Every process trains on data of its own; process 0 prints how it goes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = attach_linear_loss(LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=16, **sizes)))
    if sharded:
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        wrapped = model
    else:
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=3e-3)
    torch.manual_seed(1 + distributed.get_rank())
    for step in range(61):
        ids, request = make_batch(32)
        out = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids), linear_loss=request)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % 20 == 0 and distributed.get_rank() == 0:
            print(f"step {step}: loss {out.loss:.4f}, true continuation preferred in {out.accuracy:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fsdp2", action="store_true", help="shard the parameters; default: DDP")
    sharded = parser.parse_args().fsdp2
    distributed.init_process_group("gloo")
    train(sharded)
    # A DDP wrapper that outlives its group can hang gloo at the end; train() has let go of it.
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
