"""Which backend serves which operation: the committed table, its rules, and calls that mix backends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import PROBLEMS, assert_problem_accurate, fused_loss, loss_and_grads, random_problem

from cpo_kernels import cpo_loss, linear_cpo_loss
from cpo_kernels.kernels import registry, selection
from cpo_kernels.kernels.device import architecture
from cpo_kernels.kernels.selection import Choice, Sizes, choices_for, overridden

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
HERE = architecture(CPU)
SIZES = Sizes(50257, torch.float32, 768, torch.bfloat16)
ALL = ("torch", "triton", "cuda")


def test_the_committed_table_names_backends_and_figures():
    assert set(selection.TABLE) >= {"source", "prefer", "choices"}
    for names in selection.PREFERRED.values():
        assert set(names) <= {"torch", "cpu", "triton", "cuda"}
    for choice in selection.CHOICES:
        assert choice.backend in ("triton", "cuda", None)
        assert choice.arch.startswith(("sm_", "gfx")) and choice.measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("row_sideways", "sm_90", "cuda"), "operation 'row_sideways', expected one of"),
        (("row_forward", "sm_90", None), "operation 'row_forward' needs a backend"),
    ],
)
def test_a_choice_that_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Choice(*arguments)


def found(*choices: Choice, name: str = "auto", arch: str = "sm_90", sizes: Sizes = SIZES, available=ALL):
    with overridden(*choices):
        return choices_for(name, arch, sizes, available)


def test_the_first_that_matches_counts():
    narrow = Choice("row_forward", "sm_90", "cuda", vocab_at_most=65536)
    wide = Choice("row_forward", "sm_90", "triton")
    assert found(narrow, wide) == {"row_forward": "cuda"}
    assert found(wide, narrow) == {"row_forward": "triton"}
    assert found(narrow, wide, sizes=Sizes(128256, torch.float32)) == {"row_forward": "triton"}
    assert found(narrow, sizes=Sizes(128256, torch.float32)) == {}
    assert found(narrow, wide, arch="sm_80") == {}
    assert found(narrow, wide, available=("torch", "triton")) == {}  # nobody said that triton's is better there


def test_row_operations_go_by_the_dtype_of_logits_and_linear_ones_by_that_of_hidden():
    row = Choice("row_backward", "sm_90", "cuda", dtype="float32")
    linear = Choice("linear_kept", "sm_90", "cuda", dtype="bfloat16", hidden_at_most=768)
    assert found(row, linear) == {"row_backward": "cuda", "linear_kept": "cuda"}
    assert found(row, linear, sizes=Sizes(9, torch.bfloat16, 1024, torch.bfloat16)) == {}


def test_a_backend_that_is_named_takes_its_own_ways_around_or_none():
    choices = (
        Choice("linear_forward", "sm_90", None, hidden_at_most=512),
        Choice("linear_forward", "sm_90", "cuda", hidden_at_most=1024),
        Choice("linear_forward", "sm_90", "triton"),
    )
    assert found(*choices, name="cuda") == found(*choices) == {"linear_forward": "cuda"}
    assert found(*choices, name="triton") == {}  # where it was measured, another was faster
    assert found(*choices, name="triton", sizes=Sizes(9, torch.bfloat16, 4096, torch.bfloat16)) == {
        "linear_forward": "triton"
    }
    small = Sizes(50257, torch.bfloat16, 512, torch.bfloat16)
    assert found(*choices, name="cuda", sizes=small) == found(*choices, sizes=small) == {"linear_forward": None}
    assert found(*choices, name="torch") == {}


def test_what_is_overridden_comes_back():
    before = list(selection.CHOICES)
    with pytest.raises(RuntimeError), overridden(Choice("contrast", "sm_90", "cuda")):
        raise RuntimeError
    assert before == selection.CHOICES


@pytest.mark.parametrize("name", [name for name in ("auto", "torch", "cpu") if name in ("auto", *registry.AVAILABLE)])
def test_choices_of_another_architecture_change_nothing_here(name):
    measured = [Choice(operation, "sm_90", "cuda", measured="1.1x") for operation in selection.OPERATIONS]
    with overridden():
        base = registry.select(name, CPU, torch.float32, SIZES)
    with overridden(*measured):
        assert registry.select(name, CPU, torch.float32, SIZES) is base


def test_a_call_gets_kernels_of_several_backends(emulated_cuda):
    base = registry.select("auto", CPU, torch.float32, SIZES)
    choices = [Choice(operation, HERE, "cuda") for operation in ("row_forward", "contrast", "linear_kept")]
    with overridden(*choices, Choice("linear_forward", HERE, None)):
        mixed = registry.select("auto", CPU, torch.float32, SIZES)
        assert registry.select("auto", CPU, torch.float32) is base  # of unknown sizes
    assert mixed.name == base.name == ("cpu" if "cpu" in registry.AVAILABLE else "torch")
    assert mixed.rows.forward is emulated_cuda.rows.forward
    assert mixed.differentiable_rows is emulated_cuda.differentiable_rows
    assert mixed.rows.backward_ is base.rows.backward_
    assert mixed.contrast is emulated_cuda.contrast
    assert mixed.ways == {"linear_kept": emulated_cuda.optional["linear_kept"]}
    assert registry.select("auto", CPU, torch.float32, SIZES) is base


def test_compiled_code_takes_no_choice(emulated_cuda, monkeypatch):
    """The device cannot be asked while a graph is traced."""
    base = registry.select("auto", CPU, torch.float32)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with overridden(Choice("row_forward", HERE, "cuda")):
        assert registry.select("auto", CPU, torch.float32, SIZES) is base


def test_groups_are_as_large_as_each_launch_takes(emulated_cuda, monkeypatch):
    wider = replace(emulated_cuda, contrast_candidates=2048, logits_loss=None)
    monkeypatch.setitem(registry.BACKENDS, "triton", wider)
    monkeypatch.setattr(registry, "AVAILABLE", ("cuda", "triton"))
    for contrast, logits_loss, limit in (("cuda", None, 1024), ("triton", None, 2048), ("triton", "cuda", 1024)):
        with overridden(Choice("contrast", HERE, contrast), Choice("logits_loss", HERE, logits_loss)):
            served = registry.select("auto", CPU, torch.float32, SIZES)
            named = registry.select("cuda", CPU, torch.float32, SIZES)
        assert served.contrast_candidates == limit
        assert (named.logits_loss is None) == (served.logits_loss is None) == (logits_loss is None)


def test_other_row_kernels_leave_no_way_around_them(emulated_cuda):
    """Those of a vocabulary-parallel head know of other processes, what goes around them does not."""
    choices = [Choice(operation, HERE, "cuda") for operation in selection.OPTIONAL]
    with overridden(*choices):
        served = registry.select("cuda", CPU, torch.float32, SIZES)
    assert served.ways.keys() == set(selection.OPTIONAL)
    other = served.with_rows(registry.ROWS)
    assert other.rows is registry.ROWS
    assert not other.ways and other.linear_statistics is None


@pytest.mark.parametrize("name", ["larger_prime_vocab", "packed_whole_head"])
def test_the_loss_with_kernels_of_two_backends(emulated_cuda, name):
    with overridden(*(Choice(operation, HERE, "cuda") for operation in ("row_forward", "contrast", "logits_loss"))):
        assert_problem_accurate(PROBLEMS[name](), torch.bfloat16, backend="auto", max_logits_bytes=8192)


def test_given_logits_take_the_one_launch_where_it_is_chosen(emulated_cuda, emulator, monkeypatch):
    launches = []
    launch = emulator.cpo_loss
    monkeypatch.setattr(emulator, "cpo_loss", lambda **arguments: launches.append(1) or launch(**arguments))
    logits, targets = torch.randn(2, 3, 4, 65, requires_grad=True), torch.randint(0, 65, (2, 3, 4))
    plain = cpo_loss(logits, targets)
    assert not launches
    choices = Choice("logits_loss", HERE, "cuda", vocab_at_most=65), Choice("contrast", HERE, "cuda")
    with overridden(*choices):
        chosen = cpo_loss(logits, targets)
        cpo_loss(torch.randn(2, 3, 4, 66), torch.zeros_like(targets))
    assert launches == [1]
    torch.testing.assert_close(chosen.loss, plain.loss)
    grads = [torch.autograd.grad(out.loss, logits)[0] for out in (chosen, plain)]
    torch.testing.assert_close(*grads)


def test_the_loss_by_a_fused_forward_of_another_backend(emulated_cuda, emulator, monkeypatch):
    problem = random_problem(H=16, V=301).to(torch.bfloat16)
    launches = []
    launch = emulator.linear_forward
    monkeypatch.setattr(emulator, "linear_forward", lambda **arguments: launches.append(1) or launch(**arguments))
    with overridden(Choice("linear_forward", HERE, "cuda")), torch.no_grad():
        assert registry.select("auto", CPU, torch.bfloat16, SIZES).ways.keys() == {"linear_forward"}
        out = backends_loss(problem)
    assert launches
    torch.testing.assert_close(out, backends_loss(problem.to(torch.float64)).float(), rtol=1e-3, atol=1e-3)


def backends_loss(problem):
    return linear_cpo_loss(**problem.arguments(), **problem.options).loss.detach()


@pytest.mark.parametrize("operation", [*selection.EXCHANGED, *selection.OPTIONAL])
@pytest.mark.parametrize("options", [{}, {"contrast_weight": 0.0, "mle_weight": 1.0}], ids=["contrast", "likelihood"])
def test_a_choice_takes_what_a_call_without_it_does(emulated_cuda, operation, options):
    """A bias in float64, which kernels get in float32."""
    problem = random_problem(H=16, V=301, bias=True).with_options(**options)
    hidden, weight = (t.bfloat16().requires_grad_() for t in (problem.hidden, problem.weight))
    problem = replace(problem, hidden=hidden, weight=weight, bias=problem.bias.requires_grad_())
    plain = loss_and_grads(fused_loss(problem, backend="torch"), problem, upstream=3.0)
    with overridden(Choice(operation, HERE, "cuda")):
        for backend in ("auto", "cuda"):
            chosen = loss_and_grads(fused_loss(problem, backend=backend), problem, upstream=3.0)
            for name, expected in plain.items():
                assert chosen[name].dtype == expected.dtype
                torch.testing.assert_close(chosen[name], expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
