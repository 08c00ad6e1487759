"""Options of the head and of the objective: the default, check and meaning of each are written once, in this module.

The public functions name them again in their signatures, so that an editor shows them; a test compares both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

from .loss_table import LOSS_TYPES, LOSSES

if TYPE_CHECKING:
    from .engine.vocab_parallel import VocabShard

P = ParamSpec("P")
R = TypeVar("R")

# The limits of float32, in which kernels compute whatever the dtype of the tensors.
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Head:
    """How hidden states become the logits of the softmax, and what computes them.

    ``y = softcap * tanh(((x + bias) * logit_scale) / softcap) / temperature`` for a raw product x; without a softcap,
    ``y = (x + bias) * logit_scale / temperature``.

    Args:
        logit_scale: factor of the raw logits (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``).
        softcap: bound of the logits, > 0 (Gemma 2's ``final_logit_softcapping``); None for none.
        temperature: divisor of the logits, > 0.
        backend: ``"auto"`` or a name of :func:`cpo_kernels.backends.available`.
        max_logits_bytes: budget in bytes of all that a call holds at once beyond inputs and gradients, most of it
            logits; None for the backend's default. :func:`cpo_kernels.plan` tells how it is used.
        logits_dtype: None (the dtype of ``hidden``) or ``torch.float32``: logits kept as float32, as the products
            accumulate them, so that log-likelihoods of half-precision inputs are exact to float32. The gradient of the
            logits is rounded to the dtype of ``hidden``, as without it. Costs memory traffic and twice the budget on a
            GPU; bfloat16 on a CPU with AVX2 or AVX-512 is exact without it, at no cost.
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
        if not abs(self.logit_scale) <= LARGEST:
            raise ValueError(f"logit_scale must be a finite number, got {self.logit_scale}")
        if self.softcap is not None and not (SMALLEST <= self.softcap <= LARGEST):
            raise ValueError(f"softcap must be a positive number of float32's range or None, got {self.softcap}")
        if not (SMALLEST <= self.temperature <= LARGEST):
            raise ValueError(f"temperature must be a positive number, got {self.temperature}")
        divisors = (self.temperature, self.softcap or 1.0)
        if not all(abs(x) / y <= LARGEST for x in (self.logit_scale, self.softcap or 0.0) for y in divisors):
            raise ValueError(
                f"logit_scale={self.logit_scale}, softcap={self.softcap} and temperature={self.temperature} must have "
                "ratios within float32's range"
            )
        if self.max_logits_bytes is not None and not 0 < self.max_logits_bytes < math.inf:
            raise ValueError(f"max_logits_bytes must be positive, got {self.max_logits_bytes}")
        if not self.frozen_columns >= 0:
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


@dataclass(frozen=True)
class Objective:
    """``contrast_weight * mean_g L_g + mle_weight * NLL(rank-0 candidates, per token)``.

    Args:
        beta: inverse temperature of the contrast, > 0.
        margin: added to the score of every candidate of rank > 0, in score units (SimPO's gamma).
        label_smoothing: probability in [0, 0.5) that a pair is the wrong way round (K = 1 only); for ``"exo_pair"`` it
            has to be above 0, and most losses have no place for it.
        loss_type: a row of :data:`cpo_kernels.loss_table.LOSSES`: ``"plackett_luce"``, or for K = 1 any other.
        length_normalized: contrast means of token log-probabilities instead of sums. ``ref_logps`` are sums here too:
            the loss divides them, like its own, by the numbers of tokens.
        contrast_weight: weight of the contrast.
        mle_weight: weight of the negative log-likelihood of the rank-0 candidates.
        num_groups: denominator of the contrast (groups of the whole accumulated batch); None: the groups given.
        num_target_tokens: denominator of the NLL; None: the rank-0 tokens given.
    """

    beta: float = 0.1
    margin: float = 0.0
    label_smoothing: float = 0.0
    loss_type: str = "plackett_luce"
    length_normalized: bool = False
    contrast_weight: float = 1.0
    mle_weight: float = 0.0
    num_groups: float | None = None
    num_target_tokens: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be a positive number, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {LOSS_TYPES}, got {self.loss_type!r}")
        smoothing = LOSSES[self.loss_type].smoothing
        if self.label_smoothing and smoothing == "none":
            takers = " or ".join(repr(name) for name, loss in LOSSES.items() if loss.smoothing != "none")
            raise ValueError(f"label_smoothing={self.label_smoothing} needs loss_type={takers}, got {self.loss_type!r}")
        if not self.label_smoothing and smoothing == "required":
            raise ValueError(f"loss_type={self.loss_type!r} needs label_smoothing in (0, 0.5), got 0")
        for name in ("margin", "contrast_weight", "mle_weight"):
            if not abs(getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        for name in ("num_groups", "num_target_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")

    @property
    def of_pairs(self) -> bool:
        """Tell whether the objective is restricted to one negative per group (K = 1)."""
        return not LOSSES[self.loss_type].of_groups or self.label_smoothing != 0

    @property
    def pairs_only(self) -> str | None:
        """Name the option that restricts this objective to one negative per group; None without one."""
        if not LOSSES[self.loss_type].of_groups:
            return f"loss_type={self.loss_type!r}"
        return f"label_smoothing={self.label_smoothing}" if self.of_pairs else None

    @property
    def has_kernel(self) -> bool:
        """Tell whether the kernels that run the contrast in one launch have this loss."""
        return LOSSES[self.loss_type].kernel_code is not None

    def check_candidates(self, candidates: int) -> None:
        """Raise ``ValueError`` if groups of up to ``candidates`` = K + 1 do not suit the loss."""
        if self.of_pairs and candidates > 2:
            raise ValueError(f"{self.pairs_only} needs one negative per group (K = 1), got K = {candidates - 1}")


HEAD_OPTIONS = tuple(field.name for field in fields(Head))
OBJECTIVE_OPTIONS = tuple(field.name for field in fields(Objective))


def refuse_unknown(function: Callable[..., Any], unknown: Iterable[str], also: Iterable[str] = ()) -> None:
    """Raise ``TypeError`` for an unknown keyword argument, and name the one that was probably meant.

    Args:
        function: the function or class that was called; its signature names the arguments it has.
        unknown: the arguments that it does not have.
        also: names of arguments that it passes on.
    """
    for name in unknown:
        near = get_close_matches(name, [*argument_names(function), *also], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}{hint}")


def argument_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that a function or a class takes by keyword."""
    by_keyword = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return [name for name, own in signature(function).parameters.items() if own.kind in by_keyword]


def suggests_arguments(function: Callable[P, R], passes_to: Callable[..., Any] | None = None) -> Callable[P, R]:
    """Let a function or a class name the argument that was probably meant where a keyword is none of its own.

    Python itself does so from 3.13 on. ``passes_to`` is the function that gets the keywords that are not named.
    """
    made: Any = function
    called: Callable[P, R] = made.__init__ if isinstance(function, type) else function
    passed = [] if passes_to is None else argument_names(passes_to)
    known = {*argument_names(function), *passed}

    @wraps(called)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_unknown(function, [name for name in kwargs if name not in known], also=passed)
        return called(*args, **kwargs)

    if not isinstance(function, type):
        return checked
    made.__init__ = checked
    return function


def chosen(options: Head | Objective) -> dict[str, Any]:
    """Return the options that are not the defaults, by name."""
    defaults = type(options)()
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value != getattr(defaults, name)}
