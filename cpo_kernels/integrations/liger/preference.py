"""Liger's losses of pairs: CPO, SimPO, DPO and ORPO, with their names, signatures and return values."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from cpo_kernels.integrations.losses import log_odds
from cpo_kernels.loss_table import LOSSES, TRL_NAMES, Pair, trl_options
from cpo_kernels.options import suggests_arguments

from .pairs import Output, run_pairs

# Liger's DPO has TRL's names, but neither ipo nor sigmoid_norm, which is ``average_log_prob`` in Liger.
DPO_LOSS_TYPES = tuple(name for name in TRL_NAMES if not trl_options(name)["length_normalized"])


@suggests_arguments
class LigerFusedLinearCPOLoss(nn.Module):
    """CPO of Xu et al. 2024 (arXiv 2401.08417): no reference, ``alpha`` weighs the NLL of the chosen sequences."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.label_smoothing = ignore_index, beta, alpha, label_smoothing
        self.compute_nll_loss, self.compiled = compute_nll_loss, compiled
        self.average_log_prob, self.chunk_size = average_log_prob, chunk_size

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Output:
        """Return the outputs of :func:`.pairs.run_pairs`; raise ``ValueError`` for an odd number of sequences."""

        def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
            pair = Pair.of_ratios(chosen, rejected, self.beta, label_smoothing=self.label_smoothing)
            return LOSSES["plackett_luce"].formula(pair).loss

        return run_pairs(self, losses, lin_weight, _input, target, bias)


@suggests_arguments
class LigerFusedLinearSimPOLoss(nn.Module):
    """SimPO of Meng et al. 2024 (arXiv 2405.14734): means over tokens, and ``gamma`` as the margin of the scores."""

    average_log_prob = True

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.label_smoothing = ignore_index, beta, alpha, label_smoothing
        self.compute_nll_loss, self.compiled = compute_nll_loss, compiled
        self.gamma, self.chunk_size = gamma, chunk_size

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Output:
        """Return the outputs of :func:`.pairs.run_pairs`; raise ``ValueError`` for an odd number of sequences."""

        def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
            pair = Pair.of_ratios(chosen, rejected, self.beta, self.gamma, label_smoothing=self.label_smoothing)
            return LOSSES["plackett_luce"].formula(pair).loss

        return run_pairs(self, losses, lin_weight, _input, target, bias)


@suggests_arguments
class LigerFusedLinearDPOLoss(nn.Module):
    """DPO of Rafailov et al. 2023 (arXiv 2305.18290) and its variants, by Liger's and TRL's names of ``loss_type``."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        if loss_type not in DPO_LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {DPO_LOSS_TYPES}, got {loss_type!r}")
        smoothing = LOSSES[loss_type].smoothing if loss_type in LOSSES else "none"
        if smoothing == "required" and not 0 < label_smoothing < 1:
            raise ValueError(f"loss_type={loss_type!r} needs label_smoothing in (0, 1), got {label_smoothing}")
        if smoothing == "optional" and not 0 <= label_smoothing < 0.5:
            raise ValueError(f"loss_type={loss_type!r} needs label_smoothing in [0, 0.5), got {label_smoothing}")
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.compiled, self.use_ref_model, self.average_log_prob = compiled, use_ref_model, average_log_prob
        self.chunk_size, self.loss_type = chunk_size, loss_type
        self.label_smoothing, self.discopop_tau = label_smoothing, discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Output:
        """Return the outputs of :func:`.pairs.run_pairs`.

        ref_input (2B, T, H') and ref_weight (V, H') are the hidden states and the head of the reference.

        Raises:
            ValueError: an odd number of sequences, or ``use_ref_model`` without ref_input or ref_weight.
        """
        options = trl_options(self.loss_type, self.label_smoothing)
        numbers = {"label_smoothing": options["label_smoothing"], "tau": self.discopop_tau}

        def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
            pair = Pair.of_ratios(chosen, rejected, self.beta, **numbers)
            return LOSSES[options["loss_type"]].formula(pair).loss

        ref = None
        if self.use_ref_model:
            if ref_input is None or ref_weight is None:
                raise ValueError("use_ref_model=True needs ref_input and ref_weight, got None")
            ref = ref_input, ref_weight, ref_bias
        return run_pairs(self, losses, lin_weight, _input, target, bias, ref)


@suggests_arguments
class LigerFusedLinearORPOLoss(nn.Module):
    """ORPO of Hong et al. 2024 (arXiv 2403.07691): odds of means over tokens, ``beta`` as the paper's lambda."""

    average_log_prob = True
    alpha = 1.0

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.compute_nll_loss = ignore_index, beta, compute_nll_loss
        self.compiled, self.chunk_size = compiled, chunk_size

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Output:
        """Return the outputs of :func:`.pairs.run_pairs`, then the means of the log-sigmoid of the log odds ratio and
        of the ratio itself, two scalars.

        nll_target (2B, T), of which the first B sequences count, has the targets of the NLL if they are others, such as
        those of the prompt as well; a row that predicts a token for both is computed once.

        Raises:
            ValueError: an odd number of sequences, or an nll_target of another shape than target.
        """

        def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
            return log_odds(chosen) - log_odds(rejected)

        def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
            return -self.beta * logsigmoid(log_odds_ratio(chosen, rejected))

        loss, aux = run_pairs(self, losses, lin_weight, _input, target, bias, nll_target=nll_target)
        ratio = log_odds_ratio(*aux[:2])
        return loss, (*aux, logsigmoid(ratio).mean(), ratio.mean())
