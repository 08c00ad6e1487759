"""Ranked negatives (ANR in arXiv 2502.16433): candidates in the order of their likeness to the ground truth.

Likeness is the cosine of embeddings, from a sentence encoder (:class:`SentenceEmbedder`) or from hidden states of a
language model that has read the candidates anyway (:func:`mean_pool`). The full Plackett-Luce contrast takes the order
as ``ranks``: 0 for the ground truth, 1 for the negative most like it, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.layout import check_boundaries
from cpo_kernels.options import suggests_arguments


@suggests_arguments
def similarity_ranks(
    embeddings: Tensor, cu_groups: Sequence[int], base_ranks: Sequence[int] | None = None
) -> list[int]:
    """Rank candidates by cosine similarity to the first of their group.

    The first candidate of a group has rank 0. The others have 1, 2, ... by descending similarity, and share a rank,
    after which none is skipped, where their similarities in float64 are equal to the last bit.

    Args:
        embeddings: (S, H) floating point, on any device.
        cu_groups: (G + 1,) host integers; the candidates of group g are ``cu_groups[g]:cu_groups[g + 1]``.
        base_ranks: (S,) ranks that take precedence over similarity, such as those of an example: candidates are ordered
            by base rank first, then by similarity to the first of the group; all of base rank 0 keep rank 0.

    Returns:
        (S,) ranks, for ``CandidateLayout(..., ranks=...)``.

    Raises:
        ValueError: shapes that do not fit, or an embedding that has no direction (all zeros, NaN or infinite); the
            message names the candidate and its group.
    """
    check_boundaries("cu_groups", cu_groups)
    if embeddings.dim() != 2 or embeddings.shape[0] != cu_groups[-1] or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings must be floating point ({cu_groups[-1]}, H), got {embeddings.dtype} {tuple(embeddings.shape)}"
        )
    if base_ranks is not None and len(base_ranks) != cu_groups[-1]:
        raise ValueError(f"base_ranks must have one entry per candidate, {cu_groups[-1]}, got {len(base_ranks)}")
    directions = _directions(embeddings.detach().double().cpu(), cu_groups)
    ranks: list[int] = []
    for start, end in pairwise(cu_groups):
        # Row by row: equal embeddings must have equal similarities, which a blocked matrix product does not promise.
        similarities = [float((direction * directions[start]).sum()) for direction in directions[start:end]]
        base = [int(i > 0) for i in range(end - start)] if base_ranks is None else list(base_ranks[start:end])
        ranks += _ranks_of_group(similarities, base)
    return ranks


def _ranks_of_group(similarities: Sequence[float], base: Sequence[int]) -> list[int]:
    keys = [(rank, 0.0 if rank == 0 else -similarity) for rank, similarity in zip(base, similarities, strict=True)]
    # From 1 where no candidate has the base rank 0, which then is for the caller to object to.
    order = {key: place for place, key in enumerate(sorted(set(keys)), start=int(min(base, default=0) > 0))}
    return [order[key] for key in keys]


def _directions(embeddings: Tensor, cu_groups: Sequence[int]) -> Tensor:
    """Scale float64 embeddings (S, H) to unit vectors; raise ``ValueError`` for one without a direction."""
    # Divided by the largest entry first, so that no square overflows or vanishes.
    size = embeddings.abs().amax(1) if embeddings.shape[1] else embeddings.new_zeros(embeddings.shape[0])
    bad = ~(size.isfinite() & (size > 0))
    if bad.any():
        candidate = int(bad.nonzero()[0])
        group = next(g for g, (start, end) in enumerate(pairwise(cu_groups)) if start <= candidate < end)
        what = "is all zeros" if size[candidate] == 0 else "holds NaN or infinity"
        raise ValueError(
            f"the embedding of candidate {candidate - cu_groups[group]} of group {group} {what}, so it has no "
            "direction to compare"
        )
    scaled = embeddings / size[:, None]
    return scaled / scaled.norm(dim=1, keepdim=True)


@suggests_arguments
def mean_pool(hidden: Tensor, rows: Tensor, cu_tokens: Sequence[int]) -> Tensor:
    """Average the hidden states of each candidate's tokens, an embedding without a pass of its own.

    Args:
        hidden: (R, H) floating point, hidden states of a model over the candidates.
        rows: (N,) int64, the row of each token.
        cu_tokens: (S + 1,) host integers; the tokens of candidate s are ``cu_tokens[s]:cu_tokens[s + 1]``.

    Returns:
        (S, H) float32, without gradient; 0 for a candidate without tokens.

    Raises:
        ValueError: boundaries that do not fit ``rows``.
    """
    check_boundaries("cu_tokens", cu_tokens)
    if rows.shape != (cu_tokens[-1],):
        raise ValueError(f"rows must have shape ({cu_tokens[-1]},), got {tuple(rows.shape)}")
    lengths = torch.tensor(cu_tokens, device=hidden.device).diff()
    sums = torch.segment_reduce(hidden.detach()[rows].float(), "sum", lengths=lengths, initial=0)
    return sums / lengths.clamp(min=1).unsqueeze(1)


@suggests_arguments
class SentenceEmbedder:
    """Embeddings of texts by a model of ``sentence-transformers``.

    Args:
        name_or_path: a name on the hub, or a folder that ``SentenceTransformer.save`` wrote.
        device: device of the model; None for the library's choice.
        batch_size: texts that run together.

    Raises:
        RuntimeError: ``sentence-transformers`` is not installed, or the model cannot be loaded.
    """

    def __init__(self, name_or_path: str, device: str | torch.device | None = None, *, batch_size: int = 32) -> None:
        self.name_or_path, self.batch_size = name_or_path, batch_size
        self.model = _load(name_or_path, None if device is None else str(device))

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed S texts: (S, H) float32, on the CPU."""
        if not len(texts):
            return torch.zeros(0, self.model.get_embedding_dimension() or 0, device="cpu")
        embeddings = self.model.encode(
            list(texts), batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return embeddings.detach().float().cpu()


def _load(name_or_path: str, device: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise RuntimeError(
            f"embedding model {name_or_path!r} needs sentence-transformers, which is not installed: "
            "pip install sentence-transformers"
        ) from error
    try:
        return SentenceTransformer(name_or_path, device=device)
    except Exception as error:  # The library raises whatever the hub, a file or a module does.
        raise RuntimeError(f"embedding model {name_or_path!r} cannot be loaded: {error}") from error
