"""What a model makes of held-out text: perplexity, the truth against every kind of negative, and its generations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from demo_text import MAX_LENGTH, MAX_PROMPT_LENGTH
from torch import nn

from cpo_kernels.models import LogpsRequest
from cpo_kernels.negatives import (
    Sampling,
    autoregressive_negatives,
    mean_field_negatives,
    token_seeds,
)
from cpo_kernels.trainer import ContrastBatch, Negative, NegativeSampler, TokenizedExamples
from cpo_kernels.trainer.batch import body_inputs, layout_of
from cpo_kernels.trainer.evaluation import GenerationStatistics, generation_statistics

KINDS = ("batch", "truncation", "mean_field", "autoregressive")
HELD_OUT_NEGATIVES = 2  # of each kind
GENERATIONS = 64
SEED = 0  # of what is held out: the same whatever the run's seed
SAMPLING = Sampling(max_new_tokens=MAX_LENGTH - MAX_PROMPT_LENGTH, batch_size=GENERATIONS, seed=SEED)


@dataclass(frozen=True)
class Scores:
    """Of a model on held-out text.

    Attributes:
        perplexity: per token.
        wins: by kind of negative, how often a true continuation has a higher log-likelihood per token than all its
            negatives of that kind.
    """

    perplexity: float
    wins: dict[str, float]


def cheap_negatives(examples: TokenizedExamples, eos: int) -> list[list[Negative]]:
    """The negatives of each example that need no model."""
    sampler = NegativeSampler(examples, eos, HELD_OUT_NEGATIVES, HELD_OUT_NEGATIVES, seed=SEED)
    return [sampler.draw(index, step=0) for index in range(len(examples))]


def every_negative(model: nn.Module, examples: TokenizedExamples, eos: int) -> list[list[Negative]]:
    """Negatives of all kinds, those that need a model drawn and written by ``model``."""
    negatives = cheap_negatives(examples, eos)
    with torch.no_grad():
        drawn = [texts for start in range(0, len(examples), 16) for texts in draw(model, examples, start, 16, eos)]
    written = write(model, examples.prompts, HELD_OUT_NEGATIVES, eos, examples.completions)
    for kind, groups in (("mean_field", drawn), ("autoregressive", written)):
        for own, texts in zip(negatives, groups, strict=True):
            own += [Negative(kind, text) for text in texts]
    return negatives


def draw(model: nn.Module, examples: TokenizedExamples, start: int, count: int, eos: int) -> list[list[list[int]]]:
    """Mean-field negatives of ``count`` examples from ``start`` on, from one forward pass along their ground truths."""
    batch, indices = ContrastBatch(eos, eos), range(len(examples))[start : start + count]
    for index in indices:
        batch.add_group(examples.prompts[index], examples.completions[index])
    lengths = [len(examples.completions[index]) for index in indices]
    inputs = batch.tensors()
    model.eval()
    hidden = model.base_model(**body_inputs(inputs)).last_hidden_state.flatten(0, 1)[inputs["rows"]]
    options = {"seeds": token_seeds(SEED, 0, indices, lengths), "count": HELD_OUT_NEGATIVES}
    options |= {"eos_token_id": eos, "cu_tokens": inputs["cu_tokens"]}
    return mean_field_negatives(hidden, model.lm_head.weight, inputs["targets"], **options)


def write(
    model: nn.Module, prompts: list[list[int]], count: int, eos: int, truths: list[list[int]] | None = None
) -> list[list[list[int]]]:
    """What the model writes behind each prompt, ``count`` times, without what equals its truth if those are given."""
    options = {"eos_token_id": eos, "pad_token_id": eos, "sampling": SAMPLING, "completions": truths}
    return autoregressive_negatives(model, prompts, count, **options)


@torch.no_grad()
def score(
    model: nn.Module, examples: TokenizedExamples, negatives: list[list[Negative]], eos: int, count: int | None = None
) -> Scores:
    """The scores on the first ``count`` examples, or all."""
    model.eval()
    indices = range(len(examples))[: count or len(examples)]
    nll, tokens = 0.0, 0
    wins: dict[str, list[bool]] = {}
    for start in range(0, len(indices), 8):
        batch = ContrastBatch(eos, eos, MAX_LENGTH, share_prefixes=True)
        for index in indices[start : start + 8]:
            batch.add_group(examples.prompts[index], examples.completions[index], negatives[index])
        inputs = batch.tensors()
        layout = layout_of(inputs)
        logps = model(**body_inputs(inputs), linear_loss=LogpsRequest(inputs["targets"], layout)).logps
        lengths = torch.tensor(layout.cu_tokens).diff()
        means, kinds = (logps / lengths).tolist(), inputs["kinds"]
        for first, last in zip(layout.cu_groups, layout.cu_groups[1:], strict=False):
            nll -= float(logps[first])
            tokens += int(lengths[first])
            for kind in dict.fromkeys(kinds[first + 1 : last]):
                best = max(means[i] for i in range(first + 1, last) if kinds[i] == kind)
                wins.setdefault(kind, []).append(means[first] > best)
    model.train()
    shares = {kind: sum(own) / len(own) for kind, own in wins.items()}
    return Scores(float(torch.tensor(nll / tokens).exp()), shares)


def generations(model: nn.Module, examples: TokenizedExamples, eos: int) -> GenerationStatistics:
    """Of one continuation of each of the first prompts."""
    written = write(model, examples.prompts[:GENERATIONS], 1, eos)
    return generation_statistics([own[0] for own in written], eos)


def true_continuations(examples: TokenizedExamples, eos: int) -> GenerationStatistics:
    """Of the ground truths behind the same prompts, as far as a generation may go."""
    truths = [own[: SAMPLING.max_new_tokens] for own in examples.completions[:GENERATIONS]]
    return generation_statistics(truths, eos)
