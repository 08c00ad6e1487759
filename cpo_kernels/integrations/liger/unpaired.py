"""Liger's loss of sequences that are good or bad by themselves, KTO, with its signature and return values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpo_kernels.functional import linear_sequence_logps, linear_sequence_loss
from cpo_kernels.integrations.logit_sums import summed_logits
from cpo_kernels.integrations.losses import kto
from cpo_kernels.integrations.targets import without_ignored
from cpo_kernels.kernels.numerics import IGNORE_INDEX
from cpo_kernels.options import suggests_arguments

from .pairs import Output


@suggests_arguments
class LigerFusedLinearKTOLoss(nn.Module):
    """KTO of Ethayarajh et al. 2024 (arXiv 2402.01306), with equal weights of good and of bad answers."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.compiled, self.use_ref_model = ignore_index, beta, compiled, use_ref_model
        self.average_log_prob, self.chunk_size = average_log_prob, chunk_size

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> Output:
        """Return the loss, a scalar, and a tuple of scalars without gradients.

        They are sums over the good and over the bad sequences: of log-likelihoods (or of means over tokens), of the
        logits at all T positions, and of the rewards ``beta * (logp - ref_logp)``, in this order.

        Args:
            _input: (B, T, H).
            lin_weight: (V, H).
            target: (B, T) integers, aligned with _input.
            bias: (V,) or None.
            preference_labels: (B,) bool, which sequences are good.
            ref_input: (B, T, H'), the hidden states of the reference; used with ``use_ref_model``.
            ref_weight: (V, H').
            ref_bias: (V,) or None.
            kl: the baseline, a scalar, or one number a sequence, (B,); None for 0.

        Raises:
            ValueError: shapes that do not fit, labels that are no booleans, or ``use_ref_model`` without a reference.
        """
        good = checked_labels(_input, target, preference_labels)
        targets = without_ignored(target, self.ignore_index)
        lengths = (targets != IGNORE_INDEX).sum(-1)
        divisor = lengths if self.average_log_prob else torch.ones_like(lengths)
        ref = torch.zeros(lengths.shape, device=_input.device)
        if self.use_ref_model:
            if ref_input is None or ref_weight is None:
                raise ValueError("use_ref_model=True needs ref_input and ref_weight, got None")
            with torch.no_grad():
                ref = linear_sequence_logps(ref_input, ref_weight, targets, bias=ref_bias) / divisor
        # A baseline of each sequence is the same as a reference that is as much higher.
        baseline = ref if kl is None else ref + kl.detach().to(ref.dtype)
        of_sequences = kto(baseline[:, None], good[:, None], kl=0.0, beta=self.beta)
        seen: list[Tensor] = []

        def loss_fn(sums: Tensor, groups: range) -> Tensor:
            logps = sums / divisor[groups.start : groups.stop, None]
            seen.append(logps.detach())
            return of_sequences(logps, groups)

        loss = linear_sequence_loss(_input[:, None], lin_weight, targets[:, None], loss_fn, bias=bias)
        logps = torch.cat(seen).squeeze(1)
        rewards = self.beta * (logps - ref)
        sums = [(values * labels).sum() for values in (logps, rewards) for labels in (good, ~good)]
        logits = [summed_logits(_input, labels, lin_weight, bias) for labels in (good, ~good)]
        return loss, (*sums[:2], *logits, *sums[2:])


def checked_labels(_input: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
    """Return the labels (B,); raise ``ValueError`` for shapes that do not fit, or labels that are no booleans."""
    if _input.dim() != 3 or target.shape != _input.shape[:2]:
        raise ValueError(
            f"_input must be (B, T, H) and target (B, T), got {tuple(_input.shape)} and {tuple(target.shape)}"
        )
    if labels is None or labels.dtype != torch.bool or labels.shape != target.shape[:1]:
        found = None if labels is None else f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"preference_labels must be torch.bool of shape ({len(target)},), got {found}")
    return labels
