"""``attach_linear_loss``: the fused loss inside ``model.forward``, in place of the language-model head.

The loss has to be computed inside ``forward``, where the hooks of DDP, FSDP and ZeRO have gathered the head's weight
and wait for its gradient; reading ``model.lm_head.weight`` from outside would bypass them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from cpo_kernels.functional import linear_cpo_loss, linear_sequence_logps
from cpo_kernels.layout import CandidateLayout

from .head import check_head, find_body, find_head, head_options, verify_head


@dataclass
class LinearLossOutput(ModelOutput):
    """What a model returns for a request; a field that the request does not compute is None.

    Attributes:
        loss: scalar, differentiable.
        logits: always None; they are never materialised.
        logps: (S,) log-likelihoods, differentiable for a :class:`LogpsRequest`, else detached.
        rewards: (S,) ``beta * (logp - ref_logp)``.
        contrastive_loss, nll_loss, accuracy, margin, dropped: scalars, see :class:`~cpo_kernels.CPOOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    logps: Tensor | None = None
    rewards: Tensor | None = None
    contrastive_loss: Tensor | None = None
    nll_loss: Tensor | None = None
    accuracy: Tensor | None = None
    margin: Tensor | None = None
    dropped: Tensor | None = None


class CPORequest:
    """Asks a model for the loss of :func:`cpo_kernels.linear_cpo_loss`.

    Not a dataclass, because FSDP casts the tensors of dataclasses among a forward's arguments to its compute dtype,
    and reference log-likelihoods must stay in float32.

    Args:
        targets: (N,) int64, the vocabulary entry of each token; -100 for none.
        layout: which row of the flattened (B * L, H) hidden states predicts each token, and which candidate of
            which group it belongs to.
        options: objective and head keywords of ``linear_cpo_loss`` (``ref_logps``, ``beta``, ``mle_weight``, ...).
            ``bias``, ``logit_scale`` and ``softcap`` are the model's own.
    """

    def __init__(self, targets: Tensor, layout: CandidateLayout, **options: Any) -> None:
        self.targets, self.layout, self.options = targets, layout, options

    def compute(self, hidden: Tensor, weight: Tensor, head: Mapping[str, Any]) -> LinearLossOutput:
        """The loss from hidden states (R, H) and the head's weight (V, H)."""
        out = linear_cpo_loss(hidden, weight, self.targets, layout=self.layout, **self.options, **head)
        return LinearLossOutput(
            loss=out.loss,
            logps=out.logps,
            rewards=out.rewards,
            contrastive_loss=out.contrastive_loss,
            nll_loss=out.nll_loss,
            accuracy=out.accuracy,
            margin=out.margin,
            dropped=out.dropped,
        )


class LogpsRequest:
    """Asks a model for the log-likelihoods of :func:`cpo_kernels.linear_sequence_logps`, one per segment.

    Args:
        targets, layout: as for :class:`CPORequest`.
        options: head keywords of ``linear_sequence_logps``.
    """

    def __init__(self, targets: Tensor, layout: CandidateLayout, **options: Any) -> None:
        self.targets, self.layout, self.options = targets, layout, options

    def compute(self, hidden: Tensor, weight: Tensor, head: Mapping[str, Any]) -> LinearLossOutput:
        """The log-likelihoods (S,) from hidden states (R, H) and the head's weight (V, H)."""
        logps = linear_sequence_logps(hidden, weight, self.targets, layout=self.layout, **self.options, **head)
        return LinearLossOutput(logps=logps)


def attach_linear_loss(model: PreTrainedModel, *, verify: bool = True) -> PreTrainedModel:
    """Teach a causal language model to compute the fused loss in its forward pass.

    Called with the extra keyword ``linear_loss=CPORequest(...)`` or ``LogpsRequest(...)``, the model runs its body,
    never its head, and returns a :class:`LinearLossOutput`. Without the keyword it behaves as before. The change is
    made in place, survives ``copy.deepcopy``, and leaves parameters, ``state_dict`` and ``save_pretrained`` as they
    are; attaching twice changes nothing.

    Args:
        model: a decoder-only model of ``transformers`` with a body and a linear head, tied or not.
        verify: run one forward pass of a few tokens to check that the model's own logits are the head's product with
            the body's output, scaled and capped as its configuration says, so that a model family with a transform
            unknown here raises instead of training on wrong numbers. Skipped on the meta device.

    Returns:
        ``model``.

    Raises:
        RuntimeError: no recognisable body or head, a head with adapters or quantised weights, an encoder-decoder, or
            logits that are not this head's.
    """
    if getattr(type(model), "_computes_linear_loss", False):
        return model
    find_body(model)
    check_head(find_head(model))
    if verify:
        verify_head(model)
    kind: Any = type(model)
    model.__class__ = _with_linear_loss(kind)
    return model


@functools.cache
def _with_linear_loss(base: type) -> type:
    """A subclass of a model class whose forward takes ``linear_loss``; a class, so that copies of a model keep it."""
    original: Callable[..., Any] = base.forward  # type: ignore[attr-defined]

    def forward(self: PreTrainedModel, *args: Any, linear_loss: Any = None, **kwargs: Any) -> Any:
        if linear_loss is None:
            return original(self, *args, **kwargs)
        return _linear_forward(self, linear_loss, *args, **kwargs)

    forward.__doc__ = original.__doc__
    forward.__signature__ = _extended_signature(original)  # type: ignore[attr-defined]
    # The name is kept: it becomes `architectures` of a saved configuration, and Trainer looks it up.
    members = {"forward": forward, "__module__": base.__module__, "_computes_linear_loss": True}
    return type(base.__name__, (base,), members)


def _extended_signature(function: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(function)
    extra = inspect.Parameter("linear_loss", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*parameters[:at], extra, *parameters[at:]])


def _linear_forward(model: PreTrainedModel, request: Any, *args: Any, **kwargs: Any) -> LinearLossOutput:
    for name in ("labels", "logits_to_keep"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(f"{name} has no meaning together with linear_loss, which brings its own targets")
    body, head = find_body(model), find_head(model)
    hidden = body(*args, **{**kwargs, "use_cache": False, "return_dict": True}).last_hidden_state
    options: dict[str, Any] = dict(head_options(model))
    if getattr(head, "bias", None) is not None:
        options["bias"] = head.bias
    return request.compute(hidden.flatten(0, -2), head.weight, options)
