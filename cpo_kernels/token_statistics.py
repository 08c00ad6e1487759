"""Log-probabilities with entropies and samples of the same forward pass: evaluation, and mean-field negatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .calls import LinearCall, token_blocks
from .engine import LinearHead
from .head import Head
from .inputs import Inputs, prepare
from .layout import Block, Tokens

# Odd multiplier of Weyl sequences: blocks of one seed and neighbouring seeds do not share random numbers.
SEED_STRIDE = -7046029254386353131


class TokenStatistics(NamedTuple):
    """What a forward pass knows of each token; not differentiable.

    Attributes:
        logps: log-probabilities (...) of the targets in nats, 0 where the target is -100.
        entropy: entropies (...) of the next-token distributions in nats, 0 where the target is -100; None if not asked.
        samples: words (...) drawn from these distributions, int64, -100 where the target is; None if not asked.
    """

    logps: Tensor
    entropy: Tensor | None
    samples: Tensor | None


@torch.no_grad()
def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    entropy: bool = False,
    seed: int | Tensor | None = None,
    bias: Tensor | None = None,
    **head: Any,
) -> TokenStatistics:
    """Log-probabilities under the head ``hidden @ weight.T`` and, on request, entropies and one sample per token.

    Every sample is drawn independently of the others and of the target: a whole sequence of them is a mean-field
    negative (Feng et al. 2025). Triton's fused kernel writes no logits; elsewhere they fill one buffer at a time.

    Args:
        hidden: (..., H) float32, bfloat16, float16 (or float64 on the torch backend).
        weight: (V, H), same dtype.
        targets: (...) int64; rows of targets -100 enter no GEMM.
        entropy: whether to compute entropies.
        seed: of the samples: an integer, or an int64 tensor of one element on the device (a captured CUDA graph draws
            anew when it is overwritten). None: no samples. They repeat for the same seed, backend, sizes and library
            version.
        bias: (V,) or None.
        **head: see :class:`cpo_kernels.head.Head`; samples and entropies are of the distribution at ``temperature``.

    Raises:
        ValueError: bad shapes, dtypes, devices or target values; the message names the offending one.
        RuntimeError: a backend that is not available.
    """
    inputs = prepare(hidden, weight, targets, None, bias, Head(**head), grouped=False)
    inputs.call.head.check_exact("a call without gradients")
    with torch.autocast(hidden.device.type, enabled=False):
        return statistics(inputs, None if seed is None else seed_tensor(seed, hidden.device), entropy, targets.shape)


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed as a scalar on the device, to which an integer comes without a copy that waits."""
    if isinstance(seed, int):
        return torch.full((), seed, dtype=torch.int64, device=device)
    return seed.to(device=device, dtype=torch.int64).reshape(())


def statistics(inputs: Inputs, seed: Tensor | None, entropy: bool, shape: torch.Size) -> TokenStatistics:
    """:func:`linear_token_statistics` of checked inputs."""
    needs = (False, False, False)
    linear = inputs.call.linear(inputs.hidden, inputs.weight, inputs.bias, needs)
    tokens = inputs.call.tokens(inputs.hidden, inputs.weight)
    blocks, plan = token_blocks(inputs.call, tokens, inputs.hidden, inputs.weight, needs)
    fused = linear.backend.linear_forward is not None and (entropy or seed is not None or linear.fused_forward)
    buffer = linear.workspace(0 if fused else plan.rows_held)
    parts = [] if blocks else [no_tokens(linear, seed is not None, entropy)]
    for index, block in enumerate(blocks):
        mine = None if seed is None else seed * SEED_STRIDE + index
        parts.append(
            fused_block(linear, block, mine, entropy) if fused else block_of(linear, block, buffer, mine, entropy)
        )
    return gather(inputs.call, tokens, parts, tuple(shape))


def no_tokens(linear: LinearHead, sampled: bool, entropy: bool) -> TokenStatistics:
    """The statistics of no rows."""
    nothing = linear.hidden.new_zeros(0, dtype=reference.accumulate_dtype(linear.logits_dtype))
    return TokenStatistics(nothing, nothing if entropy else None, nothing.long() if sampled else None)


def fused_block(linear: LinearHead, block: Block, seed: Tensor | None, entropy: bool) -> TokenStatistics:
    """The statistics of a block's rows by the backend's fused linear path."""
    assert linear.backend.linear_forward is not None
    head = (linear.bias, *linear.head.transform)
    result = linear.backend.linear_forward(
        linear.hidden[block.rows], linear.weight, block.targets, None, *head, seed=seed, entropy=entropy
    )
    return TokenStatistics(result.logps, result.entropy, result.samples)


def block_of(linear: LinearHead, block: Block, buffer: Tensor, seed: Tensor | None, entropy: bool) -> TokenStatistics:
    """The same from logits."""
    logits = linear.compute_logits(block, buffer)
    stats, logps = linear.forward(block, logits)
    head = (linear.bias, *linear.head.transform)
    samples = None
    if seed is not None:
        generator = torch.Generator(device=logits.device).manual_seed(int(seed))
        uniforms = torch.rand(block.num_rows, dtype=torch.float64, generator=generator, device=logits.device)
        samples = reference.row_samples(logits, stats, uniforms, *head)
    return TokenStatistics(logps, reference.row_entropy(logits, stats, *head) if entropy else None, samples)


def gather(call: LinearCall, tokens: Tokens, parts: list[TokenStatistics], shape: tuple[int, ...]) -> TokenStatistics:
    """The statistics of all tokens from those of the blocks; every row has one token."""
    absent = call.targets == reference.IGNORE_INDEX

    def whole(values: tuple[Tensor, ...], absent_value: float) -> Tensor:
        return (
            tokens.among_all(torch.cat(values), call.targets.numel()).masked_fill(absent, absent_value).reshape(shape)
        )

    logps, entropies, samples = zip(*parts, strict=True)
    return TokenStatistics(
        whole(logps, 0.0),
        None if entropies[0] is None else whole(entropies, 0.0),
        None if samples[0] is None else whole(samples, reference.IGNORE_INDEX),
    )
