"""Budgets without room for the accumulator of a half-precision gradient, which is then made in tiles."""

from __future__ import annotations

import re
import threading
from dataclasses import replace

import pytest
import torch
from head_logps import eager_logps, fused_logps
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from problems import (
    COMPILED_BACKENDS,
    PROBLEMS,
    assert_problem_accurate,
    eager_loss,
    fused_loss,
    loss_and_grads,
    packed_problem,
    random_problem,
)
from tolerance import assert_accurate

from cpo_kernels import linear_cpo_loss, linear_sequence_loss, plan
from cpo_kernels.engine import plan as planning
from cpo_kernels.engine.plan import Needs
from cpo_kernels.kernels.cpu import gemm as cpu_gemm
from cpo_kernels.kernels.cpu import linear as cpu_linear

HALF = (torch.bfloat16, torch.float16)
ROWS = (1, 3, 5)  # of logits that the budget holds beside what comes with every call


@pytest.fixture(autouse=True)
def nothing_on_top(monkeypatch):
    """Tiny problems are planned as large ones are."""
    monkeypatch.setattr(planning, "SMALL_CHANGE", 0)
    monkeypatch.setattr(planning, "LEAST_TILE", 5)


def tight(problem, rows, **head) -> int:
    """Return a budget of so many rows of logits, with the workspace and the copies of rows, but no accumulator."""
    made = plan(**problem.arguments(), **head)
    row = made.logits_bytes // made.rows_held + made.gathered_bytes // made.rows_held
    return made.workspace_bytes + rows * row


def tiled(problem, rows, **head) -> dict:
    """Return the head of a call whose plan has tiles, within its budget."""
    head |= {"max_logits_bytes": tight(problem, rows, **head)}
    made = plan(**problem.arguments(), **problem.options, **head)
    assert made.tiles is not None and made.bytes <= made.budget_bytes == head["max_logits_bytes"]
    left_out = head.get("frozen_columns", 0) / problem.weight.shape[1]
    assert "in tiles of" in made.note and made.gemms >= 4 - left_out and made.accumulator_bytes == 0
    return head


@pairwise({"name": [*PROBLEMS], "dtype": HALF, "backend": COMPILED_BACKENDS, "rows": ROWS})
def test_loss_and_gradients(name, dtype, backend, rows):
    problem = PROBLEMS[name]()
    wide = replace(problem, hidden=problem.hidden.repeat_interleave(4, -1) / 2)
    wide = replace(wide, weight=problem.weight.repeat_interleave(4, -1) / 2)
    rounded = wide.to(dtype)
    head = {"backend": backend, "max_logits_bytes": tight(rounded, rows, backend=backend)}
    try:
        assert_problem_accurate(wide, dtype, upstream=1.7, **head)
    except ValueError as error:  # of few words, the sum of one is larger than a row of logits
        head["max_logits_bytes"] = int(re.findall(r"\d+", str(error))[-1])
        assert_problem_accurate(wide, dtype, upstream=1.7, **head)


@pytest.mark.parametrize("least", [1, 10**6], ids=["all rows", "blocks"])
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_tiles_of_all_rows_and_tiles_that_are_summed_over_blocks(backend, logits_dtype, least, monkeypatch):
    problem = random_problem(G=16, C=3, T=5, H=24, V=211, bias=True, mle_weight=0.3, softcap=4.0)
    monkeypatch.setattr(planning, "LEAST_TILE", least)
    rounded = problem.to(torch.bfloat16)
    inside = backend == "cpu" and cpu_linear.takes(rounded.hidden, rounded.weight)  # a row takes more beside its logits
    rows = (34 if least == 1 else 20) if inside else 20 if logits_dtype else 40
    head = tiled(rounded, rows, backend=backend, logits_dtype=logits_dtype)
    tiles = plan(**rounded.arguments(), **head).tiles
    assert 1 <= tiles.words < 211 and (tiles.rows >= (problem.targets != -100).sum()) == (least == 1)
    assert_problem_accurate(problem, torch.bfloat16, upstream=0.7, **head)


