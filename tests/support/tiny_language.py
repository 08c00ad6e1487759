"""A language so small that every text is listed, so that every mean over texts is an exact sum in float64.

A policy is a table of next-token logits, one row for each context. Texts end with END, or are cut off at LONGEST.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cpo_kernels import contrastive_loss

END, LONGEST, VOCAB = 2, 3, 3
CONTEXTS = [(), *((a,) for a in range(END)), *((a, b) for a in range(END) for b in range(END))]
CUT_OFF = [(*context, token) for context in CONTEXTS if len(context) == LONGEST - 1 for token in range(END)]
TEXTS = [*((*context, END) for context in CONTEXTS), *CUT_OFF]
LENGTHS = torch.tensor([len(text) for text in TEXTS], dtype=torch.float64, device="cpu")


def random_policy() -> Tensor:
    """Return logits (contexts, vocabulary) that require a gradient."""
    return torch.randn(len(CONTEXTS), VOCAB, dtype=torch.float64).requires_grad_()


def random_distribution() -> Tensor:
    """Return probabilities of all texts."""
    return torch.randn(len(TEXTS), dtype=torch.float64).softmax(0)


def token_logp(policy: Tensor, context: tuple[int, ...], token: int) -> Tensor:
    return policy[CONTEXTS.index(context)].log_softmax(0)[token]


def text_logps(policy: Tensor) -> Tensor:
    """Return the log-likelihoods of all texts."""
    logps = policy.log_softmax(-1)
    return torch.stack([sum(logps[CONTEXTS.index(text[:t]), text[t]] for t in range(len(text))) for text in TEXTS])


def policy_of(texts: Tensor) -> Tensor:
    """Return the policy that writes each text with its probability."""
    reaching = {
        context: sum(texts[i] for i, t in enumerate(TEXTS) if t[: len(context)] == context) for context in CONTEXTS
    }
    reaching |= {text: texts[i] for i, text in enumerate(TEXTS)}
    rows = [torch.stack([reaching[(*context, token)] for token in range(VOCAB)]) for context in CONTEXTS]
    return torch.stack(rows).log()


def groups_of(count: int) -> Tensor:
    """List every group of a truth and ``count`` negatives: (groups, 1 + count) indices of texts."""
    return torch.cartesian_prod(*[torch.arange(len(TEXTS))] * (1 + count)).view(-1, 1 + count)


def chances(groups: Tensor, truths: Tensor, negatives: Tensor) -> Tensor:
    """Return the probability of each group when all of its candidates are drawn independently."""
    return truths[groups[:, 0]] * negatives[groups[:, 1:]].prod(1)


def expected_contrast(
    logps: Tensor, groups: Tensor, probability: Tensor, ref_logps: Tensor | None = None, **objective
) -> Tensor:
    """Return the library's contrast, averaged over groups with a probability each; log-likelihoods are of all texts."""
    ref = None if ref_logps is None else ref_logps.detach()[groups]
    return contrastive_loss(logps[groups], ref_logps=ref, reduction="none", **objective) @ probability


def gradient(loss: Tensor, policy: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, policy, retain_graph=True)
    return grad


def scores_of_texts(policy: Tensor) -> Tensor:
    """Return the gradient of each text's log-likelihood: (texts, parameters)."""
    return torch.stack([gradient(logp, policy).flatten() for logp in text_logps(policy)])


def minimised(loss_of, policy: Tensor, steps: int = 200) -> Tensor:
    """Return the policy where a loss is least."""
    policy = policy.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [policy], max_iter=steps, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(policy)
        loss.backward()
        return loss

    optimizer.step(closure)
    return policy.detach()


def tilted(*powers: tuple[Tensor, float]) -> Tensor:
    """Return the product of powers of distributions, normalised."""
    product = math.prod(texts**power for texts, power in powers)
    return product / product.sum()
