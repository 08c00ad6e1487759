"""The fused loss in a loop of plain PyTorch: `python examples/plugging_in/plain_pytorch.py`, seconds on a CPU."""

import copy

import torch
from torch import Tensor, nn

from cpo_kernels import CPOOutput, linear_cpo_loss

WORDS, K, SHOWN, LENGTH = 31, 3, 3, 8  # progressions of 8 numbers below 31, of which 3 are the prompt


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(WORDS, 64), nn.GRU(64, 64, batch_first=True)
        self.head = nn.Linear(64, WORDS, bias=False)

    def forward(self, ids: Tensor, targets: Tensor, ref_logps: Tensor | None = None) -> CPOOutput:  # (G, K + 1, T)
        hidden = self.body(self.embedding(ids.flatten(0, 1)))[0].unflatten(0, ids.shape[:2])
        # In forward, so that the hooks of DDP and FSDP see the head; the contrast, with a little of the NLL.
        return linear_cpo_loss(hidden, self.head.weight, targets, ref_logps=ref_logps, mle_weight=0.1)


def make_batch(groups: int) -> tuple[Tensor, Tensor]:
    start, step = torch.randint(WORDS, (groups, 1, 1)), torch.randint(1, 4, (groups, 1, 1))
    terms = (start + step * torch.arange(LENGTH)).repeat(1, K + 1, 1)
    place = torch.randint(SHOWN, LENGTH, (groups, K, 1))  # candidate 0 is true, the others are wrong in one place
    terms[:, 1:].scatter_add_(2, place, torch.randint(1, WORDS, place.shape))
    ids, targets = (terms % WORDS)[..., :-1], (terms % WORDS)[..., 1:]
    targets[..., : SHOWN - 1] = -100  # the prompt is not predicted
    return ids, targets


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Model()
    reference, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(101):
        batch = make_batch(64)
        with torch.no_grad():
            ref_logps = reference(*batch).logps
        out = model(*batch, ref_logps)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {out.loss:.4f}, true continuation preferred in {out.accuracy:.0%}")
