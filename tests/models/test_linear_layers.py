"""Linear layers by our products: the same numbers, where nothing else has a hand in them."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from pairwise import pairwise
from tolerance import assert_accurate
from torch import nn
from transformers.pytorch_utils import Conv1D

from cpo_kernels.kernels.cpu.gemm import gemm, gemm_supported
from cpo_kernels.models import linear_layers
from cpo_kernels.models.linear_layers import by_our_products

pytestmark = pytest.mark.cpu


class Two(nn.Module):
    """A large layer of each kind, one of them without a bias, and a small one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.small = Conv1D(640, 512), nn.Linear(640, 512, bias=False), nn.Linear(512, 7)
        nn.init.normal_(self.first.bias)

    def forward(self, x):
        return self.small(self.second(self.first(x)))


@pytest.fixture
def products():
    """Count the products of ours."""
    with patch.object(linear_layers, "gemm", side_effect=gemm) as counted:
        yield counted


@pairwise({"dtype": [torch.float32, torch.bfloat16], "shape": [(512,), (1, 512), (3, 5, 512), (2, 0, 512)]})
def test_large_layers_run_by_our_product(products, dtype, shape):
    torch.manual_seed(0)
    model, x = Two().to(dtype), torch.randn(shape).to(dtype)
    with torch.no_grad():
        eager, exact = model(x), model.double()(x.double())
        model.to(dtype)
        with by_our_products(model):
            found = model(x)
    assert products.call_count == (2 if x.numel() and gemm_supported(dtype, dtype) else 0)
    assert found.shape == eager.shape and found.dtype == dtype
    if x.numel():
        assert_accurate(found, eager, exact, "output")


def changed_forward(model, x):
    model.first.forward = lambda x: torch.ones(*x.shape[:-1], 640)
    return model(x)


def under_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def with_gradients(model, x):
    with torch.enable_grad():
        out = model(x)
    assert out.requires_grad
    return out


@pytest.mark.parametrize(
    ("run", "expected"), [(with_gradients, 0), (under_autocast, 0), (changed_forward, 1), (lambda m, x: m(x), 2)]
)
def test_what_else_has_a_hand_in_a_layer_runs_as_it_is(products, run, expected):
    if not gemm_supported(torch.float32, torch.float32):
        pytest.skip("this machine has no product of ours")
    model, x = Two(), torch.randn(3, 512)
    with torch.no_grad():
        wanted = run(model, x)
        products.reset_mock()
        with by_our_products(model):
            torch.testing.assert_close(run(model, x), wanted, rtol=1e-4, atol=1e-4)
    assert products.call_count == expected


def test_a_bias_of_another_dtype_is_torchs_error():
    layer = nn.Linear(512, 640).bfloat16()
    layer.bias = nn.Parameter(layer.bias.float())
    with torch.no_grad(), by_our_products(layer), pytest.raises(RuntimeError):
        layer(torch.randn(2, 512).bfloat16())


def test_hooks_run_and_everything_is_as_before(products):
    model, seen = Two(), []
    model.second.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(RuntimeError, match="stop"), by_our_products(model):
        with torch.no_grad():
            model(torch.randn(2, 512))
        raise RuntimeError("stop")
    assert seen == [1]
    assert not any("forward" in vars(module) for module in model.modules())
