"""``token_logps``, ``sequence_logps`` and ``cpo_loss``: the same losses over logits that already exist."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import BACKEND_DTYPE_IDS, BACKEND_DTYPES, BACKENDS, PROBLEMS, dense, random_problem
from tolerance import assert_accurate

from cpo_kernels import CPOLoss, cpo_loss, linear_cpo_loss, sequence_logps, token_logps
from cpo_kernels.kernels import reference

PADDED = [name for name in PROBLEMS if not name.startswith("packed")]


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=BACKEND_DTYPE_IDS)
def test_cpo_loss_and_gradients(backend, dtype, name):
    problem = PROBLEMS[name]()
    logits, targets = dense(problem)
    given = {"ref_logps": problem.ref_logps, "ranks": problem.ranks}

    def grads(loss_fn, to):
        leaf = logits.to(dtype).to(to).requires_grad_()
        bias = None if problem.bias is None else problem.bias.to(dtype).to(to).requires_grad_()
        loss = loss_fn(leaf, targets, bias=bias, **given, **problem.options)
        tensors = [leaf] if bias is None else [leaf, bias]
        names = ("loss", "logits", "bias")[: 1 + len(tensors)]
        return dict(zip(names, (loss.detach(), *torch.autograd.grad(loss * 1.7, tensors)), strict=True))

    oracle, eager = grads(reference.cpo_loss, torch.float64), grads(reference.cpo_loss, dtype)
    fused = grads(lambda *args, **kwargs: cpo_loss(*args, backend=backend, **kwargs).loss, dtype)
    for key, wanted in oracle.items():
        assert fused[key].dtype == eager[key].dtype
        assert_accurate(fused[key], eager[key], wanted, key)
    assert (fused["logits"][targets == -100] == 0).all()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_token_logps_of_any_shape(backend, shape):
    logits = torch.randn(*shape, 31, requires_grad=True)
    targets = torch.randint(0, 31, shape)
    expected = reference.token_logps(logits, targets)
    logps = token_logps(logits, targets, backend=backend)
    torch.testing.assert_close(logps, expected)
    upstream = torch.randn(shape)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, upstream)[0] for x in (logps, expected)))
    if shape:
        summed = sequence_logps(logits, targets, backend=backend)
        assert summed.shape == shape[:-1]
        torch.testing.assert_close(summed, expected.sum(-1))


STRIDES = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every_other_column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "slice_of_wider_rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "shifted": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
}


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_logits_targets_and_upstream(backend, stride):
    logits, targets = torch.randn(3, 5, 31), torch.randint(0, 31, (3, 5))
    odd = STRIDES[stride](logits).requires_grad_()
    assert not odd.is_contiguous()
    leaf = logits.clone().requires_grad_()
    expected = token_logps(leaf, targets, backend=backend)
    logps = token_logps(odd, targets.t().contiguous().t(), backend=backend)
    torch.testing.assert_close(logps, expected)
    upstream = torch.ones(()).expand(3, 5)
    torch.testing.assert_close(
        torch.autograd.grad(logps, odd, upstream)[0], torch.autograd.grad(expected, leaf, upstream)[0]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_for_all(backend):
    """Logits of stride 0."""
    row = torch.randn(31, requires_grad=True)
    targets = torch.randint(0, 31, (4, 6))
    logps = token_logps(row.expand(4, 6, 31), targets, backend=backend)
    expected = torch.log_softmax(row, 0)[targets]
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), row)[0] for x in (logps, expected)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_have_gradient_0_whatever_they_hold(backend, bad):
    logits, targets = torch.randn(4, 31), torch.tensor([3, -100, 30, -100])
    logits[1] = bad
    logits[3, ::2] = bad
    logits.requires_grad_()
    logps = token_logps(logits, targets, backend=backend)
    assert logps.isfinite().all()
    logps.sum().backward()
    assert (logits.grad[[1, 3]] == 0).all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_propagate(backend, bad):
    for column in (0, 17, 30):
        logits = torch.randn(1, 2, 2, 31)
        logits[0, 1, 0, column] = bad
        targets = torch.full((1, 2, 2), 17)
        assert not token_logps(logits, targets, backend=backend)[0, 1, 0].isfinite() or column == 17
        assert not cpo_loss(logits, targets, backend=backend).loss.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_words_of_probability_0_are_legal(backend):
    """Masked words: -inf elsewhere, from the first column on, gives a finite loss and gradient."""
    logits = torch.randn(3, 31)
    logits[0, :20] = -torch.inf
    logits[1, 1:] = -torch.inf
    logits.requires_grad_()
    targets = torch.tensor([25, 0, 3])
    logps = token_logps(logits, targets, backend=backend)
    torch.testing.assert_close(logps, torch.log_softmax(logits, -1)[range(3), targets])
    assert logps[1] == 0
    logps.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ["whole_head", "ranked", "several_positives"])
def test_gradcheck(name):
    problem = PROBLEMS[name]().to(torch.float64)
    logits, targets = (t.detach() for t in dense(problem))

    def loss(leaf, bias=None):
        given = {"ref_logps": problem.ref_logps, "ranks": problem.ranks, "bias": bias}
        return cpo_loss(leaf, targets, **given, **problem.options).loss

    tensors = [logits.requires_grad_()] + ([] if problem.bias is None else [problem.bias])
    torch.autograd.gradcheck(loss, tensors, fast_mode=True)
    head = {k: v for k, v in problem.options.items() if k in ("logit_scale", "softcap", "temperature")}
    torch.autograd.gradcheck(lambda x: token_logps(x, targets, **head), logits, fast_mode=True)
    torch.autograd.gradcheck(lambda x: sequence_logps(x, targets, **head), logits, fast_mode=True)


@pytest.mark.parametrize("name", PADDED)
def test_output_equals_that_of_the_linear_form(name):
    problem = PROBLEMS[name]().to(torch.float64)
    logits, targets = dense(problem)
    given = {"ref_logps": problem.ref_logps, "ranks": problem.ranks, "bias": problem.bias}
    out = cpo_loss(logits, targets, **given, **problem.options)
    expected = linear_cpo_loss(**problem.arguments(), **problem.options)
    for field, a, b in zip(out._fields, out, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, equal_nan=True, msg=lambda m, f=field: f"{f}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_retained_graph(backend):
    problem = random_problem().to(torch.float32)
    logits, targets = dense(problem)
    logits = logits.detach().requires_grad_()
    loss = cpo_loss(logits, targets, backend=backend).loss
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    copy = first.clone()
    second = torch.autograd.grad(loss, logits)[0]
    assert torch.equal(first, copy)
    assert torch.equal(first, second)


def test_module_form():
    problem = random_problem(mle_weight=0.2)
    logits, targets = dense(problem)
    out = CPOLoss(mle_weight=0.2, beta=0.3)(logits, targets, ref_logps=problem.ref_logps)
    expected = cpo_loss(logits, targets, ref_logps=problem.ref_logps, mle_weight=0.2, beta=0.3)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_inputs_are_left_as_they_were():
    problem = replace(random_problem(), ref_logps=None)
    logits, targets = dense(problem)
    copies = logits.clone(), targets.clone()
    leaf = logits.requires_grad_()
    cpo_loss(leaf, targets).loss.backward()
    assert torch.equal(leaf.detach(), copies[0])
    assert torch.equal(targets, copies[1])
