"""What stands in for verl's two functions, without verl: signatures as recorded, values and gradients in float64.

`make test-frameworks` compares both with verl itself, in tests/frameworks/test_verl.py.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import pytest
import torch
from recorded_signatures import VERL
from tolerance import assert_accurate

from cpo_kernels.integrations import verl

pytestmark = pytest.mark.cpu


def problem(dtype: torch.dtype, absent: bool = True) -> tuple[torch.Tensor, ...]:
    hidden, weight = torch.randn(3, 5, 8, dtype=dtype), torch.randn(61, 8, dtype=dtype)
    labels = torch.randint(0, 61, (3, 5))
    if absent:
        labels[1, 2:] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def eager(hidden, weight, labels, temperature):
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    absent = labels == -100
    logps = log_p.gather(-1, labels.masked_fill(absent, 0)[..., None]).squeeze(-1)
    return logps.masked_fill(absent, 0.0), -(log_p.exp() * log_p).sum(-1).masked_fill(absent, 0.0)


def with_grads(outputs, hidden, weight) -> dict[str, torch.Tensor]:
    logps, entropy = outputs
    grads = torch.autograd.grad((logps.double() ** 2).sum() - (entropy.double() ** 2).sum(), (hidden, weight))
    return {"logps": logps.detach(), "entropy": entropy.detach(), "hidden": grads[0], "weight": grads[1]}


def test_signatures():
    mine = {
        "FusedLinearForPPO": verl.FusedLinearForPPO,
        "FusedLinearForPPO.forward": verl.FusedLinearForPPO().forward,
        "linear_cross_entropy": verl.linear_cross_entropy,
    }
    assert {name: list(inspect.signature(function).parameters) for name, function in mine.items()} == VERL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_module(dtype):
    hidden, weight, labels = problem(dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = with_grads(eager(*exact, labels, 0.7), *exact)
    same_dtype = with_grads(eager(hidden, weight, labels, 0.7), hidden, weight)
    found = with_grads(verl.FusedLinearForPPO(chunk_size=2)(hidden, weight, labels.int(), 0.7), hidden, weight)
    for name, value in found.items():
        assert_accurate(value, same_dtype[name], wanted[name], name)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_function(reduction):
    hidden, weight, labels = problem(torch.float32, absent=False)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]

    def reduced(outputs):
        logps, entropy = (x.flatten() for x in outputs)
        return {"none": logps, "sum": logps.sum(), "mean": logps.mean()}[reduction], entropy

    wanted = with_grads(reduced(eager(*exact, labels, 0.7)), *exact)
    same_dtype = with_grads(reduced(eager(hidden, weight, labels, 0.7)), hidden, weight)
    found = with_grads(verl.linear_cross_entropy(hidden, weight, labels, 0.7, reduction), hidden, weight)
    for name, value in found.items():
        assert_accurate(value, same_dtype[name], wanted[name], name)


def test_refusals():
    hidden, weight, labels = problem(torch.float32)
    with pytest.raises(ValueError, match="impl_backend must be 'torch' or 'liger', got 'cuda'"):
        verl.FusedLinearForPPO(impl_backend="cuda")
    with pytest.raises(ValueError, match="reduction must be one of"):
        verl.linear_cross_entropy(hidden, weight, labels, 1.0, "average")
    with pytest.raises(ValueError, match="target of token 0 is 61"):
        verl.linear_cross_entropy(hidden, weight, labels.masked_fill(labels == labels[0, 0], 61))


@pytest.fixture
def modules(monkeypatch):
    """Modules with the names of verl's, each with the attribute that is replaced; one of two Megatron models."""
    attributes = {where: name for name, where in verl.OWNERS.items()} | {verl.USERS[0]: "linear_cross_entropy"}
    made = {}
    for where, name in attributes.items():
        made[where] = ModuleType(where)
        setattr(made[where], name, "stock")
        monkeypatch.setitem(sys.modules, where, made[where])
    for where in ("verl", "verl.utils", "verl.utils.experimental", "verl.utils.kernel"):
        monkeypatch.setitem(sys.modules, where, ModuleType(where))
    return [(made[where], name) for where, name in attributes.items()]


def test_replaced_wherever_a_model_of_verl_looks(modules):
    with verl.fused_kernels():
        assert all(getattr(module, name) is getattr(verl, name) for module, name in modules)
    assert all(getattr(module, name) == "stock" for module, name in modules)
    verl.patch_fused_kernels()
    verl.patch_fused_kernels()  # twice changes nothing
    assert all(getattr(module, name) is getattr(verl, name) for module, name in modules)
