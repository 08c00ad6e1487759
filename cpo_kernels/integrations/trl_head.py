"""TRL's fused language-model head on our products, with its statistics of tokens, for all TRL trainers that use it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from trl.trainer import utils

from cpo_kernels.engine.entropy import linear_token_entropy
from cpo_kernels.engine.inputs import autocast
from cpo_kernels.functional import linear_token_logps
from cpo_kernels.kernels.transform import transform_logits

from .host import replaced, require_names

TESTED = "1.16"
FUNCTION, COMPACTS = "_ChunkedLogProbFunction", "_use_triton"
ARGUMENTS = ["hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"]
ARGUMENTS += ["logit_scale", "outputs"]
# The statistics of a token that TRL's head returns besides its log-probability and entropy; none has a gradient.
OF_LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log_sum_sq_probs": lambda logits, _: (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1),
    "mean_logits": lambda logits, _: logits.mean(-1),
    "is_top1": lambda logits, targets: logits.argmax(-1) == targets,
}
LOGITS = 2**24  # logits held at once for them: 64 MiB


def patch_fused_head() -> None:
    """Replace TRL's fused head (``add_fused_lm_head``) by ours in this process, from now on.

    It may be called before or after a trainer is made. Log-probabilities and their gradients are those of
    :func:`cpo_kernels.linear_token_logps`, with entropies (GRPO, RLOO, SFT) those of
    :func:`cpo_kernels.linear_token_entropy`, of the same product; TRL's other statistics (SFT, DPO, KTO) take one more.
    Prompts and padding are left out of the products, as by TRL's Triton kernels, but on the CPU too. A head that ZeRO-3
    has partitioned keeps TRL's own computation, which gathers it again for the backward pass.

    Raises:
        RuntimeError: the installed TRL lacks the private names that are replaced, or calls them with other arguments.
    """
    for name, value in _replacements().items():
        setattr(utils, name, value)


@contextmanager
def fused_head() -> Iterator[None]:
    """Apply :func:`patch_fused_head` to forward passes within the context; backward passes may come later."""
    with replaced(utils, _replacements()):
        yield


class FusedLogProbs:
    """A stand-in for TRL's autograd function, of which TRL uses only ``apply``.

    Args:
        stock: TRL's autograd function.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def apply(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        """Compute log-probabilities (N,), entropies (N,) and each of :data:`OF_LOGITS`; None for what is not asked for.

        Args:
            *arguments: :data:`ARGUMENTS`: hidden (N, H), weight (V, H) in any floating dtype, bias (V,) or None,
                targets (N,) int64, the transform of the logits, and names of fields.
        """
        hidden, weight, bias, targets, temperature, _, softcap, scale, outputs = arguments
        if hasattr(weight, "ds_id"):  # gathered for this call only, but our backward pass would read it later
            return self.stock.apply(*arguments)
        hidden, weight, bias = autocast(hidden, weight, bias)
        weight, entropy = weight.to(hidden.dtype), None
        head = {"bias": bias, "temperature": temperature, "softcap": softcap, "logit_scale": scale}
        # TRL asks the policy for entropies and its reference for none: both have to round alike.
        exact = head | ({} if hidden.dtype == torch.float64 else {"logits_dtype": torch.float32})
        if "entropy" in outputs:
            logps, entropy = linear_token_entropy(hidden, weight, targets, **exact)
        else:
            logps = linear_token_logps(hidden, weight, targets, **exact)
        of_logits = fields([name for name in outputs if name in OF_LOGITS], hidden, weight.detach(), targets, **head)
        return logps, entropy, *(of_logits.get(name) for name in OF_LOGITS)


def _replacements() -> dict[str, Any]:
    """Return the attributes of TRL's module to replace with their replacements; none if they are replaced already."""
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


@torch.no_grad()
def fields(
    names: Sequence[str], hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, **transform: Any
) -> dict[str, Tensor]:
    """Compute some of :data:`OF_LOGITS`, each (N,), by one more product in plain torch, 64 MiB of logits at a time."""
    rows, found = max(1, LOGITS // len(weight)), list[list[Tensor]]()
    for some, of_some in zip(hidden.split(rows), targets.split(rows), strict=True) if names else ():
        logits = transform_logits(linear(some, weight).float(), bias, **transform)
        found.append([OF_LOGITS[name](logits, of_some) for name in names])
    return {name: torch.cat(parts) for name, parts in zip(names, zip(*found, strict=True), strict=bool(names))}
