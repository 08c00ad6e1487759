"""Run a model's own forward with a stand-in for its head, and optionally with a given output of its body."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Replayed(NamedTuple):
    """The result of a replay.

    Attributes:
        head_input: the input that the model gave its head, differentiable; None where it did not call the head.
        out: the output of the model's forward.
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
    """Run a model's forward with a stand-in for its head and, if ``body`` is given, with a given output of its body.

    The forward runs on a shallow copy, in which only the modules that contain the head or the body are copies. So
    neither the model nor another thread that uses it notices; all other modules, with hooks, are the model's own.

    Args:
        model: the model, which is not called itself.
        forward: the forward of its class, called with a model, ``args`` and ``kwargs``.
        head: the module of the model that ``answer`` stands in for.
        answer: maps the input of the head to the output that stands for the head's.
        args: of the forward.
        kwargs: of the forward.
        body: the module of the model that returns ``outputs``; None: no module does.
        outputs: the output of the body for these arguments.
    """
    stand_in = _StandIn(head, answer)
    twins: dict[nn.Module, nn.Module] = {head: stand_in}
    if body is not None:
        twins[body] = _StandIn(body, lambda *_: outputs)
    out = forward(_substituted(model, twins), *args, **kwargs)
    return Replayed(stand_in.given, out)


def one_logit(hidden: Tensor) -> Tensor:
    """Return zeros (..., 1) in place of logits that nobody needs."""
    return hidden.new_zeros((*hidden.shape[:-1], 1))


class _StandIn(nn.Module):
    """A module that answers in place of another one, and keeps the first input that it gets."""

    def __init__(self, module: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        # Kept for its attributes: some models cast the head's input to the dtype of its weight.
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
    """Return ``module``, or where it contains a key of ``twins``, a shallow copy with the key's value in its place."""
    if module in twins:
        return twins[module]
    children = {name: child for name, child in module._modules.items() if child is not None}
    changed = {name: _substituted(child, twins) for name, child in children.items()}
    if all(changed[name] is child for name, child in children.items()):
        return module
    twin = object.__new__(type(module))  # FSDP2 does not allow copy.copy
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

    Both come from the model's own forward, with a loss of the logits that is always 0. So the result is what the model
    adds, whatever it calls the coefficient and however it counts the tokens.

    Returns:
        ``aux_loss`` and its part of the loss, differentiable scalars; both None for a model without one.
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
