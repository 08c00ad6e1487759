"""Composes other implementations of the head, each into the same loss as ours.

Every contestant maps (hidden, weight, targets, ref_logps) to the loss of `Problem.objective`: unranked CPO over the
summed token log-probabilities, beta 0.1, or the mean cross-entropy. A peer whose loss has one form only is compared
with ours on the same tensors read as that form: see the kinds of work in shapes.py.

QuACK runs on an NVIDIA GPU of sm_90 or later and is in no extra of this project: `pip install quack-kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problem import BETA, IGNORE, Problem, contrast
from benchmarks.shapes import CCE, CHUNKED, CPO, NLL, NO_GRAD, PAIRS, Shape

SequenceLogps = Callable[[Tensor, Tensor, Tensor], Tensor]  # (G, C, T, H), (V, H), (G, C, T) -> (G, C)
CrossEntropy = Callable[[Tensor, Tensor, Tensor, str], Tensor]  # the same and a reduction, "none" or "mean"
Loss = Callable[..., Tensor]  # hidden, weight, targets, ref_logps -> scalar
Result = tuple[Tensor, tuple[Tensor, ...]]
COMPILED = "torch.compile"


@dataclass(frozen=True)
class Peer:
    """Describes an implementation of the head."""

    name: str  # in the results
    loss: Loss  # that of `work`
    sequence_logps: SequenceLogps | None  # log-likelihoods alone; None where it has none to give
    nll: Loss | None = None  # mean cross-entropy over all tokens, in the form its users call; None where it has none
    work: str = CPO  # the work it does; one that does "cpo" also does "pairs"
    compiles: bool = False  # its first call of a shape compiles

    def work_on(self, shape: Shape) -> str | None:
        """Return the work it does on the tensors of a shape; None where it can do none that compares."""
        if shape.mode == NO_GRAD:
            return None if self.sequence_logps is None else shape.work if self.work == CPO else self.work
        if shape.work == NLL:
            return NLL if self.nll else None
        return {CPO: shape.work, NLL: None}.get(self.work, self.work)

    def run(self, problem: Problem) -> Result:
        """Return loss and wanted gradients of one problem; its log-likelihoods where no gradient is wanted."""
        tensors, shape = (problem.hidden, problem.weight, problem.targets), problem.shape
        if shape.mode == NO_GRAD:
            with torch.no_grad():
                return self.sequence_logps(*tensors), ()  # type: ignore[misc]
        loss = self.nll(*tensors) if shape.work == NLL else self.loss(*tensors, problem.ref_logps)  # type: ignore[misc]
        return loss, torch.autograd.grad(loss, problem.wanted)


def _of_cross_entropy(name: str, cross_entropy: CrossEntropy, **options: Any) -> Peer:
    """Make a peer from a linear cross-entropy of tokens (G, C, T), by `reduction` summed up in plain torch."""

    def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -cross_entropy(hidden, weight, targets, "none").view(targets.shape).float().sum(-1)

    def nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(hidden, weight, targets, "mean")

    return Peer(name, _contrasted(sequence_logps), sequence_logps, nll, **options)


def _contrasted(sequence_logps: SequenceLogps) -> Loss:
    """Make the loss of a peer that only knows log-probabilities."""
    return lambda hidden, weight, targets, ref: contrast(sequence_logps(hidden, weight, targets), ref)


def _eager() -> Peer:
    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
        logits = (hidden @ weight.T).flatten(0, 2).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction=reduction)

    return _of_cross_entropy("eager", cross_entropy)


def _compiled(**options: Any) -> Peer:
    eager = _eager()
    calls = {"loss": eager.loss, "sequence_logps": eager.sequence_logps, "nll": eager.nll}
    compiled = {key: torch.compile(call, **options) for key, call in calls.items()}
    return replace(eager, name=COMPILED, compiles=True, **compiled)


def _linear_cross_entropy(name: str, policy: str | None) -> Peer:
    """Make a peer by `policy`, which says how gradients are summed over chunks; None does not chunk."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"F.linear_cross_entropy is not in torch {torch.__version__}")
    options = None if policy is None else torch.nn.LinearCrossEntropyOptions(acc_policy=policy)

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
        flat = (hidden.flatten(0, 2), weight, targets.flatten())
        return F.linear_cross_entropy(*flat, ignore_index=IGNORE, reduction=reduction, options=options)

    return _of_cross_entropy(name, cross_entropy)


