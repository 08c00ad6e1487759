"""A head whose rows are shared out over processes, trained with the CPO loss; the result is that of one process.

    torchrun --standalone --nproc-per-node=2 examples/plugging_in/vocab_parallel.py

Every process has the whole body and sees the same batch; process r holds some rows of the head. The body's gradient is
that of the whole head already (VocabShard sums it), so that only what differs between processes is left: the head.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from cpo_kernels import VocabShard, linear_cpo_loss

VOCAB, HIDDEN, STEPS = 1009, 64, 40


def make_body() -> nn.Module:
    """A recurrent body, the same in every process."""
    torch.manual_seed(0)
    return nn.ModuleList([nn.Embedding(VOCAB, HIDDEN), nn.GRU(HIDDEN, HIDDEN, batch_first=True)])


def hidden_states(body: nn.Module, ids: Tensor) -> Tensor:
    """(G, C, T) token ids to (G, C, T, H)."""
    embedding, recurrent = body
    states, _ = recurrent(embedding(ids.flatten(0, 1)))
    return states.view(*ids.shape, HIDDEN)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (G, C, T): the first candidate of each group counts upwards, the other three are random."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCAB, (8, 4, 17), generator=draw)
    ids[:, 0] = (torch.randint(VOCAB, (8, 1), generator=draw) + torch.arange(17)) % VOCAB
    return ids[..., :-1], ids[..., 1:]


def train(shard_of: slice, group: VocabShard | None) -> list[float]:
    """The losses of some steps, with these rows of the head."""
    body = make_body()
    torch.manual_seed(1)
    weight = nn.Parameter((torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5)[shard_of].clone())
    optimizer = torch.optim.Adam([*body.parameters(), weight], lr=3e-3)
    losses = []
    for step in range(STEPS):
        ids, targets = batch(step)
        out = linear_cpo_loss(hidden_states(body, ids), weight, targets, beta=0.1, mle_weight=0.5, vocab_shard=group)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    return losses


def main() -> None:
    """Trains both ways and compares."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    rows = torch.arange(VOCAB).tensor_split(world)[rank]
    mine = slice(int(rows[0]), int(rows[-1]) + 1)
    shard = VocabShard.of(torch.empty(len(rows), HIDDEN))
    print(f"process {rank} holds entries {shard.start} to {shard.start + shard.size - 1} of {shard.vocab}", flush=True)
    sharded, whole = train(mine, shard), train(slice(None), None)
    difference = max(abs(a - b) for a, b in zip(sharded, whole, strict=True))
    if rank == 0:
        print(f"loss {sharded[0]:.3f} -> {sharded[-1]:.3f} over {STEPS} steps; ", end="")
        print(f"largest difference from one process with the whole head: {difference:.1e}")
    if difference > 1e-3:
        raise RuntimeError(f"the losses differ by {difference} from those of the whole head")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
