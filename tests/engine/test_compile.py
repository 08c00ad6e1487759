"""``torch.compile(fullgraph=True)`` of every public function: the same numbers, the same errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import DEVICE
from problems import (
    BACKENDS,
    PROBLEMS,
    Problem,
    backends_on,
    fused_loss,
    loss_and_grads,
    packed_problem,
    random_problem,
)
from tolerance import relative_error
from torch._dynamo.testing import CompileCounter

from cpo_kernels import (
    CandidateLayout,
    CPOLoss,
    LinearCPOLoss,
    contrastive_loss,
    cpo_loss,
    linear_cpo_loss,
    linear_sequence_logps,
    linear_sequence_loss,
    linear_token_logps,
    sequence_logps,
    token_logps,
)

HOST_BACKENDS = backends_on(torch.device("cpu"))
OPTIONS = {"beta": 0.3, "margin": 0.1, "mle_weight": 0.2, "softcap": 4.0, "temperature": 1.2}
HEAD = {"softcap": 4.0, "temperature": 1.2}


def squares(logps, groups):
    return (logps.reshape(-1) ** 2).sum() / 50


# Each takes hidden states, which require a gradient, and a padded problem.
FUNCTIONS = {
    "linear_cpo_loss": lambda h, p: linear_cpo_loss(h, p.weight, p.targets, ref_logps=p.ref_logps, **OPTIONS).loss,
    "filtered": lambda h, p: (
        linear_cpo_loss(h, p.weight, p.targets, candidate_eps=0.01, grad_filter_eps=0.01, bias=p.bias, **OPTIONS).loss
    ),
    "dense_rows": lambda h, p: (
        linear_cpo_loss(h, p.weight, p.targets, skip_absent_rows=False, bias=p.bias, **OPTIONS).loss
    ),
    "linear_sequence_loss": lambda h, p: linear_sequence_loss(h, p.weight, p.targets, squares, **HEAD),
    "linear_sequence_logps": lambda h, p: linear_sequence_logps(h, p.weight, p.targets, bias=p.bias, **HEAD).sum(),
    "linear_token_logps": lambda h, p: linear_token_logps(h, p.weight, p.targets, bias=p.bias, **HEAD).square().sum(),
    "cpo_loss": lambda h, p: cpo_loss(h @ p.weight.T, p.targets, ref_logps=p.ref_logps, bias=p.bias, **OPTIONS).loss,
    "sequence_logps": lambda h, p: sequence_logps(h @ p.weight.T, p.targets, bias=p.bias, **HEAD).sum(),
    "token_logps": lambda h, p: token_logps(h @ p.weight.T, p.targets, bias=p.bias, **HEAD).square().sum(),
    "contrastive_loss": lambda h, p: contrastive_loss(h.sum((-1, -2)), ref_logps=p.ref_logps, beta=0.3),
    "CPOLoss": lambda h, p: CPOLoss(**OPTIONS)(h @ p.weight.T, p.targets, ref_logps=p.ref_logps).loss,
    "LinearCPOLoss": lambda h, p: LinearCPOLoss(**OPTIONS)(h, p.weight, p.targets, ref_logps=p.ref_logps).loss,
}
PACKED_FUNCTIONS = {
    "linear_cpo_loss": lambda h, p: (
        linear_cpo_loss(h, p.weight, p.targets, layout=p.layout, ref_logps=p.ref_logps, bias=p.bias, **OPTIONS).loss
    ),
    "linear_sequence_loss": lambda h, p: linear_sequence_loss(h, p.weight, p.targets, squares, layout=p.layout, **HEAD),
    "linear_sequence_logps": lambda h, p: linear_sequence_logps(
        h, p.weight, p.targets, layout=p.layout, bias=p.bias, **HEAD
    ).sum(),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graph of an earlier test, or of an earlier version of an operator from a cache; no pool of workers."""
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        yield
    torch.compiler.reset()


def assert_compiled_equals_eager(function, problem: Problem, compiler: str) -> None:
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    results = []
    for call in (function, compiled):
        loss = call(problem.hidden, problem)
        tensors = [t for t in problem.tensors if t is not None]
        results.append((loss.detach(), *torch.autograd.grad(3 * loss, tensors, allow_unused=True)))
    assert any(grad is not None for grad in results[0][1:])
    for eager, other in zip(*results, strict=True):
        assert (eager is None) == (other is None)
        if eager is not None:
            torch.testing.assert_close(other, eager)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_padded_functions_compile_without_a_break(name):
    assert_compiled_equals_eager(FUNCTIONS[name], random_problem(bias=True).to(torch.float32), "aot_eager")


