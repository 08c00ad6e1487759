"""Log-probabilities with entropies and samples of the same forward pass: evaluation, and mean-field negatives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from cpo_kernels.kernels import counter_random, numerics, sampling
from cpo_kernels.kernels.device import own_arithmetic
from cpo_kernels.options import Head, refuse_unknown

from .call import Call, resolve
from .head import LinearHead
from .inputs import Inputs, prepare
from .tokens import Block, Tokens
from .vocab_parallel import VocabShard

# Odd multiplier of Weyl sequences: blocks of one seed and neighbouring seeds do not share random numbers.
SEED_STRIDE = -7046029254386353131


class TokenStatistics(NamedTuple):
    """Statistics of each token from a forward pass; not differentiable.

    Attributes:
        logps: log-probabilities (...) of the targets in nats, 0 where the target is -100.
        entropy: entropies (...) of the next-token distributions in nats, 0 where the target is -100; None if not asked.
        samples: words (...), or (..., num_samples), drawn from these distributions, int64, -100 where the target is;
            None if not asked.
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
    num_samples: int | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    max_logits_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    grad_filter_eps: float | None = None,
    candidate_eps: float | None = None,
    skip_absent_rows: bool = True,
    vocab_shard: VocabShard | None = None,
    frozen_columns: int = 0,
    **unknown: NoReturn,
) -> TokenStatistics:
    """Compute log-probabilities under ``hidden @ weight.T`` and, on request, entropies and samples of each token.

    Every sample is drawn independently of the others and of the target: a whole sequence of them is a mean-field
    negative (Feng et al. 2025). Triton's fused kernel writes no logits, and is launched once for each of
    ``num_samples``; elsewhere the logits fill one buffer at a time, and all samples come from one product.

    Args:
        hidden: (..., H) float32, bfloat16, float16 (or float64 on the torch backend).
        weight: (V, H), same dtype.
        targets: (...) int64; rows of targets -100 enter no GEMM.
        entropy: whether to compute entropies.
        seed: of the samples; None: no samples. They repeat for the same seed, backend, sizes and library version.
            An integer, or an int64 tensor of one element on the device (a captured CUDA graph draws anew when it is
            overwritten): one seed for the call. An int64 tensor (...) of the shape of ``targets``: one for each token,
            whose samples then depend on its seed, its hidden state and the head alone, whichever other tokens share
            the call, except for the rounding of the product, which may depend on its number of rows.
        num_samples: None for one sample (...), or how many (..., num_samples).
        bias: (V,) or None.
        logit_scale, ..., frozen_columns: options of the head, see :class:`cpo_kernels.options.Head`; samples and
            entropies are of the distribution at ``temperature``.
        **unknown: an option that does not exist raises a ``TypeError`` that names the nearest one.

    Raises:
        ValueError: bad shapes, dtypes, devices or target values, or ``num_samples`` below 1 or without a seed, or a
            seed that is no integer; the message names the offending value.
        RuntimeError: a backend that is not available.
    """
    refuse_unknown("linear_token_statistics", unknown)
    head = Head(
        *(logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype),
        *(grad_filter_eps, candidate_eps, skip_absent_rows, vocab_shard, frozen_columns),
    )
    check_num_samples(num_samples, seed)
    if seed is not None:
        head.check_whole("a sample of words")
    inputs = prepare(hidden, weight, targets, None, bias, head, grouped=False)
    head.check_exact("a call without gradients")
    seeds = None if seed is None else Seeds.of(seed, targets)
    with own_arithmetic(hidden.device):
        out = statistics(inputs, seeds, num_samples or 1, entropy, targets.shape)
    if num_samples is None and out.samples is not None:
        out = out._replace(samples=out.samples.squeeze(-1))
    return out


def is_integer(value: object) -> bool:
    """Tell whether a value is an integer, Python's or another library's."""
    return hasattr(value, "__index__") and not isinstance(value, Tensor)


def check_num_samples(num_samples: int | None, seed: int | Tensor | None) -> None:
    """Raise ``ValueError`` for a number of samples that cannot be drawn."""
    if num_samples is None:
        return
    if not is_integer(num_samples) or num_samples < 1:
        raise ValueError(f"num_samples must be at least 1 or None, got {num_samples}")
    if seed is None:
        raise ValueError(f"num_samples={num_samples} needs a seed, got None")


