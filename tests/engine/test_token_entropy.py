"""``linear_token_entropy``: both outputs with gradients through both, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICE
from pairwise import pairwise
from problems import BACKEND_DTYPES, BACKENDS, PROBLEMS, GemmCounter, Problem, budget_of, random_problem
from tolerance import assert_accurate
from torch import Tensor

from cpo_kernels import linear_token_logps, linear_token_statistics
from cpo_kernels.engine.entropy import linear_token_entropy
from cpo_kernels.kernels.transform import transform_logits

SHAPES = {
    "plain": random_problem,
    "whole_head": PROBLEMS["whole_head"],
    "one_word": PROBLEMS["one_word"],
    "larger_prime_vocab": PROBLEMS["larger_prime_vocab"],
}
HEAD = ("logit_scale", "softcap", "temperature")
THROUGH = {"both": (1.0, 1.0), "logps": (1.0, None), "entropy": (None, 1.0)}


def head_of(problem: Problem) -> dict:
    return {name: value for name, value in problem.options.items() if name in HEAD}


def eager(problem: Problem) -> tuple[Tensor, Tensor]:
    logits = transform_logits(problem.hidden @ problem.weight.T, problem.bias, **head_of(problem))
    log_p = logits.log_softmax(-1)
    absent = problem.targets == -100
    logps = log_p.gather(-1, problem.targets.masked_fill(absent, 0)[..., None]).squeeze(-1)
    return logps.masked_fill(absent, 0.0), -(log_p.exp() * log_p).sum(-1).masked_fill(absent, 0.0)


def fused(problem: Problem, **head) -> tuple[Tensor, Tensor]:
    return linear_token_entropy(*problem.tensors[:2], problem.targets, bias=problem.bias, **head_of(problem), **head)


def results(outputs: tuple[Tensor, Tensor], problem: Problem, upstreams) -> dict[str, Tensor]:
    """The two outputs and the gradients of their sum, weighted by the upstream gradients that are not None."""
    used = [(out, up.to(out.dtype)) for out, up in zip(outputs, upstreams, strict=True) if up is not None]
    named = zip(("hidden", "weight", "bias"), problem.tensors, strict=True)
    wanted = {name: t for name, t in named if t is not None and t.requires_grad}
    grads = torch.autograd.grad([o for o, _ in used], list(wanted.values()), [u for _, u in used])
    logps, entropy = (out.detach() for out in outputs)
    return {"logps": logps, "entropy": entropy, **dict(zip(wanted, grads, strict=True))}


def upstreams_like(problem: Problem, through: str) -> list[Tensor | None]:
    return [weight and weight * torch.randn(problem.targets.shape, dtype=torch.float64) for weight in THROUGH[through]]


@pairwise(
    {
        "backend, dtype": BACKEND_DTYPES,
        "name": SHAPES.keys(),
        "rows": {"kept": None, "recomputed": 3},
        "frozen": {"trainable": False, "frozen": True},
        "through": THROUGH.keys(),
    }
)
def test_outputs_and_gradients(backend, dtype, name, rows, frozen, through):
    source = SHAPES[name]()
    exact, rounded = source.to(dtype).to(torch.float64), source.to(dtype)
    for problem in (exact, rounded):
        problem.weight.requires_grad_(not frozen)
    upstreams = upstreams_like(source, through)
    oracle = results(eager(exact), exact, upstreams)
    same_dtype = results(eager(rounded), rounded, upstreams)
    got = fused(rounded, backend=backend, max_logits_bytes=rows and budget_of(rounded, rows))
    got = results(got, rounded, upstreams)
    assert got.keys() == oracle.keys()
    for key, wanted in oracle.items():
        if wanted.any():
            assert_accurate(got[key], same_dtype[key], wanted, key)
        else:
            assert not got[key].any(), key  # of one word, whose distribution is certain


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits(backend):
    """Entropies below a rounding of 1, whose gradient is nothing beside that of the log-probabilities."""
    source = PROBLEMS["huge_logits"]()
    exact, rounded = source.to(torch.float32).to(torch.float64), source.to(torch.float32)
    upstreams = upstreams_like(source, "both")
    oracle, same = (results(eager(problem), problem, upstreams) for problem in (exact, rounded))
    got = results(fused(rounded, backend=backend), rounded, upstreams)
    for key in ("logps", "hidden", "weight"):
        assert_accurate(got[key], same[key], oracle[key], key)
    torch.testing.assert_close(got["entropy"], oracle["entropy"].float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_step_of_the_logits_changes_both_as_the_gradient_says(backend):
    """Central differences in float64 of the reference, which share no formula with the gradient."""
    problem = random_problem(H=5, V=11, softcap=2.0, temperature=0.7).to(torch.float32)
    upstreams = upstreams_like(problem, "both")
    grads = results(fused(problem, backend=backend), problem, upstreams)
    double = problem.to(torch.float64)
    step = torch.randn_like(double.weight)

    def weighted(scale: float) -> Tensor:
        with torch.no_grad():
            moved = Problem(double.hidden, double.weight + scale * step, double.targets, options=problem.options)
            return sum((out * up).sum() for out, up in zip(eager(moved), upstreams, strict=True))

    slope = (weighted(1e-5) - weighted(-1e-5)) / 2e-5
    torch.testing.assert_close((grads["weight"].double() * step).sum(), slope, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities_alone_are_those_of_the_other_functions(backend):
    problem = random_problem(bias=True).to(torch.float32)
    problem.options = {}
    head = {"bias": problem.bias, "backend": backend}
    arguments = *problem.tensors[:2], problem.targets
    statistics = linear_token_statistics(*arguments, entropy=True, **head)
    logps, entropy = fused(problem, backend=backend)
    torch.testing.assert_close(logps, linear_token_logps(*arguments, **head), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.detach(), statistics.entropy, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        quiet = fused(problem, backend=backend)
    assert torch.equal(quiet.logps, statistics.logps) and torch.equal(quiet.entropy, statistics.entropy)
    assert not quiet.entropy.requires_grad


@pytest.mark.parametrize("rows", [None, 3], ids=["kept", "recomputed"])
def test_retained_graph_and_any_shape(rows):
    hidden, weight = torch.randn(2, 3, 7, requires_grad=True), torch.randn(31, 7, requires_grad=True)
    targets = torch.randint(0, 31, (2, 3))
    targets[0, 1] = -100
    out = linear_token_entropy(hidden, weight, targets, max_logits_bytes=rows and rows * 31 * 4)
    total = out.logps.sum() + 0.5 * out.entropy.sum()
    first, second = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not first[0][0, 1].any()
    none = linear_token_entropy(hidden[:0], weight, targets[:0])
    assert none.logps.shape == none.entropy.shape == (0, 3)
    assert not torch.autograd.grad(none.logps.sum() + none.entropy.sum(), weight)[0].any()


def test_rows_without_a_target_may_hold_anything():
    problem = random_problem().to(torch.float32)
    absent = problem.targets == -100
    hidden = problem.hidden.detach().masked_fill(absent[..., None], torch.nan).requires_grad_()
    for skip in (True, False):
        out = linear_token_entropy(hidden, problem.weight, problem.targets, skip_absent_rows=skip)
        grads = torch.autograd.grad(out.logps.sum() + out.entropy.sum(), (hidden, problem.weight))
        assert all(grad.isfinite().all() for grad in grads)
        assert not out.entropy[absent].any() and not grads[0][absent].any()


def test_forbidden_words_have_no_part_in_the_gradient():
    problem = random_problem(bias=True).to(torch.float32)
    problem.options = {}
    free = problem.targets != 30
    targets = problem.targets.masked_fill(~free, 0)
    bias = problem.bias.detach().clone()
    bias[30] = -torch.inf
    out = linear_token_entropy(problem.hidden, problem.weight, targets, bias=bias)
    fewer = linear_token_entropy(problem.hidden, problem.weight[:30], targets, bias=bias[:30])
    for a, b in zip(out, fewer, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(o.logps.sum() - o.entropy.sum(), problem.hidden)[0] for o in (out, fewer)]
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the products of the CPU's backends")
def test_products():
    """Three where the logits are kept, four where they are computed again, one without gradients."""
    problem = random_problem(G=4, C=4, T=8, H=16, V=128).to(torch.float32)
    rows = int((problem.targets != -100).sum())
    counts = {}
    for name, budget in {"kept": None, "again": budget_of(problem, 40)}.items():
        with GemmCounter() as counter:
            out = fused(problem, max_logits_bytes=budget)
            (out.logps.sum() + out.entropy.sum()).backward()
        counts[name] = counter.products(rows, problem.weight)
    with GemmCounter() as counter, torch.no_grad():
        fused(problem)
    counts["none"] = counter.products(rows, problem.weight)
    assert counts == pytest.approx({"kept": 3, "again": 4, "none": 1})


def test_refusals():
    problem = random_problem().to(torch.float32)
    arguments = *problem.tensors[:2], problem.targets
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        linear_token_entropy(*arguments, temperatur=0.7)
    with pytest.raises(ValueError, match=r"candidate_eps=0\.1: an entropy has no filters"):
        linear_token_entropy(*arguments, candidate_eps=0.1)
    with pytest.raises(ValueError, match=r"target of token .* is 31"):
        linear_token_entropy(*arguments[:2], problem.targets.masked_fill(problem.targets == -100, 31))
    out = linear_token_entropy(*arguments)
    (grad,) = torch.autograd.grad(out.entropy.sum(), problem.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()
