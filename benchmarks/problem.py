"""Draws the inputs of a shape, and defines the loss that is taken of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.shapes import CPO, NLL, NO_GRAD, TRAINED, Shape

BETA = 0.1
IGNORE = -100


@dataclass(frozen=True)
class Problem:
    """Holds the tensors of one shape, for the work that is done on them: `shape.work`."""

    shape: Shape
    hidden: Tensor  # (G, C, T, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (G, C, T)
    ref_logps: Tensor | None = None  # (G, C) fp32, for "cpo"

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """Returns the tensors whose gradients are taken."""
        return tuple(tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad)

    def as_work(self, work: str) -> Problem:
        """Return the same for other work: pairs without a reference, of the candidates of each group two by two."""
        if work == self.shape.work:
            return self
        pairs = self.shape.pairs()
        dims = (pairs.groups, pairs.candidates, pairs.tokens)
        hidden = self.hidden.detach().view(*dims, pairs.hidden).requires_grad_(self.hidden.requires_grad)
        return Problem(pairs, hidden, self.weight, self.targets.view(dims))

    def objective(self, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
        """Return the loss of this work from (G, C) sequence log-likelihoods of policy and reference."""
        if self.shape.work == NLL:
            return -logps.sum() / (self.targets != IGNORE).sum()
        return contrast(logps, ref_logps)


def contrast(logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """Return unranked CPO: the mean over groups of -log softmax(beta * (logps - ref))[0]. `logps` is (G, C)."""
    scores = BETA * (logps if ref_logps is None else logps - ref_logps)
    return (torch.logsumexp(scores, dim=-1) - scores[:, 0]).mean()


def draw(shape: Shape, seed: int = 0, device: torch.device | str = "cpu") -> Problem:
    """Draw inputs whose logits look like a small language model's: spread 2, NLL of a target about 3 nats.

    With that, a sequence's log-likelihood spreads by about 2 * sqrt(T) nats around -3 T; references spread by 10 more,
    so at beta 0.1 the contrast is not settled and every candidate has a gradient.
    """
    drawn = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    dims = (shape.groups, shape.candidates, shape.tokens)
    weight = torch.randn(shape.vocab, shape.hidden, dtype=shape.dtype, **drawn).mul_(2 / shape.hidden**0.5)
    targets = torch.randint(shape.vocab, dims, **drawn)
    hidden = torch.randn(*dims, shape.hidden, **drawn) + 2.5 * weight[targets].float()
    targets[..., : shape.prompt_tokens] = IGNORE
    ref = 10 * torch.randn(dims[:2], **drawn) - 3 * (shape.tokens - shape.prompt_tokens)
    hidden = hidden.to(shape.dtype).requires_grad_(shape.mode != NO_GRAD)
    weight.requires_grad_(shape.mode == TRAINED)
    return Problem(shape, hidden, weight, targets, ref if shape.work == CPO else None)
