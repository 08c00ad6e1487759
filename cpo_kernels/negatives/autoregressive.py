"""Autoregressive negatives (AN in arXiv 2502.16433): completions that the model itself writes, by ``generate``.

They cost most, one forward pass a token, and training gains most from them. A run draws them anew every few steps, or
they are drawn ahead of time and kept in a file (:func:`write_negatives`) that training reads back.

A completion is a function of the model, the prompt, the seed, and the key of the prompt: not of the other prompts, nor
of how they are batched, nor of torch's global generators, which are neither read nor advanced. (The rounding of
products may depend on the number of rows, which can change a draw on the very boundary of two tokens.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.kernels import counter_random, sampling
from cpo_kernels.options import suggests_arguments

from .endings import as_ids, until_end
from .progress import progress_bar
from .seeds import token_seeds
from .wrong import is_wrong


@suggests_arguments
@dataclass(frozen=True)
class Sampling:
    """How completions are sampled.

    Args:
        temperature: divisor of the logits, > 0.
        top_p: in (0, 1]; tokens are drawn from the smallest set of the likeliest that has this probability together.
        max_new_tokens: tokens of a completion at most, EOS included.
        batch_size: sequences that are generated at once.
        seed: any integer; the same seed draws the same completions.

    Raises:
        ValueError: a number out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@suggests_arguments
def autoregressive_negatives(
    model: Any,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    sampling: Sampling | None = None,
    keys: Sequence[int] | None = None,
    completions: Sequence[Sequence[int]] | None = None,
    synced_gpus: bool = False,
    disable_tqdm: bool = False,
) -> list[list[list[int]]]:
    """Sample ``count`` completions of each prompt.

    Sampling is from the model's distribution at the temperature and top-p given; the model's own generation
    configuration (its top-k, its penalties) plays no part. While sampling, the model is in evaluation mode, without
    dropout and gradient checkpointing, and uses its cache whatever its configuration says; afterwards it is as before.
    It may have a loss attached or adapters.

    Args:
        model: a causal language model of ``transformers`` or a ``PeftModel`` of one.
        prompts: token ids of each prompt, at least one. A prompt and its completion must fit the model's positions.
        count: how many completions of each.
        eos_token_id: the token that ends a completion, or every one that may.
        pad_token_id: any token, since padding is masked.
        sampling: how to sample; default: :class:`Sampling`'s own.
        keys: for each prompt an integer, such as the index of its example, on which its completions depend besides the
            seed. Default: its position, 0, 1, ...
        completions: token ids of each prompt's ground truth; a draw equal to it, by :func:`is_wrong`, is left out.
            Default: all draws are returned.
        synced_gpus: keep calling the model until all processes have finished, as weights sharded over processes (FSDP,
            ZeRO 3) need it. All processes must call then, with any number of prompts, none included.
        disable_tqdm: show no progress bar, which otherwise is shown on a terminal after some seconds.

    Returns:
        ``negatives[prompt][number]``, token ids: with EOS at the end where the model ended it, without where it was cut
        off at ``max_new_tokens``.

    Raises:
        ValueError: a negative count, an empty prompt (it is named), another number of keys or completions than of
            prompts, or a prompt and a completion that may have more tokens than the model has positions.
        RuntimeError: logits that are not finite.
    """
    sampling = sampling or Sampling()
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    for name, values in (("key", keys), ("completion", completions)):
        if values is not None and len(values) != len(prompts):
            raise ValueError(f"expected one {name} per prompt, {len(prompts)}, got {len(values)}")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty; the first token of a completion needs a row that predicts it")
    _check_positions(model, max(map(len, prompts), default=0), sampling.max_new_tokens)
    seeds = token_seeds(sampling.seed, 0, range(len(prompts)) if keys is None else keys, count).tolist()
    # By length, so that a batch has little padding; the longest first, so that running out of memory happens early.
    jobs = [(index, sample) for index in range(len(prompts)) for sample in range(count)]
    jobs.sort(key=lambda job: -len(prompts[job[0]]))
    batches = [jobs[start : start + sampling.batch_size] for start in range(0, len(jobs), sampling.batch_size)]
    if synced_gpus:
        batches += [[]] * (_most_of_all(len(batches), model.device) - len(batches))
    negatives: list[list[list[int]]] = [[[] for _ in range(count)] for _ in prompts]
    from cpo_kernels.models.linear_layers import by_our_products

    ends = list(as_ids(eos_token_id))
    generator = _Generator(model, sampling, ends, pad_token_id, synced_gpus, reads_once=count > 1)
    bar = progress_bar("Generating", "text", len(jobs), disable_tqdm)
    with bar, _ready_to_generate(model), by_our_products(model):
        for batch in batches:
            own = list(dict.fromkeys(index for index, _ in batch))
            owners = [own.index(index) for index, _ in batch]
            keyed = [seeds[index * count + sample] for index, sample in batch]
            # A process without prompts generates for any prompt, in step with the other processes' batches.
            drawn = generator([prompts[index] for index in own] or [ends[:1]], owners or [0], keyed or [0])
            for (index, sample), completion in zip(batch, drawn[: len(batch)], strict=True):
                negatives[index][sample] = completion
            bar.update(len(batch))
    if completions is None:
        return negatives
    return [
        [own for own in drawn if is_wrong(own, truth, ends)]
        for drawn, truth in zip(negatives, completions, strict=True)
    ]


