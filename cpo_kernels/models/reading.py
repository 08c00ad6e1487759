"""How a model computes logits from the output of its body, found by running it and not by its name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from cpo_kernels.kernels.transform import transform_logits

from .adapters import plain_head
from .head import evaluating, find_body, find_head, positions_of
from .quantised import is_quantised, rounds_by_batch
from .replay import Replayed, replay
from .sharded import is_sharded

PROBED_TOKENS = 16
TINY, HUGE = 2.0**-40, 2.0**40  # a logit far below any softcap, and one far above
# Largest change of a hidden state, relative to its norm, that rounding explains when later tokens change.
LEAKS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
LEAK_OF_INT8 = 1e-1  # later tokens decide which columns are rounded to 8 bits


@dataclass(frozen=True)
class HeadReading:
    """What a model computes between its body and its logits.

    Attributes:
        options: ``logit_scale`` and ``softcap`` of the head's output, without those that change nothing.
        direct: whether the head gets the body's ``last_hidden_state`` unchanged; otherwise the model's own forward has
            to make its input.
    """

    options: dict[str, float]
    direct: bool


def read_head(model: PreTrainedModel, *, verify: bool) -> HeadReading:
    """Find out what a model does between its body and its head, and to its logits.

    The model's own forward runs with a stand-in for its head, which returns chosen numbers from tiny to huge, so that
    the logits show a scale and a softcap. With ``verify`` the body runs as well, twice with different later tokens: the
    model must give its head what the body returns, and no hidden state may depend on later tokens. For a model that is
    sharded or on the meta device, and without ``verify``, the body's output is made up.

    Raises:
        RuntimeError: the logits are not those of the head, scaled and capped; or the model is not causal.
    """
    body, head = find_body(model), find_head(model)
    kind = type(model)
    runs = verify and not is_sharded(model)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    ids = torch.tensor([_plain_tokens(model, _head_size(model, head))], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, "return_dict": True}
    chosen = _chosen_logits(ids.shape[1], _head_size(model, head), device)

    def answer(_: Tensor) -> Tensor:
        return chosen.clone()  # some models scale their logits in place

    with evaluating(model):
        try:
            outputs = body(**inputs) if runs else _made_up(model, ids)
            with torch.enable_grad():  # logits that need a gradient come from other parameters
                found = replay(model, kind.forward, head, answer, (), inputs, body=body, outputs=outputs)
            own = replay(model, kind.forward, head, answer, (), inputs) if runs else found
            changed = inputs | {"input_ids": _with_other_end(ids)}
            moved = replay(model, kind.forward, head, answer, (), changed) if runs else found
        except Exception as error:
            raise RuntimeError(
                f"{kind.__name__} failed on a probe of {ids.shape[1]} tokens, by which its head is read: "
                f"{type(error).__name__}: {error}"
            ) from error
    hidden = outputs.last_hidden_state
    allowed = LEAK_OF_INT8 if rounds_by_batch(model) else LEAKS.get(hidden.dtype, LEAKS[torch.bfloat16])
    _check_input(kind.__name__, found, own, moved, hidden, allowed)
    return HeadReading(_read_options(kind.__name__, found.out.logits, chosen), _same(found.head_input, hidden))


def _check_input(name: str, found: Replayed, own: Replayed, moved: Replayed, hidden: Tensor, allowed: float) -> None:
    """Raise ``RuntimeError`` unless the head's input comes from the body's output, and from no later tokens.

    ``allowed`` is how far it may move by rounding when those change, relative to its norm.
    """
    given = found.head_input
    if given is None or given.shape[:-1] != hidden.shape[:-1] or not _same(own.head_input, given):
        raise RuntimeError(
            f"{name} does not apply its head to the last hidden state of its body; the fused loss would differ from "
            "the model's own"
        )
    leak = _distance(own.head_input, moved.head_input)
    if not leak <= allowed:
        raise RuntimeError(
            f"{name} is not causal: on a probe its hidden states move by {leak:.2g} of their norm when later tokens "
            "change; expected a decoder (some are one by is_decoder=True or causal=True)"
        )


def _read_options(name: str, logits: Tensor, chosen: Tensor) -> dict[str, float]:
    """Find the scale and the softcap that turn ``chosen`` (1, n, V) into ``logits`` (1, n, V)."""
    problem = f"{name} transforms its logits in a way that no scale and no softcap explains"
    if logits.shape != chosen.shape:
        raise RuntimeError(f"{problem}: of {tuple(chosen.shape)} from its head it makes {tuple(logits.shape)}")
    if logits.requires_grad:
        raise RuntimeError(f"{problem}: parameters of its own take part, which the fused loss would not train")
    precision = torch.finfo(logits.dtype).eps
    scale, bound = float(logits[0, 0, 0]) / TINY, abs(float(logits[0, 0, -1]))
    options: dict[str, float] = {}
    if not math.isclose(scale, 1.0, rel_tol=8 * precision):
        options["logit_scale"] = scale
    if bound < abs(scale) * math.sqrt(HUGE):
        options["softcap"] = bound
    expected = transform_logits(chosen, **options).to(logits.dtype)  # type: ignore[arg-type]
    if not torch.allclose(logits, expected, rtol=16 * precision, atol=0.0):
        raise RuntimeError(f"{problem} ({options or 'neither'} fits best); the fused loss would differ from its own")
    return options


def _chosen_logits(length: int, vocab: int, device: torch.device) -> Tensor:
    """Make numbers (1, n, V) on which a scale, a softcap and swapped entries leave different traces."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    factors = torch.arange(1, length + 1, dtype=dtype, device=device)[:, None] / 2
    logits = torch.linspace(-40.0, 40.0, vocab, dtype=dtype, device=device) * factors
    logits[:, 0], logits[:, -1] = TINY, HUGE
    return logits[None]


