"""The trainer's loss with a Python function in place of the contrast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cpo_kernels.engine.losses import check_loss
from cpo_kernels.models import LinearLossOutput, SequenceLossRequest
from cpo_kernels.negatives import KINDS
from cpo_kernels.objective import LossTerms, make_groups, make_problem, summarize
from cpo_kernels.options import Objective

from .batch import body_inputs, layout_of
from .config import CPOConfig

LossFn = Callable[[Tensor, range], Tensor]


def check_own_loss(config: CPOConfig) -> None:
    """Raise ``ValueError`` for an option of the contrast, which a loss function would silently ignore."""
    if not config.contrasts:
        raise ValueError(f"loss_fn takes the place of the contrast, which alpha={config.alpha} leaves out")
    ignored = {"loss_type": "plackett_luce", "label_smoothing": 0.0, "margin": 0.0, "ranking": "none"}
    ignored |= {"candidate_eps": None, "grad_filter_eps": None, **{f"{kind}_weight": 1.0 for kind in KINDS}}
    for name, expected in ignored.items():
        value = getattr(config, name)
        if value != expected:
            raise ValueError(f"loss_fn takes the place of the contrast that {name}={value!r} is for; use {expected!r}")


def own_loss(
    model: nn.Module, inputs: Mapping[str, Any], ref_logps: Tensor | None, loss_fn: LossFn, config: CPOConfig
) -> LinearLossOutput:
    """Compute ``alpha * loss_fn + mle_weight * NLL`` of a batch, in one pass over the logits.

    Args:
        model: a model with an attached loss.
        inputs: the tensors of a batch, with the sizes of the whole step.
        ref_logps: (S,) sums under the reference, or None.
        loss_fn: see :class:`~cpo_kernels.trainer.CPOTrainer`.
        config: the weights of the two parts, and the options of the head.

    Returns:
        The answer to a :class:`~cpo_kernels.models.CPORequest`, with the loss of ``loss_fn`` as ``contrastive_loss``.
    """
    sizes = {name: inputs[name] for name in ("num_groups", "num_target_tokens")}
    objective, starts = Objective(**config.objective_options, **sizes), inputs["cu_groups"]
    device = inputs["targets"].device
    bounds, ranks = (torch.tensor(inputs[name], device=device) for name in ("cu_tokens", "ranks"))
    problem = make_problem(objective, make_groups(starts, device), bounds.diff(), ref_logps, ranks)
    seen: dict[int, tuple[Tensor, Tensor]] = {}  # sums and loss by first group, detached

    def loss_of(sums: Tensor, groups: range) -> Tensor:
        here = problem.chunk(groups, slice(starts[groups.start], starts[groups.stop]))
        ratios = here.logps(sums if here.ref_logps is None else sums - here.ref_logps)
        loss = loss_fn(here.groups.pad(ratios, -torch.inf), groups)
        if sums.requires_grad:
            check_loss(loss)
        seen[groups.start] = sums.detach(), loss.detach()
        nll = -(sums * here.best).sum() / problem.num_target_tokens
        return objective.contrast_weight * loss / problem.num_groups + objective.mle_weight * nll

    share = (len(starts) - 1) / inputs["num_groups"]
    request = SequenceLossRequest(
        inputs["targets"], layout_of(inputs), loss_of, router_share=share, **config.head_options
    )
    out = model(**body_inputs(inputs), linear_loss=request)
    sums, losses = (torch.cat([part[i].reshape(-1) for _, part in sorted(seen.items())]) for i in (0, 1))
    nll = -(sums * problem.best).sum() / problem.num_target_tokens
    terms = LossTerms(out.loss, losses.sum() / problem.num_groups, nll.to(sums.dtype))
    whole = summarize(problem, terms, sums, (len(sums),))
    out.logps, out.rewards, out.nll_loss = whole.logps, whole.rewards, whole.nll_loss
    out.accuracy, out.margin, out.dropped = whole.accuracy, whole.margin, whole.dropped
    out.contrastive_loss = whole.contrastive_loss
    return out
