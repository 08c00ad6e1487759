"""A head sharded along the vocabulary over two and four gloo processes: equal to the whole head, by the one rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_script
from project import SUPPORT
from tolerance import assert_accurate
from torch import Tensor
from vocab_parallel_cases import CASES, WORLDS, Case, eager, results

from cpo_kernels import VocabShard, cpo_loss, linear_cpo_loss, linear_token_statistics
from cpo_kernels.integrations.verl import linear_cross_entropy

pytestmark = pytest.mark.cpu


def launch(path: Path, backend: str, world: int) -> list[dict[int, dict[str, Any]]]:
    """What each of so many processes saved."""
    run_script(SUPPORT / "vocab_parallel_worker.py", backend, str(path), processes=world)
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All cases in the pairs (0, 1) and (2, 3), and in all four."""
    return launch(tmp_path_factory.mktemp("vocab_parallel"), "gloo", 4)


def of_groups(runs, world, name):
    """The results of the processes of each group, in the order of their ranks."""
    groups = [runs] if world == 4 else [runs[:2], runs[2:]]
    found = [[run[world][name] for run in group] for group in groups]
    for result in (result for group in found for result in group):
        assert not isinstance(result, str), result
    return found


def whole_of(case: Case, group: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of a group of processes put together; what they share must be bitwise equal."""
    for key in ("loss", "logps", "hidden"):
        for result in group[1:]:
            assert key not in result or torch.equal(result[key], group[0][key]), f"{key} differs between processes"
    in_order = group[::-1] if case.sizes == "reversed" else group
    return {k: torch.cat([r[k] for r in in_order]) if k in ("weight", "bias") else v for k, v in group[0].items()}


def assert_whole(case: Case, group: list[dict[str, Tensor]]) -> None:
    """The results of a group of processes obey the rule."""
    rounded, oracle = (results(*eager(case, p), p) for p in (case.make(), case.make(torch.float64)))
    whole = whole_of(case, group)
    assert whole.keys() == oracle.keys()
    for key, value in whole.items():
        assert_accurate(value, rounded[key], oracle[key], key)


@pytest.mark.parametrize(("name", "world"), [(n, w) for n, case in CASES.items() for w in WORLDS if case.runs_in(w)])
def test_shards_equal_the_whole(name, world, runs):
    for group in of_groups(runs, world, name):
        assert_whole(CASES[name], group)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_shards_on_two_gpus_equal_the_whole(tmp_path):
    runs = launch(tmp_path, "nccl", 2)
    assert runs[0][2].keys() == runs[1][2].keys() != set()
    for name in runs[0][2]:
        assert not isinstance(runs[0][2][name], str), runs[0][2][name]
        assert_whole(CASES[name], [run[2][name] for run in runs])


@pytest.mark.parametrize("world", WORLDS)
def test_three_products_of_the_shard_two_for_a_frozen_head_one_without_gradients(world, runs):
    for counts in (counts for group in of_groups(runs, world, "gemms") for counts in group):
        assert counts == pytest.approx({"trained": 3, "frozen": 2, "none": 1})


@pytest.mark.parametrize("world", WORLDS)
def test_the_caller_may_sum_the_gradient_of_hidden(world, runs):
    for group in of_groups(runs, world, "share of hidden"):
        assert not torch.equal(group[0]["share"], group[1]["share"])
        torch.testing.assert_close(sum(result["share"] for result in group), group[0]["sum"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_entropies_are_of_the_whole_vocabulary(world, runs):
    problem = Case("long").make()
    head = {"bias": problem.bias, "entropy": True, "top1": True}
    want = linear_token_statistics(*problem.tensors[:2], problem.targets, **head)
    for result in (result for group in of_groups(runs, world, "statistics") for result in group):
        torch.testing.assert_close(result["logps"], want.logps, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result["entropy"], want.entropy, rtol=1e-5, atol=1e-6)
        assert torch.equal(result["top1"], want.top1) and torch.equal(result["best"], problem.targets != -100)


@pytest.mark.parametrize("world", WORLDS)
def test_verls_function_takes_a_group_and_leaves_the_sum_over_it_to_megatron(world, runs):
    problem = Case("larger_prime_vocab").make()
    want = linear_cross_entropy(problem.hidden, problem.weight, problem.targets.clamp(min=0), 0.8)
    hidden, weight = torch.autograd.grad(want[0].sum() - want[1].sum(), problem.tensors[:2])
    for group in of_groups(runs, world, "verl"):
        for result in group:
            torch.testing.assert_close((result["logps"], result["entropy"]), tuple(x.detach() for x in want))
        torch.testing.assert_close(sum(result["hidden"] for result in group), hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat([result["weight"] for result in group]), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_a_retained_graph_gives_the_same_gradients_twice(world, runs):
    for result in (result for group in of_groups(runs, world, "twice") for result in group):
        assert torch.equal(result["first"], result["second"])


@pytest.mark.parametrize("world", WORLDS)
def test_processes_agree_on_chunks_whatever_their_shards_and_threads(world, runs):
    for group in of_groups(runs, world, "plans"):
        chunks, starts, sizes, vocabs = zip(*group, strict=True)
        assert len(chunks[0]) > 1 and all(other == chunks[0] for other in chunks)
        assert len(set(sizes)) > 1 and vocabs == (sum(sizes),) * world
        assert starts == tuple(sum(sizes[:rank]) for rank in range(world))


ERRORS = {
    "empty shard": "ValueError: the shard of rank 1 is empty",
    "gap": "ValueError: the shard of rank 1 starts at 4, expected 3",
    "start of some": "ValueError: start must be given on all ranks or on none",
    "hidden sizes": "ValueError: the shard of rank 1 has shape (3, 3), expected (size, 2)",
    "other weight": "ValueError: weight must have the",
    "placement": "ValueError: a vocabulary-parallel weight must be a DTensor placed (Shard(0),)",
    "DTensor and group": "ValueError: a DTensor brings its group",
    "DTensor": "ValueError: weight is a DTensor placed (Shard(dim=0),), expected a tensor",
    "filter": "ValueError: candidate_eps=0.1: a vocabulary-parallel head has no filters",
    "sample": "ValueError: a sample of words cannot take vocab_shard",
    "target": "ValueError: target of token 1 is",
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ERRORS)
def test_every_process_raises(name, world, runs):
    for result in (result for group in of_groups(runs, world, "errors") for result in group):
        assert result[name].startswith(ERRORS[name])


def test_what_cannot_take_shards_says_so():
    shard = VocabShard(None, 0, 5, 5, 5, 2**20)
    with pytest.raises(ValueError, match="cannot take vocab_shard"):
        cpo_loss(torch.zeros(1, 2, 1, 5), torch.zeros(1, 2, 1, dtype=torch.int64), vocab_shard=shard)
    compiled = torch.compile(linear_cpo_loss, backend="eager", fullgraph=True)
    # Torch 2.8 names the kind of error only.
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"cannot take vocab_shard|ValueError"):
        compiled(torch.zeros(1, 2, 1, 3), torch.zeros(5, 3), torch.zeros(1, 2, 1, dtype=torch.int64), vocab_shard=shard)


def test_without_processes_there_is_no_shard():
    with pytest.raises(RuntimeError, match="init_process_group"):
        VocabShard.of(torch.zeros(3, 2))
