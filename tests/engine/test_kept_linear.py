"""The engine with the path that keeps exponentials for the gradient instead of logits, where a choice asks for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import simt_host
import torch
from pairwise import pairwise
from problems import (
    BUDGETS,
    GemmCounter,
    assert_problem_accurate,
    budget_of,
    fused_loss,
    loss_and_grads,
    packed_problem,
    random_problem,
)
from tolerance import assert_accurate, relative_error

from cpo_kernels import linear_cpo_loss, linear_sequence_logps, linear_token_logps, plan
from cpo_kernels.kernels import plain
from cpo_kernels.kernels.cuda import hopper as cuda_hopper
from cpo_kernels.kernels.device import architecture
from cpo_kernels.kernels.selection import Choice, overridden

pytestmark = pytest.mark.cpu

HALF = [torch.bfloat16, torch.float16]
H = 16  # rows at multiples of 16 bytes
PROBLEMS = {
    "padded": lambda: random_problem(H=H, V=301, mle_weight=0.4),
    "packed, shared rows": lambda: packed_problem(H=H, V=301, mle_weight=0.2),
    "whole head": lambda: random_problem(
        H=H, V=301, bias=True, logit_scale=0.7, softcap=3.0, temperature=1.3, beta=0.4
    ),
    "several tiles": lambda: random_problem(G=2, C=3, T=5, H=24, V=1009),
}


@pytest.fixture
def launches(emulated_cuda, emulator, monkeypatch):
    """Names of the launches, in order, under the choice."""
    names = ("linear_forward", "linear_backward", "unit_forward", "row_forward", "row_backward")
    made = simt_host.record(emulator, monkeypatch, names)
    with overridden(Choice("linear_kept", architecture(torch.device("cpu")), "cuda")):
        yield made


@pairwise({"dtype": HALF, "name": PROBLEMS.keys(), "budget": BUDGETS.keys()})
def test_loss_and_gradients(launches, dtype, name, budget):
    problem = PROBLEMS[name]()
    rows = BUDGETS[budget]
    limit = None if rows is None else rows * (problem.weight.shape[0] + 16) * dtype.itemsize
    assert_problem_accurate(problem, dtype, upstream=3.0, backend="cuda", max_logits_bytes=limit)
    assert {"linear_forward", "linear_backward"} == set(launches)


def test_two_bare_products_are_left(launches):
    problem = PROBLEMS["padded"]().to(torch.bfloat16)
    with GemmCounter() as counter:
        fused_loss(problem, backend="cuda", max_logits_bytes=budget_of(problem, 16))
    rows = plan(**problem.arguments()).num_rows
    assert counter.products(rows, problem.weight) == pytest.approx(2)
    assert launches.count("linear_forward") == launches.count("linear_backward") > 1


def test_a_retained_graph_and_two_runs_give_the_same_bits(launches):
    problem = PROBLEMS["packed, shared rows"]().to(torch.bfloat16)
    loss = fused_loss(problem, backend="cuda")
    runs = [torch.autograd.grad(loss, (problem.hidden, problem.weight), retain_graph=True) for _ in range(2)]
    runs.append(torch.autograd.grad(fused_loss(problem, backend="cuda"), (problem.hidden, problem.weight)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("rows", [None, 8], ids=["kept", "recomputed"])
def test_log_likelihoods_whose_gradient_comes_later(launches, rows, frozen):
    problem = PROBLEMS["padded"]().to(torch.bfloat16)
    problem.weight.requires_grad_(not frozen)
    upstream = torch.randn(problem.targets.shape[:2])
    results = []
    for kind, to in (("cuda", torch.bfloat16), ("torch", torch.bfloat16), ("torch", torch.float64)):
        hidden, weight = (t.detach().to(to).requires_grad_(t.requires_grad) for t in (problem.hidden, problem.weight))
        limit = budget_of(problem, rows + 1) if rows and kind == "cuda" else None
        logps = linear_sequence_logps(hidden, weight, problem.targets, backend=kind, max_logits_bytes=limit)
        wanted = (hidden,) if frozen else (hidden, weight)
        results.append((logps.detach(), *torch.autograd.grad(logps, wanted, upstream.to(logps.dtype))))
    for name, *tensors in zip(("logps", "hidden", "weight"), *results, strict=False):
        assert_accurate(*tensors, name)
    assert {"linear_forward", "linear_backward"} == set(launches)


def test_the_gradient_goes_the_way_of_the_forward(launches):
    """Whatever is chosen by then."""
    problem = PROBLEMS["padded"]().to(torch.bfloat16)
    arguments = problem.hidden, problem.weight, problem.targets
    leaves = (problem.hidden, problem.weight)
    kept = linear_sequence_logps(*arguments, backend="cuda")
    expected = torch.autograd.grad(kept.sum(), leaves, retain_graph=True)
    kept = linear_sequence_logps(*arguments, backend="cuda")
    with overridden():
        found = torch.autograd.grad(kept.sum(), leaves)
        plain = linear_sequence_logps(*arguments, backend="cuda")
        other = torch.autograd.grad(plain.sum(), leaves, retain_graph=True)
        plain = linear_sequence_logps(*arguments, backend="cuda")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    again = torch.autograd.grad(plain.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(again, other, strict=True))


def test_log_likelihoods_are_exact_in_the_memory_of_half_precision_logits(launches):
    """1,024 tokens of bfloat16: within the 2e-3 nats that otherwise take float32 logits."""
    hidden = torch.randn(1, 1, 1024, 32).bfloat16().requires_grad_()
    weight = (torch.randn(257, 32) / 4).bfloat16().requires_grad_()
    targets = torch.randint(0, 257, (1, 1, 1024))
    arguments = {"contrast_weight": 0.0, "mle_weight": 1.0}
    exact = linear_cpo_loss(hidden.double(), weight.double(), targets, backend="torch", **arguments).logps
    kept, rounded = (
        linear_cpo_loss(hidden, weight, targets, backend=kind, **arguments).logps for kind in ("cuda", "torch")
    )
    assert (kept - exact).abs().item() < 2e-3 < (rounded - exact).abs().item()


def test_the_plan_counts_what_is_kept(launches):
    """2 bytes a logit, in rows of whole vectors, and a float32 maximum for each tile."""
    problem = PROBLEMS["several tiles"]().to(torch.bfloat16)
    result = plan(**problem.arguments(), backend="cuda", logits_dtype=torch.float32)
    assert result.logits_bytes == result.num_rows * (2 * 1016 + 4 * 4)
    space = cuda_hopper.room(result.num_rows, problem.hidden, 1009)
    held = space.exponentials.untyped_storage().nbytes() + space.tile_tops.untyped_storage().nbytes()
    assert held == result.logits_bytes
    with torch.no_grad():
        assert plan(**problem.arguments(), backend="cuda").logits_bytes == result.num_rows * 1009 * 2


@pytest.mark.parametrize(
    "problem",
    [
        random_problem(H=7, V=301).to(torch.bfloat16),
        random_problem(H=H, V=301).to(torch.float32),
    ],
    ids=["odd H", "float32"],
)
def test_matrices_that_it_does_not_take_go_the_plain_way(launches, problem):
    fused_loss(problem, backend="cuda").backward()
    assert set(launches) == {"unit_forward", "row_backward"}


def test_a_matrix_in_a_wider_buffer(launches):
    """Rows at multiples of 16 bytes will do; one element off does not."""
    problem = PROBLEMS["padded"]().to(torch.bfloat16)
    grads = loss_and_grads(fused_loss(problem, backend="cuda"), problem)
    wide = torch.full((301, H + 9), torch.nan, dtype=torch.bfloat16)
    for first, path in ((8, "linear_forward"), (1, "unit_forward")):
        width = H + 8 if first == 8 else H + 9
        weight = wide.view(-1)[: 301 * width].view(301, width)[:, first : first + H].copy_(problem.weight.detach())
        launches.clear()
        moved = replace(problem, weight=weight.requires_grad_())
        found = loss_and_grads(fused_loss(moved, backend="cuda"), moved)
        assert path in launches
        if first == 8:
            assert all(torch.equal(found[name], grads[name]) for name in grads)
        wide = wide.detach().clone()


def test_padding_may_hold_nan(launches):
    problem = random_problem(H=H, V=301).to(torch.bfloat16)
    grads = loss_and_grads(fused_loss(problem, backend="cuda"), problem)
    with torch.no_grad():
        problem.hidden[problem.targets == -100] = torch.nan
    for skip in (True, False):
        found = loss_and_grads(fused_loss(problem, backend="cuda", skip_absent_rows=skip), problem)
        for name, grad in grads.items():
            assert torch.equal(found[name], grad) if skip else found[name].isfinite().all()


def test_filters_see_the_same_gradient(launches):
    """A threshold that keeps everything, and one that leaves columns out."""
    problem = PROBLEMS["padded"]().to(torch.bfloat16)
    exact = loss_and_grads(fused_loss(problem, backend="cuda"), problem)
    for eps, dropped in ((0.0, False), (0.02, True)):
        out = linear_cpo_loss(**problem.arguments(), **problem.options, backend="cuda", grad_filter_eps=eps)
        assert (out.dropped > 0) == dropped
        for name, found in loss_and_grads(out.loss, problem).items():
            assert relative_error(found, exact[name]) <= (0.1 if dropped and name != "loss" else 0)
    assert "row_backward" not in launches


@pytest.mark.parametrize(("width", "launch"), [(H, "linear_forward"), (H + 1, "row_forward")])
def test_log_likelihoods_alone_where_the_fused_forward_is_chosen(launches, width, launch):
    """And takes the matrices."""
    problem = random_problem(H=width, V=301).to(torch.bfloat16)
    arch = architecture(torch.device("cpu"))
    with overridden(Choice("linear_forward", arch, "cuda")), torch.no_grad():
        linear_sequence_logps(problem.hidden, problem.weight, problem.targets, backend="cuda")
        made = plan(**problem.arguments(), backend="cuda")
    assert launches == [launch]
    assert (made.logits_bytes == 0) == (launch == "linear_forward")


def test_without_gradients_logits_are_computed(launches):
    problem = PROBLEMS["padded"]().to(torch.bfloat16)
    with torch.no_grad():
        logps = linear_token_logps(problem.hidden, problem.weight, problem.targets, backend="cuda")
    exact = plain.row_forward(
        problem.hidden.detach().flatten(0, 2).double() @ problem.weight.detach().double().T,
        problem.targets.flatten(),
        *(None, None, 1.0, 0.0, 1.0),
    )[1]
    torch.testing.assert_close(logps.flatten(), exact.float(), atol=0.05, rtol=0.01)
    assert launches == ["row_forward"]
