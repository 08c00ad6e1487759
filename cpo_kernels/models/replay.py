"""A model's own forward around what its body returned, with something else in place of its head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Replayed(NamedTuple):
    """What came of a replay.

    Attributes:
        head_input: what the model gave its head, differentiable; None where its forward does not call the head.
        out: what its forward returned.
    """

    head_input: Tensor | None
    out: Any


def replay(
    model: nn.Module,
    forward: Callable[..., Any],
    head: nn.Module,
    answer: Callable[[Tensor], Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    body: nn.Module | None = None,
    outputs: Any = None,
) -> Replayed:
    """Run a model's forward with a stand-in for its head and, if ``body`` is given, with the body's output given too.

    It runs on a shallow copy in which only the modules on the way to those two are copies, so neither the model nor
    another thread that uses it notices; parameters and hooks of all other modules are the model's own.

    Args:
        model: the model, which is not called itself.
        forward: its class's forward, of a model and what follows.
        head: the module of the model that ``answer`` stands in for.
        answer: from what the head is given to what it returns.
        args: of the forward.
        kwargs: of the forward.
        body: the module of the model that returns ``outputs``; None: no module does.
        outputs: what it returned for these arguments.
    """
    stand_in = _StandIn(head, answer)
    twins: dict[nn.Module, nn.Module] = {head: stand_in}
    if body is not None:
        twins[body] = _StandIn(body, lambda *_: outputs)
    out = forward(_substituted(model, twins), *args, **kwargs)
    return Replayed(stand_in.given, out)


def one_logit(hidden: Tensor) -> Tensor:
    """Answer for a head whose logits nobody needs: zeros (..., 1)."""
    return hidden.new_zeros((*hidden.shape[:-1], 1))


class _StandIn(nn.Module):
    """Answers in place of a module, and keeps what it was given first."""

    def __init__(self, module: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        # Some models cast what they give their head to the dtype of its weight.
        self._of, self.answer = [module], answer
        self.given: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_of"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given = args[0] if args and isinstance(args[0], Tensor) else None
        return self.answer(*args)


def _substituted(module: nn.Module, twins: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put other modules in place of some within one; returns it, or a shallow copy where one of them is in it."""
    if module in twins:
        return twins[module]
    children = {name: child for name, child in module._modules.items() if child is not None}
    changed = {name: _substituted(child, twins) for name, child in children.items()}
    if all(changed[name] is child for name, child in children.items()):
        return module
    twin = object.__new__(type(module))  # and not copy.copy, which FSDP2 does not allow
    twin.__dict__.update(module.__dict__, _modules=module._modules | changed)
    return twin


def router_losses(
    model: Any,
    forward: Callable[..., Any],
    head: nn.Module,
    body: nn.Module,
    outputs: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the load-balancing loss of a mixture of experts, raw and as the model adds it to its loss.

    Both come from the model's own forward, which gets labels for a loss of the logits that is always 0; so what is
    added is what the model adds, whatever it calls the coefficient and however it counts the tokens.

    Returns:
        ``aux_loss`` and its share in the loss, differentiable scalars; None for a model that has none.
    """
    hidden = outputs.last_hidden_state

    def quiet(model: Any, *args: Any, **kwargs: Any) -> Any:
        model.loss_function = lambda *_, **__: hidden.new_zeros((), dtype=torch.float32)
        return forward(model, *args, **kwargs)

    labels = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    given = {**kwargs, "labels": labels, "use_cache": False, "return_dict": True}
    out = replay(model, quiet, head, one_logit, args, given, body=body, outputs=outputs).out
    raw = getattr(out, "aux_loss", None)
    if not isinstance(raw, Tensor):
        return None, None
    return raw, out.loss
