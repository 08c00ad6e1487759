"""verl's own functions and models against ours: `make test-frameworks` installs verl and runs this file."""

from __future__ import annotations

import copy
import inspect
import sys

import pytest
import torch
from recorded_signatures import VERL
from tolerance import assert_accurate

import cpo_kernels.integrations.verl as ours

pytest.importorskip("verl", reason="needs verl: make test-frameworks")
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.experimental import torch_functional
from verl.utils.kernel import linear_cross_entropy as kernel
from verl.workers.config.model import HFModelConfig

pytestmark = pytest.mark.cpu
STOCK = torch_functional.FusedLinearForPPO
N, H, V = 37, 16, 101


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    hidden, weight = torch.randn(2, N, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (2, N))


def outputs_and_grads(head, hidden, weight, labels, temperature, through) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of their sums with fixed weights, through both or one of them."""
    logps, entropy = head(hidden, weight, labels, temperature)
    generator = torch.Generator().manual_seed(3)
    terms = {
        "logps": (logps * torch.randn(labels.shape, generator=generator)).sum(),
        "entropy": (entropy * torch.randn(labels.shape, generator=generator)).sum(),
    }
    grads = torch.autograd.grad(sum(terms[name] for name in through), (hidden, weight))
    return {"logps": logps.detach(), "entropy": entropy.detach(), "hidden": grads[0], "weight": grads[1]}


def oracle(hidden, weight, labels, temperature):
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    return log_p.gather(-1, labels[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("through", [("logps", "entropy"), ("logps",), ("entropy",)], ids="+".join)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_module_is_no_less_exact_than_verls(dtype, temperature, through):
    hidden, weight, labels = problem(dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = outputs_and_grads(oracle, *exact, labels, temperature, through)
    theirs, mine = (
        outputs_and_grads(head(chunk_size=8), hidden, weight, labels, temperature, through)
        for head in (STOCK, ours.FusedLinearForPPO)
    )
    for name, value in mine.items():
        assert value.shape == theirs[name].shape
        assert_accurate(value, theirs[name], wanted[name], name)


def test_recorded_signatures_are_those_of_this_version():
    """What test_integration_verl.py, which runs without verl, takes for verl's."""
    found = {
        "FusedLinearForPPO": inspect.signature(STOCK.__init__),
        "FusedLinearForPPO.forward": inspect.signature(STOCK.forward),
        "linear_cross_entropy": inspect.signature(kernel.LinearCrossEntropy.forward),
    }
    assert {name: list(sign.parameters)[1:] for name, sign in found.items()} == VERL


SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
}


def policy_step(model, entropy_coeff: float) -> dict[str, torch.Tensor]:
    """The outputs of verl's forward of a batch, and the gradients of a policy-gradient loss with an entropy bonus."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, V, (3, 13), generator=generator)
    mask = (torch.arange(13) < torch.tensor([13, 9, 6])[:, None]).long()
    advantages, old = torch.randn(3, 13, generator=generator), -4.5 + 0.1 * torch.randn(3, 13, generator=generator)
    model.zero_grad()
    out = model(input_ids=ids, attention_mask=mask, return_dict=True, temperature=0.8)
    # verl's Triton backend flattens both.
    logps, entropy = out.log_probs.reshape(ids.shape), out.entropy.reshape(ids.shape)
    losses = -advantages * (logps - old).exp()
    loss = agg_loss(losses, mask, "token-mean") - entropy_coeff * agg_loss(entropy, mask, "token-mean")
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "log_probs": logps.detach(), "entropy": entropy.detach(), **grads}


@pytest.fixture
def forwards():
    """verl replaces the forward of a class, which is the same for all models of it."""
    kept = {kind: kind.forward for kind in (LlamaForCausalLM, Qwen2ForCausalLM)}
    yield
    for kind, forward in kept.items():
        kind.forward = forward


@pytest.mark.parametrize("entropy_coeff", [0.0, 0.01])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_verls_model(name, backend, entropy_coeff, forwards):
    """With verl's torch backend stock is the measure; verl's Triton kernels need a GPU, so its torch backend is."""
    torch.manual_seed(0)
    model = MODELS[name]()
    stock, fused = copy.deepcopy(model), model
    apply_monkey_patch(stock, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend="torch")
    wanted = policy_step(stock, entropy_coeff)
    apply_monkey_patch(fused, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend=backend)
    with ours.fused_kernels():
        found = policy_step(fused, entropy_coeff)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_verl_imports_what_external_lib_names(tmp_path, monkeypatch):
    """verl's own configuration object imports the module, which replaces both functions for good."""
    monkeypatch.setattr(torch_functional, "FusedLinearForPPO", STOCK)
    monkeypatch.setattr(kernel, "linear_cross_entropy", kernel.linear_cross_entropy)
    monkeypatch.delitem(sys.modules, "cpo_kernels.integrations.verl_external", raising=False)
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    name = "cpo_kernels.integrations.verl_external"
    HFModelConfig(path=str(tmp_path), load_tokenizer=False, external_lib=name)
    assert torch_functional.FusedLinearForPPO is ours.FusedLinearForPPO
    assert kernel.linear_cross_entropy is ours.linear_cross_entropy


def test_another_verl_is_refused_by_name(monkeypatch):
    monkeypatch.delattr(torch_functional, "FusedLinearForPPO")
    with pytest.raises(RuntimeError, match=r"verl .* has no verl.utils.experimental.torch_functional.FusedLinearFor"):
        ours.patch_fused_kernels()
