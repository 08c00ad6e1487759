"""Other implementations of the head, each composed into the same loss as ours.

Every contestant maps (hidden, weight, targets, ref_logps) to (loss, (grad_hidden, grad_weight)) for the loss of
`problem.contrast`: unranked CPO over the summed token log-probabilities, beta 0.1. A peer that contrasts one pair only
is compared with ours on the same tensors read as pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problem import BETA, IGNORE, Problem, contrast

SequenceLogps = Callable[[Tensor, Tensor, Tensor], Tensor]  # (G, C, T, H), (V, H), (G, C, T) -> (G, C)
Loss = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
Result = tuple[Tensor, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Peer:
    """One contestant.

    `skips_ignored`: -100 rows stay out of its GEMMs; `pairs_only`: its loss contrasts one pair, K = 1; `compiles`: its
    first call of a shape compiles.
    """

    name: str
    loss: Loss
    sequence_logps: SequenceLogps
    skips_ignored: bool = False
    pairs_only: bool = False
    compiles: bool = False

    def run(self, problem: Problem) -> Result:
        """Loss and all gradients of one problem."""
        loss = self.loss(problem.hidden, problem.weight, problem.targets, problem.ref_logps)
        return loss, torch.autograd.grad(loss, (problem.hidden, problem.weight))


def _eager() -> Peer:
    def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = hidden @ weight.T
        nll = F.cross_entropy(logits.flatten(0, 2).float(), targets.flatten(), ignore_index=IGNORE, reduction="none")
        return -nll.view(targets.shape).sum(-1)

    return _from_logps("eager", sequence_logps)


def _compiled() -> Peer:
    eager = _eager()
    return Peer(
        "torch.compile",
        loss=torch.compile(eager.loss, fullgraph=True, dynamic=False),
        sequence_logps=torch.compile(eager.sequence_logps, fullgraph=True, dynamic=False),
        compiles=True,
    )


def _linear_cross_entropy(name: str, *, chunked: bool) -> Peer:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"F.linear_cross_entropy is not in torch {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        nll = F.linear_cross_entropy(
            hidden.flatten(0, 2), weight, targets.flatten(), ignore_index=IGNORE, reduction="none", options=options
        )
        return -nll.view(targets.shape).float().sum(-1)

    return _from_logps(name, sequence_logps)


def _trl() -> Peer:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE  # the width its trainers use

    def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        flat = targets.flatten()
        arguments = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())  # temperature, width, softcap, scale, extras
        logps = ChunkedLogProbFunction.apply(hidden.flatten(0, 2), weight, None, flat.clamp(min=0), *arguments)[0]
        return logps.masked_fill(flat == IGNORE, 0.0).view(targets.shape).sum(-1)

    return _from_logps("TRL fused head", sequence_logps)


def _cut_cross_entropy() -> Peer:
    from cut_cross_entropy import linear_cross_entropy

    def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        impl = "cce" if hidden.is_cuda else "torch_compile"  # its kernels, which leave small gradients out by default
        nll = linear_cross_entropy(hidden, weight, targets, impl=impl, reduction="none")
        return -nll.sum(-1)

    return _from_logps("Cut Cross-Entropy", sequence_logps, skips_ignored=True, compiles=True)


def _liger() -> Peer:
    from liger_kernel.chunked_loss import LigerFusedLinearCPOLoss

    # alpha weighs Liger's NLL term; the preference term has weight 1. chunk_size counts pairs, 1 is its default.
    criterion = LigerFusedLinearCPOLoss(beta=BETA, alpha=0.0, compute_nll_loss=False, chunk_size=1)

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # Liger wants all chosen sequences first, then all rejected ones
        stacked = hidden.transpose(0, 1).flatten(0, 1)
        return criterion(weight, stacked, targets.transpose(0, 1).flatten(0, 1))

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, ref_logps: Tensor | None) -> Tensor:
        if ref_logps is not None:
            raise ValueError("Liger's CPO loss takes no reference log-likelihoods")
        return call(hidden, weight, targets)[0]

    def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        chosen, rejected = call(hidden, weight, targets)[1][:2]
        return torch.stack((chosen, rejected), dim=-1)

    return Peer("Liger CPO", loss, sequence_logps, pairs_only=True, compiles=True)


def ours(name: str, max_logits_bytes: int | None = None, logits_dtype: torch.dtype | None = None) -> Peer:
    """This project's loss, within `max_logits_bytes` of logits held in `logits_dtype` (None: its defaults)."""
    from cpo_kernels import linear_cpo_loss, linear_sequence_logps

    head = {"max_logits_bytes": max_logits_bytes, "logits_dtype": logits_dtype}

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, ref_logps: Tensor | None) -> Tensor:
        return linear_cpo_loss(hidden, weight, targets, ref_logps=ref_logps, beta=BETA, **head).loss

    def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_sequence_logps(hidden, weight, targets, **head)

    return Peer(name, loss, sequence_logps, skips_ignored=True)


def installed() -> tuple[list[str], dict[str, str]]:
    """Names of the peers that can be built here, and why the others cannot."""
    names, missing = [], {}
    for name, build in BUILDERS.items():
        try:
            build()
            names.append(name)
        except (ImportError, AttributeError, RuntimeError) as error:  # transformers raises RuntimeError for its imports
            missing[name] = str(error).splitlines()[0]
    return names, missing


def _from_logps(
    name: str, sequence_logps: SequenceLogps, *, skips_ignored: bool = False, compiles: bool = False
) -> Peer:
    """A peer that only knows token log-probabilities: sum them, then contrast in plain torch."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, ref_logps: Tensor | None) -> Tensor:
        return contrast(sequence_logps(hidden, weight, targets), ref_logps)

    return Peer(name, loss, sequence_logps, skips_ignored=skips_ignored, compiles=compiles)


BUILDERS: dict[str, Callable[[], Peer]] = {
    "eager": _eager,
    "torch.compile": _compiled,
    "F.linear_cross_entropy": lambda: _linear_cross_entropy("F.linear_cross_entropy", chunked=False),
    "F.linear_cross_entropy, chunked": lambda: _linear_cross_entropy("F.linear_cross_entropy, chunked", chunked=True),
    "Liger CPO": _liger,
    "TRL fused head": _trl,
    "Cut Cross-Entropy": _cut_cross_entropy,
}
