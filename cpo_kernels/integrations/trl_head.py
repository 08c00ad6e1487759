"""TRL's fused language-model head on our products, for every TRL trainer that uses it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from trl.trainer import utils

from cpo_kernels.functional import linear_token_logps

from .host import replaced, require_names
from .trl_statistics import FIELDS, TokenFields

TESTED = "1.16"
FUNCTION, COMPACTS = "_ChunkedLogProbFunction", "_use_triton"
ARGUMENTS = ["hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"]
ARGUMENTS += ["logit_scale", "outputs"]


def patch_fused_head() -> None:
    """Give models with TRL's fused head (``add_fused_lm_head``) ours, from now on, in this process.

    Called before or after a trainer is made. Log-probabilities are those of :func:`cpo_kernels.linear_token_logps`,
    with its gradients; what else TRL asks for is one more product, see :class:`TokenFields`. As TRL does where it uses
    Triton, prompts and padding are left out of the products, here on the CPU too. A head that ZeRO-3 has partitioned
    keeps TRL's own computation, which gathers it again for the backward pass.

    Raises:
        RuntimeError: the installed TRL has not the private names that are replaced, or calls them otherwise.
    """
    for name, value in _replacements().items():
        setattr(utils, name, value)


@contextmanager
def fused_head() -> Iterator[None]:
    """:func:`patch_fused_head` for forward passes as long as the context lasts; backward passes may come later."""
    with replaced(utils, _replacements()):
        yield


class FusedLogProbs:
    """In place of TRL's autograd function, of which only ``apply`` is used.

    Args:
        stock: TRL's.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def apply(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        """Log-probabilities (N,), and those :data:`FIELDS` that are asked for, else None.

        Args:
            *arguments: :data:`ARGUMENTS`: hidden (N, H), weight (V, H) in any floating dtype, bias (V,) or None,
                targets (N,) int64, what is done to the logits, and names of fields.
        """
        hidden, weight, bias, targets, temperature, _, softcap, scale, outputs = arguments
        if hasattr(weight, "ds_id"):  # gathered for this call only, while our backward pass reads what it saved
            return self.stock.apply(*arguments)
        head = {"temperature": temperature, "softcap": softcap, "logit_scale": scale}
        weight = weight.to(hidden.dtype)
        logps = linear_token_logps(hidden, weight, targets, bias=bias, **head)
        if not set(FIELDS) & set(outputs):
            return logps, *(None for _ in FIELDS)
        return logps, *TokenFields.apply(hidden, weight, bias, targets, head, outputs, self.stock)


def _replacements() -> dict[str, Any]:
    """Attributes of TRL's module and what takes their place; none if that has happened already."""
    require_names("trl", TESTED, utils, FUNCTION, COMPACTS)
    stock, compacts = getattr(utils, FUNCTION), getattr(utils, COMPACTS)
    if isinstance(stock, FusedLogProbs):
        return {}
    names = list(inspect.signature(stock.forward).parameters)[1:]
    if names != ARGUMENTS:
        raise RuntimeError(
            f"trl.trainer.utils.{FUNCTION} takes {', '.join(names)}; this integration is tested with trl {TESTED}, "
            f"where it takes {', '.join(ARGUMENTS)}"
        )
    return {FUNCTION: FusedLogProbs(stock), COMPACTS: lambda device: device.type == "cpu" or compacts(device)}
