"""Ranks by similarity: the order, ties, what has no direction, the two embedders, and the contrast that uses them."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import tiny_models
import torch
from devices import DEVICE

from cpo_kernels import CandidateLayout, contrastive_loss, linear_cpo_loss, linear_sequence_logps
from cpo_kernels.kernels import reference
from cpo_kernels.negatives import SentenceEmbedder, mean_pool, similarity_ranks


def unit(*degrees: float) -> torch.Tensor:
    """Vectors (S, 2) at angles to the first axis, of any lengths."""
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1) * torch.linspace(0.5, 7.0, len(degrees))[:, None]


def test_most_alike_comes_first():
    assert similarity_ranks(unit(0, 90, 10, 170), [0, 4]) == [0, 2, 1, 3]
    assert similarity_ranks(unit(30, 90, 0, 35, 10, 40, 30), [0, 3, 4, 7]) == [0, 2, 1, 0, 0, 2, 1]


def test_against_torch():
    embeddings, cu_groups = torch.randn(40, 6), [0, 7, 8, 20, 40]
    got = similarity_ranks(embeddings, cu_groups)
    for start, end in pairwise(cu_groups):
        similarity = torch.cosine_similarity(embeddings[start:end].double(), embeddings[start].double(), dim=1)
        similarity[0] = 2.0
        expected = similarity.argsort(descending=True).argsort().tolist()
        assert got[start:end] == expected


def test_equally_alike_are_equal():
    vectors = torch.randn(3, 33)
    embeddings = vectors[[0, 1, 2, 1, 0, 2]]
    ranks = similarity_ranks(embeddings, [0, 6])
    assert ranks[0] == 0
    assert ranks[4] == 1  # the same text as the ground truth, and yet a negative
    assert ranks[1] == ranks[3] and ranks[2] == ranks[5]
    assert sorted(set(ranks)) == [0, 1, 2, 3]
    assert similarity_ranks(embeddings[[0, 1]] * 4.0, [0, 2]) == [0, 1]


def test_given_ranks_go_first():
    embeddings = unit(0, 90, 10, 170, 5)
    assert similarity_ranks(embeddings, [0, 5], base_ranks=[0, 1, 2, 1, 0]) == [0, 1, 3, 2, 0]
    assert similarity_ranks(embeddings, [0, 5], base_ranks=[0, 1, 1, 1, 1]) == similarity_ranks(embeddings, [0, 5])


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_lengths_do_not_count(scale):
    assert similarity_ranks(unit(0, 90, 10, 170).double() * scale, [0, 4]) == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("value", "reason"), [(0.0, "is all zeros"), (torch.nan, "holds NaN"), (torch.inf, "holds NaN or infinity")]
)
def test_an_embedding_without_direction_is_named(value, reason):
    embeddings = torch.randn(5, 3)
    embeddings[3] = value
    with pytest.raises(ValueError, match=f"candidate 1 of group 1 {reason}"):
        similarity_ranks(embeddings, [0, 2, 5])


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"floating point \(4, H\), got torch.float32 \(5, 3\)"):
        similarity_ranks(torch.randn(5, 3), [0, 4])
    with pytest.raises(ValueError, match="one entry per candidate, 5, got 4"):
        similarity_ranks(torch.randn(5, 3), [0, 5], [0, 1, 1, 1])
    with pytest.raises(ValueError, match=r"rows must have shape \(5,\), got \(4,\)"):
        mean_pool(torch.randn(5, 3), torch.arange(4), [0, 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_pool(dtype):
    hidden, rows, cu_tokens = torch.randn(9, 4).to(dtype), torch.tensor([0, 3, 8, 3, 3, 1]), [0, 3, 3, 6]
    got = mean_pool(hidden.requires_grad_(), rows, cu_tokens)
    expected = [hidden[[0, 3, 8]].float().mean(0), torch.zeros(4), hidden[[3, 3, 1]].float().mean(0)]
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got, torch.stack(expected).detach())


def test_ranks_in_the_full_contrast():
    """Plackett-Luce over the order of similarity: padded, packed, and by hand."""
    embeddings = unit(0, 90, 10, 170, 60)
    ranks = similarity_ranks(embeddings, [0, 5])
    assert ranks == [0, 3, 1, 4, 2]
    logps = torch.randn(1, 5, dtype=torch.float64)
    scores = 0.4 * logps[0]
    order = [0, 2, 4, 1, 3]
    expected = sum(scores[order[i:]].logsumexp(0) - scores[order[i]] for i in range(4))
    got = contrastive_loss(logps, ranks=torch.tensor([ranks]), beta=0.4)
    torch.testing.assert_close(got, expected)
    by_definition = reference.contrastive_loss(scores, torch.tensor(ranks), torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(got, by_definition)


@pytest.mark.cpu
def test_plain_loop():
    """Candidates ordered by the hidden states of the model that scores them, in one forward pass."""
    model = tiny_models.gpt2().eval()
    prompt, candidates = [3, 4], [[5, 6, 7, 2], [8, 9, 2], [5, 6, 2], [10, 2]]
    ids = torch.tensor([prompt + c + [0] * (4 - len(c)) for c in candidates])
    rows = torch.tensor([6 * s + 1 + t for s, c in enumerate(candidates) for t in range(len(c))])
    targets = torch.tensor([token for c in candidates for token in c])
    cu_tokens = torch.tensor([0, *map(len, candidates)]).cumsum(0).tolist()
    hidden = model.base_model(ids).last_hidden_state.flatten(0, 1)
    ranks = similarity_ranks(mean_pool(hidden, rows, cu_tokens), [0, 4])
    assert sorted(ranks) == [0, 1, 2, 3]
    layout = CandidateLayout(cu_tokens, [0, 4], rows=rows, ranks=ranks)
    loss = linear_cpo_loss(hidden, model.lm_head.weight, targets, layout=layout, beta=0.3).loss
    plain = CandidateLayout(cu_tokens, [0, 4], rows=rows)
    logps = linear_sequence_logps(hidden, model.lm_head.weight, targets, layout=plain)
    torch.testing.assert_close(loss, contrastive_loss(logps[None], ranks=torch.tensor([ranks]), beta=0.3))


@pytest.fixture
def saved_embedder(tmp_path):
    """A bag of words, saved as a SentenceTransformer is."""
    package = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")  # where versions 5 and 6 both have it
    model = package.SentenceTransformer(modules=[models.BoW(vocab=["cat", "dog", "sat", "ran"])], device="cpu")
    model.save(str(tmp_path / "bag"))
    return str(tmp_path / "bag")


@pytest.mark.cpu
def test_sentence_embedder(saved_embedder):
    embedder = SentenceEmbedder(saved_embedder, device="cpu")
    embeddings = embedder.embed(["cat sat", "dog ran", "cat ran", "sat cat cat"])
    assert embeddings.dtype == torch.float32
    expected = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1], [2, 0, 1, 0]], dtype=torch.float32)
    torch.testing.assert_close(embeddings, expected)
    assert similarity_ranks(embeddings, [0, 4]) == [0, 3, 2, 1]
    assert embedder.embed([]).shape == (0, 4)
    with pytest.raises(ValueError, match="candidate 1 of group 0 is all zeros"):
        similarity_ranks(embedder.embed(["cat", "unheard of"]), [0, 2])


@pytest.mark.cpu
def test_an_embedder_that_is_not_there_names_itself(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(RuntimeError, match=r"embedding model '.*nowhere' cannot be loaded"):
        SentenceEmbedder(str(tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(RuntimeError, match="pip install sentence-transformers"):
        SentenceEmbedder("any")


def test_device_of_embeddings():
    assert similarity_ranks(unit(0, 90, 10).to(DEVICE), [0, 3]) == [0, 2, 1]
