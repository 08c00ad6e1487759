"""One of the processes of test_integration_cross_entropy.py: a head split along the vocabulary, by other names."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from cpo_kernels.integrations.cut_cross_entropy import VocabParallelOptions, linear_cross_entropy

V, H = 23, 6
# name: options, and whether the gradient of the hidden states is summed.
CASES = {
    "mean": ({}, True),
    "log-sum-exps": ({"return_lse": True, "softcap": 3.0, "shift": 1}, True),
    "share": ({"return_lse": True}, False),
    "of tokens": ({"reduction": "none"}, True),
}


def total(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    loss, lse = out if isinstance(out, tuple) else (out, None)
    return loss.sum() if lse is None else loss.sum() + 0.1 * lse.square().sum()


def dense(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, options: dict) -> dict[str, Tensor]:
    """The whole head with stored logits."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    shift = options.get("shift", 0)
    logits, targets = F.linear(*leaves)[:, : -shift or None], targets[:, shift:]
    if "softcap" in options:
        logits = options["softcap"] * (logits / options["softcap"]).tanh()
    reduction = options.get("reduction", "mean")
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    lse = logits.logsumexp(-1).masked_fill(targets == -100, 0.0)
    out = total((loss, lse) if options.get("return_lse") else loss)
    return named(out, torch.autograd.grad(out, leaves))


def named(out: Tensor, grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {"loss": out.detach(), **dict(zip(("hidden", "weight", "bias"), grads, strict=True))}


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(3, 7, H), torch.randn(V, H), torch.randn(V)
    targets = torch.randint(V, (3, 7))
    targets[:, ::3] = -100
    results: dict = {"expected": {}}
    for name, (options, summed) in CASES.items():
        split = VocabParallelOptions.from_vocab(V, reduce_e_grad=summed)
        leaves = [x.clone().requires_grad_() for x in (hidden, weight[split.start : split.stop])]
        leaves.append(bias[split.start : split.stop].clone().requires_grad_())
        for _ in range(2):  # the second call reuses what the first found out
            e, c, b = leaves
            out = total(linear_cross_entropy(e, c, targets, b, **options, vocab_parallel_options=split))
            results[name] = named(out, torch.autograd.grad(out, leaves))
        wide = [x.double() for x in (hidden, weight, bias)]
        results["expected"][name] = (
            dense(*wide, targets, options),
            dense(hidden, weight, bias, targets, options),
        )
    torch.save(results, folder / f"{os.environ['RANK']}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
