"""Models and heads that PEFT has wrapped: which weight and which features give the logits of the active adapters."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .quantised import head_weight, is_quantised

# Of a head in floating point, and of one that bitsandbytes has quantised.
LORA_LAYERS = (("tuners.lora", "Linear"), ("tuners.lora.bnb", "Linear4bit"), ("tuners.lora.bnb", "Linear8bitLt"))


@dataclass(frozen=True)
class AppliedHead:
    """A head as one product: its logits are ``features @ weight.T + bias``.

    Attributes:
        features: (R, F) hidden states, then the features of the active low-rank adapters; F = H + sum of ranks.
        weight: (V, F), the columns of the head, then those of the adapters. For a tied head it is an alias, whose
            gradient is written to in place, so no other code may hold that gradient.
        bias: (V,) or None.
        frozen_columns: leading columns of the weight that need no gradient, see :class:`cpo_kernels.options.Head`.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    frozen_columns: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """What a linear function takes besides features, weight and targets."""
        frozen = {"frozen_columns": self.frozen_columns} if self.frozen_columns else {}
        return {"bias": self.bias, **frozen}


def find_base(model: nn.Module) -> nn.Module:
    """Return the model of ``transformers`` inside a ``PeftModel``, else ``model`` itself.

    Raises:
        RuntimeError: an adapter that puts virtual tokens before the prompt, which would shift the rows of tokens.
    """
    wrapper: Any = model
    if _is_peft(model, "mixed_model", "PeftMixedModel"):
        return wrapper.base_model.model
    if not _is_peft(model, "peft_model", "PeftModel"):
        return model
    for name, config in wrapper.peft_config.items():
        if config.is_prompt_learning:
            raise RuntimeError(
                f"adapter {name!r} ({config.peft_type.value}) puts virtual tokens before the prompt, which shifts the "
                "rows that predict tokens; expected an adapter of the weights, such as LoRA"
            )
    return wrapper.get_base_model()


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all adapters of a model, which disabling its adapters takes out of it."""
    parameters: list[Any] = []
    for module in model.modules():
        # Every layer of PEFT, also one of trained copies or tokens, lists the attributes that it adds to the model.
        for name in (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ())):
            own = getattr(module, name, None)
            parameters += own.parameters() if isinstance(own, nn.Module) else [own]
    return [parameter for parameter in parameters if isinstance(parameter, nn.Parameter)]


def selected_head(head: nn.Module) -> nn.Module:
    """Return the head in use: the trained copy in ``modules_to_save``, or the original if adapters are disabled."""
    if not _is_peft(head, "utils", "ModulesToSaveWrapper"):
        return head
    wrapper: Any = head
    _check_one_choice(wrapper)
    active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return wrapper.original_module if wrapper.disable_adapters or not active else wrapper.modules_to_save[active[0]]


def plain_head(head: nn.Module) -> nn.Module:
    """Return the linear layer below all adapters.

    Raises:
        RuntimeError: an adapter of a kind that :func:`apply_head` does not apply.
    """
    chosen: Any = selected_head(head)
    if not _is_wrapped(chosen):
        return chosen
    if not any(_is_peft(chosen, package, kind) for package, kind in LORA_LAYERS):
        kind = f"{type(chosen).__module__}.{type(chosen).__name__}"
        raise RuntimeError(
            f"the head is wrapped in an adapter ({kind}), which the fused loss does not apply; use LoRA or "
            "modules_to_save for the head, leave it out of the adapter's target modules, or merge it"
        )
    if chosen.get_base_layer() is not chosen.base_layer:
        raise RuntimeError(
            "the head is wrapped in one adapter inside another, which the fused loss does not apply; expected one, "
            "merge the inner"
        )
    return chosen.base_layer


def check_adapters(head: nn.Module) -> None:
    """Raise ``RuntimeError`` for active adapters of the head that :func:`apply_head` does not apply."""
    chosen: Any = selected_head(head)
    if chosen is plain_head(head):
        return
    _check_one_choice(chosen)
    active = _active(chosen)
    for name in active:
        variant = chosen.lora_variant.get(name)
        if variant is None:
            continue
        what = f"adapter {name!r} of the head is {type(variant).__name__.removesuffix('Variant')}"
        if not _is_dora(chosen, name):
            raise RuntimeError(f"{what}, which the fused loss does not apply; expected plain LoRA or DoRA, or merge it")
        if len(active) > 1:
            raise RuntimeError(f"{what} and not the only active one of {active}; expected one")
        if chosen.training and not isinstance(chosen.lora_dropout[name], nn.Identity):
            raise RuntimeError(f"{what} with dropout of its input; expected lora_dropout=0")


def head_modules(head: nn.Module) -> list[nn.Module]:
    """Return the modules whose parameters :func:`apply_head` reads of ``head``, outer ones first."""
    chosen: Any = selected_head(head)
    modules: list[nn.Module] = [head, chosen, plain_head(head)]
    for name in _active(chosen):
        magnitudes = chosen.lora_magnitude_vector
        modules += [chosen.lora_A[name], chosen.lora_B[name]]
        modules += [magnitudes[name]] if name in magnitudes else []
    return list(dict.fromkeys(modules))


def apply_head(head: nn.Module, hidden: Tensor) -> AppliedHead:
    """Apply ``head`` with its active adapters to hidden states (R, H); differentiable in all of them.

    A low-rank adapter is merged by columns: ``x W' + s (x A') B' = [x, s x A'] [W, B]'``. Unlike a sum of
    weights, this loses nothing to the rounding of a half-precision W, and allows dropout of the adapter's input. Where
    W is frozen it costs two products, and a third of the columns of B only.

    Raises:
        RuntimeError: an adapter of a kind that :func:`apply_head` does not apply.
    """
    check_adapters(head)
    plain: Any = plain_head(head)
    chosen: Any = selected_head(head)
    if chosen is not plain and chosen.disable_adapters and chosen.merged:
        chosen.unmerge()  # as the layer's own forward does
    weight, bias = head_weight(plain, hidden.dtype), getattr(plain, "bias", None)
    if bias is not None and is_quantised(plain):
        bias = bias.to(weight.dtype)  # as the layer's own forward does
    features, columns = [hidden], [weight]
    for name in _active(chosen):
        inner, outer, scaling = chosen.lora_A[name], chosen.lora_B[name], chosen.scaling[name]
        dropped = chosen.lora_dropout[name](hidden.to(inner.weight.dtype))
        features.append((functional.linear(dropped, inner.weight) * scaling).to(hidden.dtype))
        columns.append(outer.weight.to(weight.dtype))
        if outer.bias is not None:
            shift = (outer.bias * scaling).to(weight.dtype)
            bias = shift if bias is None else bias + shift
    if len(columns) == 1:
        return AppliedHead(hidden, weight, bias)
    merged, frozen = torch.cat(columns, 1), 0 if weight.requires_grad else weight.shape[1]
    for name in _active(chosen):
        if _is_dora(chosen, name):
            # The gradient of the magnitude comes from all columns.
            merged, frozen = merged * _dora_scale(chosen, name, weight).to(weight.dtype).unsqueeze(1), 0
    return AppliedHead(torch.cat(features, 1), merged, bias, frozen)


def _active(head: Any) -> list[str]:
    """Return the names of the low-rank adapters that are active."""
    if not _is_wrapped(head) or head.disable_adapters or head.merged:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def _check_one_choice(head: nn.Module) -> None:
    for hook in head._forward_pre_hooks.values():
        if "adapter_names" in getattr(hook, "keywords", {}):
            raise RuntimeError("adapter_names, an adapter per example, is not supported by a head with adapters")


def _is_dora(head: Any, name: str) -> bool:
    return name in head.lora_magnitude_vector and type(head.lora_variant.get(name)).__name__ == "DoraLinearVariant"


def _dora_scale(head: Any, name: str, weight: Tensor) -> Tensor:
    """Return magnitude over norm, (V,); the norm has no gradient (Liu et al. 2024, DoRA, section 4.3)."""
    inner, outer = head.lora_A[name].weight.detach(), head.lora_B[name].weight.detach()
    norm = torch.linalg.norm(
        torch.addmm(weight.detach().to(inner.dtype), outer, inner, alpha=head.scaling[name]), dim=1
    )
    return head.lora_magnitude_vector[name].weight / norm


def _is_wrapped(head: nn.Module) -> bool:
    return hasattr(head, "base_layer") or hasattr(head, "token_adapter")


def _is_peft(module: nn.Module, package: str, kind: str) -> bool:
    """Tell whether ``module`` is of a class of PEFT; without importing PEFT, before which no module can be."""
    source = sys.modules.get(f"peft.{package}")
    return source is not None and isinstance(module, getattr(source, kind))