@pytest.mark.parametrize("least", [1, 10**6], ids=["all rows", "blocks"])
def test_tiles_give_what_one_chunk_gives(least, monkeypatch):
    """The loss of a float32 call is that of the reference; the gradient of a tile is a sum of the same products."""
    monkeypatch.setattr(planning, "LEAST_TILE", least)
    problem = random_problem(G=8, C=3, T=5, H=64, V=509).to(torch.bfloat16)
    whole = loss_and_grads(fused_loss(problem), problem)
    parts = loss_and_grads(fused_loss(problem, **tiled(problem, 15)), problem)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=2**-7, atol=2**-9 * value.abs().max().item())


def test_any_loss_dense_rows_frozen_columns_and_known_coefficients():
    problem = random_problem(G=8, C=3, T=5, H=24, V=211)
    rounded, exact = problem.to(torch.bfloat16), problem.to(torch.bfloat16).to(torch.float64)
    oracle, eager = (loss_and_grads(eager_loss(p), p) for p in (exact, rounded))
    for more in ({"skip_absent_rows": False}, {"frozen_columns": 4}):
        head = tiled(rounded, 15, **more)
        found = loss_and_grads(fused_loss(rounded, **head), rounded)
        kept = slice(more.get("frozen_columns", 0), None)
        assert not found["weight"][:, : kept.start].any()
        for name, wanted in oracle.items():
            part = (..., kept) if name == "weight" else ...
            assert_accurate(found[name][part], eager[name][part], wanted[part], name)
    head = tiled(rounded, 15)

    def summed(logps, groups):
        return -logps.sum() / 7

    own = linear_sequence_loss(rounded.hidden, rounded.weight, rounded.targets, summed, **head)
    oracle, eager = (loss_and_grads(-eager_logps(p).sum() / 7, p) for p in (exact, rounded))
    for name, value in loss_and_grads(own, rounded).items():
        assert_accurate(value, eager[name], oracle[name], name)
    alone = {"contrast_weight": 0.0, "mle_weight": 1.0}
    assert_problem_accurate(problem.with_options(**alone), torch.bfloat16, **head)


@pytest.mark.parametrize("make", [random_problem, packed_problem])
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_log_likelihoods(make, backend):
    problem = make(H=24, V=211, bias=True)
    rounded, exact = problem.to(torch.bfloat16), problem.to(torch.bfloat16).to(torch.float64)
    head = tiled(rounded, 4, backend=backend)
    oracle, eager = (loss_and_grads(eager_logps(p).square().sum(), p) for p in (exact, rounded))
    found = loss_and_grads(fused_logps(rounded, **head).square().sum(), rounded)
    for name, wanted in oracle.items():
        assert_accurate(found[name], eager[name], wanted, name)


def test_a_filter_still_leaves_candidates_out():
    problem = random_problem(G=8, C=3, T=5, H=24, V=211).to(torch.bfloat16)
    head = {"candidate_eps": 0.3, "grad_filter_eps": 1e-3}
    out = linear_cpo_loss(**problem.arguments(), **tiled(problem, 15, **head))
    whole = linear_cpo_loss(**problem.arguments(), **head)
    assert 0 < out.dropped <= 1.01 * whole.dropped
    for one, other in zip(
        *(torch.autograd.grad(o.loss, (problem.hidden, problem.weight)) for o in (out, whole)), strict=True
    ):
        assert (one.double() - other.double()).norm() <= 0.1 * other.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("make", [random_problem, packed_problem])
def test_the_smallest_budget_is_named_and_works(make, backend, dtype):
    problem = make(H=24, V=211, bias=True).to(dtype)
    with pytest.raises(ValueError, match="max_logits_bytes=1 does not hold") as raised:
        fused_loss(problem, backend=backend, max_logits_bytes=1)
    smallest = int(re.findall(r"\d+", str(raised.value))[-1])
    assert plan(**problem.arguments(), backend=backend, max_logits_bytes=smallest).bytes <= smallest
    assert fused_loss(problem, backend=backend, max_logits_bytes=smallest).isfinite()
    with pytest.raises(ValueError, match=f"the smallest that works is {smallest}"):
        fused_loss(problem, backend=backend, max_logits_bytes=smallest - 1)


