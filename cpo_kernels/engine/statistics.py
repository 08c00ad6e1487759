"""Log-probabilities with more statistics of the same forward pass: evaluation, metrics, mean-field negatives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
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
        samples: words (...), or (..., num_samples), drawn from these distributions, int64, -100 where the target is and
            where ``sample_mask`` is false; None if not asked.
        top1: (...) bool, whether no word is more probable than the target, False where that is -100; None if not asked.
    """

    logps: Tensor
    entropy: Tensor | None
    samples: Tensor | None
    top1: Tensor | None = None


@torch.no_grad()
def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    entropy: bool = False,
    top1: bool = False,
    seed: int | Tensor | None = None,
    num_samples: int | None = None,
    sample_mask: Tensor | None = None,
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
    """Compute log-probabilities under ``hidden @ weight.T`` and, on request, more statistics of each token.

    Every sample is drawn independently of the others and of the target; put in place of some of the targets, they make
    a mean-field negative (Feng et al. 2025). All samples come from one product: Triton's fused kernel writes no logits,
    elsewhere they fill one buffer at a time.

    Args:
        hidden: (..., H) float32, bfloat16, float16 (or float64 on the torch backend).
        weight: (V, H), same dtype.
        targets: (...) int64; rows of targets -100 enter no GEMM.
        entropy: whether to compute entropies.
        top1: whether to tell which targets are most probable words. It costs nothing besides entropies or samples.
        seed: of the samples; None: no samples. They repeat for the same seed, backend, sizes and library version.
            An integer, or an int64 tensor of one element on the device (a captured CUDA graph draws anew when it is
            overwritten): one seed for the call. An int64 tensor (...) of the shape of ``targets``: one for each token,
            whose samples then depend on its seed, its hidden state and the head alone, whichever other tokens share
            the call, except for the rounding of the product, which may depend on its number of rows.
        num_samples: None for one sample (...), or how many (..., num_samples).
        sample_mask: bool of the shape of the samples, which of them to draw, each as without a mask; None: all. The
            others are -100, and cost little.
        bias: (V,) or None.
        logit_scale, ..., frozen_columns: options of the head, see :class:`cpo_kernels.options.Head`; samples and
            entropies are of the distribution at ``temperature``.
        **unknown: an option that does not exist raises a ``TypeError`` that names the nearest one.

    Raises:
        ValueError: bad shapes, dtypes, devices or target values, ``num_samples`` below 1, a seed that is no integer, or
            ``num_samples`` or ``sample_mask`` without a seed; the message names the offending value.
        RuntimeError: a backend that is not available.
    """
    refuse_unknown(linear_token_statistics, unknown)
    head = Head(
        *(logit_scale, softcap, temperature, backend, max_logits_bytes, logits_dtype),
        *(grad_filter_eps, candidate_eps, skip_absent_rows, vocab_shard, frozen_columns),
    )
    check_num_samples(num_samples, sample_mask, seed)
    if seed is not None:
        head.check_whole("a sample of words")
    inputs = prepare(hidden, weight, targets, None, bias, head, grouped=False)
    head.check_exact("a call without gradients")
    draws = None if seed is None else Draws.of(seed, num_samples, sample_mask, targets)
    with own_arithmetic(hidden.device):
        out = statistics(inputs, draws, entropy, top1, targets.shape)
    if num_samples is None and out.samples is not None:
        out = out._replace(samples=out.samples.squeeze(-1))
    return out


def is_integer(value: object) -> bool:
    """Tell whether a value is an integer, Python's or another library's."""
    return hasattr(value, "__index__") and not isinstance(value, Tensor)


def check_num_samples(num_samples: int | None, sample_mask: Tensor | None, seed: int | Tensor | None) -> None:
    """Raise ``ValueError`` for a number of samples that cannot be drawn, and for samples without a seed."""
    if num_samples is not None and (not is_integer(num_samples) or num_samples < 1):
        raise ValueError(f"num_samples must be at least 1 or None, got {num_samples}")
    if seed is None and num_samples is not None:
        raise ValueError(f"num_samples={num_samples} needs a seed, got None")
    if seed is None and sample_mask is not None:
        raise ValueError("sample_mask needs a seed, got None")


