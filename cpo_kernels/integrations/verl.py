"""verl's fused head: log-probabilities and entropies of tokens from hidden states, on our kernels.

``actor_rollout_ref.model.external_lib=cpo_kernels.integrations.verl_external`` switches it on in a verl run, see
docs/frameworks.md; :func:`patch_fused_kernels` does so in a program. Both functions here work without verl.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, distributed, nn

from cpo_kernels.engine.entropy import linear_token_entropy
from cpo_kernels.engine.vocab_parallel import VocabShard
from cpo_kernels.options import suggests_arguments

from .host import replaced, require_names

TESTED = "0.9"
REDUCTIONS = ("none", "sum", "mean")
# The modules that look a name up whenever a model is run, by the name.
OWNERS = {
    "FusedLinearForPPO": "verl.utils.experimental.torch_functional",
    "linear_cross_entropy": "verl.utils.kernel.linear_cross_entropy",
}
# Modules of Megatron's models, which have taken the name over when they were imported.
USERS = ("verl.models.mcore.model_forward_fused", "verl.models.mcore.model_forward_1f1b_overlap")
_shards: dict[Any, VocabShard] = {}


@suggests_arguments
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Compute what ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy`` does, for any sizes and devices.

    Args:
        hidden: (..., H).
        weight: (V, H) in the dtype of ``hidden``, or this process's rows of it.
        labels: (...) integers of the whole vocabulary; -100 gives 0 for both results, and no gradient.
        temperature: divisor of the logits.
        reduction: ``"none"``, or ``"sum"`` or ``"mean"`` of the log-probabilities over all tokens.
        dist_process_group: the processes over which the vocabulary is split, in the order of their ranks; None: none.
            The gradient of ``hidden`` is this process's share, as verl's is: Megatron's own backward pass sums it.

    Returns:
        Log-probabilities (N,), or a scalar if reduced, and entropies (N,), float32, both differentiable in ``hidden``
        and ``weight``; N is the number of labels.

    Raises:
        ValueError: another reduction, or arguments that :func:`cpo_kernels.linear_token_logps` refuses.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    targets = labels.reshape(-1).to(torch.int64)
    logps, entropy = linear_token_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets,
        temperature=1.0 if temperature is None else float(temperature),
        vocab_shard=shard_of(weight, dist_process_group),
    )
    if reduction == "none":
        return logps, entropy
    return logps.sum() / (targets.numel() if reduction == "mean" else 1), entropy


class FusedLinearForPPO(nn.Module):
    """What ``verl.utils.experimental.torch_functional.FusedLinearForPPO`` computes.

    Args:
        chunk_size: accepted, and without effect: logits fill a budget of bytes.
        impl_backend: verl's ``fused_kernel_options.impl_backend``; ``"torch"`` or ``"liger"``, without effect.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"impl_backend must be 'torch' or 'liger', got {impl_backend!r}")
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities and entropies (...) of the tokens ``input_ids`` (...), float32, differentiable.

        Args:
            hidden_states: (..., H), each the one that predicts the token.
            vocab_weights: (V, H).
            input_ids: (...) integers, -100 for none.
            temperature: divisor of the logits.
        """
        targets = input_ids.to(torch.int64)
        out = linear_token_entropy(hidden_states, vocab_weights, targets, temperature=float(temperature))
        return out.logps, out.entropy


def patch_fused_kernels() -> None:
    """Replace verl's fused head by ours in this process, from now on, for models that verl runs with fused kernels.

    Of verl's settings ``use_fused_kernels`` must be true; ``fused_kernel_options.impl_backend`` may be any.

    Raises:
        RuntimeError: the installed verl lacks the names that are replaced.
    """
    for owner, values in _replacements():
        for name, value in values.items():
            setattr(owner, name, value)


@contextmanager
def fused_kernels() -> Iterator[None]:
    """Apply :func:`patch_fused_kernels` to forward passes within the context; backward passes may come later."""
    with ExitStack() as stack:
        for owner, values in _replacements():
            stack.enter_context(replaced(owner, values))
        yield


def _replacements() -> list[tuple[Any, dict[str, Any]]]:
    """Return modules of verl with the attributes to replace in each."""
    ours = {"FusedLinearForPPO": FusedLinearForPPO, "linear_cross_entropy": linear_cross_entropy}
    found: list[tuple[Any, dict[str, Any]]] = []
    for name, where in OWNERS.items():
        owner = import_module(where)
        require_names("verl", TESTED, owner, name)
        found.append((owner, {name: ours[name]}))
    name = "linear_cross_entropy"
    users = (sys.modules.get(where) for where in USERS)
    return found + [(user, {name: ours[name]}) for user in users if hasattr(user, name)]


def shard_of(weight: Tensor, group: Any) -> VocabShard | None:
    """Return which rows of the head ``weight`` holds; found once for each group and shape, by a collective call."""
    if group is None or distributed.get_world_size(group) == 1:
        return None
    key = group, weight.shape, weight.device
    if key not in _shards:
        _shards[key] = VocabShard.of(weight, group, reduce_grad_hidden=False)
    return _shards[key]
