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

from cpo_kernels.options import suggests_arguments

from .adapters import apply_head, find_base, head_modules
from .head import check_head, find_body, find_head
from .linear_layers import by_our_products
from .prefix.masks import with_prefix_tree
from .prefix.tree import PrefixTree
from .quantised import keep_trainable
from .reading import read_head
from .replay import one_logit, replay, router_losses
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


@suggests_arguments
def attach_linear_loss(model: Model, *, verify: bool = True) -> Model:
    """Teach a causal language model to compute the fused loss in its forward pass.

    Called with the extra keyword ``linear_loss=CPORequest(...)`` (or ``SequenceLossRequest``, ``LogpsRequest``,
    ``StatisticsRequest``), the model runs its body, never its head, and returns a :class:`LinearLossOutput`. Without
    the keyword it behaves as before. With ``prefix_tree=PrefixTree(...)`` its rows are packed groups, see
    :func:`cpo_kernels.models.pack_groups`, and it takes no ``attention_mask`` or ``position_ids``. The change is made
    in place, survives ``copy.deepcopy``, ``pickle`` and ``torch.save`` (loading needs this package, and the model
    then has the loss attached), and leaves parameters, ``state_dict`` and ``save_pretrained`` as they are; attaching
    twice changes nothing.

    Running the model's own forward, whatever its family, shows whether it scales or caps its logits and what it
    computes between body and head. A mixture of experts with ``output_router_logits`` adds its load-balancing loss to
    ``loss`` as it does with labels, and returns it as ``aux_loss``.

    Args:
        model: a decoder-only model of ``transformers`` with a body and a linear head, tied or not; or a ``PeftModel``
            of one, whose base model is changed. Adapters of the body work as ever. Of the head's adapters, LoRA, DoRA
            and ``modules_to_save`` are applied if active at the call; disabled adapters leave the base head. A body
            may be quantised in any way. A head that bitsandbytes has quantised is read as a weight in the dtype of the
            hidden states, made anew in each call beside its budget.
        verify: also run the body on a few tokens, to check that the model gives its head what the body returns and
            that no hidden state depends on later tokens. Skipped on the meta device and once the model is sharded.

    Returns:
        ``model``.

    Raises:
        RuntimeError: no recognisable body or head, a head with other adapters or otherwise quantised weights, prompt
            learning, an encoder-decoder, logits that differ from this head's by more than a scale and a softcap, a
            model that is not causal, a ``forward`` that has been replaced on the object, or 4-bit layers that
            bitsandbytes has put into a form without gradients.
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
    keep_trainable(base)
    base._head_reading = read_head(base, verify=verify)
    kind: Any = type(base)
    base.__class__ = _with_linear_loss(kind)
    return model


@functools.cache
def _with_linear_loss(base: type) -> type:
    """Return a subclass of a model class whose forward takes ``linear_loss``; copies of a model keep the class."""
    original: Callable[..., Any] = base.forward  # type: ignore[attr-defined]

    def forward(
        self: PreTrainedModel, *args: Any, linear_loss: Any = None, prefix_tree: PrefixTree | None = None, **kwargs: Any
    ) -> Any:
        if linear_loss is not None:
            return _linear_forward(self, original, linear_loss, prefix_tree, args, kwargs)
        if prefix_tree is not None:
            kwargs = with_prefix_tree(self, prefix_tree, kwargs)
        return original(self, *args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        # The class has the name of its base and cannot be imported by it, so loading makes it anew from the base.
        return _make, (base,), *object.__reduce_ex__(self, max(2, int(protocol)))[2:]

    forward.__doc__ = original.__doc__
    forward.__signature__ = _extended_signature(original)  # type: ignore[attr-defined]
    # The base's name is kept: it becomes `architectures` of a saved configuration, and Trainer looks it up.
    members = {"forward": forward, "__reduce_ex__": reduce_ex, "__module__": base.__module__}
    return type(base.__name__, (base,), members | {"_computes_linear_loss": True})


def _make(base: type) -> Any:
    """Make an empty object of a model class with the loss attached, for pickle."""
    return object.__new__(_with_linear_loss(base))


def _extended_signature(function: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(function)
    names = ("linear_loss", "prefix_tree")
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*parameters[:at], *extra, *parameters[at:]])


def _linear_forward(
    model: Any,
    original: Callable[..., Any],
    request: Any,
    tree: PrefixTree | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> LinearLossOutput:
    for name in ("labels", "logits_to_keep"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(f"{name} has no meaning together with linear_loss, which brings its own targets")
    body, head, reading = find_body(model), find_head(model), model._head_reading
    given = kwargs if tree is None else with_prefix_tree(model, tree, kwargs)
    with one_gradient(body, find_embedding(model), head) as tied, by_our_products(body):
        outputs = body(*args, **{**given, **_router_keyword(model, kwargs), "use_cache": False, "return_dict": True})
    rows = outputs.last_hidden_state
    if not reading.direct:
        rows = replay(model, original, head, one_logit, args, given, body=body, outputs=outputs).head_input
    aux_loss = router_loss = None
    if getattr(outputs, "router_logits", None) is not None:
        # A position that candidates share counts once for each of them, as it does in separate rows.
        counted = kwargs if tree is None else kwargs | {"attention_mask": tree.readers}
        aux_loss, router_loss = router_losses(model, original, head, body, outputs, args, counted)

    def compute(hidden: Tensor) -> LinearLossOutput:
        out = request.compute(hidden, tied(apply_head(head, hidden)), reading.options)
        out.aux_loss = aux_loss
        if router_loss is not None and out.loss is not None:
            added = getattr(request, "router_share", 1.0) * router_loss
            out.loss, out.router_loss = out.loss + added, added.detach()
        return out.protected() if may_be_sharded() else out

    return run_inside(head_modules(head), compute, rows.flatten(0, -2))


def _router_keyword(model: Any, kwargs: dict[str, Any]) -> dict[str, bool]:
    """Return the keyword that asks a mixture of experts' body for router logits, where its own forward asks."""
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        return {}
    asked = kwargs.get("output_router_logits")
    return {"output_router_logits": bool(config.output_router_logits if asked is None else asked)}