@pytest.mark.parametrize("name", PACKED_FUNCTIONS)
def test_packed_functions_compile_without_a_break(name):
    assert_compiled_equals_eager(PACKED_FUNCTIONS[name], packed_problem(bias=True).to(torch.float32), "aot_eager")


@pytest.mark.parametrize("name", ["linear_cpo_loss", "cpo_loss"])
def test_inductor_gives_the_same(name):
    assert_compiled_equals_eager(FUNCTIONS[name], random_problem(bias=True).to(torch.float32), "inductor")


def test_inductor_reads_the_gain_of_float16_gradients_in_its_own_dtype():
    """The number of target tokens, a float64 tensor, is part of the gain where there is an NLL."""
    problem = random_problem(G=2, C=2).to(torch.float16)
    assert_compiled_equals_eager(FUNCTIONS["linear_cpo_loss"], problem, "inductor")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ranked", "several_positives", "length_normalized_with_margin"])
def test_objectives_and_backends(name, backend):
    problem = PROBLEMS[name]().to(torch.float32)

    def loss(hidden, problem):
        return fused_loss(replace(problem, hidden=hidden), backend=backend)

    assert_compiled_equals_eager(loss, problem, "aot_eager")


@pytest.mark.parametrize("needs", ["hidden", "weight", "none"])
def test_what_needs_no_gradient_gets_none(needs):
    problem = random_problem(bias=True).to(torch.float32)
    for name in ("hidden", "weight", "bias"):
        getattr(problem, name).requires_grad_(name == needs)
    compiled = torch.compile(lambda p: fused_loss(p), fullgraph=True, backend="aot_eager")
    loss = compiled(problem)
    torch.testing.assert_close(loss, fused_loss(problem))
    assert loss.requires_grad == (needs != "none")
    if needs != "none":
        tensor = getattr(problem, needs)
        torch.testing.assert_close(*(torch.autograd.grad(x, tensor)[0] for x in (loss, fused_loss(problem))))


def test_compiled_inside_a_model_under_autocast():
    problem = random_problem().to(torch.float32)

    def step(hidden, weight):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return linear_cpo_loss(torch.tanh(hidden), weight, problem.targets).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    tensors = problem.hidden, problem.weight
    losses = step(*tensors), compiled(*tensors)
    torch.testing.assert_close(*losses)
    for eager, other in zip(*(torch.autograd.grad(loss, tensors) for loss in losses), strict=True):
        torch.testing.assert_close(other, eager)


def test_float16_gradients_survive_until_the_loss_scale_arrives():
    problem = random_problem(num_groups=2.0**16).to(torch.float16)
    compiled = torch.compile(lambda p: fused_loss(p), fullgraph=True, backend="aot_eager")
    expected = loss_and_grads(fused_loss(problem), problem, upstream=2.0**16)
    result = loss_and_grads(compiled(problem), problem, upstream=2.0**16)
    for name, value in expected.items():
        assert relative_error(result[name], value) < 4 * torch.finfo(torch.float16).eps, name


CHECKED = {
    "linear_cpo_loss": lambda h, w, y, b: linear_cpo_loss(h, w, y, backend=b).loss,
    "linear_token_logps": lambda h, w, y, b: linear_token_logps(h, w, y, backend=b),
    "token_logps": lambda h, w, y, b: token_logps(h @ w.T, y, backend=b),
    "cpo_loss": lambda h, w, y, b: cpo_loss(h @ w.T, y, backend=b).loss,
}


@pytest.mark.cpu  # on a GPU these are device assertions: test_cuda_device.py
@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("name", CHECKED)
def test_bad_targets_are_errors_in_compiled_code_too(name, backend):
    """Found at run time, by the graph that was made for good ones."""
    problem = random_problem(ref=False)
    compiled = torch.compile(CHECKED[name], fullgraph=True, backend="aot_eager")
    good = problem.hidden.float(), problem.weight.float()
    compiled(*good, problem.targets, backend)
    for bad in (31, -1, -(2**40), 2**40):
        targets = problem.targets.clone()
        targets[1, 1, 1] = bad
        with pytest.raises((ValueError, RuntimeError), match="target"):
            compiled(*good, targets, backend)


