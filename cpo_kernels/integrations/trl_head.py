"""TRL's fused language-model head on our products, with its statistics of tokens, for all TRL trainers that use it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from trl.trainer import utils

from cpo_kernels.engine.statistics import linear_token_statistics
from cpo_kernels.functional import linear_token_logps
from cpo_kernels.kernels.transform import transform_logits

from .host import replaced, require_names

TESTED = "1.16"
FUNCTION, COMPACTS = "_ChunkedLogProbFunction", "_use_triton"
ARGUMENTS = ["hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"]
ARGUMENTS += ["logit_scale", "outputs"]
# The statistics of a token that TRL's head returns besides its log-probability.
FIELDS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
CHUNK = 32768  # TRL's number of vocabulary entries at a time in its own computation
LOGITS = 2**24  # logits held at once where more than the entropy is asked for: 64 MiB


def patch_fused_head() -> None:
    """Replace TRL's fused head (``add_fused_lm_head``) by ours in this process, from now on.

    It may be called before or after a trainer is made. Log-probabilities and their gradients are those of
    :func:`cpo_kernels.linear_token_logps`; TRL's other statistics take one more product, see :class:`TokenFields`.
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
        """Compute log-probabilities (N,) and each of :data:`FIELDS` that is asked for; None for the other fields.

        Args:
            *arguments: :data:`ARGUMENTS`: hidden (N, H), weight (V, H) in any floating dtype, bias (V,) or None,
                targets (N,) int64, the transform of the logits, and names of fields.
        """
        hidden, weight, bias, targets, temperature, _, softcap, scale, outputs = arguments
        if hasattr(weight, "ds_id"):  # gathered for this call only, but our backward pass would read it later
            return self.stock.apply(*arguments)
        head = {"temperature": temperature, "softcap": softcap, "logit_scale": scale}
        weight = weight.to(hidden.dtype)
        logps = linear_token_logps(hidden, weight, targets, bias=bias, **head)
        if not set(FIELDS) & set(outputs):
            return logps, *(None for _ in FIELDS)
        return logps, *TokenFields.apply(hidden, weight, bias, targets, head, outputs, self.stock)


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


class TokenFields(torch.autograd.Function):
    """The :data:`FIELDS` that are asked for, each (N,), None for other fields; only the entropy has a gradient.

    The entropy alone (GRPO, RLOO) is that of :func:`cpo_kernels.linear_token_statistics`. With other fields (SFT, DPO,
    KTO) all come from one more product in plain torch, 64 MiB of logits at a time. The gradient of the entropy, which
    only an entropy bonus asks for, is TRL's own computation.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Any,
        names: Any,
        stock: Any,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head, ctx.stock = head, stock
        if set(names) <= {"log_probs", "entropy"}:
            entropy = linear_token_statistics(hidden, weight, targets, entropy=True, bias=bias, **head).entropy
            return entropy, None, None, None
        blocks = zip(*(x.split(max(1, LOGITS // len(weight))) for x in (hidden, targets)), strict=True)
        parts = [fields_of(transform_logits(linear(h, weight).float(), bias, **head), t) for h, t in blocks]
        columns = [
            torch.cat(column) if name in names else None
            for name, column in zip(FIELDS, zip(*parts, strict=True), strict=True)
        ]
        ctx.mark_non_differentiable(*(column for column in columns[1:] if column is not None))
        return tuple(columns)

    @staticmethod
    def backward(ctx: Any, grad_entropy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # noqa: D102
        *inputs, targets = ctx.saved_tensors
        leaves: Any = [None if x is None else x.detach() for x in inputs]
        wanted = [x.requires_grad_() for x, needed in zip(leaves, ctx.needs_input_grad, strict=False) if needed]
        options = ctx.head["temperature"], CHUNK, ctx.head["softcap"], ctx.head["logit_scale"]
        with torch.enable_grad():
            entropy = ctx.stock.apply(*leaves, targets, *options, ("entropy",))[1]
        grads = iter(torch.autograd.grad(entropy, wanted, grad_entropy))
        return *(next(grads) if needed else None for needed in ctx.needs_input_grad[:3]), None, None, None, None


def fields_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Compute :data:`FIELDS` of some rows, each (n,), from their logits (n, V) and targets (n,)."""
    lse = logits.logsumexp(-1)
    entropy = lse - (logits.softmax(-1) * logits).sum(-1)
    return entropy, (2 * logits).logsumexp(-1) - 2 * lse, logits.mean(-1), logits.argmax(-1) == targets
