"""Bodies and heads of bitsandbytes: the fused loss and its gradients are those of the weights, written out."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_cases import adapted, lora
from attach_cases import contrast_inputs, dense_logps, dense_loss, request_for
from quantised_models import HEAD_TOO, needs_bitsandbytes, quantised, weight_of, written_out
from torch import nn

from cpo_kernels import attach_linear_loss
from cpo_kernels.models import CPORequest, LogpsRequest, StatisticsRequest
from cpo_kernels.models import quantised as quantised_layers
from cpo_kernels.models.adapters import apply_head
from cpo_kernels.models.head import find_head

pytestmark = [pytest.mark.cpu, needs_bitsandbytes]
BODY, HEAD = ["q_proj", "down_proj"], ["lm_head", "v_proj"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def grads_of(loss, model):
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def fused(model, **options):
    ids, targets, layout, ref_logps = contrast_inputs()
    request = request_for(targets, layout, ref_logps)
    request.options |= options
    return model(input_ids=ids, linear_loss=request).loss


def assert_equal(got, want, rtol=TOLERANCE["rtol"]):
    assert got.keys() == want.keys() and got
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name], rtol=rtol, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# The name of a model: its layers, and which of them have adapters.
TRAINED = {
    "4bit body": lambda: adapted(quantised("4bit"), lora(target_modules=BODY)),
    "4bit body, adapted head": lambda: adapted(quantised("4bit, nested"), lora(target_modules=HEAD)),
    "4bit body, trained copy": lambda: adapted(quantised(), lora(target_modules=BODY, modules_to_save=["lm_head"])),
    "4bit gpt2, tied head": lambda: adapted(
        quantised("4bit", "gpt2"), lora(target_modules=["c_attn"], fan_in_fan_out=True)
    ),
    "4bit head": lambda: adapted(quantised("4bit", **HEAD_TOO), lora(target_modules=BODY)),
    "4bit nested head, adapted": lambda: adapted(quantised("4bit, nested", **HEAD_TOO), lora(target_modules=HEAD)),
    "4bit head, DoRA": lambda: adapted(quantised("4bit", **HEAD_TOO), lora(target_modules=HEAD, use_dora=True)),
}
IN_8_BITS = {
    "8bit body": lambda: adapted(quantised("8bit"), lora(target_modules=BODY)),
    "8bit head": lambda: adapted(quantised("8bit", **HEAD_TOO), lora(target_modules=BODY)),
    "8bit head, adapted": lambda: adapted(quantised("8bit", **HEAD_TOO), lora(target_modules=HEAD)),
}


@pytest.mark.parametrize("case", TRAINED)
def test_loss_and_gradients_equal_those_of_the_weights_written_out(case):
    model = TRAINED[case]()
    plain = written_out(model)
    want = dense_loss(plain, *contrast_inputs())
    want_grads = grads_of(want, plain)
    attach_linear_loss(model)
    budget = 6 * 24 * 4  # logits of two groups at most, in several chunks where their gradient waits for nothing
    for options in ({}, {"max_logits_bytes": budget} if "head" in case and "adapted" not in case else {}):
        got = fused(model, **options)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert_equal(grads_of(got, model), want_grads)
    base = find_head(model.get_base_model())
    assert not [name for name, p in base.named_parameters() if p.grad is not None]


@pytest.mark.parametrize("case", TRAINED | IN_8_BITS)
def test_loss_and_gradients_are_close_to_those_of_the_model(case):
    """In 8 bits a model rounds what its head multiplies, and the fused loss does not: a hundredth."""
    model = (TRAINED | IN_8_BITS)[case]()
    rtol = {"8bit body": 1e-4, "8bit head": 5e-2, "8bit head, adapted": 5e-2}.get(case, 1e-4)
    attach_linear_loss(model)
    want = dense_loss(model, *contrast_inputs())
    want_grads = grads_of(want, model)
    got = fused(model)
    torch.testing.assert_close(got, want, rtol=rtol / 5, atol=1e-6)
    got_grads = grads_of(got, model)
    assert got_grads.keys() == want_grads.keys()
    for name, grad in got_grads.items():
        assert (grad - want_grads[name]).norm() <= rtol * want_grads[name].norm() + 1e-7, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", ["4bit", "4bit, nested", "8bit"])
def test_the_weight_of_a_head(bits, dtype, monkeypatch):
    monkeypatch.setattr(quantised_layers, "ROWS", 7)
    head = quantised(bits, dtype=dtype, **HEAD_TOO).lm_head
    before = {name: value.clone() for name, value in head.state_dict().items() if isinstance(value, torch.Tensor)}
    hidden = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    applied = apply_head(head, hidden)
    assert applied.weight.dtype == dtype and not applied.weight.requires_grad and applied.weight.grad_fn is None
    torch.testing.assert_close(applied.weight.double(), weight_of(head), rtol=torch.finfo(dtype).eps, atol=1e-6)
    head.train()(hidden)  # an 8-bit layer moves its numbers in its first call
    assert torch.equal(apply_head(head, hidden).weight, applied.weight)
    after = {name: value for name, value in head.state_dict().items() if isinstance(value, torch.Tensor)}
    assert before.keys() == after.keys() and all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_bias_is_taken_in_the_dtype_of_the_weight(bits):
    head = quantised(bits, dtype=torch.bfloat16, **HEAD_TOO).lm_head
    head.bias = nn.Parameter(torch.randn(24), requires_grad=False)
    hidden = torch.randn(5, 64, dtype=torch.bfloat16)
    applied = apply_head(head, hidden)
    assert applied.bias.dtype == torch.bfloat16
    logits = hidden.float() @ applied.weight.float().T + applied.bias.float()
    torch.testing.assert_close(head.train()(hidden).float(), logits, rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_other_requests_read_a_quantised_head(bits):
    model = attach_linear_loss(quantised(bits, **HEAD_TOO).train())
    plain = written_out(model).train()
    if bits == "8bit":  # only the head differs: the body rounds what it multiplies
        plain.model = model.model
    ids, targets, layout, _ = contrast_inputs()
    want = dense_logps(plain, ids, targets, layout)
    got = model(input_ids=ids, linear_loss=LogpsRequest(targets, layout)).logps
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    tokens = model(input_ids=ids, linear_loss=StatisticsRequest(targets, layout.rows, entropy=True))
    logits = plain(ids).logits.flatten(0, 1)[layout.rows].log_softmax(-1)
    torch.testing.assert_close(tokens.token_logps, logits.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.entropy, -(logits.exp() * logits).sum(-1), rtol=1e-4, atol=1e-5)


def test_a_copy_and_disabled_adapters():
    model = attach_linear_loss(TRAINED["4bit head"]())
    base = model.get_base_model()
    before = fused(model)
    copied = copy.deepcopy(model)
    assert torch.equal(fused(copied), before)
    with model.disable_adapter():
        torch.testing.assert_close(
            fused(model), dense_loss(written_out(base), *contrast_inputs()), rtol=1e-5, atol=1e-6
        )


def test_gradients_are_the_same_after_an_evaluation():
    """On a CPU with AVX512-BF16, bitsandbytes alone loses them, without a word."""
    model = attach_linear_loss(TRAINED["4bit body"]())
    ids, *_ = contrast_inputs()
    before = grads_of(fused(model), model)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = grads_of(fused(model.train()), model)
    assert all(torch.equal(after[name], grad) for name, grad in before.items()) and before.keys() == after.keys()


def test_a_body_that_has_lost_its_gradients_is_refused():
    model = quantised("4bit")
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(
        RuntimeError, match=r"layers\.1\.mlp\.up_proj was called in evaluation mode.*load the model anew"
    ):
        attach_linear_loss(model)


def test_weights_that_are_rounded_in_each_call_are_refused():
    """Trained 16-bit weights of an 8-bit layer: the product of the layer is of their rounded values."""
    import bitsandbytes

    model = quantised("8bit")
    model.lm_head = bitsandbytes.nn.Linear8bitLt(64, 24, bias=False, has_fp16_weights=True)
    with pytest.raises(RuntimeError, match=r"quantised in a way.*llm_int8_skip_modules=\['lm_head'\]"):
        attach_linear_loss(model)


def test_a_budget_that_is_too_small_says_so():
    model = attach_linear_loss(TRAINED["4bit head"]())
    ids, targets, layout, _ = contrast_inputs()
    with pytest.raises(ValueError, match="max_logits_bytes"):
        model(input_ids=ids, linear_loss=CPORequest(targets, layout, max_logits_bytes=1))
