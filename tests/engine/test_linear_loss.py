"""``linear_cpo_loss`` and ``linear_sequence_loss``: loss and gradients against the dense reference, and their cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from devices import DEVICE
from pairwise import pairwise
from problems import (
    BACKEND_DTYPE_IDS,
    BACKEND_DTYPES,
    BACKENDS,
    BUDGETS,
    PROBLEMS,
    assert_problem_accurate,
    budget_of,
    dense,
    eager_loss,
    fused_loss,
    loss_and_grads,
    packed_problem,
    random_problem,
)
from tolerance import relative_error
from torch.utils.checkpoint import checkpoint

from cpo_kernels import (
    CandidateLayout,
    LinearCPOLoss,
    contrastive_loss,
    linear_cpo_loss,
    linear_sequence_logps,
    linear_sequence_loss,
    plan,
)


@pairwise(
    {
        "backend, dtype": BACKEND_DTYPES,
        "name": PROBLEMS.keys(),
        "rows": BUDGETS,
    }
)
def test_loss_and_gradients(backend, dtype, name, rows):
    problem = PROBLEMS[name]()
    budget = None if rows is None else budget_of(problem.to(dtype), rows)
    assert_problem_accurate(problem, dtype, upstream=1.7, backend=backend, max_logits_bytes=budget)


def test_the_budgets_of_the_grid_do_what_their_names_say():
    problem = random_problem().to(torch.float32)
    budgets = {name: rows and budget_of(problem, rows) for name, rows in BUDGETS.items()}
    plans = {name: plan(**problem.arguments(), max_logits_bytes=budget) for name, budget in budgets.items()}
    assert len(plans["one_chunk"].chunks) == 1
    assert len(plans["several_chunks"].chunks) > 1
    assert not any(chunk.recomputed for chunk in plans["several_chunks"].chunks)
    assert all(chunk.recomputed for chunk in plans["recomputed"].chunks)


NEEDS = [needs for needs in product([False, True], repeat=3) if any(needs)]  # of hidden, weight and bias


@pairwise({"backend": BACKENDS, "needs": NEEDS, "rows": BUDGETS})
def test_each_subset_of_requires_grad(backend, needs, rows):
    """The gradients that are asked for are those of the full set, and the others are not made."""
    problem = random_problem(bias=True).to(torch.float32)
    head = {"backend": backend, "max_logits_bytes": rows and budget_of(problem, rows)}
    full = loss_and_grads(fused_loss(problem, **head), problem)
    for tensor, need in zip(problem.tensors, needs, strict=True):
        tensor.requires_grad_(need)
    part = loss_and_grads(fused_loss(problem, **head), problem)
    assert len(part) == 1 + sum(needs)
    for name, grad in part.items():
        assert relative_error(grad, full[name]) < 1e-6, name


@pytest.mark.parametrize("problem", [random_problem, packed_problem])
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=BACKEND_DTYPE_IDS)
def test_two_runs_are_bitwise_equal(backend, dtype, problem):
    torch.set_num_threads(2)
    problem = problem(H=64, V=1009, bias=True).to(dtype)
    head = {"backend": backend, "max_logits_bytes": budget_of(problem, 9)}
    first, second = (loss_and_grads(fused_loss(problem, **head), problem) for _ in range(2))
    for name, value in first.items():
        assert value.isfinite().all()
        assert torch.equal(value, second[name]), name


def strided(problem):
    """The same numbers behind every kind of stride: transposed, sliced, reversed order of dimensions."""
    G, C, T = problem.targets.shape
    H = problem.hidden.shape[-1]
    wide = torch.zeros(T, G, C, 2 * H, dtype=problem.hidden.dtype)
    wide[..., ::2] = problem.hidden.permute(2, 0, 1, 3)
    targets = torch.zeros(C, T, G, 3, dtype=torch.int64)
    targets[..., 1] = problem.targets.permute(1, 2, 0)
    ranks = torch.tensor([0, 1, 1]).expand(G, C)
    result = replace(
        problem,
        hidden=wide[..., ::2].permute(1, 2, 0, 3),
        weight=problem.weight.t().contiguous().t(),
        targets=targets[..., 1].permute(2, 0, 1),
        bias=problem.bias.repeat_interleave(2)[::2],
        ref_logps=problem.ref_logps.t().contiguous().t(),
        ranks=ranks,
    )
    tensors = (*result.tensors, result.targets, result.ref_logps, result.ranks)
    assert not any(t.is_contiguous() for t in tensors)
    return result


@pytest.mark.parametrize("rows", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, rows):
    problem = random_problem(bias=True)
    plain, odd = problem.to(torch.float32), strided(problem)
    leaves = [t.to(torch.float32).requires_grad_() for t in odd.tensors]
    odd = replace(odd, hidden=leaves[0], weight=leaves[1], bias=leaves[2])
    assert not any(t.is_contiguous() for t in leaves[:2])
    head = {"backend": backend, "max_logits_bytes": rows and budget_of(plain, rows)}
    expected, result = (loss_and_grads(fused_loss(p, **head), p) for p in (plain, odd))
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_strided_and_expanded_hidden(backend):
    """A row stride of 0: every row is the same memory."""
    problem = packed_problem().to(torch.float32)
    row = problem.hidden[:1].detach()
    expanded = replace(problem, hidden=row.expand(18, -1).requires_grad_())
    copied = replace(problem, hidden=row.repeat(18, 1).requires_grad_())
    results = [loss_and_grads(fused_loss(p, backend=backend), p) for p in (expanded, copied)]
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", ["stride_0", "minus_two", "zero", "twice_used"])
def test_upstream_gradient(backend, upstream):
    problem = random_problem(bias=True).to(torch.float32)
    unit = loss_and_grads(fused_loss(problem, backend=backend), problem)
    loss = fused_loss(problem, backend=backend)
    if upstream == "stride_0":
        total, factor = loss.expand(4).sum(), 4.0
    elif upstream == "twice_used":
        total, factor = loss + 0.5 * loss, 1.5
    else:
        factor = -2.0 if upstream == "minus_two" else 0.0
        total = loss * factor
    for name, grad in loss_and_grads(total, problem).items():
        if name != "loss":
            torch.testing.assert_close(grad, factor * unit[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_retained_graph_gives_the_same_gradients_again(backend, dtype):
    problem = random_problem(bias=True).to(dtype)
    loss = fused_loss(problem, backend=backend)
    first = torch.autograd.grad(3 * loss, problem.tensors, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(3 * loss, problem.tensors, retain_graph=True)
    other = torch.autograd.grad(6 * loss, problem.tensors)
    for a, b, c, d in zip(first, copies, second, other, strict=True):
        assert torch.equal(a, b), "a second backward changed gradients that were handed out"
        assert torch.equal(b, c)
        torch.testing.assert_close(d, 2 * b, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    problem = random_problem().to(torch.float32)
    expected = loss_and_grads(fused_loss(problem), problem)

    def loss(hidden, weight):
        return fused_loss(replace(problem, hidden=hidden, weight=weight))

    again = checkpoint(loss, problem.hidden, problem.weight, use_reentrant=use_reentrant)
    again.backward()
    assert torch.equal(problem.hidden.grad, expected["hidden"])
    assert torch.equal(problem.weight.grad, expected["weight"])


def test_second_backward_inside_autocast_is_the_same():
    problem = random_problem().to(torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = fused_loss(problem, logits_dtype=torch.float32)
        first, second = (torch.autograd.grad(loss, problem.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_autocast_equals_inputs_in_its_dtype(backend, logits_dtype):
    """Float32 parameters under autocast(bfloat16): the computation of bfloat16 inputs, gradients in float32."""
    problem = random_problem(bias=True).to(torch.float32)
    head = {"backend": backend, "logits_dtype": logits_dtype, "max_logits_bytes": 13 * 31 * 4}
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = fused_loss(problem, **head)
        inside = loss_and_grads(loss, problem)
    half = problem.to(torch.bfloat16)
    expected = loss_and_grads(fused_loss(half, **head), half)
    for name, value in inside.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name].float()), name


def test_tied_weight_sums_both_gradients():
    """The head is the embedding: its gradient is the sum of both uses."""
    weight = torch.randn(31, 7, requires_grad=True)
    tokens, targets = torch.randint(0, 31, (2, 2, 4)), torch.randint(0, 31, (2, 2, 4))

    def grad(loss_of_logits_or_hidden):
        return torch.autograd.grad(loss_of_logits_or_hidden(torch.tanh(weight[tokens])), weight)[0]

    fused = grad(lambda hidden: linear_cpo_loss(hidden, weight, targets).loss)
    problem = random_problem(ref=False)
    dense_grad = grad(lambda h: eager_loss(replace(problem, hidden=h, weight=weight, targets=targets)))
    torch.testing.assert_close(fused, dense_grad)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_predict_nothing_get_exactly_zero(backend, layout):
    """Even where they hold NaN: they enter no product."""
    problem = (random_problem if layout == "padded" else packed_problem)().to(torch.float32)
    used = torch.zeros(problem.hidden.shape[:-1], dtype=torch.bool)
    if layout == "padded":
        used = problem.targets != -100
    else:
        used[problem.layout.rows[problem.targets != -100]] = True
    assert 0 < (~used).sum() < used.numel()
    expected = loss_and_grads(fused_loss(problem, backend=backend), problem)
    with torch.no_grad():
        problem.hidden[~used] = torch.nan
    result = loss_and_grads(fused_loss(problem, backend=backend), problem)
    for name, value in expected.items():
        assert torch.equal(result[name], value), name
    assert (result["hidden"][~used] == 0).all()
    assert (result["hidden"][used] != 0).any(-1).all()


@pairwise({"backend": BACKENDS, "where": ["hidden", "weight", "bias"], "bad": [torch.nan, torch.inf]})
def test_nan_and_infinity_propagate(backend, bad, where):
    problem = random_problem(bias=True).to(torch.float32)
    with torch.no_grad():
        getattr(problem, where).view(-1)[-1] = bad
    if where == "hidden":
        problem.targets[-1, -1, -1] = 3
    out = linear_cpo_loss(**problem.arguments(), backend=backend)
    assert not out.loss.isfinite()


def test_fully_masked_candidate_is_absent_and_never_nan():
    problem = random_problem(G=2, C=3).to(torch.float32)
    problem.targets[0, 1] = -100
    out = linear_cpo_loss(**problem.arguments(), mle_weight=0.1)
    assert out.logps[0, 1] == 0
    assert out.rewards[0, 1] == 0
    assert all(value.isfinite().all() for value in out)
    without = replace(
        problem,
        hidden=problem.hidden.detach()[:1, [0, 2]].requires_grad_(),
        targets=problem.targets[:1, [0, 2]],
        ref_logps=problem.ref_logps[:1, [0, 2]],
    )
    with_absent = replace(
        problem,
        hidden=problem.hidden.detach()[:1].requires_grad_(),
        targets=problem.targets[:1],
        ref_logps=problem.ref_logps[:1],
    )
    one, other = (linear_cpo_loss(**p.arguments(), mle_weight=0.1) for p in (without, with_absent))
    for name in ("loss", "contrastive_loss", "nll_loss", "accuracy", "margin"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_global_denominators():
    problem = random_problem(mle_weight=0.5).to(torch.float32)
    whole = linear_cpo_loss(**problem.arguments(), **problem.options)
    tokens = int((problem.targets[:, 0] != -100).sum())
    scaled = problem.with_options(num_groups=torch.tensor(12), num_target_tokens=2 * tokens)
    out = linear_cpo_loss(**scaled.arguments(), **scaled.options)
    torch.testing.assert_close(out.contrastive_loss, whole.contrastive_loss * 3 / 12)
    torch.testing.assert_close(out.nll_loss, whole.nll_loss / 2)
    grads = [loss_and_grads(fused_loss(p), p)["weight"] for p in (scaled, problem)]
    contrast_only = problem.with_options(mle_weight=0.0)
    contrast_grad = loss_and_grads(fused_loss(contrast_only), contrast_only)["weight"]
    torch.testing.assert_close(grads[0], contrast_grad / 4 + (grads[1] - contrast_grad) / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_with_global_denominators_add_up(backend):
    problem = random_problem(G=4, mle_weight=0.4).to(torch.float32)
    expected = loss_and_grads(fused_loss(problem, backend=backend), problem)
    tokens = int((problem.targets[:, 0] != -100).sum())
    total = dict.fromkeys(("loss", "weight"), 0.0)
    for g in range(4):
        part = replace(
            problem,
            hidden=problem.hidden[g : g + 1],
            targets=problem.targets[g : g + 1],
            ref_logps=problem.ref_logps[g : g + 1],
        ).with_options(num_groups=4, num_target_tokens=tokens)
        loss = fused_loss(part, backend=backend)
        total["loss"] += loss.detach()
        total["weight"] += torch.autograd.grad(loss, problem.weight)[0]
    for name, value in total.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("order", [[1, 0, 2], [2, 1, 0]])
def test_order_of_groups_and_candidates_does_not_matter(order):
    problem = random_problem().to(torch.float64)
    moved = replace(
        problem,
        hidden=problem.hidden.detach()[order].flip(1).requires_grad_(),
        targets=problem.targets[order].flip(1),
        ref_logps=problem.ref_logps[order].flip(1),
        ranks=torch.tensor([[1, 1, 0]] * 3),
    )
    before, after = (loss_and_grads(fused_loss(p), p) for p in (problem, moved))
    torch.testing.assert_close(after["loss"], before["loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(after["weight"], before["weight"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(after["hidden"], before["hidden"][order].flip(1), rtol=1e-10, atol=1e-12)


def test_padded_and_packed_forms_agree():
    problem = random_problem(mle_weight=0.2).to(torch.float32)
    G, C, T = problem.targets.shape
    layout = CandidateLayout(range(0, G * C * T + 1, T), range(0, G * C + 1, C))
    padded = linear_cpo_loss(**problem.arguments(), **problem.options)
    packed = linear_cpo_loss(
        problem.hidden.reshape(-1, 7),
        problem.weight,
        problem.targets.reshape(-1),
        layout=layout,
        ref_logps=problem.ref_logps.reshape(-1),
        **problem.options,
    )
    assert packed.logps.shape == (G * C,)
    assert padded.logps.shape == (G, C)
    for name, a, b in zip(padded._fields, padded, packed, strict=True):
        assert torch.equal(a.reshape(-1), b.reshape(-1)), name


GRADCHECKED = (
    "one_word",
    "one_token_segments",
    "whole_head",
    "length_normalized_with_margin",
    "ranked",
    "several_positives",
    "packed_shared_rows",
    "packed_whole_head",
)


@pytest.mark.parametrize("rows", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck(name, rows):
    problem = PROBLEMS[name]().to(torch.float64)
    head = {"max_logits_bytes": rows and budget_of(problem, rows)}

    def loss(hidden, weight, bias=None):
        return fused_loss(replace(problem, hidden=hidden, weight=weight, bias=bias), **head)

    torch.autograd.gradcheck(loss, [t for t in problem.tensors if t is not None], fast_mode=True)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_gradcheck_of_any_loss(layout):
    problem = (random_problem if layout == "padded" else packed_problem)(bias=True).to(torch.float64)

    def loss(hidden, weight, bias):
        def squares(logps, groups):
            return (logps.reshape(-1) ** 2).sum() / 50 + logps.sum()

        return linear_sequence_loss(
            hidden,
            weight,
            problem.targets,
            squares,
            layout=problem.layout,
            bias=bias,
            max_logits_bytes=budget_of(problem, 9),
        )

    torch.autograd.gradcheck(loss, problem.tensors, fast_mode=True)


@pairwise({"backend": BACKENDS, "layout": ["padded", "packed"], "rows": BUDGETS})
def test_any_loss_sees_whole_groups_and_which_they_are(backend, layout, rows):
    """A contrast with references looked up by group equals the built-in one."""
    problem = (random_problem if layout == "padded" else packed_problem)(beta=0.3).to(torch.float32)
    cu_groups = None if problem.layout is None else problem.layout.cu_groups
    ranks = [0, 1, 0, 1, 2, 0, 0, 1, 3]
    seen = []

    def loss_fn(logps, groups):
        assert isinstance(groups, range)
        seen.extend(groups)
        if cu_groups is None:
            assert logps.shape == (len(groups), 3)
            ref = problem.ref_logps[groups.start : groups.stop].float()
            scores, present = 0.3 * (logps - ref), (problem.targets != -100).any(-1)[groups.start : groups.stop]
            worse = scores[:, 1:].masked_fill(~present[:, 1:], -torch.inf)
            return (torch.cat([scores[:, :1], worse], 1).logsumexp(1) - scores[:, 0]).sum()
        segments = slice(cu_groups[groups.start], cu_groups[groups.stop])
        assert logps.shape == (segments.stop - segments.start,)
        total = logps.new_zeros(())
        for g in groups:
            members = [s for s in range(cu_groups[g], cu_groups[g + 1]) if s != 3]  # segment 3 is absent
            scores = {s: 0.3 * (logps[s - segments.start] - problem.ref_logps[s].float()) for s in members}
            for i in members:
                lower = [scores[j] for j in members if ranks[j] > ranks[i]]
                total = total + (torch.stack([scores[i], *lower]).logsumexp(0) - scores[i] if lower else 0.0)
        return total

    head = {"backend": backend, "max_logits_bytes": rows and budget_of(problem, rows)}
    loss = linear_sequence_loss(problem.hidden, problem.weight, problem.targets, loss_fn, layout=problem.layout, **head)
    assert seen == [0, 1, 2]
    built_in = replace(problem, layout=problem.layout and replace(problem.layout, ranks=ranks))
    expected = loss_and_grads(3 * fused_loss(built_in, **head), built_in)
    for name, value in loss_and_grads(loss, problem).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        again = linear_sequence_loss(
            problem.hidden, problem.weight, problem.targets, loss_fn, layout=problem.layout, **head
        )
    torch.testing.assert_close(again, loss.detach())


def test_module_form():
    problem = random_problem(mle_weight=0.2).to(torch.float32)
    module = LinearCPOLoss(mle_weight=0.2, beta=0.3)
    out = module(problem.hidden, problem.weight, problem.targets, ref_logps=problem.ref_logps)
    expected = linear_cpo_loss(**problem.arguments(), mle_weight=0.2, beta=0.3)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert "beta=0.3" in repr(module)


def test_contrast_from_the_output_of_the_log_likelihoods():
    """linear_sequence_logps and contrastive_loss compose into the same loss and gradients."""
    problem = random_problem(G=2, C=2, beta=0.3).to(torch.float32)
    logps = linear_sequence_logps(problem.hidden, problem.weight, problem.targets)
    loss = contrastive_loss(logps, ref_logps=problem.ref_logps, beta=0.3)
    expected = loss_and_grads(fused_loss(problem), problem)
    for name, value in loss_and_grads(loss, problem).items():
        torch.testing.assert_close(value, expected[name])


def test_output_is_detached_but_for_the_loss():
    problem = random_problem().to(torch.float32)
    out = linear_cpo_loss(**problem.arguments())
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in out[1:])
    with torch.no_grad():
        assert not linear_cpo_loss(**problem.arguments()).loss.requires_grad
    logits, targets = dense(problem)
    tokens = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    sums = (tokens * (targets >= 0)).sum(-1)
    torch.testing.assert_close(out.logps, sums.detach())
    present = (targets >= 0).any(-1)
    rewards = (0.1 * (sums - problem.ref_logps.float())).where(present, 0.0)
    torch.testing.assert_close(out.rewards, rewards.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_references_ranks_and_bias(backend):
    """Backends take addresses of their elements one after another."""
    problem = random_problem(G=3, C=4, bias=True).to(torch.float32)
    ranks = torch.tensor([[0, 1, 2, 1]]).expand(3, 4)
    wide = torch.randn(3, 4, 2)
    for ref in (wide[..., 0], torch.tensor(-7.0).expand(3, 4), torch.randn(4, 3).t()):
        bias = torch.randn(62)[::2].requires_grad_()
        strided = replace(problem, ref_logps=ref, ranks=ranks, bias=bias)
        dense_copy = replace(
            problem, ref_logps=ref.clone(), ranks=ranks.clone(), bias=bias.detach().clone().requires_grad_()
        )
        found = loss_and_grads(fused_loss(strided, backend=backend), strided)
        expected = loss_and_grads(fused_loss(dense_copy, backend="torch"), dense_copy)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)
