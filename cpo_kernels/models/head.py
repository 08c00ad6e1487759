"""Where a Hugging Face causal language model keeps its body and its head, and what it does to its logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from cpo_kernels.kernels.transform import transform_logits

from .adapters import check_adapters, plain_head
from .sharded import is_sharded


def find_body(model: PreTrainedModel) -> nn.Module:
    """The module whose ``last_hidden_state`` the head is applied to.

    Raises:
        RuntimeError: the model has none that differs from itself, or is an encoder-decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise RuntimeError(f"{type(model).__name__} is an encoder-decoder; expected a decoder-only language model")
    body = getattr(model, "base_model", model)
    if body is model and hasattr(model, "get_decoder"):
        body = model.get_decoder()
    if body is model or not isinstance(body, nn.Module):
        raise RuntimeError(
            f"{type(model).__name__} has no recognisable body: expected a causal language model of transformers, whose "
            "base_model or get_decoder() is the transformer without the head"
        )
    return body


def find_head(model: PreTrainedModel) -> nn.Module:
    """The output embeddings, possibly wrapped in adapters.

    Raises:
        RuntimeError: the model has none.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise RuntimeError(
            f"{type(model).__name__} has no recognisable head: expected a linear layer from get_output_embeddings()"
        )
    return head


def check_head(head: nn.Module) -> None:
    """Raise ``RuntimeError`` for a head that is more than a weight (V, H), a bias (V,) and known adapters."""
    check_adapters(head)
    plain = plain_head(head)
    kind = type(plain).__name__
    weight = getattr(plain, "weight", None)
    emptied = isinstance(weight, Tensor) and weight.numel() == 0  # by ZeRO-3, which keeps the shape elsewhere
    if not isinstance(weight, Tensor) or (weight.ndim != 2 and not emptied):
        raise RuntimeError(f"the head ({kind}) has no weight of shape (V, H); expected a linear layer")
    known = type(weight) in (nn.Parameter, Tensor) or is_sharded(plain)
    if not weight.is_floating_point() or not known:
        raise RuntimeError(
            f"the head ({kind}, weight {type(weight).__name__} of {weight.dtype}) is quantised, which the fused loss "
            "does not read; keep the head in floating point (llm_int8_skip_modules, modules_to_not_convert)"
        )


def head_options(model: PreTrainedModel) -> dict[str, float]:
    """``logit_scale`` and ``softcap`` of the model's logits, from its configuration.

    Known are ``logit_scale`` (Cohere), ``logits_scaling`` (Granite, a divisor), ``lm_head_multiplier`` (Falcon-H1) and
    ``final_logit_softcapping`` (Gemma).
    """
    config: Any = model.config.get_text_config()
    options: dict[str, float] = {}
    scale = (getattr(config, "logit_scale", None) or 1.0) * (getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= getattr(config, "logits_scaling", None) or 1.0
    if scale != 1.0:
        options["logit_scale"] = scale
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap:
        options["softcap"] = softcap
    return options


def verify_head(model: PreTrainedModel) -> None:
    """Check on a few tokens that the model's logits are what :func:`head_options` says of its body and head.

    The head's own forward does not run: a probe with the weight below its adapters stands in for it and records its
    input. A model that is sharded or on the meta device is not checked.

    Raises:
        RuntimeError: they are not.
    """
    if is_sharded(model):
        return
    head: Any = plain_head(find_head(model))
    probe = _HeadProbe(head.weight, getattr(head, "bias", None))
    ids = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, "return_dict": True}
    with evaluating(model), _output_embeddings(model, probe):
        logits = model.forward(**inputs).logits
        hidden = find_body(model)(**inputs).last_hidden_state
    name = type(model).__name__
    if probe.hidden is None or not _same(probe.hidden, hidden):
        raise RuntimeError(
            f"{name} does not apply its head to the last hidden state of its body as it is; the fused loss would "
            "differ from the model's own"
        )
    options = head_options(model)
    expected = transform_logits(probe.logits.float(), **options)  # type: ignore[arg-type]
    if not _same(logits, expected):
        raise RuntimeError(
            f"{name} transforms its logits in a way that its configuration does not tell (it tells "
            f"{options or 'nothing'}); the fused loss would differ from the model's own"
        )


def _same(value: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding in the dtype of ``value``; NaN equals NaN, for weights that hold some."""
    atol = 8 * torch.finfo(value.dtype).eps * max(1.0, float(expected.abs().max().nan_to_num(posinf=1.0)))
    same_shape = value.shape == expected.shape
    return same_shape and torch.allclose(value.float(), expected.float(), rtol=0.0, atol=atol, equal_nan=True)


class _HeadProbe(nn.Module):
    """Applies a head's weight and bias and keeps what it saw."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        # Assigned as they are: a tied weight must stay one Parameter.
        self.weight, self.bias = weight, bias
        self.hidden: Tensor | None = None
        self.logits: Tensor = weight.new_empty(0)

    def forward(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        self.logits = functional.linear(hidden, self.weight, self.bias)
        return self.logits.clone()  # some models scale their logits in place


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """A model in evaluation mode and without gradients; its modules' modes come back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _output_embeddings(model: PreTrainedModel, probe: nn.Module) -> Iterator[None]:
    head = find_head(model)
    model.set_output_embeddings(probe)
    try:
        yield
    finally:
        model.set_output_embeddings(head)
