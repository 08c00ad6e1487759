"""Liger's fused DPO with one import changed: `python examples/plugging_in/liger_losses.py`, seconds on a CPU.

A model of one layer learns to tell true continuations of arithmetic progressions from wrong ones. The batch is Liger's:
first all chosen sequences, then all rejected ones.
"""

import copy

import torch
from torch import Tensor, nn

from cpo_kernels.integrations.liger import LigerFusedLinearDPOLoss

WORDS, SHOWN, LENGTH = 31, 3, 8


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(WORDS, 64), nn.GRU(64, 64, batch_first=True)
        self.head = nn.Linear(64, WORDS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.embedding(ids))[0]  # hidden states; the loss has the head


def make_batch(pairs: int) -> tuple[Tensor, Tensor]:
    start, step = torch.randint(WORDS, (pairs, 1)), torch.randint(1, 4, (pairs, 1))
    chosen = (start + step * torch.arange(LENGTH)) % WORDS
    place = torch.randint(SHOWN, LENGTH, (pairs, 1))
    rejected = chosen.scatter_add(1, place, torch.randint(1, WORDS, place.shape)) % WORDS
    terms = torch.cat([chosen, rejected])
    targets = terms[:, 1:].clone()
    targets[:, : SHOWN - 1] = -100  # the prompt is not predicted
    return terms[:, :-1], targets


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Model()
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_function = LigerFusedLinearDPOLoss(beta=0.1)
    for step in range(101):
        ids, targets = make_batch(64)
        loss, (*_, chosen_rewards, rejected_rewards) = loss_function(
            model.head.weight, model(ids), targets, ref_input=reference(ids), ref_weight=reference.head.weight
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(
                f"step {step}: loss {loss:.4f}, preferred in {(chosen_rewards > rejected_rewards).float().mean():.0%}"
            )
