"""Log-likelihoods under the reference, computed once before training and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cpo_kernels.negatives.progress import progress_bar

from .builder import BatchBuilder
from .data import TokenizedExamples
from .files import whole_file

DIGEST = "xxh3_128"
DELETE = "delete the file, and they are computed again"

ScoreExamples = Callable[[Sequence[int]], list[Tensor]]


class ReferenceScores:
    """The log-likelihoods of every candidate of every example of a data set.

    Args:
        starts: (E + 1,) int64, the candidates of example e are ``starts[e]:starts[e + 1]``.
        logps: (S,) float32, nats.
    """

    def __init__(self, starts: Tensor, logps: Tensor) -> None:
        self.starts, self.logps = starts.tolist(), logps

    def of(self, indices: Sequence[int]) -> Tensor:
        """Return the log-likelihoods of the candidates of some examples, joined in their order."""
        return torch.cat([self.logps[self.starts[i] : self.starts[i + 1]] for i in indices])


def precompute(
    directory: Path, batches: BatchBuilder, examples: TokenizedExamples, step: int, accelerator: Accelerator
) -> ReferenceScores:
    """Score a data set whose negatives never change.

    Args:
        directory: folder of the cached scores.
        batches: builds the groups that are scored.
        examples: the data.
        step: the step with which negatives are drawn.
        accelerator: the accelerator of the run.
    """
    config, sources = batches.config, batches.negatives.sources
    reference = sources.reference
    assert reference is not None
    key = cache_key(
        model=[reference.fingerprint, reference.description],
        data=examples.digest,
        negatives=[config.negative_counts(examples.brings_negatives), batches.negatives.seed, step, config.max_length],
        eos=batches.negatives.ends,
        precision=[accelerator.mixed_precision, str(sources.head)],
    )

    def score(indices: Sequence[int]) -> list[Tensor]:
        batch = batches.build(examples, indices, step, contrast=True)
        with sources.autocast():
            logps = reference.score(batch.tensors(), sources.head, pool=False).logps
        assert logps is not None
        return list(logps.cpu().split([end - start for start, end in pairwise(batch.groups)]))

    size, quiet = config.per_device_eval_batch_size, config.hides_progress
    return load_or_compute(directory, key, len(examples), size, score, accelerator, quiet)


def cache_key(**parts: Any) -> str:
    """Digest everything that the scores depend on: model, data, negatives, precision."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def load_or_compute(
    directory: Path,
    key: str,
    num_examples: int,
    batch_size: int,
    score: ScoreExamples,
    accelerator: Accelerator,
    disable_tqdm: bool = False,
) -> ReferenceScores:
    """Load the scores cached under ``key``; if there are none, compute them in all processes together.

    Args:
        directory: folder of the cached scores, one file per key.
        key: see :func:`cache_key`.
        num_examples: E.
        batch_size: examples scored at a time by each process.
        score: maps indices of examples to the log-likelihoods of their candidates, one tensor per example.
        accelerator: the accelerator of the run, through which processes share scores.
        disable_tqdm: show no progress bar.

    Raises:
        ValueError: a file that is cut off or is not what was written; the message names it.
    """
    path = directory / f"{key}.safetensors"
    # One process decides: a shared file system may show a file to other processes later.
    (found,) = gather_object([path.is_file()])[:1]
    if not found:
        _compute(path, num_examples, batch_size, score, accelerator, disable_tqdm)
        accelerator.wait_for_everyone()
    return _load(path, num_examples)


def _load(path: Path, num_examples: int) -> ReferenceScores:
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get(DIGEST)
            starts, logps = file.get_tensor("starts"), file.get_tensor("logps")
        whole = written == _digest(starts, logps) and len(starts) == num_examples + 1
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the reference scores in {path} cannot be read ({error}); {DELETE}") from error
    if not whole:
        raise ValueError(f"the reference scores in {path} are not those that were written; {DELETE}")
    return ReferenceScores(starts, logps)


def _digest(starts: Tensor, logps: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(starts.numpy().tobytes() + logps.numpy().tobytes())


def _compute(
    path: Path,
    num_examples: int,
    batch_size: int,
    score: ScoreExamples,
    accelerator: Accelerator,
    disable_tqdm: bool,
) -> None:
    mine = range(accelerator.process_index, num_examples, accelerator.num_processes)
    scores: list[tuple[int, list[float]]] = []
    hidden = disable_tqdm or not accelerator.is_local_main_process
    with progress_bar("Reference scores", "example", len(mine), hidden) as bar:
        # A model that is sharded runs in all processes or in none: one without examples left scores some example again.
        for start in range(0, len(range(0, num_examples, accelerator.num_processes)), batch_size):
            indices = mine[start : start + batch_size]
            own = score(indices or [0])[: len(indices)]
            scores += [(index, logps.tolist()) for index, logps in zip(indices, own, strict=True)]
            bar.update(len(indices))
    scores = sorted(gather_object(scores))
    if not accelerator.is_main_process:
        return
    starts = torch.tensor([0, *(len(logps) for _, logps in scores)]).cumsum(0)
    logps = torch.tensor([value for _, own in scores for value in own], dtype=torch.float32)
    with whole_file(path) as partial:
        save_file({"starts": starts, "logps": logps}, partial, metadata={DIGEST: _digest(starts, logps)})