@pytest.mark.cpu  # on a GPU these are device assertions: test_cuda_device.py
def test_bad_ranks_are_errors_in_compiled_code_too():
    compiled = torch.compile(lambda x, ranks: contrastive_loss(x, ranks=ranks), fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 2), torch.tensor([[0, 1], [1, 0]]))
    with pytest.raises((ValueError, RuntimeError), match="group 1 has no rank-0"):
        compiled(torch.randn(2, 2), torch.tensor([[0, 1], [1, 2]]))


@pytest.mark.cpu  # on a GPU these are device assertions: test_cuda_device.py
@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("name", ["linear_cpo_loss", "cpo_loss"])
def test_groups_without_a_contrast_are_errors_in_compiled_code_too(name, backend):
    problem = random_problem(ref=False)
    compiled = torch.compile(CHECKED[name], fullgraph=True, backend="aot_eager")
    good = problem.hidden.float(), problem.weight.float()
    compiled(*good, problem.targets, backend)
    for absent, message in (((1, 0), "rank-0"), ((1, slice(1, 3)), "contrast")):
        targets = problem.targets.clone()
        targets[absent] = -100
        with pytest.raises((ValueError, RuntimeError), match=message):
            compiled(*good, targets, backend)


def packed_call(rows_per_group: list[int]) -> tuple[torch.Tensor, torch.Tensor, CandidateLayout]:
    """Hidden states, targets and layout of groups with so many candidates, of two tokens each."""
    cu_groups = torch.tensor([0, *rows_per_group]).cumsum(0).tolist()
    layout = CandidateLayout(list(range(0, 2 * cu_groups[-1] + 1, 2)), cu_groups)
    return torch.randn(layout.num_tokens, 8), torch.randint(13, (layout.num_tokens,)), layout


def test_a_batch_of_another_size_compiles_nothing_anew():
    """The compiler makes sizes symbolic when it meets a second one; no third is compiled, nor other counts."""
    counter, weight = CompileCounter(), torch.randn(13, 8)
    compiled = torch.compile(linear_cpo_loss, backend=counter, fullgraph=True)
    for step, (groups, length) in enumerate([(2, 4), (3, 5), (4, 6), (7, 3)]):
        hidden, targets = torch.randn(groups, 3, length, 8), torch.randint(13, (groups, 3, length))
        counts = {"num_groups": 10 + step, "num_target_tokens": 50 + step, "mle_weight": 0.5}
        want = linear_cpo_loss(hidden, weight, targets, **counts)
        torch.testing.assert_close(compiled(hidden, weight, targets, **counts), want, equal_nan=True)
    assert counter.frame_count == 2


def test_other_boundaries_compile_nothing_anew():
    counter, weight = CompileCounter(), torch.randn(13, 8)
    compiled = torch.compile(linear_cpo_loss, backend=counter, fullgraph=True)
    for rows_per_group in ([2, 2], [2, 3, 2], [4, 2], [2, 2, 2, 2], [5, 3]):
        hidden, targets, layout = packed_call(rows_per_group)
        want = linear_cpo_loss(hidden, weight, targets, layout=layout)
        torch.testing.assert_close(compiled(hidden, weight, targets, layout=layout), want, equal_nan=True)
    assert counter.frame_count == 2


def frames(function, calls) -> int:
    """How many graphs the compiler makes of these calls; their results are those of eager execution."""
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), function(*arguments), equal_nan=True)
    return counter.frame_count


WEIGHT = torch.randn(13, 8)
REFERENCES = torch.randn(99)
OF_ANY_SIZE = {
    "linear_cpo_loss": lambda h, y: linear_cpo_loss(h, WEIGHT, y, mle_weight=0.5).loss,
    "linear_token_logps": lambda h, y: linear_token_logps(h, WEIGHT, y),
    "linear_sequence_loss": lambda h, y: linear_sequence_loss(
        h, WEIGHT, y, lambda logps, groups: logps.sub(REFERENCES[groups.start : groups.stop, None]).square().sum()
    ),
    "cpo_loss": lambda h, y: cpo_loss(h @ WEIGHT.T, y, mle_weight=0.5).loss,
    "sequence_logps": lambda h, y: sequence_logps(h @ WEIGHT.T, y),
    "contrastive_loss": lambda h, y: contrastive_loss(h.sum((-1, -2))),
}


