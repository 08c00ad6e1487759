"""Filtered gradients: what they leave out is what they say, it bounds their error, and they save products."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from pairwise import pairwise
from problems import (
    BACKEND_DTYPE_IDS,
    BACKEND_DTYPES,
    GemmCounter,
    Problem,
    budget_of,
    dense,
    eager_loss_of,
    fused_loss,
    loss_and_grads,
    packed_problem,
    random_problem,
)
from torch import Tensor

from cpo_kernels import linear_cpo_loss, linear_sequence_loss
from cpo_kernels.engine.filters import move_elements_, move_rows_
from cpo_kernels.kernels import numerics, plain, reference, transform
from cpo_kernels.kernels.cpu import extension as cpu_extension
from cpo_kernels.kernels.cpu import rows as cpu_rows
from cpo_kernels.kernels.registry import BACKENDS

EPS = (0.0, 1e-4, 1e-2, 0.1, 0.5)
FILTERS = ("candidate_eps", "grad_filter_eps")
WHICH = {"candidates": FILTERS[:1], "columns": FILTERS[1:], "both": FILTERS}


def untrained(**options) -> Problem:
    """Near-uniform softmax, contrasts undecided."""
    problem = random_problem(G=4, C=5, T=6, H=16, V=211, ref=False, **options)
    return replace(problem, hidden=0.05 * problem.hidden)


def trained(**options) -> Problem:
    """A head that predicts the first candidates well and half of the others fairly: most contrasts are settled."""
    problem = random_problem(G=4, C=5, T=6, H=16, V=211, ref=False, **options)
    skill = torch.tensor([1.0, 0.9, 0.6, 0.2, 0.0], dtype=torch.float64)[:, None, None]
    right = problem.weight[problem.targets.clamp(min=0)]
    return replace(problem, hidden=skill * right + 0.1 * problem.hidden)


PROBLEMS = {"untrained": untrained, "trained": trained}


def output_and_grads(problem: Problem, **head) -> tuple[Tensor, dict[str, Tensor]]:
    out = linear_cpo_loss(**problem.arguments(), **problem.options, **head)
    return out.dropped, loss_and_grads(out.loss, problem)


def dense_gradient(problem: Problem) -> tuple[Tensor, Tensor]:
    """Gradient of the loss by the dense logits (G, C, T, V), and its absolute value by the log-likelihoods (G, C)."""
    logits = (problem.hidden.double() @ problem.weight.double().T).detach().requires_grad_()
    loss = reference.cpo_loss(logits, problem.targets, **problem.options)
    (grad,) = torch.autograd.grad(loss, logits)
    # At its target, a token has the gradient coef * (1 - p).
    target = problem.targets.clamp(min=0).unsqueeze(-1)
    coef = grad.gather(-1, target) / (1 - logits.detach().softmax(-1).gather(-1, target))
    present = problem.targets != numerics.IGNORE_INDEX
    return grad, torch.where(present, coef.squeeze(-1), 0.0).abs().amax(-1)


def expected_share(problem: Problem, unit: float, candidate_eps=None, grad_filter_eps=None) -> float:
    """Share of the mass of the dense gradient that the definition leaves out, all groups being one chunk."""
    grad, coef = dense_gradient(problem)
    kept = grad.clone()
    if candidate_eps is not None:
        kept[coef <= candidate_eps * unit] = 0.0
    if grad_filter_eps is not None:
        kept[..., kept.abs().amax((0, 1, 2)) <= grad_filter_eps * unit] = 0.0
    return float((grad - kept).abs().sum() / grad.abs().sum())


@pairwise({"make": PROBLEMS, "which": WHICH, "eps": EPS})
def test_dropped_is_the_share_of_the_mass_and_bounds_the_error(make, which, eps):
    """Row by row, the error of a gradient is at most the mass dropped times the largest vector it multiplies.

    Of columns twice that: what stands for them is a mean of theirs.
    """
    problem = make(beta=0.5).to(torch.float64)
    filters = {name: eps for name in which}
    _, exact = output_and_grads(problem, backend="torch")
    dropped, filtered = output_and_grads(problem, backend="torch", **filters)
    share = expected_share(problem, 0.5 / 4, **filters)
    if dropped.item() != pytest.approx(share, rel=1e-9, abs=1e-15):
        # Columns stay where compacting them is not worth it: then only candidates are left out.
        assert "grad_filter_eps" in filters
        filters.pop("grad_filter_eps")
        share = expected_share(problem, 0.5 / 4, **filters)
    assert dropped.item() == pytest.approx(share, rel=1e-9, abs=1e-15)
    mass = dense_gradient(problem)[0].abs().sum().item()
    sources = {"hidden": problem.weight, "weight": problem.hidden.flatten(0, 2)}
    for name, source in sources.items():
        error = (filtered[name] - exact[name]).flatten(0, -2).norm(dim=-1)
        bound = (1 + ("grad_filter_eps" in filters)) * dropped.item() * mass * source.norm(dim=-1).max().item()
        assert error.sum().item() <= bound * (1 + 1e-9) + 1e-15
    assert filtered["loss"] == exact["loss"]


def test_something_is_dropped():
    """The tests above would pass if nothing ever were."""
    problem = trained(beta=0.5).to(torch.float64)
    dropped = {name: output_and_grads(problem, **{name: 0.01})[0].item() for name in FILTERS}
    assert all(0 < share < 0.5 for share in dropped.values()), dropped


def tail_problem() -> Problem:
    """Words that are rare everywhere, with weights that have much in common, as those of a trained model."""
    problem = trained(beta=0.5)
    common = torch.randn(16, dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(1))
    weight = problem.weight + 3.0 * common.to(problem.weight)  # the softmax does not see it
    return replace(problem, weight=weight)


@pytest.mark.parametrize("rows", [None, 31], ids=["one_chunk", "a_chunk_for_each_group"])
def test_columns_left_out_are_there_as_their_sum(rows):
    """In each chunk a rank-one product takes their place, which is nearer to them than nothing."""
    problem = tail_problem().to(torch.float64)
    budget = None if rows is None else budget_of(problem, rows)
    dropped, filtered = output_and_grads(problem, backend="torch", max_logits_bytes=budget, grad_filter_eps=3e-3)
    assert dropped > 1e-4
    dense_grad = dense_gradient(problem)[0]
    expected, nothing = dense_grad.clone(), dense_grad.clone()
    for groups in [slice(None)] if rows is None else [slice(g, g + 1) for g in range(len(dense_grad))]:
        quiet = dense_grad[groups].abs().amax((0, 1, 2)) <= 3e-3 * 0.5 / 4
        left_out = dense_grad[groups][..., quiet]
        shares = left_out.abs().sum((0, 1, 2)) / left_out.abs().sum()
        expected[groups][..., quiet] = left_out.sum(-1, keepdim=True) * shares
        nothing[groups][..., quiet] = 0.0
    products = {
        "hidden": lambda grad: grad @ problem.weight.detach(),
        "weight": lambda grad: grad.flatten(0, 2).T @ problem.hidden.detach().flatten(0, 2),
    }
    for name, make in products.items():
        torch.testing.assert_close(filtered[name], make(expected), rtol=1e-9, atol=1e-13)
        exact = make(dense_grad)
        share = 0.5 if name == "hidden" else 1.0  # rare words have much in common, these random rows do not
        assert (filtered[name] - exact).norm() < share * (make(nothing) - exact).norm()


@pytest.mark.parametrize("name", FILTERS)
def test_dropping_saves_products(name):
    problem = trained(beta=0.5).to(torch.float32)
    present = int((problem.targets != numerics.IGNORE_INDEX).sum())
    products = {}
    for eps in (None, 0.01):
        with GemmCounter() as counter:
            fused_loss(problem, **{name: eps})
        products[eps] = counter.products(present, problem.weight)
    assert products[None] == 3
    assert 1 < products[0.01] < 2.5


@pytest.mark.parametrize("name", FILTERS)
def test_dropping_everything(name):
    problem = untrained().to(torch.float32)
    dropped, grads = output_and_grads(problem, **{name: 1e6})
    assert dropped.item() == pytest.approx(1.0, rel=1e-5)
    assert not grads["hidden"].any()
    assert not grads["weight"].any()


def test_an_nll_keeps_its_candidates():
    """The contrast has settled them, but the NLL still wants them more likely."""
    problem = trained(beta=0.1, mle_weight=1.0).to(torch.float64)
    dropped, grads = output_and_grads(problem, candidate_eps=1e6)
    only_nll = replace(problem, options={**problem.options, "contrast_weight": 0.0})
    _, expected = output_and_grads(only_nll)
    rank0 = torch.zeros_like(problem.hidden, dtype=torch.bool)
    rank0[:, 0] = True
    assert not grads["hidden"][~rank0].any()
    exact = output_and_grads(problem)[1]["hidden"]
    assert torch.allclose(grads["hidden"][rank0], exact[rank0], rtol=1e-12)
    assert grads["hidden"][rank0].norm() > 0.5 * expected["hidden"].norm()
    assert 0 < dropped < 1


CASES = {
    "padded": lambda: trained(beta=0.5),
    "bias_and_softcap": lambda: random_problem(G=3, C=4, T=5, H=8, V=101, bias=True, softcap=4.0, logit_scale=1.3),
    "shared_rows": lambda: packed_problem(bias=True, beta=1.0),
}


@pairwise(
    {
        "backend, dtype": BACKEND_DTYPES,
        "make": CASES,
        "rows": {"one_chunk": None, "chunks": 31, "recomputed": 3},
    }
)
def test_every_backend_in_every_layout(backend, dtype, make, rows):
    """The filtered gradient is the exact one within what was dropped and the roundings of the dtype."""
    problem = make().to(dtype)
    head = {"backend": backend, "max_logits_bytes": None if rows is None else budget_of(problem, rows)}
    _, exact = output_and_grads(problem, **head)
    dropped, filtered = output_and_grads(problem, **head, candidate_eps=0.02, grad_filter_eps=0.02)
    assert 0 < dropped < 0.6
    largest = problem.weight.double().norm(dim=-1).max().item()
    error = (filtered["hidden"].double() - exact["hidden"].double()).flatten(0, -2).norm(dim=-1).sum().item()
    roundings = 8 * torch.finfo(dtype).eps * exact["hidden"].double().flatten(0, -2).norm(dim=-1).sum().item()
    assert error <= 2 * dropped.item() * token_mass(problem) * largest + roundings
    assert filtered["loss"] == exact["loss"]


@pytest.mark.parametrize(("rows", "eps"), [(None, 0.5), (20, 0.004)], ids=["one_chunk", "a_chunk_for_each_of_nine"])
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=BACKEND_DTYPE_IDS)
def test_filtered_gradients_are_those_of_double(backend, dtype, rows, eps):
    """All of them, with left-out columns of more blocks than wait for one pass."""
    sizes = {"G": 9, "C": 4, "T": 5, "H": 8, "V": 101}
    problem = random_problem(**sizes, bias=True, beta=0.5).to(dtype)
    budget = None if rows is None else budget_of(problem, rows)
    dropped, filtered = output_and_grads(problem, backend=backend, max_logits_bytes=budget, grad_filter_eps=eps)
    double = problem.to(torch.float64)
    budget = None if rows is None else budget_of(double, rows)
    _, expected = output_and_grads(double, backend="torch", max_logits_bytes=budget, grad_filter_eps=eps)
    assert 0 < dropped < 0.6
    # A column at the edge may be kept in one dtype and left out in the other.
    allowed = 2e-2 if dtype.itemsize == 2 else 1e-5
    for name in ("hidden", "weight", "bias"):
        difference = (filtered[name].double() - expected[name]).norm()
        assert difference <= allowed * expected[name].norm(), name


def token_mass(problem: Problem) -> float:
    """At least the mass of the tokens' gradients, which counts a softcap's derivative as 1."""
    logits, targets = dense(problem)
    logits = logits.detach().double().requires_grad_()
    bias = None if problem.bias is None else problem.bias.detach().double()
    (grad,) = torch.autograd.grad(eager_loss_of(problem, logits, targets, bias), logits)
    softcap = problem.options.get("softcap")
    if softcap is None:
        return grad.abs().sum().item()
    capped = transform.transform_logits(logits.detach(), bias, problem.options.get("logit_scale", 1.0), softcap)
    return (grad / (1 - (capped / softcap).square())).abs().sum().item()


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_each_subset_of_requires_grad(needs):
    problem = CASES["bias_and_softcap"]().to(torch.float64)
    filters = {"candidate_eps": 0.02, "grad_filter_eps": 0.02}
    whole = output_and_grads(problem, **filters)[1]
    for tensor, need in zip(problem.tensors, needs, strict=True):
        tensor.requires_grad_(need)
    dropped, part = output_and_grads(problem, **filters)
    assert dropped > 0
    for name, grad in part.items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-12, atol=1e-15)


def test_exact_calls_and_calls_without_gradients_drop_nothing():
    problem = trained().to(torch.float32)
    assert output_and_grads(problem)[0] == 0
    with torch.no_grad():
        assert linear_cpo_loss(**problem.arguments(), candidate_eps=0.1, grad_filter_eps=0.1).dropped == 0


@pytest.mark.parametrize("name", FILTERS)
def test_nan_is_never_dropped(name):
    problem = trained().to(torch.float32)
    with torch.no_grad():
        problem.hidden[1, 0, 2, 3] = torch.nan
    _, grads = output_and_grads(problem, **{name: 1e6})
    assert grads["hidden"][1].isnan().any()


def test_a_loss_of_ones_own():
    problem = trained().to(torch.float64)

    def loss_fn(logps: Tensor, groups: range) -> Tensor:
        return -torch.log_softmax(0.1 * logps, -1)[:, 0].sum()

    def grads(**head) -> Tensor:
        loss = linear_sequence_loss(problem.hidden, problem.weight, problem.targets, loss_fn, **head)
        return torch.autograd.grad(loss, problem.hidden)[0]

    exact, filtered = grads(), grads(candidate_eps=0.01)
    assert 0 < (exact - filtered).norm() < 0.2 * exact.norm()
    assert (filtered == 0).all(-1).sum() > (exact == 0).all(-1).sum()


@pytest.mark.parametrize("stride", [7, 10])
@pytest.mark.parametrize("rows", [[], [0], [5], [1, 4, 5], [0, 1, 2], [3, 4, 5], [0, 1, 2, 3, 4, 5]])
def test_rows_and_elements_move_to_the_front(rows, stride):
    source, columns = torch.randn(6, stride)[:, :7], torch.tensor([0, 2, 3, 6])
    kept = torch.tensor(rows, dtype=torch.int64, device="cpu")
    matrix = source.clone(memory_format=torch.preserve_format).as_strided((6, 7), (7, 1))
    moved, order = move_rows_(matrix, kept)
    assert sorted(order.tolist()) == rows
    assert torch.equal(moved, source[order])
    memory = torch.empty(6 * stride)
    matrix = memory.as_strided((6, 7), (stride, 1)).copy_(source)
    dense, spare = move_elements_(BACKENDS["torch"], matrix, kept.to(matrix.device), columns)
    assert torch.equal(dense[:, :-1], source[kept][:, columns])
    torch.testing.assert_close(dense[:, -1], source[kept].sum(1) - source[kept][:, columns].sum(1))
    assert spare.data_ptr() == matrix.data_ptr() + dense.numel() * 4
    assert spare.numel() == 5 * stride + 7 - dense.numel()


@pytest.mark.cpu
@pytest.mark.skipif(not cpu_extension.available(), reason="no compiled extension")
@pytest.mark.parametrize("isa", cpu_extension.build_info().supported_isas if cpu_extension.available() else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_compiled_columns_are_those_of_the_reference(isa, dtype):
    for vocab, threads in product((1, 31, 32, 97, 2048, 4111), (1, 2)):
        grad = torch.randn(9, 2 * vocab).to(dtype)[:, :vocab]
        rows, columns = torch.tensor([0, 3, 8]), torch.randperm(vocab)[: vocab // 3].sort().values
        largest, mass = cpu_rows.column_stats(grad, isa=isa, threads=threads)
        assert torch.equal(largest, grad.float().abs().amax(0))
        torch.testing.assert_close(mass, grad.float().abs().sum(0))
        taken = cpu_rows.take_columns(grad, rows, columns, isa=isa, threads=threads)
        expected = plain.take_columns(grad, rows, columns)
        assert torch.equal(taken[:, :-1], expected[:, :-1])
        rounding = torch.finfo(dtype).eps * expected[:, -1].abs() + 1e-5 * vocab**0.5
        assert ((taken[:, -1] - expected[:, -1]).abs() <= rounding).all()


@pytest.mark.cpu
@pytest.mark.skipif(not cpu_extension.available(), reason="no compiled extension")
def test_compiled_columns_check_what_they_are_given():
    grad, some = torch.randn(4, 40), torch.tensor([1, 2])
    grad[2, 7] = torch.nan
    assert cpu_rows.column_stats(grad)[1].isnan().nonzero().tolist() == [[7]]
    for rows, columns in ((torch.tensor([4]), some), (some, torch.tensor([-1])), (some, torch.tensor([40]))):
        with pytest.raises(ValueError, match="is not in"):
            cpu_rows.take_columns(grad, rows, columns)
    with pytest.raises(ValueError, match="strides"):
        cpu_rows.column_stats(grad.t())
    with pytest.raises(ValueError, match="dtype"):
        cpu_rows.column_stats(grad.double())
