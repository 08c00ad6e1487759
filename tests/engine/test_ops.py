"""The operators: schemas, fake kernels and autograd as torch.library checks them, and kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from pairwise import pairwise
from problems import BACKEND_DTYPES, BACKENDS
from tolerance import assert_accurate

from cpo_kernels.engine.compiled import pack
from cpo_kernels.kernels import numerics, plain, reference, registry
from cpo_kernels.options import Head, Objective

OPS = torch.ops.cpo_kernels
ROW_STARTS = {"one_per_row": None, "shared": [0, 2, 2, 5, 6]}
TRANSFORMS = {"plain": (1.0, 0.0, 1.0), "whole": (0.7, 3.0, 1.3)}


def row_inputs(dtype, row_starts, V=31, bias=True):
    starts = None if row_starts is None else torch.tensor(row_starts)
    N = 4 if row_starts is None else row_starts[-1]
    targets = torch.randint(0, V, (N,))
    targets[1] = -100
    return torch.randn(4, V).to(dtype), targets, starts, torch.randn(V).to(dtype) if bias else None


@pairwise(
    {
        "prefix": [p for p in ("", "triton_") if hasattr(OPS, f"{p}row_forward")],
        "dtype": [torch.float32, torch.bfloat16],
        "row_starts": ROW_STARTS,
        "transform": TRANSFORMS,
    }
)
def test_opcheck_of_the_row_operators(prefix, dtype, row_starts, transform):
    forward, backward = (getattr(OPS, prefix + name).default for name in ("row_forward", "row_backward"))
    logits, targets, starts, bias = row_inputs(dtype, row_starts)
    stats, logps = forward(logits, targets, starts, bias, *transform)
    torch.library.opcheck(forward, (logits.requires_grad_(), targets, starts, bias, *transform))
    arguments = (logits.detach(), targets, starts, stats, torch.randn_like(logps), bias, *transform)
    torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("logits_shape", [(0, 5), (1, 1), (3, 2)])
def test_opcheck_of_small_sizes(logits_shape):
    targets = torch.zeros(logits_shape[0], dtype=torch.int64)
    torch.library.opcheck(OPS.row_forward.default, (torch.randn(logits_shape), targets, None, None, 1.0, 0.0, 1.0))


OBJECTIVE = pack(Objective(beta=0.1, margin=0.2, mle_weight=0.5, num_groups=3.0))
HEAD = pack(Head(logit_scale=0.9, softcap=4.0, temperature=1.1))


def inputs_of(packed: bool) -> tuple[list[torch.Tensor], tuple[torch.Tensor | None, ...]]:
    """Hidden, weight and bias; targets, rows and the boundaries of groups of two candidates of three tokens."""
    tensors = [torch.randn(12, 7), torch.randn(31, 7), torch.randn(31)]
    targets = torch.randint(0, 31, (12,))
    if packed:
        rows = torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 5, 7, 8, 9])
        return tensors, (targets, rows, torch.tensor([0, 3, 6, 9, 12]), torch.tensor([0, 2, 4]))
    tensors[0] = tensors[0].view(2, 2, 3, 7)
    return tensors, (targets.view(2, 2, 3), None, None, None)


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False]], ids=["trainable", "frozen"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck_of_the_fused_loss(packed, needs):
    tensors, tokens = inputs_of(packed)
    tensors = [t.requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    shape = (4,) if packed else (2, 2)
    references = torch.randn(shape), torch.tensor([0, 1, 1, 0]).view(shape)
    torch.library.opcheck(OPS.linear_cpo.default, (*tensors, *tokens, *references, needs, *OBJECTIVE, *HEAD))


def test_opcheck_of_the_gradients_scale():
    grads = [torch.randn(3, 2), torch.randn(0)]
    torch.library.opcheck(OPS.scale_grads.default, (grads, torch.tensor(2.0), torch.randn(2, 2)))


def test_opcheck_of_the_checks():
    torch.library.opcheck(OPS.checked_targets.default, (torch.tensor([3, -100, 0]), 5))
    lengths, ranks = torch.tensor([2, 1, 3, 4]), torch.tensor([0, 1, 1, 0])
    torch.library.opcheck(OPS.checked_lengths.default, (lengths, ranks, 2, True))
    torch.library.opcheck(OPS.checked_lengths.default, (lengths, None, 2, False))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck_of_the_fused_logps(packed):
    tensors, tokens = inputs_of(packed)
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(OPS.linear_token_logps.default, (*leaves, *tokens, *HEAD))
    text, numbers = HEAD
    backward = (torch.randn(tokens[0].shape), *tensors, *tokens, numbers, [True, True, True], text)
    torch.library.opcheck(OPS.linear_token_logps_backward.default, backward)


def test_unwritten_memory_is_poisoned():
    """The fixture of conftest.py that makes an output nobody wrote fail the tests above and elsewhere."""
    like = torch.zeros(3, 2)
    for tensor in (torch.empty(3, 2), torch.empty_like(like), like.new_empty(4), torch.empty_strided((3, 2), (1, 3))):
        assert tensor.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


@pairwise(
    {
        "backend, dtype": BACKEND_DTYPES,
        "V": [1, 2, 31, 1009],
        "row_starts": ROW_STARTS,
        "transform": TRANSFORMS,
    }
)
def test_row_kernels_of_every_backend(backend, dtype, V, row_starts, transform):
    """Forward, backward and backward in place against a float64 log-softmax."""
    kernels = registry.BACKENDS[backend].rows
    logits, targets, starts, bias = row_inputs(dtype, row_starts, V)
    rows, coef = plain.token_rows(targets, starts), torch.randn(targets.shape, dtype=torch.float64)
    names = dict(zip(("logit_scale", "softcap", "temperature"), transform, strict=True))

    def dense(to):
        leaf = logits.to(to).requires_grad_()
        logps = reference.token_logps(leaf[rows], targets, bias=bias.to(to), **names)
        (grad,) = torch.autograd.grad((logps * coef).sum(), leaf)
        return logps.detach(), grad

    stats, logps = kernels.forward(logits, targets, starts, bias, *transform)
    assert_accurate(logps, dense(dtype)[0], dense(torch.float64)[0], "logps")
    coef_here = coef.to(stats.dtype)
    grad = kernels.backward(logits, targets, starts, stats, coef_here, bias, *transform)
    assert_accurate(grad, dense(dtype)[1], dense(torch.float64)[1], "grad")
    in_place = logits.clone()
    kernels.backward_(in_place, targets, starts, stats, coef_here, bias, *transform)
    assert torch.equal(in_place, grad)
    if dtype == torch.float32:
        narrow = logits.clone()
        kernels.backward_(narrow, targets, starts, stats, coef_here, bias, *transform, torch.bfloat16)
        assert torch.equal(numerics.narrow_view(narrow, torch.bfloat16), grad.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_several_tokens_a_row_counts_each_once(backend):
    """The same word twice, and a cancelling pair of coefficients."""
    kernels = registry.BACKENDS[backend].rows
    logits, targets, starts = torch.randn(2, 5), torch.tensor([3, 3, 0, 1]), torch.tensor([0, 2, 4])
    coef = torch.tensor([1.0, 0.5, 2.0, -2.0])
    stats, _ = kernels.forward(logits, targets, starts, None, 1.0, 0.0, 1.0)
    grad = kernels.backward(logits, targets, starts, stats, coef, None, 1.0, 0.0, 1.0)
    probabilities = logits.softmax(-1)
    expected = torch.stack([-1.5 * probabilities[0], torch.zeros(5)])
    expected[0, 3] += 1.5
    expected[1, 0], expected[1, 1] = 2.0, -2.0
    torch.testing.assert_close(grad, expected)
