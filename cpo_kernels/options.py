"""Options of the language-model head that every public function takes: ``**head`` in the signatures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch

if TYPE_CHECKING:
    from .engine.vocab_parallel import VocabShard


class HeadOptions(TypedDict, total=False):
    """Keyword arguments of the head, besides ``bias``; see :class:`Head` for their meaning."""

    logit_scale: float
    softcap: float | None
    temperature: float
    backend: str
    max_logits_bytes: int | None
    logits_dtype: torch.dtype | None
    grad_filter_eps: float | None
    candidate_eps: float | None
    skip_absent_rows: bool
    vocab_shard: VocabShard | None
    frozen_columns: int


@dataclass(frozen=True)
class Head:
    """How hidden states become the logits of the softmax, and with what means.

    ``y = softcap * tanh(((x + bias) * logit_scale) / softcap) / temperature`` for a raw product x; without a softcap,
    ``y = (x + bias) * logit_scale / temperature``.

    Args:
        logit_scale: factor of the raw logits (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``).
        softcap: bound of the logits, > 0 (Gemma 2's ``final_logit_softcapping``); None for none.
        temperature: divisor of the logits, > 0.
        backend: ``"auto"`` or a name of :func:`cpo_kernels.backends.available`.
        max_logits_bytes: budget of the logits held at once, in bytes; None for the backend's default.
        logits_dtype: None (the dtype of ``hidden``) or ``torch.float32``: logits kept as float32, as the products
            accumulate them, so that log-likelihoods of half-precision inputs are exact to float32. The gradient of the
            logits is rounded to the dtype of ``hidden``, as without it. Costs memory traffic and twice the budget.
        grad_filter_eps: leave vocabulary columns out of GEMMs 2 and 3 in which no gradient of the chunk's logits is
            above ``grad_filter_eps`` times the largest coefficient of a token (``beta / num_groups`` for the contrast
            alone), all of them entering as one column, their sum; None for exact gradients. ``CPOOutput.dropped`` says
            what share was left out.
        candidate_eps: leave candidates out of GEMMs 2 and 3 whose coefficient in the contrast is at most
            ``candidate_eps * beta / num_groups``; None for exact gradients.
        skip_absent_rows: keep rows that predict nothing out of the products, which the host must count: on a GPU, one
            synchronisation a call. False (and always while a CUDA graph is captured): every row of the padded form
            enters the products, and nothing waits for the device. Warm up with it before a capture, so that no kernel
            is compiled in it.
        vocab_shard: None, or what :meth:`cpo_kernels.VocabShard.of` says of a weight that is sharded over processes
            along the vocabulary. Every process of its group makes the same calls with the same ``hidden`` and
            ``targets`` (of the whole vocabulary), and ``weight`` and ``bias`` are its shards.
        frozen_columns: leading columns of ``weight`` (V, H) whose gradient nobody needs: those of a frozen weight that
            stand before the columns of a low-rank adapter. GEMM 3 leaves them out, and their gradient is 0
            (``torch.compile`` computes it all the same).
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    backend: str = "auto"
    max_logits_bytes: int | None = None
    logits_dtype: torch.dtype | None = None
    grad_filter_eps: float | None = None
    candidate_eps: float | None = None
    skip_absent_rows: bool = True
    vocab_shard: VocabShard | None = None
    frozen_columns: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.logit_scale):
            raise ValueError(f"logit_scale must be a finite number, got {self.logit_scale}")
        if self.softcap is not None and not (self.softcap > 0 and math.isfinite(self.softcap)):
            raise ValueError(f"softcap must be a positive number or None, got {self.softcap}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be a positive number, got {self.temperature}")
        if self.max_logits_bytes is not None and self.max_logits_bytes <= 0:
            raise ValueError(f"max_logits_bytes must be positive, got {self.max_logits_bytes}")
        if self.frozen_columns < 0:
            raise ValueError(f"frozen_columns must be at least 0, got {self.frozen_columns}")
        if self.logits_dtype not in (None, torch.float32):
            raise ValueError(f"logits_dtype must be None or torch.float32, got {self.logits_dtype}")
        for name in ("grad_filter_eps", "candidate_eps"):
            eps = getattr(self, name)
            if eps is not None and not 0 <= eps < math.inf:
                raise ValueError(f"{name} must be a number of at least 0 or None, got {eps}")
            if eps is not None and self.vocab_shard is not None:
                raise ValueError(f"{name}={eps}: a vocabulary-parallel head has no filters")

    @property
    def filtered(self) -> bool:
        """Whether gradients may leave something out."""
        return self.grad_filter_eps is not None or self.candidate_eps is not None

    def check_exact(self, function: str) -> None:
        """Raise ``ValueError`` where ``function`` has no contrast or product that a filter could shorten."""
        for name in ("grad_filter_eps", "candidate_eps"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)}: {function} has no filters; only linear_cpo_loss "
                    "and linear_sequence_loss have them"
                )

    def check_whole(self, function: str) -> None:
        """Raise ``ValueError`` where ``function`` cannot take a head sharded over processes."""
        if self.vocab_shard is not None:
            raise ValueError(f"{function} cannot take vocab_shard, got {self.vocab_shard}")

    @property
    def transform(self) -> tuple[float, float, float]:
        """(logit_scale, softcap, temperature) as the row operators take them: softcap 0 means none."""
        return self.logit_scale, self.softcap or 0.0, self.temperature
