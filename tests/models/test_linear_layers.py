"""Linear layers by our products: the same numbers, where nothing else has a hand in them."""

from __future__ import annotations

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
from pairwise import pairwise
from tolerance import assert_accurate
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from cpo_kernels import CandidateLayout, attach_linear_loss
from cpo_kernels.kernels.cpu.gemm import gemm, gemm_supported
from cpo_kernels.models import CPORequest, linear_layers
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


def taken(dtype):
    return dtype == torch.float32 and gemm_supported(dtype, dtype)


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
    assert products.call_count == (2 if x.numel() and taken(dtype) else 0)
    assert found.shape == eager.shape and found.dtype == dtype
    if x.numel():
        assert_accurate(found, eager, exact, "output")


def changed_forward(model, x):
    model.first.forward = lambda x: torch.ones(*x.shape[:-1], 640)
    return model(x)


def under_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def kept_elsewhere(model, x):
    with torch.enable_grad(), torch.autograd.graph.save_on_cpu():
        return model(x)


def counted(model, x):
    with FlopCounterMode(display=False) as counter:
        out = model(x)
    assert counter.get_total_flops() == 2 * 3 * (512 * 640 + 640 * 512 + 512 * 7)
    return out


def transformed(model, x):
    return torch.func.vmap(model)(x)


def compiled(model, x):
    model.second.compile(backend="eager")
    return model(x)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (kept_elsewhere, 0),
        (under_autocast, 0),
        (counted, 0),
        (transformed, 0),
        (compiled, 1),
        (changed_forward, 1),
        (lambda m, x: m(x), 2),
    ],
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


@pairwise(
    {
        "dtype": [torch.float32, torch.bfloat16],
        "shape": [(512,), (3, 5, 512)],
        "frozen": ["nothing", "weight", "bias", "input"],
        "expanded": [False, True],
    }
)
def test_gradients_are_those_of_the_layers(products, dtype, shape, frozen, expanded):
    """Also where the gradient of the output is one number, repeated."""
    torch.manual_seed(0)
    model, x = Two().to(dtype), torch.randn(shape).to(dtype).requires_grad_(frozen != "input")
    del model.small
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    asked = [tensor for tensor in (x, *model.parameters()) if tensor.requires_grad]
    upstream = torch.ones(()).expand(*shape[:-1], 512) if expanded else torch.randn(*shape[:-1], 512)

    def gradients(model, x, asked):
        with torch.enable_grad():
            return torch.autograd.grad(model.second(model.first(x)), asked, upstream.to(x.dtype))

    plain = gradients(model, x, asked)
    with by_our_products(model):
        found = gradients(model, x, asked)
    wide, wide_x = deepcopy(model).double(), x.detach().double().requires_grad_(x.requires_grad)
    exact = gradients(wide, wide_x, [t for t in (wide_x, *wide.parameters()) if t.requires_grad])
    of_weights, of_inputs = 2 * (frozen != "weight"), 1 + (frozen != "input")
    assert products.call_count == (2 + of_weights + of_inputs if taken(dtype) else 0)
    for ours, torchs, right in zip(found, plain, exact, strict=True):
        assert ours.dtype == dtype
        assert_accurate(ours, torchs, right, "gradient")


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_have_the_same_gradients(reentrant):
    """Checkpointing runs the layers a second time in the backward pass, after the context."""
    torch.manual_seed(0)
    model, x = Two(), torch.randn(3, 512, requires_grad=True)
    wanted = torch.autograd.grad(model(x).sum(), model.first.weight)
    with by_our_products(model):
        loss = checkpoint(model, x, use_reentrant=reentrant).sum()
    loss.backward()
    torch.testing.assert_close(model.first.weight.grad, *wanted, rtol=1e-4, atol=1e-4)


def test_an_output_may_be_changed_in_place_and_so_may_what_needs_no_gradient():
    """As after torch's own product: adapters add to what a layer returns."""
    torch.manual_seed(0)
    model, x = Two(), torch.randn(3, 512)
    model.first.weight.requires_grad_(False)

    def run():
        given = x.clone()
        out = model.first(given)
        given.zero_()  # a frozen layer does not need it any more
        out += 1
        out[..., :5].mul_(2)
        out = model.second(out)
        out.clamp_(max=1)
        out.sum().backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return out, *grads

    wanted = run()
    with by_our_products(model):
        found = run()
    assert len(wanted) == 3
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_in_the_context_is_of_torchs_layers(copied):
    model = Two()
    with by_our_products(model):
        twin = copied(model)
    for one in (model, twin):
        assert [type(module) for module in one.children()] == [Conv1D, nn.Linear, nn.Linear]
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_threads_that_run_one_model():
    model, x = Two(), torch.randn(2, 512)
    wanted, interval = model(x).detach(), sys.getswitchinterval()

    def run(_):
        for _ in range(200):
            with torch.no_grad(), by_our_products(model):
                torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert [type(module) for module in model.children()] == [Conv1D, nn.Linear, nn.Linear]


def test_inputs_whose_bytes_are_not_their_values():
    model = Two()
    x = torch.complex(torch.randn(3, 512), torch.randn(3, 512)).conj().imag
    assert x.is_neg()
    sparse = nn.Linear(512, 640, bias=False)
    sparse.weight = nn.Parameter((torch.randn(640, 512) * (torch.rand(640, 512) < 0.01)).to_sparse_csr())
    with torch.no_grad():
        wanted = model(x), sparse(x.resolve_neg())
        with by_our_products(model), by_our_products(sparse):
            found = model(x), sparse(x.resolve_neg())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_forward_taken_in_the_context_runs_after_it():
    model, x = Two(), torch.randn(3, 640)
    with by_our_products(model):
        forward = model.second.forward
    for kept in (nullcontext(), torch.autograd.graph.save_on_cpu()):
        with kept:
            torch.testing.assert_close(forward(input=x), model.second(x), rtol=1e-4, atol=1e-4)


def test_a_second_derivative_is_refused_not_wrong(products):
    model, x = Two(), torch.randn(3, 512, requires_grad=True)
    with by_our_products(model):
        (first,) = torch.autograd.grad((model.second(x @ torch.randn(512, 640)) ** 2).sum(), x, create_graph=True)
    if products.call_count:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_a_model_with_the_loss_runs_forward_and_backward_by_our_products(products):
    config = GPT2Config(vocab_size=64, n_embd=512, n_layer=1, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=1)
    model, ids = attach_linear_loss(GPT2LMHeadModel(config).train()), torch.randint(64, (2, 8))
    products.reset_mock()
    request = CPORequest(ids.flatten()[1:8], CandidateLayout([0, 3, 7], [0, 2], rows=torch.arange(7)))
    model(ids, linear_loss=request).loss.backward()
    large = [layer for layer in model.transformer.h.modules() if getattr(layer, "nx", 0) * getattr(layer, "nf", 0)]
    assert len(large) == 4
    assert products.call_count == (3 * 4 if gemm_supported(torch.float32, torch.float32) else 0)


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
    assert [type(module) for module in model.children()] == [Conv1D, nn.Linear, nn.Linear]