def _with_other_end(ids: Tensor) -> Tensor:
    """Replace the second half of ids (1, n) by other tokens."""
    half = ids.shape[1] // 2
    return torch.cat([ids[:, :half], ids[:, : ids.shape[1] - half].flip(1)], dim=1)


def _distance(first: Any, second: Any) -> float:
    """Measure the distance of the first halves of two tensors of hidden states (1, n, H), relative to their norm."""
    half = first.shape[1] // 2
    one, other = (states[:, :half].float() for states in (first, second))
    distances = (one - other).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-30)
    return float(distances.nan_to_num(nan=0.0).max()) if half else 0.0


def _head_size(model: PreTrainedModel, head: nn.Module) -> int:
    """Find the number V of logits, also where ZeRO has emptied the weight or its rows are packed."""
    plain: Any = plain_head(head)
    whole = plain.weight.numel() and not is_quantised(plain)
    return int(plain.weight.shape[0] if whole else plain.out_features)


def _plain_tokens(model: PreTrainedModel, vocab: int) -> list[int]:
    """Choose n tokens to which no configuration gives a meaning (such as the place of an image), if there are any."""
    config: Any = model.config
    text = config.get_text_config()
    length = min(PROBED_TOKENS, positions_of(config) or PROBED_TOKENS)
    named = (value for own in (config, text) for name, value in vars(own).items() if name.endswith(("_id", "_index")))
    special = {value for value in named if isinstance(value, int)}
    entries = min(vocab, getattr(text, "vocab_size", None) or vocab)
    plain = [token for token in range(min(entries, length + len(special))) if token not in special] or [0]
    return [plain[k % len(plain)] for k in range(length)]


@dataclass
class _MadeUpOutput(ModelOutput):
    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


def _made_up(model: PreTrainedModel, ids: Tensor) -> Any:
    """Make up an output of a body for tokens (1, n), for a body that cannot run."""
    dtype = model.dtype if model.dtype.is_floating_point else torch.float32
    width = model.config.get_text_config().hidden_size
    hidden = torch.linspace(-1.0, 1.0, ids.numel() * width, dtype=torch.float32, device=ids.device)
    return _MadeUpOutput(last_hidden_state=hidden.view(*ids.shape, width).to(dtype))


def _same(value: Tensor | None, expected: Tensor) -> bool:
    """Tell whether two tensors are equal but for rounding in the dtype of ``value``; NaN equals NaN."""
    if value is None or value.shape != expected.shape:
        return False
    atol = 8 * torch.finfo(value.dtype).eps * max(1.0, float(expected.detach().abs().max().nan_to_num(posinf=1.0)))
    return torch.allclose(value.float(), expected.float(), rtol=0.0, atol=atol, equal_nan=True)
