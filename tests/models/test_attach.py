"""``attach_linear_loss``: the fused loss of a model equals a dense computation from the model's own logits."""

from __future__ import annotations

import copy
from itertools import pairwise

import peft
import pytest
import tiny_models
import torch
import transformers
from attach_cases import (
    FAMILIES,
    V,
    contrast_inputs,
    dense_logps,
    dense_loss,
    request_for,
)
from tolerance import assert_accurate
from torch import nn

from cpo_kernels import attach_linear_loss
from cpo_kernels.models import LogpsRequest, StatisticsRequest


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param]().eval()


def test_loss_and_gradients_equal_the_dense_computation(model):
    ids, targets, layout, ref_logps = contrast_inputs()
    want = dense_loss(model, ids, targets, layout, ref_logps)
    want.backward()
    want_grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    attach_linear_loss(model)
    out = model(ids, linear_loss=request_for(targets, layout, ref_logps))
    out.loss.backward()
    assert out.logits is None
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        tolerance = {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(parameter.grad, want_grads[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_log_likelihoods_equal_the_dense_computation(model):
    ids, targets, layout, _ = contrast_inputs()
    attach_linear_loss(model)
    got = model(ids, linear_loss=LogpsRequest(targets, layout)).logps
    torch.testing.assert_close(got, dense_logps(model, ids, targets, layout), rtol=1e-5, atol=1e-5)


def test_pooled_hidden_states_are_means_over_the_predicting_rows():
    model = attach_linear_loss(tiny_models.llama())
    ids, targets, layout, _ = contrast_inputs()
    targets[3:5] = -100  # segment 1 is absent
    targets[7] = -100
    out = model(ids, linear_loss=LogpsRequest(targets, layout, pool=True))
    hidden = model.model(ids).last_hidden_state.flatten(0, 1).detach()
    want = []
    for start, end in pairwise(layout.cu_tokens):
        mine = [int(layout.rows[n]) for n in range(start, end) if targets[n] != -100]
        want.append(hidden[mine].mean(0) if mine else torch.zeros(hidden.shape[1]))
    assert out.embeddings.dtype == torch.float32 and not out.embeddings.requires_grad
    torch.testing.assert_close(out.embeddings, torch.stack(want))
    assert torch.equal(out.logps, model(ids, linear_loss=LogpsRequest(targets, layout)).logps)


def test_statistics_equal_the_models_own_logits(model):
    ids, targets, layout, _ = contrast_inputs()
    targets[4] = -100
    attach_linear_loss(model)
    out = model(ids, linear_loss=StatisticsRequest(targets, layout.rows, seed=3, entropy=True, top1=True))
    logps = model(ids).logits.flatten(0, 1).log_softmax(-1)[layout.rows].detach()
    present = targets != -100
    own = logps.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1).where(present, 0.0)
    entropy = -(logps.exp() * logps).sum(-1).where(present, 0.0)
    torch.testing.assert_close(out.token_logps, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy, entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.top1, logps.argmax(-1) == targets)
    assert out.samples.shape == targets.shape and bool(((out.samples >= 0) == present).all())
    again = model(ids, linear_loss=StatisticsRequest(targets, layout.rows, seed=3))
    assert torch.equal(again.samples, out.samples) and again.entropy is None
    assert not out.token_logps.requires_grad


def test_samples_of_a_token_with_a_seed_of_its_own():
    """Several of each token, the same whatever shares the call."""
    ids, targets, layout, _ = contrast_inputs()
    model, seeds = attach_linear_loss(tiny_models.llama()), torch.arange(len(targets)) + 7

    def samples(part: slice) -> torch.Tensor:
        request = StatisticsRequest(targets[part], layout.rows[part], seed=seeds[part], num_samples=5)
        return model(ids, linear_loss=request).samples

    everything = samples(slice(None))
    assert everything.shape == (len(targets), 5)
    assert torch.equal(samples(slice(3, 6)), everything[3:6])
    mask = torch.rand(everything.shape) < 0.5
    request = StatisticsRequest(targets, layout.rows, seed=seeds, num_samples=5, sample_mask=mask)
    assert torch.equal(model(ids, linear_loss=request).samples, everything.where(mask, -100))


def test_without_the_keyword_the_model_is_as_before(model):
    ids = contrast_inputs()[0]
    before = model(ids, labels=ids)
    state = model.state_dict().keys()
    assert attach_linear_loss(model) is model
    after = model(ids, labels=ids)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert model.state_dict().keys() == state
    assert not model.training and all(not module.training for module in model.modules())


def test_the_head_never_runs(model):
    """Neither when the loss is attached, nor in the passes after it."""
    head = model.get_output_embeddings()
    calls = []
    head.register_forward_pre_hook(lambda *_: calls.append("hook"))
    head.forward = lambda *_: calls.append("forward")
    attach_linear_loss(model)
    assert model.get_output_embeddings() is head
    ids, targets, layout, ref_logps = contrast_inputs()
    model(ids, linear_loss=request_for(targets, layout, ref_logps)).loss.backward()
    model(ids, linear_loss=LogpsRequest(targets, layout))
    assert calls == []


def test_a_copy_computes_with_its_own_parameters():
    model = attach_linear_loss(tiny_models.gpt2())
    ids, targets, layout, ref_logps = contrast_inputs()
    clone = copy.deepcopy(model)
    before = clone(ids, linear_loss=request_for(targets, layout, ref_logps)).loss
    with torch.no_grad():
        model.transformer.wte.weight.mul_(2)
    after = clone(ids, linear_loss=request_for(targets, layout, ref_logps)).loss
    changed = model(ids, linear_loss=request_for(targets, layout, ref_logps)).loss
    assert torch.equal(before, after) and not torch.equal(before, changed)


def test_tied_weights_stay_tied():
    model = attach_linear_loss(tiny_models.gpt2())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_attaching_twice_changes_nothing():
    model = attach_linear_loss(tiny_models.llama())
    kind = type(model)
    assert type(attach_linear_loss(model)) is kind


def test_attached_on_the_meta_device():
    """Nothing can be verified there; the weights come later."""
    with torch.device("meta"):
        model = attach_linear_loss(tiny_models.llama())
    weights = tiny_models.llama()
    model.load_state_dict(weights.state_dict(), assign=True)
    model.model.rotary_emb = weights.model.rotary_emb
    ids, targets, layout, _ = contrast_inputs()
    want = dense_logps(weights, ids, targets, layout)
    torch.testing.assert_close(model(ids, linear_loss=LogpsRequest(targets, layout)).logps, want, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_under_its_own_name(tmp_path):
    model = attach_linear_loss(tiny_models.llama())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_compiled_without_a_break():
    ids, targets, layout, ref_logps = contrast_inputs()
    model = attach_linear_loss(tiny_models.gpt2(n_layer=1))
    want = model(ids, linear_loss=request_for(targets, layout, ref_logps)).loss
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(ids, linear_loss=request_for(targets, layout, ref_logps)).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in (want, got)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def test_generate_still_works():
    model = tiny_models.llama().eval()
    ids = contrast_inputs()[0]
    before = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(before, attach_linear_loss(model).generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    ids, targets, layout, ref_logps = contrast_inputs()
    grads = []
    for checkpointing in (False, True):
        model = attach_linear_loss(FAMILIES[family]()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, linear_loss=request_for(targets, layout, ref_logps)).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_half_precision_is_as_close_as_the_dense_computation(model, precision):
    ids, targets, layout, ref_logps = contrast_inputs()
    if precision == "bfloat16":
        model.bfloat16()
    oracle = copy.deepcopy(model).double()
    eager = copy.deepcopy(model)
    attach_linear_loss(model)
    dense_loss(oracle, ids, targets, layout, ref_logps).backward()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "autocast"):
        want = dense_loss(eager, ids, targets, layout, ref_logps)
        got = model(ids, linear_loss=request_for(targets, layout, ref_logps)).loss
    want.backward()
    got.backward()
    for (name, parameter), dense, exact in zip(
        model.named_parameters(), eager.parameters(), oracle.parameters(), strict=True
    ):
        assert_accurate(parameter.grad, dense.grad, exact.grad, name)
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "autocast"):
        logps = model(ids, linear_loss=LogpsRequest(targets, layout)).logps
        assert_accurate(
            logps, dense_logps(eager, ids, targets, layout), dense_logps(oracle, ids, targets, layout), "logps"
        )


def test_an_adapter_in_the_body_trains_through_the_fused_loss():
    base = attach_linear_loss(tiny_models.llama())
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids, targets, layout, ref_logps = contrast_inputs()
    model(input_ids=ids, linear_loss=request_for(targets, layout, ref_logps)).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert grads and all(grad.abs().sum() > 0 for grad in grads)


def odd(transform):
    """A family this package has never heard of, with logits of its own."""

    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = transform(out.logits)
            return out

    return Odd(tiny_models.llama().config)


def other_hidden_model():
    """Its head sees what its body is told by no argument that a caller can give."""

    class Other(transformers.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            hidden = self.model(input_ids.flip(1)).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden))

    return Other(tiny_models.llama().config)


def failing_model():
    class Failing(transformers.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            raise ValueError("no language is set")

    return Failing(tiny_models.llama().config)


def quantised_head():
    model = tiny_models.llama()
    model.lm_head.weight = nn.Parameter(torch.zeros(V, 16, dtype=torch.int8), requires_grad=False)
    return model


def encoder_decoder():
    sizes = {"vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: tiny_models.gpt2().transformer, "GPT2Model has no recognisable body"),
        (lambda: nn.Linear(2, 2), "Linear has no recognisable body"),
        (lambda: transformers.GPT2ForSequenceClassification(tiny_models.gpt2().config), "no recognisable head"),
        (encoder_decoder, "T5ForConditionalGeneration is an encoder-decoder"),
        (quantised_head, "torch.int8.*is quantised"),
        (lambda: odd(lambda logits: logits.pow(3)), "Odd transforms its logits in a way that no scale and no softcap"),
        (lambda: odd(lambda logits: logits - logits.max()), "Odd transforms its logits"),
        (lambda: odd(lambda logits: logits.flip(-1)), "Odd transforms its logits"),
        (lambda: odd(lambda logits: logits[..., 1:]), r"Odd transforms .* of \(1, 16, 24\) .* it makes \(1, 16, 23\)"),
        (lambda: odd(lambda logits: logits.clamp(max=100.0)), "Odd transforms its logits"),
        (other_hidden_model, "Other does not apply its head to the last hidden state of its body"),
        (failing_model, "Failing failed on a probe of 16 tokens.*ValueError: no language is set"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused(make_model, message):
    with pytest.raises(RuntimeError, match=message):
        attach_linear_loss(make_model())


def test_labels_beside_a_request_are_refused():
    ids, targets, layout, ref_logps = contrast_inputs()
    model = attach_linear_loss(tiny_models.llama())
    with pytest.raises(ValueError, match="labels has no meaning together with linear_loss"):
        model(ids, labels=ids, linear_loss=request_for(targets, layout, ref_logps))
