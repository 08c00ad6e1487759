"""The softmax inside the CPU's product, on every instruction set that has one, against torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_rows import HEADS, PRODUCT_ISAS, tokens_for
from pairwise import pairwise

from cpo_kernels.kernels.cpu import linear

pytestmark = pytest.mark.cpu
DTYPES = [torch.float32, torch.bfloat16]
SIZES = {  # (R, H, V): tiles are 8 x 48 and 6 x 16, sums are over 48 columns, a block of k has 768 units
    "one number": (1, 1, 1),
    "fewer words than a sample": (5, 7, 13),
    "a word less than a sum": (17, 64, 47),
    "one sum": (9, 33, 48),
    "tile edges": (33, 100, 1009),
    "two blocks of fp32": (20, 1601, 503),
    "several blocks and spans": (13, 2050, 2203),
}


@pytest.fixture(params=PRODUCT_ISAS)
def isa(request):
    return request.param


def problem(size, dtype, counts=None):
    """Return hidden, weight, targets and row_starts, and a coefficient for each token."""
    R, H, V = SIZES[size]
    hidden, weight = torch.randn(R, H).to(dtype), (torch.randn(V, H) * 3 / H**0.5).to(dtype)
    targets, row_starts, coef = tokens_for(V, counts or [1] * R)
    return (hidden, weight, targets, row_starts if counts else None), coef


def oracle(given, coef, head, dtype=torch.float64):
    """Return log-probabilities (N,) and the gradient (R, V) of the raw logits."""
    hidden, weight, targets, row_starts = given
    logits = (hidden.to(dtype) @ weight.to(dtype).T).requires_grad_()
    rows = torch.arange(len(hidden))
    rows = rows if row_starts is None else rows.repeat_interleave(row_starts.diff())
    found = head.transform(logits).log_softmax(-1)[rows, targets.clamp(min=0)].masked_fill(targets < 0, 0.0)
    (found * coef.to(dtype)).sum().backward()
    return found.detach(), logits.grad


def run(given, coef, head, isa=None, in_place=False, threads=None):
    hidden, weight, *tokens = given
    out = torch.full((len(hidden), len(weight)), torch.nan, dtype=hidden.dtype)
    stats, logps = linear.linear_forward(*given, *head.args(), out=out, isa=isa, threads=threads)
    transform = head.args()[1:]
    scale = linear.linear_scale(out, *tokens, stats, logps, coef, *transform, in_place=in_place, isa=isa)
    return stats, logps, out, scale


@pairwise(
    {
        "size": [*SIZES],
        "name": [*HEADS],
        "dtype": DTYPES,
        "shared": {"one token a row": False, "any number": True},
        "in_place": {"scaled later": False, "in place": True},
    }
)
def test_log_probabilities_and_gradient(isa, size, dtype, name, shared, in_place):
    R, _, V = SIZES[size]
    counts = [(1, 0, 3, 2, 40)[row % 5] for row in range(R)] if shared else None
    (given, coef), head = problem(size, dtype, counts), HEADS[name](V)
    exact, exact_grad = oracle(given, coef, head)
    eager, _ = oracle(given, coef, head, torch.float32)
    stats, logps, out, scale = run(given, coef, head, isa, in_place)
    # Those of float32 products, whatever the dtype of the inputs.
    torch.testing.assert_close(logps.double(), exact, rtol=3e-6, atol=3e-6 + 4 * (eager - exact).abs().max().item())
    if in_place:
        assert torch.equal(scale, torch.where(scale == 0, 0.0, 1.0))
    rounding = torch.finfo(dtype).eps
    grad = out.double() * scale.double()[:, None]
    assert (grad - exact_grad).norm() <= (2 * rounding + 2e-6) * exact_grad.norm() + 1e-12
    again, _ = linear.linear_forward(*given, *head.args(), isa=isa, threads=1)
    assert torch.equal(again, stats)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(isa, dtype, threads):
    torch.manual_seed(0)
    given = torch.randn(70, 96).to(dtype), torch.randn(4001, 96).to(dtype) / 10, torch.randint(0, 4001, (70,)), None
    found = [run(given, torch.ones(70), HEADS["plain"](4001), isa, threads=count) for count in (2, threads)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_a_maximum_far_above_the_sample(isa, dtype, name, monkeypatch):
    """The reference is looked for once more where exp would overflow relative to the first one."""
    V, head = 1000, HEADS[name](1000)
    hidden = torch.randn(12, 64).to(dtype)
    weight = torch.zeros(V, 64, dtype=dtype)
    weight[501] = 40 * hidden[3]  # no column of the sample: 0, 15, 30, ...
    targets = torch.randint(0, V, (12,))
    targets[3:5] = 501
    given, coef, searched = (hidden, weight, targets, None), torch.randn(12), []
    real = linear.largest
    monkeypatch.setattr(linear, "largest", lambda *args, **rest: searched.append(1) or real(*args, **rest))
    _, logps, out, scale = run(given, coef, head, isa)
    assert bool(searched) == (head.logit_scale != 0 and not head.softcap)
    exact, exact_grad = oracle(given, coef, head)
    torch.testing.assert_close(logps.double(), exact, rtol=3e-6, atol=3e-5)
    assert (out.double() * scale.double()[:, None] - exact_grad).norm() <= 0.01 * exact_grad.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_stay_in_their_rows(isa, dtype, value):
    (hidden, weight, targets, _), coef = problem("tile edges", dtype)
    head = HEADS["plain"](len(weight))
    weight, targets = weight.abs(), targets.abs()  # -100 becomes a word like another
    _, clean, _, _ = run((hidden, weight, targets, None), coef, head, isa)
    hidden = hidden.clone()
    hidden[4] = value
    coef[4] = 0.0
    _, logps, out, scale = run((hidden, weight, targets, None), coef, head, isa)
    others = torch.arange(len(hidden)) != 4
    assert torch.equal(logps[others], clean[others])
    assert logps[4].isnan()
    assert not (out[4] * scale[4]).any(), "a token without a coefficient adds nothing, whatever its row holds"


def test_a_row_without_a_token_becomes_zeros_whatever_it_holds(isa):
    (hidden, weight, targets, _), coef = problem("tile edges", torch.bfloat16)
    absent = targets < 0
    hidden[absent] = torch.nan
    _, logps, out, scale = run((hidden, weight, targets, None), coef, HEADS["plain"](len(weight)), isa)
    assert absent.any() and not out[absent].any() and not scale[absent].any() and not logps[absent].any()
    assert logps.isfinite().all() and out[~absent].isfinite().all()


def test_words_that_a_bias_rules_out(isa):
    (given, coef), V = problem("tile edges", torch.float32), 1009
    head = HEADS["plain"](V)
    head.bias = torch.zeros(V)
    head.bias[::2] = -math.inf  # the first columns of the sample among them
    targets = given[2]
    targets[targets >= 0] |= 1
    exact, _ = oracle(given, coef, head)
    _, logps, out, _ = run(given, coef, head, isa)
    torch.testing.assert_close(logps.double(), exact, rtol=1e-5, atol=1e-5)
    assert not out[targets >= 0][:, ::2].any()


def test_what_does_not_fit_is_refused():
    given, _ = problem("tile edges", torch.float32)
    hidden, weight, targets, _ = given
    head = HEADS["plain"](1009).args()
    refused = {
        "hidden has dtype": (hidden.half(), weight.half(), targets),
        "weight": (hidden, weight[:, :-1], targets),
        r"targets\[2\] = 1009": (hidden, weight, torch.where(torch.arange(33) == 2, 1009, targets)),
        "targets": (hidden, weight, targets[:-1]),
    }
    for message, arguments in refused.items():
        with pytest.raises(ValueError, match=message):
            linear.linear_forward(*arguments, None, *head)
    for message, out in {"out": torch.empty(33, 1008), "strides": torch.empty(1009, 33).T}.items():
        with pytest.raises(ValueError, match=message):
            linear.linear_forward(*given, *head, out=out)
    with pytest.raises(ValueError, match="memory has 5 numbers"):
        linear.linear_forward(*given, *head, memory=torch.empty(5))
