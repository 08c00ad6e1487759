"""``attach_linear_loss``: the fused loss inside ``model.forward``, in place of the language-model head.

The loss has to be computed inside ``forward``, where the hooks of DDP, FSDP and ZeRO have gathered the head's weight
and wait for its gradient; reading ``model.lm_head.weight`` from outside would bypass them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import apply_head, find_base, head_modules
from .head import check_head, find_body, find_head, head_options, verify_head
from .prefix.masks import with_prefix_tree
from .prefix.tree import PrefixTree
from .requests import CPORequest, LinearLossOutput, LogpsRequest, SequenceLossRequest, StatisticsRequest
from .sharded import may_be_sharded, run_inside
from .tied import find_embedding, one_gradient

__all__ = [
    "CPORequest",
    "LinearLossOutput",
    "LogpsRequest",
    "SequenceLossRequest",
    "StatisticsRequest",
    "attach_linear_loss",
]

Model = TypeVar("Model", bound=nn.Module)


def attach_linear_loss(model: Model, *, verify: bool = True) -> Model:
    """Teach a causal language model to compute the fused loss in its forward pass.

    Called with the extra keyword ``linear_loss=CPORequest(...)`` (or ``SequenceLossRequest``, ``LogpsRequest``,
    ``StatisticsRequest``), the model runs its body, never its head, and returns a :class:`LinearLossOutput`. Without
    the keyword it behaves as before. With ``prefix_tree=PrefixTree(...)`` its rows are packed groups, see
    :func:`cpo_kernels.models.pack_groups`, and it takes no ``attention_mask`` or ``position_ids``. The change is made
    in place, survives ``copy.deepcopy``, and leaves parameters, ``state_dict`` and ``save_pretrained`` as they are;
    attaching twice changes nothing.

    Args:
        model: a decoder-only model of ``transformers`` with a body and a linear head, tied or not; or a ``PeftModel``
            of one, whose base model is changed. Adapters of the body need nothing here; of the head, LoRA, DoRA and
            ``modules_to_save`` are applied as they are active at each call, and disabled adapters give the base.
        verify: run one forward pass of a few tokens to check that the model's own logits are the head's product with
            the body's output, scaled and capped as its configuration says, so that a model family with a transform
            unknown here raises instead of training on wrong numbers. Skipped on the meta device and once the model
            is sharded.

    Returns:
        ``model``.

    Raises:
        RuntimeError: no recognisable body or head, a head with other adapters or quantised weights, prompt learning,
            an encoder-decoder, logits that are not this head's, or a ``forward`` that has been replaced on the object.
    """
    base: Any = find_base(model)
    if getattr(type(base), "_computes_linear_loss", False):
        return model
    if "forward" in vars(base):
        raise RuntimeError(
            f"the forward of this {type(base).__name__} object has been replaced (by hooks of device_map, a prepared "
            "model of accelerate, or a fused head), which would hide the one that computes the loss; attach it first"
        )
    find_body(base)
    check_head(find_head(base))
    if verify:
        verify_head(base)
    kind: Any = type(base)
    base.__class__ = _with_linear_loss(kind)
    return model


@functools.cache
def _with_linear_loss(base: type) -> type:
    """A subclass of a model class whose forward takes ``linear_loss``; a class, so that copies of a model keep it."""
    original: Callable[..., Any] = base.forward  # type: ignore[attr-defined]

    def forward(
        self: PreTrainedModel, *args: Any, linear_loss: Any = None, prefix_tree: PrefixTree | None = None, **kwargs: Any
    ) -> Any:
        if prefix_tree is not None:
            kwargs = with_prefix_tree(self, prefix_tree, kwargs)
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
    names = ("linear_loss", "prefix_tree")
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*parameters[:at], *extra, *parameters[at:]])


def _linear_forward(model: PreTrainedModel, request: Any, *args: Any, **kwargs: Any) -> LinearLossOutput:
    for name in ("labels", "logits_to_keep"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(f"{name} has no meaning together with linear_loss, which brings its own targets")
    body, head = find_body(model), find_head(model)
    with one_gradient(body, find_embedding(model), head) as tied:
        rows = body(*args, **{**kwargs, "use_cache": False, "return_dict": True}).last_hidden_state.flatten(0, -2)

    def compute(hidden: Tensor) -> LinearLossOutput:
        out = request.compute(hidden, tied(apply_head(head, hidden)), head_options(model))
        return out.protected() if may_be_sharded() else out

    return run_inside(head_modules(head), compute, rows)