@dataclass(frozen=True)
class Draws:
    """The samples of a call.

    Attributes:
        seeds: the seed of the call, a scalar, or those of its tokens, (N,); int64 on the device.
        count: how many samples each token has.
        wanted: (N, count) bool, which of them to draw; None: all.
    """

    seeds: Tensor
    count: int
    wanted: Tensor | None

    @classmethod
    def of(cls, seed: int | Tensor, num_samples: int | None, sample_mask: Tensor | None, targets: Tensor) -> Draws:
        """Make draws of what users pass."""
        shape, count = targets.shape, num_samples or 1
        if sample_mask is None:
            return cls(device_seeds(seed, targets), count, None)
        expected = shape if num_samples is None else (*shape, count)
        found = sample_mask.dtype, tuple(sample_mask.shape), sample_mask.device
        if found != (torch.bool, tuple(expected), targets.device):
            raise ValueError(
                f"sample_mask must be torch.bool of shape {tuple(expected)} on {targets.device}, "
                f"got {found[0]} {found[1]} on {found[2]}"
            )
        return cls(device_seeds(seed, targets), count, sample_mask.reshape(-1, count))

    def of_slots(self, tokens: Tokens) -> Draws:
        """Return those of the tokens that count."""
        return self.at(tokens.of_slots)

    def of_block(self, index: int, block: Block) -> Draws:
        """Return those of a block's rows; a seed of the call becomes the block's own."""
        draws = self.at(lambda values: values[block.order])
        return draws if self.seeds.dim() else replace(draws, seeds=self.seeds * SEED_STRIDE + index)

    def at(self, choose: Callable[[Tensor], Tensor]) -> Draws:
        """Return those of some tokens, which ``choose`` takes from what all of them have."""
        seeds = choose(self.seeds) if self.seeds.dim() else self.seeds
        return replace(self, seeds=seeds, wanted=None if self.wanted is None else choose(self.wanted))

    def sample_seeds(self) -> Tensor:
        """Return the seeds (r, count) of the samples of each row, or (1, count) of one seed for all rows.

        The first sample has the seed itself, so that it is also the only one of ``num_samples=None``.
        """
        first = self.seeds.reshape(-1, 1)
        others = torch.arange(1, self.count, device=first.device)
        return torch.cat([first, counter_random.counted(first, others)], 1)

    def uniforms(self, rows: int) -> Tensor:
        """Draw uniforms (rows, count) in [0, 1), float64."""
        device = self.seeds.device
        if self.seeds.dim():
            return counter_random.uniforms(self.seeds[:, None], torch.arange(self.count, device=device))
        generator = torch.Generator(device=device).manual_seed(int(self.seeds))
        return torch.rand((rows, self.count), dtype=torch.float64, generator=generator, device=device)


def device_seeds(seed: int | Tensor, targets: Tensor) -> Tensor:
    """Make a scalar or (N,) seeds of what users pass; an integer comes to the device without a copy that waits."""
    if not isinstance(seed, Tensor):
        if not (is_integer(seed) and -(2**63) <= seed < 2**63):
            raise ValueError(f"seed must be an integer of 64 bits, got {seed}")
        return torch.full((), seed, dtype=torch.int64, device=targets.device)
    per_token = seed.shape == targets.shape
    if seed.is_floating_point() or seed.is_complex() or not (per_token or seed.numel() == 1):
        raise ValueError(
            f"seed must be an integer, or int64 of one element or of the shape of targets, {tuple(targets.shape)}, "
            f"got {seed.dtype} {tuple(seed.shape)}"
        )
    return seed.to(device=targets.device, dtype=torch.int64).reshape(-1 if per_token else ())


