"""Liger's loss of sampled completions, GRPO and its relatives, with its signature and return values."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from cpo_kernels.functional import linear_sequence_loss, linear_token_logps
from cpo_kernels.integrations.targets import mark_absent
from cpo_kernels.kernels.numerics import accumulate_dtype
from cpo_kernels.options import suggests_arguments

from .pairs import Output
from .policy import LOSS_TYPES, OF_TOKENS_ONLY, Given, Terms, terms_of, token_weights


@suggests_arguments
class LigerFusedLinearGRPOLoss(nn.Module):
    """GRPO of Shao et al. 2024 (arXiv 2402.03300) and its relatives, by Liger's and TRL's names of ``loss_type``."""

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {LOSS_TYPES}, got {loss_type!r}")
        if importance_sampling_level not in ("token", "sequence"):
            raise ValueError(
                f"importance_sampling_level must be 'token' or 'sequence', got {importance_sampling_level!r}"
            )
        positive = {"sapo_temperature_pos": sapo_temperature_pos, "sapo_temperature_neg": sapo_temperature_neg}
        for name, value in (positive | ({} if delta is None else {"delta": delta})).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.beta, self.compiled, self.use_ref_model, self.chunk_size = beta, compiled, use_ref_model, chunk_size
        self.epsilon_low, self.epsilon_high, self.loss_type = epsilon_low, epsilon_high, loss_type
        self.max_completion_length, self.importance_sampling_level = max_completion_length, importance_sampling_level
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.temperature, self.delta, self.use_bias_correction_kl = temperature, delta, use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Output:
        """Return the loss, a scalar, and the metrics, scalars without gradients.

        The metrics are means over tokens: the divergence from the reference, unless ``beta`` is 0, and the share of
        clipped ratios.

        Args:
            _input: (B, T, H) hidden states.
            lin_weight: (V, H).
            selected_token_ids: (B, T) integers, the sampled tokens, aligned with _input.
            attention_mask: (B, T), 0 where there is no token: such a row enters no product (with ``"luspo"``, whose
                mean is over all positions, every row does).
            advantages: (B,).
            bias: (V,) or None.
            ref_per_token_logps: (B, T) log-probabilities under the reference; None: from ref_input and ref_weight.
            old_per_token_logps: (B, T) log-probabilities under the model that drew the samples; None: the present ones.
            ref_input: (B, T, H'), the hidden states of the reference; used with ``use_ref_model``.
            ref_weight: (V, H').
            ref_bias: (V,) or None.
            vllm_is_ratio: (B,), (B, 1) or (B, T), correction for the difference between sampler and old model, or None.
            num_items_in_batch: tokens of the accumulated batch over all processes, for ``"dapo"``, ``"cispo"`` and
                ``"vespo"``; None: those of this call on all processes.

        Raises:
            ValueError: shapes that do not fit, a token of -100 that the mask counts, ``use_ref_model`` without a
                reference, ``"dr_grpo"`` without ``max_completion_length``, or an importance ratio of whole sequences
                with a loss of tokens.
        """
        self.check(_input, selected_token_ids, attention_mask, advantages, vllm_is_ratio)
        absent = (attention_mask == 0) & (self.loss_type != "luspo")
        targets = mark_absent(selected_token_ids, absent, "a token that attention_mask leaves out")
        head: dict[str, Any] = {"bias": bias, "temperature": self.temperature}
        ref = self.ref_logps(targets, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        dtype = accumulate_dtype(_input.dtype)

        def present(logps: Tensor | None) -> Tensor | None:
            return None if logps is None else logps.detach().to(dtype).masked_fill(absent, 0.0)

        ratio = None if vllm_is_ratio is None else vllm_is_ratio.detach().to(dtype).view(len(targets), -1)
        mask = attention_mask.detach().to(dtype)
        gains = advantages.detach().to(dtype)[:, None]
        given = Given(mask, gains, present(old_per_token_logps), present(ref), ratio)
        weights = token_weights(mask.double(), self, num_items_in_batch)  # the losses of tokens may cancel
        seen: list[Terms] = []

        def loss_fn(logps: Tensor, groups: range) -> Tensor:
            here = slice(groups.start, groups.stop)
            terms = terms_of(logps, given.of(here), self)
            seen.append(Terms(*(None if x is None else x.detach() for x in terms)))  # type: ignore[arg-type]
            return (terms.losses * weights[here]).sum().to(dtype)

        # A group is a sequence, and its candidates are its tokens, so that the loss sees each of them.
        loss = linear_sequence_loss(_input.unsqueeze(2), lin_weight, targets.unsqueeze(2), loss_fn, **head)
        tokens = mask.sum().clamp(min=1)
        kls = [terms.kl for terms in seen if terms.kl is not None]
        metrics = [torch.cat(kls)] if kls else []
        metrics.append(torch.cat([terms.clipped for terms in seen]))
        return loss, tuple((metric * mask).sum() / tokens for metric in metrics)

    def ref_logps(
        self,
        targets: Tensor,
        ref_per_token_logps: Tensor | None,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> Tensor | None:
        """Return log-probabilities (B, T) under the reference; None where the loss has no part for one."""
        if not self.use_ref_model:
            return None
        if ref_per_token_logps is not None:
            if ref_input is not None:
                warnings.warn("both ref_per_token_logps and ref_input are given: ref_input is not used", stacklevel=3)
            return ref_per_token_logps
        if ref_input is None or ref_weight is None:
            raise ValueError("use_ref_model=True needs ref_per_token_logps, or ref_input and ref_weight, got None")
        if self.beta == 0:
            return None
        with torch.no_grad():
            return linear_token_logps(ref_input, ref_weight, targets, bias=ref_bias, temperature=self.temperature)

    def check(
        self, _input: Tensor, ids: Tensor, attention_mask: Tensor, advantages: Tensor, ratio: Tensor | None
    ) -> None:
        """Raise ``ValueError`` for options or shapes that do not fit each other."""
        if self.importance_sampling_level == "sequence" and self.loss_type in OF_TOKENS_ONLY:
            raise ValueError(
                f"Sequence-level importance sampling is not supported for loss_type={self.loss_type!r}: use "
                "importance_sampling_level='token'"
            )
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' needs max_completion_length, got None")
        shape = tuple(ids.shape)
        if _input.dim() != 3 or shape != _input.shape[:2] or attention_mask.shape != ids.shape:
            raise ValueError(
                f"_input must be (B, T, H), selected_token_ids and attention_mask (B, T), got {tuple(_input.shape)}, "
                f"{shape} and {tuple(attention_mask.shape)}"
            )
        if advantages.shape != shape[:1]:
            raise ValueError(f"advantages must be ({shape[0]},), got {tuple(advantages.shape)}")
        if ratio is not None and tuple(ratio.shape) not in (shape[:1], (shape[0], 1), shape):
            raise ValueError(
                f"vllm_is_ratio must be ({shape[0]},), ({shape[0]}, 1) or {shape}, got {tuple(ratio.shape)}"
            )
