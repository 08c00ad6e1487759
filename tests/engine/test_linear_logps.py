"""``linear_token_logps`` and ``linear_sequence_logps``: values, gradients whose factors arrive later, and cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from devices import DEVICE
from head_logps import eager_logps, fused_logps
from pairwise import pairwise
from problems import (
    BACKEND_DTYPES,
    BACKENDS,
    PROBLEMS,
    GemmCounter,
    Problem,
    budget_of,
    packed_problem,
    random_problem,
)
from tolerance import assert_accurate
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cpo_kernels import linear_token_logps
from cpo_kernels.kernels import reference

BUDGETS = {"kept": None, "recomputed": 3}
FROZEN = {"trainable": False, "frozen": True}
NEEDS = [needs for needs in product([False, True], repeat=3) if any(needs)]  # of hidden, weight and bias
SHAPES = {
    "plain": random_problem,
    "whole_head": PROBLEMS["whole_head"],
    "one_word": PROBLEMS["one_word"],
    "two_words": PROBLEMS["two_words"],
    "one_token_segments": PROBLEMS["one_token_segments"],
    "huge_logits": PROBLEMS["huge_logits"],
    "larger_prime_vocab": PROBLEMS["larger_prime_vocab"],
    "packed_shared_rows": packed_problem,
    "packed_whole_head": PROBLEMS["packed_whole_head"],
}


def logps_and_grads(logps: Tensor, problem: Problem, upstream: Tensor) -> dict[str, Tensor]:
    named = zip(("hidden", "weight", "bias"), problem.tensors, strict=True)
    wanted = {name: t for name, t in named if t is not None and t.requires_grad}
    grads = torch.autograd.grad(logps, list(wanted.values()), upstream.to(logps.dtype))
    return {"logps": logps.detach(), **dict(zip(wanted, grads, strict=True))}


def upstream_like(problem: Problem) -> Tensor:
    shape = problem.targets.shape[:2] if problem.layout is None else (problem.layout.num_segments,)
    return torch.randn(shape, dtype=torch.float64)


@pairwise(
    {
        "backend, dtype": BACKEND_DTYPES,
        "name": SHAPES.keys(),
        "rows": BUDGETS,
        "frozen": FROZEN,
    }
)
def test_logps_and_gradients(backend, dtype, name, rows, frozen):
    source = SHAPES[name]()
    exact, rounded = source.to(dtype).to(torch.float64), source.to(dtype)
    if frozen:
        exact.weight.requires_grad_(False)
        rounded.weight.requires_grad_(False)
    upstream = upstream_like(source)
    oracle = logps_and_grads(eager_logps(exact), exact, upstream)
    eager = logps_and_grads(eager_logps(rounded), rounded, upstream)
    head = {"backend": backend, "max_logits_bytes": rows and budget_of(rounded, rows)}
    fused = logps_and_grads(fused_logps(rounded, **head), rounded, upstream)
    for key, wanted in oracle.items():
        assert fused[key].dtype == eager[key].dtype
        assert_accurate(fused[key], eager[key], wanted, key)


@pairwise({"backend": BACKENDS, "shape": [(), (5,), (2, 3), (2, 2, 2, 3), (0,), (0, 4)], "rows": BUDGETS})
def test_token_logps_of_any_shape(backend, shape, rows):
    hidden = torch.randn(*shape, 7, requires_grad=True)
    weight = torch.randn(31, 7, requires_grad=True)
    targets = torch.randint(0, 31, shape)
    if targets.numel() > 2:
        targets.view(-1)[1] = -100
    expected = reference.token_logps(hidden @ weight.T, targets)
    logps = linear_token_logps(hidden, weight, targets, backend=backend, max_logits_bytes=rows and rows * 31 * 4)
    torch.testing.assert_close(logps, expected)
    assert (logps[targets == -100] == 0).all()
    upstream = torch.randn(shape)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight), upstream) for x in (logps, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pairwise({"backend": BACKENDS, "needs": NEEDS, "rows": BUDGETS})
def test_each_subset_of_requires_grad(backend, needs, rows):
    problem = random_problem(bias=True).to(torch.float32)
    head, upstream = {"backend": backend, "max_logits_bytes": rows and budget_of(problem, rows)}, upstream_like(problem)
    full = logps_and_grads(fused_logps(problem, **head), problem, upstream)
    for tensor, need in zip(problem.tensors, needs, strict=True):
        tensor.requires_grad_(need)
    part = logps_and_grads(fused_logps(problem, **head), problem, upstream)
    assert len(part) == 1 + sum(needs)
    for name, value in part.items():
        torch.testing.assert_close(value, full[name])


@pairwise({"backend": BACKENDS, "shape": ["plain", "packed_shared_rows"], "rows": BUDGETS, "frozen": FROZEN})
def test_retained_graph_bitwise_repeatable_and_stride_0(backend, shape, rows, frozen):
    problem = SHAPES[shape]().to(torch.float32)
    problem.weight.requires_grad_(not frozen)
    head = {"backend": backend, "max_logits_bytes": rows and budget_of(problem, rows)}
    tensors = [t for t in (problem.hidden, problem.weight) if t.requires_grad]
    logps = fused_logps(problem, **head)
    ones = torch.ones(()).expand(logps.shape)
    assert ones.stride() == (0,) * logps.dim()
    first = torch.autograd.grad(logps, tensors, ones, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(logps, tensors, ones.contiguous(), retain_graph=True)
    third = torch.autograd.grad(logps, tensors, 2 * ones)
    anew = torch.autograd.grad(fused_logps(problem, **head), tensors, ones)
    for a, copy, b, c, d in zip(first, copies, second, third, anew, strict=True):
        assert torch.equal(a, copy), "a second backward changed gradients that were handed out"
        assert torch.equal(a, b)
        assert torch.equal(a, d)
        torch.testing.assert_close(2 * a, c)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_stride_0_upstream_of_tokens(backend, frozen):
    hidden, weight = torch.randn(6, 7, requires_grad=True), torch.randn(31, 7, requires_grad=not frozen)
    targets = torch.tensor([3, -100, 30, 0, 7, -100])
    linear_token_logps(hidden, weight, targets, backend=backend).sum().backward()
    (expected,) = torch.autograd.grad(reference.token_logps(hidden @ weight.T, targets).sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected)
    assert (hidden.grad[targets == -100] == 0).all()


@pairwise({"backend": BACKENDS, "layout": ["padded", "packed"], "rows": BUDGETS, "frozen": FROZEN})
def test_rows_that_predict_nothing_get_exactly_zero(backend, layout, rows, frozen):
    problem = (random_problem if layout == "padded" else packed_problem)().to(torch.float32)
    problem.weight.requires_grad_(not frozen)
    used = torch.zeros(problem.hidden.shape[:-1], dtype=torch.bool)
    if layout == "padded":
        used = problem.targets != -100
    else:
        used[problem.layout.rows[problem.targets != -100]] = True
    with torch.no_grad():
        problem.hidden[~used] = torch.nan
    logps = fused_logps(problem, backend=backend, max_logits_bytes=rows and budget_of(problem, rows))
    assert logps.isfinite().all()
    logps.sum().backward()
    assert (problem.hidden.grad[~used] == 0).all()
    assert problem.hidden.grad.isfinite().all()
    assert frozen or problem.weight.grad.isfinite().all()


@pytest.mark.parametrize("shared", [False, True], ids=["own_rows", "shared_rows"])
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_rows_of_absent_tokens_are_not_looked_at(frozen, shared):
    """A target of -100 may carry any row index."""
    problem = packed_problem().to(torch.float32)
    problem.weight.requires_grad_(not frozen)
    if not shared:
        layout = replace(problem.layout, rows=torch.randperm(20))
        problem = replace(problem, hidden=torch.randn(20, 7, requires_grad=True), layout=layout)
    rows = problem.layout.rows.clone()
    absent = problem.targets == -100
    expected = fused_logps(problem)
    (wanted,) = torch.autograd.grad(expected.sum(), problem.hidden)
    for bad in (-1, 10**6):
        rows[absent] = bad
        logps = fused_logps(replace(problem, layout=replace(problem.layout, rows=rows)))
        assert torch.equal(logps, expected)
        assert torch.equal(torch.autograd.grad(logps.sum(), problem.hidden)[0], wanted)


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_packed_rows_each_used_once_in_any_order(frozen):
    """One token a row, but not in the order of the rows: the frozen head scales each row by its own token."""
    problem = packed_problem().to(torch.float32)
    problem.weight.requires_grad_(not frozen)
    rows = torch.randperm(20)
    problem = replace(problem, hidden=torch.randn(20, 7, requires_grad=True), layout=replace(problem.layout, rows=rows))
    upstream = upstream_like(problem)
    expected, result = (logps_and_grads(f(problem), problem, upstream) for f in (eager_logps, fused_logps))
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value)


PRODUCTS = {"frozen": 2, "kept": 3, "recomputed": 4, "frozen_in_blocks": 2, "no_grad": 1}


@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_number_of_products(backend, case):
    problem = random_problem(G=4, C=3, T=6, H=64, V=131).to(torch.float32)
    problem.weight.requires_grad_(not case.startswith("frozen"))
    rows = None if case in ("frozen", "kept", "no_grad") else 5
    head = {"backend": backend, "max_logits_bytes": rows and budget_of(problem, rows)}
    present = int((problem.targets != -100).sum())
    with torch.set_grad_enabled(case != "no_grad"), GemmCounter() as counter:
        logps = fused_logps(problem, **head)
        if case != "no_grad":
            logps.sum().backward()
    assert counter.products(present, problem.weight) == pytest.approx(PRODUCTS[case])
    largest = counter.largest_row_count(problem.weight)
    assert largest == present if rows is None else 1 < largest <= rows


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    problem = random_problem().to(torch.float32)
    expected = torch.autograd.grad(fused_logps(problem).sum(), (problem.hidden, problem.weight))

    def logps(hidden, weight):
        return fused_logps(replace(problem, hidden=hidden, weight=weight))

    checkpoint(logps, problem.hidden, problem.weight, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(problem.hidden.grad, expected[0])
    assert torch.equal(problem.weight.grad, expected[1])


@pairwise({"backend": BACKENDS, "rows": BUDGETS, "logits_dtype": [None, torch.float32]})
def test_backward_inside_autocast_is_the_same(backend, rows, logits_dtype):
    """The products of backward keep their dtype wherever backward is called."""
    problem = random_problem(bias=True).to(torch.float32)
    head = {"backend": backend, "logits_dtype": logits_dtype, "max_logits_bytes": rows and rows * 31 * 4}
    grads = []
    for inside in (False, True):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logps = fused_logps(problem, **head)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=inside):
            grads.append(torch.autograd.grad(logps.sum(), problem.tensors))
    for outside, inside in zip(*grads, strict=True):
        assert torch.equal(outside, inside)


@pairwise(
    {"name": ["plain", "whole_head", "packed_shared_rows", "packed_whole_head"], "rows": BUDGETS, "frozen": FROZEN}
)
def test_gradcheck(name, rows, frozen):
    problem = SHAPES[name]().to(torch.float64)
    problem.weight.requires_grad_(not frozen)
    head = {"max_logits_bytes": rows and budget_of(problem, rows)}

    def logps(hidden, weight, bias=None):
        return fused_logps(replace(problem, hidden=hidden, weight=weight, bias=bias), **head)

    torch.autograd.gradcheck(logps, [t for t in problem.tensors if t is not None], fast_mode=True)


def test_an_absent_segment_has_logp_0_and_nothing_at_all_is_allowed():
    problem = random_problem().to(torch.float32)
    assert fused_logps(problem)[0, 1] == 0
    nothing = replace(problem, targets=torch.full_like(problem.targets, -100))
    logps = fused_logps(nothing)
    assert (logps == 0).all()
    logps.sum().backward()
    assert (problem.hidden.grad == 0).all()
    assert (problem.weight.grad == 0).all()
