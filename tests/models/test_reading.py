"""What is between body and logits is found by running a model: heads of all kinds, causality, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import tiny_models
import torch
import transformers
from attach_cases import ROPE, SMALL, V, contrast_inputs, dense_logps, dense_loss, from_config, request_for
from torch import nn
from torch.nn import functional

from cpo_kernels import attach_linear_loss
from cpo_kernels.models import LogpsRequest

BERT = SMALL | {"max_position_embeddings": 64, "initializer_range": 0.3, "hidden_dropout_prob": 0.0}
MPT = {"vocab_size": V, "d_model": 16, "n_heads": 2, "n_layers": 2}
XLM = {"vocab_size": V, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64, "dropout": 0.0}
XLNET = {"vocab_size": V, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}


def llama4():
    text = transformers.Llama4TextConfig(**ROPE, intermediate_size_mlp=32, head_dim=8, num_local_experts=2)
    torch.manual_seed(0)
    return transformers.Llama4ForCausalLM(text)


def mllama(*cross_attention_layers: int):
    text = transformers.MllamaTextConfig(**ROPE, cross_attention_layers=list(cross_attention_layers), pad_token_id=0)
    torch.manual_seed(0)
    return transformers.MllamaForCausalLM(text)


def llava():
    """A place for an image has no meaning without one, so no probe may put a token there."""
    vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    vision |= {"hidden_size": 16, "intermediate_size": 16, "projection_dim": 16}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**ROPE),
        vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=1,
        image_token_id=1,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config)


def scaled(before: float = 1.0, after: float = 1.0, softcap: float | None = None, bias: bool = False):
    """Numbers that no configuration tells, on either side of the head."""

    class Unknown(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            kwargs |= {"labels": None}
            hidden = self.model(input_ids, **kwargs).last_hidden_state
            logits = self.lm_head(hidden * before).mul_(after)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    torch.manual_seed(0)
    model = Unknown(transformers.LlamaConfig(**ROPE))
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(V))
    return model


def bias_of_its_own():
    """A layer between body and head that is trained."""

    class Projected(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.dense = nn.Linear(config.hidden_size, config.hidden_size)
            self.post_init()

        def forward(self, input_ids=None, **kwargs):
            kwargs |= {"labels": None}
            hidden = functional.gelu(self.dense(self.model(input_ids, **kwargs).last_hidden_state))
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden))

    torch.manual_seed(0)
    return Projected(transformers.LlamaConfig(**ROPE))


READ = {
    "llama4, base_model is itself": llama4,
    "mllama, text": mllama,
    "mllama, text, with layers for an image": lambda: mllama(1),
    "llava, text in a wrapper": llava,
    "mpt, a word for its scale": lambda: from_config("mpt", **MPT, logit_scale="inv_sqrt_d_model"),
    "mpt, a scale that it does not apply": lambda: from_config("mpt", **MPT, logit_scale=0.5),
    "recurrent_gemma, its own name for a softcap": lambda: from_config(
        "recurrent_gemma", **ROPE | {"num_hidden_layers": 3}, lru_width=16, head_dim=8, logits_soft_cap=1.5
    ),
    "xlm, causal": lambda: from_config("xlm", **XLM, causal=True),
    "bert, decoder, a head of three layers": lambda: from_config("bert", **BERT, is_decoder=True),
    "roberta, decoder": lambda: from_config("roberta", **BERT, is_decoder=True),
    "scale of the logits": lambda: scaled(after=0.3),
    "negative scale": lambda: scaled(after=-0.7),
    "scale of the hidden states": lambda: scaled(before=1 / 7, bias=True),
    "scales and softcap": lambda: scaled(0.5, 3.0, 2.5, bias=True),
    "layer before the head": bias_of_its_own,
    "phi, bias": lambda: from_config("phi", **ROPE),
    "bloom": lambda: from_config("bloom", vocab_size=V, hidden_size=16, n_layer=2, n_head=2),
    "ctrl": lambda: from_config("ctrl", vocab_size=V, n_embd=16, dff=32, n_layer=2, n_head=2, resid_pdrop=0.0),
    "mamba": lambda: from_config("mamba", vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4),
}


@pytest.mark.parametrize("family", READ)
def test_loss_and_gradients_equal_those_of_the_models_own_logits(family):
    model = READ[family]().eval()
    ids, targets, layout, ref_logps = contrast_inputs()
    want = dense_loss(model, ids, targets, layout, ref_logps)
    want.backward()
    want_grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    attach_linear_loss(model)
    out = model(input_ids=ids, linear_loss=request_for(targets, layout, ref_logps))
    out.loss.backward()
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        got, expected = parameter.grad, want_grads[name]
        if got is None or expected is None:
            assert got is expected is None, name
            continue
        bound = 1e-5 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
    # In half precision too, where the numbers that are read come through the dtype of the model.
    half = READ[family]().eval().bfloat16()
    options = attach_linear_loss(half)._head_reading.options
    assert options == pytest.approx(model._head_reading.options, rel=1e-2)


def pooled():
    """Causal up to the end of its body, and not beyond."""

    class Pooled(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            hidden = self.model(input_ids, **kwargs).last_hidden_state
            logits = self.lm_head(hidden + hidden.mean(1, keepdim=True))
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    torch.manual_seed(0)
    return Pooled(transformers.LlamaConfig(**ROPE))


def temperature_of_its_own():
    class Trained(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.temperature = nn.Parameter(torch.tensor(0.5))

        def forward(self, input_ids=None, **kwargs):
            out = super().forward(input_ids, **kwargs)
            out.logits = out.logits * self.temperature
            return out

    return Trained(transformers.LlamaConfig(**ROPE))


def test_a_scale_that_is_trained_is_refused_and_a_frozen_one_is_a_number():
    with pytest.raises(RuntimeError, match=r"Trained transforms its logits .* parameters of its own take part"):
        attach_linear_loss(temperature_of_its_own())
    frozen = temperature_of_its_own().requires_grad_(False)
    assert attach_linear_loss(frozen)._head_reading.options == {"logit_scale": 0.5}


NOT_CAUSAL = {
    "between body and head": pooled,
    "xlnet": lambda: from_config("xlnet", **XLNET),
    "xlm": lambda: from_config("xlm", **XLM),
    "bert": lambda: from_config("bert", **BERT),
    "bert-generation": lambda: from_config("bert-generation", **BERT),
}


@pytest.mark.parametrize("family", NOT_CAUSAL)
def test_logits_that_depend_on_later_tokens_are_refused(family):
    model = NOT_CAUSAL[family]().eval()
    name = type(model).__name__
    with pytest.raises(RuntimeError, match=rf"{name} is not causal: .* move by .* when later tokens change; expected"):
        attach_linear_loss(model)
    assert type(model).__name__ == name and not hasattr(model, "_head_reading")
    with torch.no_grad():  # and they do
        ids = torch.arange(3, 11)[None]
        other = torch.cat([ids[:, :7], ids[:, :1]], dim=1)
        assert not torch.equal(model(input_ids=ids).logits[:, :7], model(input_ids=other).logits[:, :7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_that_regroup_the_rows_count_as_causal(dtype):
    experts = ROPE | {"num_local_experts": 4, "num_experts_per_tok": 2}
    attach_linear_loss(from_config("mixtral", **experts).to(dtype))


def test_a_model_whose_body_is_not_there_yet_is_read_all_the_same():
    """What it does to its logits needs no weight."""
    with torch.device("meta"):
        model = attach_linear_loss(scaled(after=0.3, softcap=2.5))
    assert model._head_reading.options == pytest.approx({"logit_scale": 0.3, "softcap": 2.5}, rel=1e-9)
    assert attach_linear_loss(scaled(after=0.3), verify=False)._head_reading.options["logit_scale"] == pytest.approx(
        0.3
    )


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "torch.save": saved,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "the oldest pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "a copy of a copy": lambda model: saved(copy.deepcopy(pickle.loads(pickle.dumps(model)))),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [tiny_models.gpt2, lambda: from_config("granite", **ROPE, logits_scaling=4.0)])
def test_copies_of_an_attached_model_are_attached(how, make):
    model = attach_linear_loss(make().eval())
    other = COPIES[how](model)
    assert type(other) is type(model) and not other.training
    ids, targets, layout, _ = contrast_inputs()
    request = LogpsRequest(targets, layout)
    want = dense_logps(model, ids, targets, layout)
    torch.testing.assert_close(other(ids, linear_loss=request).logps, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert other.state_dict().keys() == model.state_dict().keys()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (other.get_output_embeddings().weight is other.get_input_embeddings().weight) is tied
    assert attach_linear_loss(other) is other


def test_an_adapted_model_is_saved_and_loaded():
    model = attach_linear_loss(tiny_models.adapted().eval())
    ids, targets, layout, _ = contrast_inputs()
    request = LogpsRequest(targets, layout)
    assert torch.equal(saved(model)(ids, linear_loss=request).logps, model(ids, linear_loss=request).logps)