@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_any_numbers_of_groups_candidates_and_tokens_are_one_graph(name):
    sizes = [(2, 3, 4), (3, 2, 5), (4, 5, 6), (5, 4, 3), (6, 7, 2), (7, 2, 5), (8, 6, 3), (9, 8, 4), (3, 9, 7)]
    calls = [(torch.randn(*size, 8), torch.randint(13, size)) for size in sizes]
    assert frames(OF_ANY_SIZE[name], calls) <= 2  # sizes that are equal by chance are taken to be one at first


LAYOUTS = [[2, 2], [2, 3, 2], [4, 2], [2, 2, 2, 2], [5, 3], [6, 2, 2], [2] * 7, [9, 3], [2] * 9, [4] * 4]
OF_ANY_LAYOUT = {
    "linear_cpo_loss": lambda h, y, layout: linear_cpo_loss(h, WEIGHT, y, layout=layout).loss,
    "linear_sequence_logps": lambda h, y, layout: linear_sequence_logps(h, WEIGHT, y, layout=layout),
    "linear_sequence_loss": lambda h, y, layout: linear_sequence_loss(
        h, WEIGHT, y, lambda logps, groups: logps.square().sum() + len(groups), layout=layout
    ),
}


@pytest.mark.parametrize("inside", [False, True], ids=["made outside", "made inside"])
@pytest.mark.parametrize("name", OF_ANY_LAYOUT)
def test_any_boundaries_are_one_graph(name, inside):
    function = OF_ANY_LAYOUT[name]
    calls = [(hidden, targets, layout) for hidden, targets, layout in map(packed_call, LAYOUTS)]
    if inside:
        calls = [(h, y, *layout.boundaries) for h, y, layout in calls]
        assert frames(lambda h, y, *boundaries: function(h, y, CandidateLayout(*boundaries)), calls) <= 2
    else:
        assert frames(function, calls) <= 2  # rows that are None make one more


def test_boundaries_of_a_layout_that_is_made_inside_are_checked_when_it_runs():
    def function(hidden, targets, cu_tokens, cu_groups):
        return linear_cpo_loss(hidden, WEIGHT, targets, layout=CandidateLayout(cu_tokens, cu_groups)).loss

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    hidden, targets, layout = packed_call([2, 2])
    compiled(hidden, targets, *layout.boundaries)
    with pytest.raises((ValueError, RuntimeError), match="cu_groups must end at the number of segments, 4, got 3"):
        compiled(hidden, targets, layout.boundaries[0], torch.tensor([0, 2, 3]))
    with pytest.raises(ValueError, match=r"cu_tokens must be int64 .* got torch.float32"):
        CandidateLayout(torch.zeros(3), torch.zeros(2).long())


CHANGING = {
    "linear_cpo_loss": lambda h, y, beta, scale, other: (
        linear_cpo_loss(
            h,
            WEIGHT,
            y,
            beta=beta,
            margin=other,
            mle_weight=other,
            num_groups=3 + 2 * beta,
            temperature=scale,
            logit_scale=scale,
            grad_filter_eps=1e-9 * scale,
        ).loss
    ),
    "linear_sequence_logps": lambda h, y, beta, scale, other: linear_sequence_logps(
        h, WEIGHT, y, temperature=scale, softcap=10 * scale
    ),
    "cpo_loss": lambda h, y, beta, scale, other: (
        cpo_loss(h @ WEIGHT.T, y, beta=beta, margin=other, mle_weight=other, num_groups=3 + 2 * beta).loss
    ),
    "contrastive_loss": lambda h, y, beta, scale, other: contrastive_loss(h.sum((-1, -2)), beta=beta, margin=other),
    "smoothed": lambda h, y, beta, scale, other: contrastive_loss(
        h[:, :2].sum((-1, -2)), beta=beta, label_smoothing=0.01 * other
    ),
}


@pytest.mark.parametrize("name", CHANGING)
def test_other_values_of_the_options_are_one_graph(name):
    hidden, targets = torch.randn(2, 3, 4, 8), torch.randint(13, (2, 3, 4))
    calls = [(hidden, targets, 0.1 + step / 10, 1 + step / 7, 0.05 + step / 5) for step in range(10)]
    assert frames(CHANGING[name], calls) == 1


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_other_values_of_the_options_arrive_in_loss_and_gradient(compiler):
    function = CHANGING["linear_cpo_loss"]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for step in range(3):
        hidden = torch.randn(2 + step, 2, 3, 8, requires_grad=True)
        arguments = (hidden, torch.randint(13, (2 + step, 2, 3)), 0.1 + step, 1.5 + step, 0.25 * step + 0.1)
        losses = compiled(*arguments), function(*arguments)
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in losses))
