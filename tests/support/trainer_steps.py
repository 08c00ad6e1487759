"""Shared by tests of the trainer: data that brings negatives, inputs of a step, log-likelihoods by the model."""

from __future__ import annotations

import itertools

import torch

NONE = {"num_batch_negatives": 0, "num_truncation_negatives": 0}
GIVEN = [
    {"prompt": "the cat", "completion": " sat on the mat", "negatives": [" ran", " slept on a tree", " flew"]},
    {"prompt": "a dog ran", "completion": " over the river", "negatives": [" sat", " swam near", " and then"]},
]


def micro_batch(run, indices):
    """Return the inputs of one step on some examples."""
    ((inputs,), _) = run.get_batch_samples(iter([{"index": torch.tensor(indices)}]), 1, torch.device("cpu"))
    return inputs


def candidates(run, inputs) -> list[list[list[int]]]:
    """Return the tokens of the candidates of each group."""
    bounds = inputs["cu_tokens"]
    tokens = [inputs["targets"][a:b].tolist() for a, b in itertools.pairwise(bounds)]
    groups = inputs["cu_groups"]
    return [tokens[a:b] for a, b in itertools.pairwise(groups)]


def dense_logps(model, prompt, completion) -> torch.Tensor:
    text = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logps = model(input_ids=text).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, text[0, 1:, None])[len(prompt) - 1 :, 0].sum()