def _cut_cross_entropy() -> Peer:
    from cut_cross_entropy import linear_cross_entropy

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
        impl = "cce" if hidden.is_cuda else "torch_compile"  # its kernels, which leave small gradients out by default
        return linear_cross_entropy(hidden, weight, targets, impl=impl, reduction=reduction)

    return _of_cross_entropy(CCE, cross_entropy, compiles=True)


def _trl() -> Peer:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE  # the width its trainers use

    def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        flat = targets.flatten()
        arguments = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())  # temperature, width, softcap, scale, extras
        logps = ChunkedLogProbFunction.apply(hidden.flatten(0, 2), weight, None, flat.clamp(min=0), *arguments)[0]
        return logps.masked_fill(flat == IGNORE, 0.0).view(targets.shape).sum(-1)

    return Peer("TRL fused head", _contrasted(sequence_logps), sequence_logps)


def _quack() -> Peer:
    if not torch.cuda.is_available():
        raise RuntimeError("needs a GPU")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(hidden.flatten(0, 2), weight, targets.flatten(), ignore_index=IGNORE)

    return Peer("QuACK", nll, None, nll, work=NLL, compiles=True)


def _liger() -> Peer:
    from liger_kernel.chunked_loss import LigerFusedLinearCPOLoss

    # alpha weighs Liger's NLL term; the preference term has weight 1. chunk_size counts pairs, 1 is its default.
    criterion = LigerFusedLinearCPOLoss(beta=BETA, alpha=0.0, compute_nll_loss=False, chunk_size=1)

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # (G, 2, ...) in the order that Liger wants: (2 G, ...), all chosen sequences first.
        return criterion(weight, *(tensor.transpose(0, 1).flatten(0, 1) for tensor in (hidden, targets)))

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, ref_logps: Tensor | None) -> Tensor:
        if ref_logps is not None:
            raise ValueError("Liger's CPO loss takes no reference log-likelihoods")
        return call(hidden, weight, targets)[0]

    def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return torch.stack(call(hidden, weight, targets)[1][:2], dim=-1)

    return Peer("Liger CPO", loss, sequence_logps, work=PAIRS, compiles=True)


def ours(
    name: str, max_logits_bytes: int | None = None, logits_dtype: torch.dtype | None = None, backend: str = "auto"
) -> Peer:
    """Make this project's peer, with `max_logits_bytes` of logits held in `logits_dtype` (None: the defaults)."""
    from cpo_kernels import linear_cpo_loss, linear_sequence_logps

    head = {"max_logits_bytes": max_logits_bytes, "logits_dtype": logits_dtype, "backend": backend}

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, ref_logps: Tensor | None) -> Tensor:
        return linear_cpo_loss(hidden, weight, targets, ref_logps=ref_logps, beta=BETA, **head).loss

    def nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ranks = targets.new_zeros(targets.shape[:2])  # every candidate is a ground truth
        options = {"ranks": ranks, "contrast_weight": 0.0, "mle_weight": 1.0}
        return linear_cpo_loss(hidden, weight, targets, **options, **head).loss

    def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_sequence_logps(hidden, weight, targets, **head)

    return Peer(name, loss, sequence_logps, nll)


def build(name: str, builders: Mapping[str, Callable[[], Peer]]) -> Peer | str:
    """Return a peer, or why it cannot be built here."""
    try:
        return builders[name]()
    except (ImportError, AttributeError, RuntimeError) as error:  # transformers raises RuntimeError for its imports
        return str(error).splitlines()[0]


BUILDERS: dict[str, Callable[[], Peer]] = {
    "eager": _eager,
    COMPILED: partial(_compiled, fullgraph=True, dynamic=False),  # its best where shapes stay
    "F.linear_cross_entropy": partial(_linear_cross_entropy, "F.linear_cross_entropy", None),
    CHUNKED: partial(_linear_cross_entropy, CHUNKED, "auto"),
    "Liger CPO": _liger,
    "TRL fused head": _trl,
    CCE: _cut_cross_entropy,
    "QuACK": _quack,
}
# For calls whose shapes vary, of which nobody is told beforehand: compiled for every shape it would be until it gives
# up, so it compiles for those dimensions that have been seen to change.
VARYING = BUILDERS | {COMPILED: _compiled}
