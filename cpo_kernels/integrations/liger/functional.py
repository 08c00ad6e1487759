"""The functional forms of Liger's losses: the arguments of each in the order of Liger's function of that name."""

from __future__ import annotations

import torch
from torch import Tensor

from cpo_kernels.options import suggests_arguments

from .cross_entropy import CrossEntropyOutput, LigerFusedLinearCrossEntropyLoss
from .grpo import LigerFusedLinearGRPOLoss
from .pairs import Output
from .preference import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from .unpaired import LigerFusedLinearKTOLoss


@suggests_arguments
def liger_fused_linear_cpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    compute_nll_loss: bool = True,
    compiled: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
) -> Output:
    """Compute what :class:`LigerFusedLinearCPOLoss` of these options computes."""
    options = ignore_index, beta, alpha, label_smoothing, compute_nll_loss, compiled, average_log_prob, chunk_size
    return LigerFusedLinearCPOLoss(*options)(weight, _input, target, bias)


@suggests_arguments
def liger_fused_linear_simpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    gamma: float = 0.5,
    chunk_size: int = 1,
) -> Output:
    """Compute what :class:`LigerFusedLinearSimPOLoss` of these options computes."""
    options = ignore_index, beta, alpha, label_smoothing, compute_nll_loss, compiled, gamma, chunk_size
    return LigerFusedLinearSimPOLoss(*options)(weight, _input, target, bias)


@suggests_arguments
def liger_fused_linear_dpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    alpha: float = 1.0,
) -> Output:
    """Compute what :class:`LigerFusedLinearDPOLoss` of these options computes."""
    loss = LigerFusedLinearDPOLoss(
        ignore_index=ignore_index,
        beta=beta,
        alpha=alpha,
        compute_nll_loss=compute_nll_loss,
        compiled=compiled,
        use_ref_model=use_ref_model,
        average_log_prob=average_log_prob,
        chunk_size=chunk_size,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
    )
    return loss(weight, _input, target, bias, ref_input, ref_weight, ref_bias)


@suggests_arguments
def liger_fused_linear_orpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = True,
    nll_target: Tensor | None = None,
    compiled: bool = True,
    chunk_size: int = 1,
) -> Output:
    """Compute what :class:`LigerFusedLinearORPOLoss` of these options computes."""
    loss = LigerFusedLinearORPOLoss(ignore_index, beta, compute_nll_loss, compiled, chunk_size)
    return loss(weight, _input, target, bias, nll_target)


@suggests_arguments
def liger_fused_linear_kto(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    preference_labels: Tensor,
    bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
) -> Output:
    """Compute what :class:`LigerFusedLinearKTOLoss` of these options computes."""
    loss = LigerFusedLinearKTOLoss(ignore_index, beta, compiled, use_ref_model, average_log_prob, chunk_size)
    return loss(_input, weight, target, bias, preference_labels, ref_input, ref_weight, ref_bias, kl)


@suggests_arguments
def liger_fused_linear_grpo(
    _input: Tensor,
    weight: Tensor,
    selected_token_ids: Tensor,
    attention_mask: Tensor,
    advantages: Tensor,
    bias: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    beta: float = 0.04,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    temperature: float = 1.0,
    compiled: bool = True,
    use_ref_model: bool = True,
    chunk_size: int = 1,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    num_items_in_batch: float | Tensor | None = None,
) -> Output:
    """Compute what :class:`LigerFusedLinearGRPOLoss` of these options computes."""
    loss = LigerFusedLinearGRPOLoss(
        *(beta, compiled, use_ref_model, chunk_size, epsilon_low, epsilon_high, loss_type, max_completion_length),
        *(importance_sampling_level, sapo_temperature_pos, sapo_temperature_neg, temperature, delta),
        *(use_bias_correction_kl, vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg),
    )
    samples = _input, weight, selected_token_ids, attention_mask, advantages, bias
    others = ref_per_token_logps, old_per_token_logps, ref_input, ref_weight, ref_bias
    return loss(*samples, *others, vllm_is_ratio, num_items_in_batch)


@suggests_arguments
def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:
    """Compute what :class:`LigerFusedLinearCrossEntropyLoss` of these options computes.

    ``chunk_mem_const`` has no effect.
    """
    loss = LigerFusedLinearCrossEntropyLoss(
        *(ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss, accum_dtype),
        *(use_token_scaling, return_token_accuracy, return_predicted_tokens),
    )
    return loss(weight, input, target, bias)