def statistics(inputs: Inputs, draws: Draws | None, entropy: bool, top1: bool, shape: torch.Size) -> TokenStatistics:
    """Run :func:`linear_token_statistics` on checked inputs; samples come as (..., num_samples)."""
    plain = draws is None and not (entropy or top1)
    # Entropies and samples are computed from logits; a way that leaves no statistics of rows cannot tell the largest.
    given: dict[str, Any] = {} if plain else {"way": LinearHead, "scratch_bytes": sampling.scratch_bytes}
    call = resolve(inputs, (False, False, False), whole_groups=False, **given)
    linear, blocks = call.bind(*inputs.tensors), call.blocks()
    fused = not plain and call.backend.linear_statistics is not None
    draws = None if draws is None else draws.of_slots(call.tokens)
    parts = [] if blocks else [no_tokens(linear, draws, entropy, top1)]
    elements = sampling.elements_within(call.plan.workspace_bytes, inputs.hidden.device)
    with nullcontext() if fused else linear.workspace(call.plan.rows_held) as buffer:
        for index, block in enumerate(blocks):
            mine = None if draws is None else draws.of_block(index, block)
            if fused:
                parts.append(fused_block(linear, block, mine, entropy, top1))
            else:
                parts.append(block_of(linear, block, buffer, mine, entropy, top1, elements))
    call.tokens.check()
    return gather(call, parts, tuple(shape))


def no_tokens(linear: LinearHead, draws: Draws | None, entropy: bool, top1: bool) -> TokenStatistics:
    """Return the statistics of no rows."""
    nothing = linear.hidden.new_zeros(0, dtype=numerics.accumulate_dtype(linear.logits_dtype))
    samples = None if draws is None else nothing.new_zeros((0, draws.count), dtype=torch.int64)
    return TokenStatistics(nothing, nothing if entropy else None, samples, nothing.bool() if top1 else None)


def is_top1(stats: Tensor, logps: Tensor) -> Tensor:
    """Tell from the statistics (2, r) of rows whether their one target has the row's largest logit, (r,) bool.

    All kernels subtract first the maximum and then the logarithm from a target's logit, so that equality is exact; sums
    over shards of the vocabulary may be off by one rounding.
    """
    return logps >= -(1 + torch.finfo(logps.dtype).eps) * stats[1]


def fused_block(linear: LinearHead, block: Block, draws: Draws | None, entropy: bool, top1: bool) -> TokenStatistics:
    """Compute the statistics of a block's rows by the backend's fused linear path."""
    launch = linear.backend.linear_statistics
    assert launch is not None
    asked: dict[str, Any] = {} if draws is None else {"seed": draws.sample_seeds(), "wanted": draws.wanted}
    arguments = (linear.hidden[block.rows], linear.weight, block.targets, None, *linear.transform)
    result = launch(*arguments, entropy=entropy, **asked)
    best = is_top1(result.stats, result.logps) if top1 else None
    return TokenStatistics(result.logps, result.entropy, result.samples, best)


def block_of(
    linear: LinearHead, block: Block, buffer: Any, draws: Draws | None, entropy: bool, top1: bool, elements: int
) -> TokenStatistics:
    """Compute the statistics of a block's rows by the way of the call.

    Entropies and samples need logits, of which so many ``elements`` are taken at a time.
    """
    stats, logps, logits = linear.forward(block, buffer, keep=False)
    head, samples = linear.transform, None
    if draws is not None:
        uniforms, wanted = draws.uniforms(block.num_rows), draws.wanted
        samples = sampling.row_samples(logits, stats, uniforms, wanted, *head, elements=elements)
    entropies = sampling.row_entropy(logits, stats, *head, elements=elements) if entropy else None
    shard = linear.head.vocab_shard
    if entropies is not None and shard is not None:
        entropies = shard.sum_(entropies)
    return TokenStatistics(logps, entropies, samples, is_top1(stats, logps) if top1 else None)


def gather(call: Call, parts: list[TokenStatistics], shape: tuple[int, ...]) -> TokenStatistics:
    """Join the statistics of the blocks, in which every row has one token, to those of all tokens."""
    absent = call.targets == numerics.IGNORE_INDEX

    def whole(values: tuple[Tensor, ...], absent_value: float) -> Tensor:
        together = call.tokens.among_all(torch.cat(values), call.targets.numel())
        mask = absent.view(-1, *[1] * (together.dim() - 1))
        return together.masked_fill(mask, absent_value).reshape(*shape, *together.shape[1:])

    logps, entropies, samples, top1 = zip(*parts, strict=True)
    return TokenStatistics(
        whole(logps, 0.0),
        None if entropies[0] is None else whole(entropies, 0.0),
        None if samples[0] is None else whole(samples, numerics.IGNORE_INDEX),
        None if top1[0] is None else whole(top1, False),
    )
