"""What ``linear_cpo_loss`` takes and keeps: products of matrices, copies, memory that outlives it."""

from __future__ import annotations

import gc

import pytest
import torch
from pairwise import pairwise
from problems import (
    BACKENDS,
    GemmCounter,
    budget_of,
    fused_loss,
    packed_problem,
    random_problem,
)

from cpo_kernels import linear_cpo_loss, plan


def gemm_problem(layout):
    """Sizes that no two share, so that a recorded shape says which product it was."""
    if layout == "packed":
        return packed_problem(H=64, V=131).to(torch.float32)
    return random_problem(G=4, C=3, T=6, H=64, V=131).to(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_may_be_changed_in_place(backend):
    """As by accumulation, ``loss /= steps``; none of them is a view of another."""
    problem = random_problem().to(torch.float32)
    out = linear_cpo_loss(**problem.arguments(), backend=backend)
    before = [value.clone() for value in out]
    loss = out.loss
    loss /= 2
    for place, value in enumerate(out):
        assert torch.equal(value, before[place] / 2 if place == 0 else before[place])
    for value in out[1:]:
        value.zero_()
    assert torch.equal(loss, before[0] / 2)
    halved = torch.autograd.grad(loss, problem.hidden)[0]
    whole = torch.autograd.grad(linear_cpo_loss(**problem.arguments(), backend=backend).loss, problem.hidden)[0]
    torch.testing.assert_close(halved, whole / 2)


PRODUCTS = {"trainable": 3, "frozen": 2, "head_only": 2, "no_grad": 1, "recomputed": 4, "recomputed_frozen": 3}


@pairwise({"backend": BACKENDS, "case": PRODUCTS.keys(), "layout": ["padded", "packed"]})
def test_number_of_products(backend, case, layout):
    """3 for a trainable head, 2 for a frozen one, 1 without gradients, one more if logits are recomputed.

    A frozen head recomputes only where rows predict several tokens, as in the packed problem.
    """
    problem = gemm_problem(layout)
    if case.endswith("frozen"):
        problem.weight.requires_grad_(False)
    if case == "head_only":
        problem.hidden.requires_grad_(False)
    head = {"backend": backend}
    if case.startswith("recomputed"):
        head["max_logits_bytes"] = budget_of(problem, 2)
    expected = 2 if (case, layout) == ("recomputed_frozen", "padded") else PRODUCTS[case]
    counter = GemmCounter()
    with torch.set_grad_enabled(case != "no_grad"):
        planned = plan(**problem.arguments(), **head)
        with counter:
            loss = fused_loss(problem, **head)
            if case != "no_grad":
                loss.backward()
    present = problem.targets != -100
    rows = int(present.sum()) if layout == "padded" else problem.layout.rows[present].unique().numel()
    assert planned.gemms == pytest.approx(expected)
    if case.startswith("recomputed") and layout == "packed":
        rows = planned.num_rows  # a row shared by two groups is in both of their chunks
    assert counter.products(rows, problem.weight) == pytest.approx(expected)
    if case.startswith("recomputed"):
        assert counter.largest_row_count(problem.weight) == planned.rows_held
        # A copy of hidden states may take the place of a row of logits where no group has to be held together.
        assert planned.rows_held == 2 or (expected == 2 and planned.rows_held == 1)


def test_rows_in_use_are_views_where_they_are_consecutive():
    """All tokens present: no copy of hidden is made, so GEMM 1 reads its memory."""
    problem = random_problem(C=2, T=1).to(torch.float32)
    reads = []

    class Reads(GemmCounter):
        def read(self, *operands):
            reads.extend(a.untyped_storage()._cdata for a in operands)

    with torch.no_grad(), Reads():
        fused_loss(problem)
    assert problem.hidden.untyped_storage()._cdata in reads


def numbers_alive() -> int:
    # Not isinstance, which would wake the deprecated proxies among all objects.
    return sum(t.numel() for t in gc.get_objects() if issubclass(type(t), torch.Tensor))


def test_nothing_is_kept_alive_after_the_loss_is_gone():
    problem = random_problem().to(torch.float32)
    fused_loss(problem).backward()
    gc.collect()
    before = numbers_alive()
    for _ in range(3):
        fused_loss(problem).backward()
    gc.collect()
    assert numbers_alive() <= before  # less, where what another test has left goes in the meantime
