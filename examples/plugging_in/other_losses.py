"""KTO, ORPO, InfoNCA, NCA and GSPO through `linear_sequence_loss`, on model and data of plain_pytorch.py.

`python examples/plugging_in/other_losses.py`; seconds on a CPU. GSPO's samples come from the data here, not the model.
"""

import copy

import torch
from plain_pytorch import SHOWN, Model, make_batch
from torch import Tensor

from cpo_kernels import linear_sequence_logps, linear_sequence_loss
from cpo_kernels.integrations import losses

torch.manual_seed(0)
start = Model()
reference = copy.deepcopy(start).requires_grad_(False)


def hidden(model: Model, ids: Tensor) -> Tensor:  # (G, C, T) -> (G, C, T, H)
    return model.body(model.embedding(ids.flatten(0, 1)))[0].unflatten(0, ids.shape[:2])


def log_likelihoods(model: Model, ids: Tensor, targets: Tensor) -> Tensor:  # (G, C), without gradients
    with torch.no_grad():
        return linear_sequence_logps(hidden(model, ids), model.head.weight, targets)


def make_loss(name: str, model: Model, ids: Tensor, targets: Tensor) -> losses.LossFn:
    ref_logps, lengths = log_likelihoods(reference, ids, targets), (targets != -100).sum(-1)
    rewards = torch.zeros_like(ref_logps)
    rewards[:, 0] = 1.0  # candidate 0 is the true continuation
    if name == "kto":
        strangers = torch.cat([ids[..., :SHOWN], ids.roll(1, 0)[..., SHOWN:]], -1), targets.roll(1, 0)
        # The baseline is that of prompts with the continuations of others.
        kl = losses.kto_baseline(log_likelihoods(model, *strangers), log_likelihoods(reference, *strangers))
        return losses.kto(ref_logps, rewards > 0, kl=kl, beta=0.5, undesirable_weight=1 / 3)
    if name == "orpo":
        return losses.orpo(lengths, beta=1.0)
    if name == "gspo":
        advantages = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
        return losses.gspo(log_likelihoods(model, ids, targets), advantages, lengths)
    return getattr(losses, name)(ref_logps, rewards, beta=1.0, reward_temperature=0.2)


for name in ("kto", "orpo", "info_nca", "nca", "gspo"):
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        ids, targets = (x[:, :2] if name == "orpo" else x for x in make_batch(64))
        loss = linear_sequence_loss(
            hidden(model, ids), model.head.weight, targets, make_loss(name, model, ids, targets)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = log_likelihoods(model, *make_batch(256)).argmax(1)
    print(f"{name}: true continuation the likeliest in {(best == 0).double().mean():.0%}")