@dataclass(frozen=True)
class Seeds:
    """The seed of a call, a scalar, or those of its tokens, (N,); int64 on the device."""

    values: Tensor

    @classmethod
    def of(cls, seed: int | Tensor, targets: Tensor) -> Seeds:
        """Make seeds of what users pass; an integer comes to the device without a copy that waits."""
        if not isinstance(seed, Tensor):
            if not (is_integer(seed) and -(2**63) <= seed < 2**63):
                raise ValueError(f"seed must be an integer of 64 bits, got {seed}")
            return cls(torch.full((), seed, dtype=torch.int64, device=targets.device))
        per_token = seed.shape == targets.shape
        if seed.is_floating_point() or seed.is_complex() or not (per_token or seed.numel() == 1):
            raise ValueError(
                f"seed must be an integer, or int64 of one element or of the shape of targets, {tuple(targets.shape)}, "
                f"got {seed.dtype} {tuple(seed.shape)}"
            )
        return cls(seed.to(device=targets.device, dtype=torch.int64).reshape(-1 if per_token else ()))

    def of_slots(self, tokens: Tokens) -> Seeds:
        """Return the seeds of the tokens that count, (n,), or the scalar."""
        return self if self.values.dim() == 0 else Seeds(tokens.of_slots(self.values))

    def of_block(self, index: int, block: Block) -> Seeds:
        """Return the seeds of a block's rows, (r,), or the block's own scalar."""
        return Seeds(self.values * SEED_STRIDE + index if self.values.dim() == 0 else self.values[block.order])

    def of_sample(self, index: int) -> Tensor:
        """Return the seeds of a launch that draws the sample number ``index`` of each row."""
        return counter_random.counted(self.values, self.values.new_tensor(index)) if index else self.values

    def uniforms(self, rows: int, count: int) -> Tensor:
        """Draw uniforms (rows, count) in [0, 1), float64."""
        device = self.values.device
        if self.values.dim():
            return counter_random.uniforms(self.values[:, None], torch.arange(count, device=device))
        generator = torch.Generator(device=device).manual_seed(int(self.values))
        return torch.rand((rows, count), dtype=torch.float64, generator=generator, device=device)


def statistics(
    inputs: Inputs, seeds: Seeds | None, num_samples: int, entropy: bool, shape: torch.Size
) -> TokenStatistics:
    """Run :func:`linear_token_statistics` on checked inputs; samples come as (..., num_samples)."""
    call = resolve(inputs, (False, False, False), whole_groups=False)
    plain = seeds is None and not entropy
    if not plain:
        call = replace(call, way=LinearHead)  # entropies and samples are computed from logits
    linear, blocks = call.bind(*inputs.tensors), call.blocks()
    fused = not plain and call.backend.linear_statistics is not None
    buffer = None if fused else linear.workspace(call.plan.rows_held)
    seeds = None if seeds is None else seeds.of_slots(call.tokens)
    parts = [] if blocks else [no_tokens(linear, num_samples if seeds else 0, entropy)]
    for index, block in enumerate(blocks):
        mine = None if seeds is None else seeds.of_block(index, block)
        if fused:
            parts.append(fused_block(linear, block, mine, num_samples, entropy))
        else:
            parts.append(block_of(linear, block, buffer, mine, num_samples, entropy))
    return gather(call, parts, tuple(shape))


def no_tokens(linear: LinearHead, num_samples: int, entropy: bool) -> TokenStatistics:
    """Return the statistics of no rows; no samples for ``num_samples`` of 0."""
    nothing = linear.hidden.new_zeros(0, dtype=numerics.accumulate_dtype(linear.logits_dtype))
    samples = nothing.new_zeros((0, num_samples), dtype=torch.int64) if num_samples else None
    return TokenStatistics(nothing, nothing if entropy else None, samples)


def fused_block(
    linear: LinearHead, block: Block, seeds: Seeds | None, num_samples: int, entropy: bool
) -> TokenStatistics:
    """Compute the statistics of a block's rows by the backend's fused linear path."""
    launch = linear.backend.linear_statistics
    assert launch is not None
    arguments = (linear.hidden[block.rows], linear.weight, block.targets, None, *linear.transform)
    result = launch(*arguments, seed=None if seeds is None else seeds.of_sample(0), entropy=entropy)
    samples = None
    if seeds is not None:
        others = [launch(*arguments, seed=seeds.of_sample(index)).samples for index in range(1, num_samples)]
        samples = torch.stack([result.samples, *others], dim=1)
    return TokenStatistics(result.logps, result.entropy, samples)


def block_of(
    linear: LinearHead, block: Block, buffer: Any, seeds: Seeds | None, num_samples: int, entropy: bool
) -> TokenStatistics:
    """Compute the statistics of a block's rows by the way of the call; entropies and samples need logits."""
    stats, logps, logits = linear.forward(block, buffer, keep=False)
    head, samples = linear.transform, None
    if seeds is not None:
        samples = sampling.row_samples(logits, stats, seeds.uniforms(block.num_rows, num_samples), *head)
    entropies = sampling.row_entropy(logits, stats, *head) if entropy else None
    shard = linear.head.vocab_shard
    if entropies is not None and shard is not None:
        entropies = shard.sum_(entropies)
    return TokenStatistics(logps, entropies, samples)


def gather(call: Call, parts: list[TokenStatistics], shape: tuple[int, ...]) -> TokenStatistics:
    """Join the statistics of the blocks, in which every row has one token, to those of all tokens."""
    absent = call.targets == numerics.IGNORE_INDEX

    def whole(values: tuple[Tensor, ...], absent_value: float) -> Tensor:
        together = call.tokens.among_all(torch.cat(values), call.targets.numel())
        mask = absent.view(-1, *[1] * (together.dim() - 1))
        return together.masked_fill(mask, absent_value).reshape(*shape, *together.shape[1:])

    logps, entropies, samples = zip(*parts, strict=True)
    return TokenStatistics(
        whole(logps, 0.0),
        None if entropies[0] is None else whole(entropies, 0.0),
        None if samples[0] is None else whole(samples, numerics.IGNORE_INDEX),
    )