@given(
    st.builds(
        Needs,
        row=st.integers(1, 10**5),
        gathered_row=st.integers(0, 10**4),
        accumulator=st.integers(0, 10**7),
        workspace=st.integers(0, 10**6),
        vocab=st.sampled_from([0, 1, 31, 50257]),
        logit=st.integers(1, 4),
    ),
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.integers(0, 10**7),
    st.sampled_from([0, 2**16]),
)
@settings(max_examples=1000, deadline=None)
def test_every_budget_is_kept_or_refused(needs, total, largest, more, small):
    """From the smallest budget on all work, and none below; what comes on top is small change, where it is allowed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "SMALL_CHANGE", small)
        smallest = needs.smallest(total)
        asked = smallest + more
        rows, accumulator, is_tiled = needs.share(asked, explicit=True, total=total, largest=largest)
        held = min(rows, total)
        assert held >= 1
        assert held * (needs.row + needs.gathered_row) + accumulator + needs.workspace <= asked + small
        if total > rows and not is_tiled:
            assert accumulator == needs.accumulator
        if is_tiled:
            tiles = needs.tiles(asked - needs.workspace, total)
            assert 1 <= tiles.words <= needs.vocab and 1 <= tiles.rows <= total
            assert tiles.bytes <= asked - needs.workspace
        with pytest.raises(ValueError, match=rf"is {smallest}$"):
            needs.share(smallest - 1 - more % smallest, explicit=True, total=total, largest=largest)


@given(
    st.builds(
        Needs,
        row=st.integers(1, 10**5),
        gathered_row=st.integers(0, 10**4),
        accumulator=st.integers(0, 10**7),
        workspace=st.integers(10**5, 10**8),
        vocab=st.sampled_from([0, 31, 50257]),
        logit=st.integers(1, 4),
    ),
    st.integers(1, 4000),
    st.floats(0.01, 1.0),
    st.integers(0, 10**8),
)
@settings(max_examples=500, deadline=None)
def test_the_workspace_gives_way_to_a_small_budget(needs, total, share, more):
    """What works is what works with the least workspace, and never more than the budget is taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "SMALL_CHANGE", 0)
        least = int(share * needs.workspace)
        smallest = replace(needs, workspace=least).smallest(total)
        asked = smallest + more
        sizes = needs.kept_to(asked, least, total)
        assert least <= sizes.workspace <= needs.workspace
        rows, accumulator, _ = sizes.share(asked, explicit=True, total=total, largest=1)
        assert min(rows, total) * (needs.row + needs.gathered_row) + accumulator + sizes.workspace <= asked
        with pytest.raises(ValueError, match=rf"is {smallest}$"):
            needs.kept_to(smallest - 1, least, total).share(smallest - 1, explicit=True, total=total, largest=1)


@pytest.mark.skipif("cpu" not in COMPILED_BACKENDS, reason="needs the compiled kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_take_turns_where_a_small_budget_has_no_room_for_all_of_them(dtype, monkeypatch):
    """The workspace of two threads does not fit: one runs the products, and sums are the same to the bit."""
    monkeypatch.setattr(cpu_gemm, "_kept", threading.local())  # no workspace is kept from before
    problem, threads = random_problem(G=2, C=4, T=16, H=96, V=1021).to(dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        one = cpu_gemm.gemm_workspace(128, 1021, 96, dtype, 1)
        head = {"backend": "cpu", "max_logits_bytes": one + 2**19}
        made = plan(**problem.arguments(), **head)
        assert one <= made.workspace_bytes < cpu_gemm.gemm_workspace(128, 1021, 96, dtype)
        assert made.bytes <= head["max_logits_bytes"]
        found = loss_and_grads(fused_loss(problem, **head), problem)
        assert cpu_gemm._kept.workspace.nbytes <= made.workspace_bytes
        torch.set_num_threads(1)
        expected = loss_and_grads(fused_loss(problem, **head), problem)
    finally:
        torch.set_num_threads(threads)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2**-7, atol=2**-9 * value.abs().max().item())
