"""What is measured of a model: likelihood of texts, entropy and quality of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tasks import Ids, Task
from torch.nn.functional import pad

from cpo_kernels.negatives import Sampling, autoregressive_negatives
from cpo_kernels.trainer.evaluation import generation_statistics

BATCH = 256


@dataclass(frozen=True)
class Score:
    """Of one completion: its log-likelihood, the sum of the entropies of its predictions, in nats, and its tokens."""

    logp: float
    entropy: float
    tokens: int


@torch.no_grad()
def scored(
    model: Any, prompts: Sequence[Ids], completions: Sequence[Ids], eos: int, temperature: float = 1.0
) -> list[Score]:
    """Score completions behind their prompts, by the model's distribution at a temperature."""
    model.eval()
    scores: list[Score] = []
    for start in range(0, len(prompts), BATCH):
        pairs = list(zip(prompts[start : start + BATCH], completions[start : start + BATCH], strict=True))
        longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
        # Padding behind a text changes nothing before it.
        rows = [torch.tensor([*prompt, *completion]) for prompt, completion in pairs]
        ids = torch.stack([pad(row, (0, longest - len(row)), value=eos) for row in rows])
        logs = (model(input_ids=ids).logits[:, :-1].float() / temperature).log_softmax(-1)
        logps = logs.gather(-1, ids[:, 1:, None])[..., 0]
        entropies = -(logs.exp() * logs).sum(-1)
        for row, (prompt, completion) in enumerate(pairs):
            own = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
            scores.append(Score(float(logps[row, own].sum()), float(entropies[row, own].sum()), len(completion)))
    return scores


def nll_per_token(model: Any, prompts: Sequence[Ids], completions: Sequence[Ids], eos: int) -> float:
    """Return the negative log-likelihood of texts, in nats per token."""
    scores = scored(model, prompts, completions, eos)
    return -sum(score.logp for score in scores) / sum(score.tokens for score in scores)


def sampled(model: Any, task: Task, prompts: Sequence[Ids], temperature: float, seed: int) -> dict[str, Any]:
    """Sample one completion of each prompt and measure them; the same seed draws with the same random numbers.

    Returns:
        ``quality`` (mean), ``entropy`` (nats per token), ``length`` (tokens), ``repetition`` and ``distinct`` (of
        pairs of tokens), and ``each``, the quality of each completion.
    """
    room = task.max_length - max(map(len, prompts))
    sampling = Sampling(temperature=temperature, max_new_tokens=room, batch_size=BATCH, seed=seed)
    drawn = autoregressive_negatives(model, prompts, 1, eos_token_id=task.eos, pad_token_id=task.eos, sampling=sampling)
    completions = [own for (own,) in drawn]
    each = task.quality(prompts, completions)
    scores = scored(model, prompts, completions, task.eos, temperature)
    statistics = generation_statistics(completions, task.eos)
    return {
        "quality": sum(each) / len(each),
        "entropy": sum(score.entropy for score in scores) / sum(score.tokens for score in scores),
        "length": statistics.mean_length,
        "repetition": statistics.repetition[2],
        "distinct": statistics.distinct[2],
        "each": each,
    }