def _check_positions(model: Any, longest: int, max_new_tokens: int) -> None:
    from cpo_kernels.models.head import positions_of

    positions = positions_of(model.config)
    if positions is not None and longest + max_new_tokens > positions:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the {positions} positions of the "
            "model"
        )


def _most_of_all(number: int, device: torch.device) -> int:
    """Find the largest of all processes' numbers."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return number
    most = torch.tensor(number, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


class _Generator:
    """Generates completions of prompts with a model.

    Args:
        model: as for :func:`autoregressive_negatives`.
        sampling: how to sample.
        eos_token_id: the tokens that end a completion.
        pad_token_id: the token that fills up.
        synced_gpus: whether processes run in step.
        reads_once: whether a prompt is read once for all of its completions, where the model's cache can be repeated.
    """

    def __init__(
        self,
        model: Any,
        sampling: Sampling,
        eos_token_id: list[int],
        pad_token_id: int,
        synced_gpus: bool,
        reads_once: bool,
    ) -> None:
        self.model, self.sampling, self.ends, self.pad = model, sampling, eos_token_id, pad_token_id
        self.synced_gpus, self.reads_once = synced_gpus, reads_once

    def __call__(
        self, prompts: Sequence[Sequence[int]], owners: Sequence[int], seeds: Sequence[int]
    ) -> list[list[int]]:
        """Generate a completion of prompt ``owners[b]`` with ``seeds[b]``, for all b."""
        from transformers import LogitsProcessorList

        device, width = self.model.device, max(map(len, prompts))
        ids = [[self.pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        there = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        read = torch.tensor(ids, device=device), torch.tensor(there, device=device)  # (P, T) each
        which = torch.tensor(owners, device=device)  # (B,)
        drawing = [*_warpers(self.sampling), _SeededChoice(torch.tensor(seeds, device=device), width)]
        # The last processor draws a token and rules out all others, so that greedy search returns it.
        processors: Any = LogitsProcessorList(drawing)
        tokens = self.sampling.max_new_tokens
        text, mask = (part[which] for part in read)  # (B, T) each
        state: dict[str, Any] = {}
        if self.reads_once:
            before = _kept_tensors(self.model)
            first = self._generate(*read, 1, LogitsProcessorList())
            self.reads_once = _can_be_repeated(first.past_key_values, width) and _same(
                before, _kept_tensors(self.model)
            )
            if self.reads_once:
                chosen = processors(text, first.logits[0][which]).argmax(-1, keepdim=True)
                text, mask = torch.cat([text, chosen], 1), torch.cat([mask, torch.ones_like(chosen)], 1)
                first.past_key_values.batch_select_indices(which)
                tokens, state = tokens - 1, {"past_key_values": first.past_key_values}
        if tokens:
            text = self._generate(text, mask, tokens, processors, **state).sequences
        # What follows the end of a completion is padding, or what nobody reads.
        return [until_end(completion, self.ends) for completion in text[:, width:].tolist()]

    def _generate(self, ids: Tensor, mask: Tensor, tokens: int, processors: Any, **state: Any) -> Any:
        from transformers import GenerationConfig

        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=tokens == 1,
            eos_token_id=self.ends,
            pad_token_id=self.pad,
        )
        options = {"generation_config": config, "logits_processor": processors, "synced_gpus": self.synced_gpus}
        return self.model.generate(input_ids=ids, attention_mask=mask, **options, **state)


def _kept_tensors(model: Any) -> list[Tensor]:
    """Return what modules keep besides parameters and buffers, such as the offsets of positions of some models."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(one is other for one, other in zip(before, after, strict=True))


def _can_be_repeated(cache: Any, width: int) -> bool:
    """Tell whether a cache holds keys and values of ``width`` tokens and nothing else, a row a text.

    Virtual tokens of prompt tuning, which lie before a prompt, are more than it.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    rows = (DynamicLayer, DynamicSlidingWindowLayer)
    plain = type(cache) is DynamicCache and all(type(layer) in rows for layer in cache.layers)
    return plain and cache.get_seq_length() == width


def _warpers(sampling: Sampling) -> list[Any]:
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = []
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(float(sampling.top_p)))
    return warpers


class _SeededChoice:
    """A logits processor that draws each row's token by its seed and place, and rules out all other tokens.

    Args:
        seeds: (B,) int64 on the device of the logits.
        width: number of tokens before the first drawn one.
    """

    def __init__(self, seeds: Tensor, width: int) -> None:
        self.seeds, self.width = seeds, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V): 0 for the chosen token, else -inf."""
        place = self.seeds.new_tensor(input_ids.shape[1] - self.width)
        chosen = sampling.words_at(scores.float().softmax(-1), counter_random.uniforms(self.seeds, place)[:, None])
        if bool((chosen < 0).any()):
            raise RuntimeError("the model's logits hold NaN or infinity, so no token can be drawn from them")
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


@contextmanager
def _ready_to_generate(model: Any) -> Iterator[None]:
    """Put the model in evaluation mode, with a generation configuration without options, within the context."""
    from transformers import GenerationConfig

    trained = [module for module in model.modules() if module.training]
    # A PeftModel passes its generation configuration on to the model that it wraps.
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    configs = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        model.eval()
        yield
    finally:
        for module in trained:
            module.training = True
        for owner, config in zip(owners, configs, strict=True):
            owner.generation_config = config
