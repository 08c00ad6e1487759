"""Heads and bodies that PEFT has wrapped: the fused loss equals the dense one of the model's own logits."""

from __future__ import annotations

import copy

import peft
import pytest
import tiny_models
import torch
from adapter_cases import CASES, adapted, lora
from attach_cases import contrast_inputs, dense_logps, dense_loss, request_for

from cpo_kernels import attach_linear_loss, plan
from cpo_kernels.models import CPORequest, LogpsRequest, StatisticsRequest

pytestmark = pytest.mark.cpu
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def gradients(model) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def fused_loss(model) -> torch.Tensor:
    ids, targets, layout, ref_logps = contrast_inputs()
    torch.manual_seed(7)
    return model(input_ids=ids, linear_loss=request_for(targets, layout, ref_logps)).loss


def fused_logps(model) -> torch.Tensor:
    ids, targets, layout, _ = contrast_inputs()
    return model(input_ids=ids, linear_loss=LogpsRequest(targets, layout)).logps


def own_logps(model) -> torch.Tensor:
    ids, targets, layout, _ = contrast_inputs()
    return dense_logps(model, ids, targets, layout)


@pytest.fixture(params=CASES)
def model(request):
    return CASES[request.param]()


def test_loss_and_gradients_equal_the_dense_computation(model):
    """Dropout draws the same numbers in both: the body has none."""
    inputs = contrast_inputs()
    torch.manual_seed(7)
    want = dense_loss(model, *inputs)
    want.backward()
    want_grads = gradients(model)
    assert attach_linear_loss(model) is model
    got = fused_loss(model)
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got_grads = gradients(model)
    assert got_grads.keys() == want_grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, grad in got_grads.items():
        torch.testing.assert_close(grad, want_grads[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_disabled_adapters_give_the_base(model):
    attach_linear_loss(model.eval())
    with model.disable_adapter():
        want = own_logps(model)
        torch.testing.assert_close(fused_logps(model), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fused_logps(model), want, rtol=1e-3, atol=1e-3)


def test_attached_before_the_adapters():
    """The order of attaching and adapting does not matter, nor does attaching again."""
    before = adapted(attach_linear_loss(tiny_models.llama()), lora())
    after = attach_linear_loss(adapted(tiny_models.llama(), lora()))
    assert torch.equal(fused_loss(before), fused_loss(after))
    assert torch.equal(fused_loss(attach_linear_loss(before)), fused_loss(after))


def test_adapters_of_transformers_itself():
    model = attach_linear_loss(tiny_models.llama().eval())
    try:
        model.add_adapter(lora())
    except ValueError as error:
        if "version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(f"this transformers refuses every released PEFT for adapters of its own: {error}")
    torch.testing.assert_close(fused_logps(model), own_logps(model), rtol=1e-5, atol=1e-5)
    model.disable_adapters()
    torch.testing.assert_close(fused_logps(model), fused_logps(attach_linear_loss(tiny_models.llama())))


@pytest.mark.parametrize("case", ["head", "DoRA", "bias"])
def test_merged_adapters_give_the_same(case):
    model = attach_linear_loss(CASES[case]().eval())
    before = fused_logps(model)
    model.merge_adapter()
    torch.testing.assert_close(fused_logps(model), before, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(fused_logps(model), own_logps(model), rtol=1e-5, atol=1e-5)


def test_the_adapter_chosen_last_counts():
    model = attach_linear_loss(adapted(tiny_models.llama(), lora(), lora(r=3)).eval())
    seen = []
    for name in ("default", "more-0"):
        model.set_adapter(name)
        seen.append(fused_logps(model))
        torch.testing.assert_close(seen[-1], own_logps(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(*seen, rtol=1e-3)


@pytest.mark.parametrize(("case", "gemms"), [("body", 2), ("trained copy", 3), ("head", 2 + 2 / 18), ("DoRA", 3)])
def test_a_frozen_head_costs_two_products(case, gemms, monkeypatch):
    plans = []

    def compute(self, hidden, head, transform):
        plans.append(plan(head.features, head.weight, self.targets, layout=self.layout, **head.options, **transform))
        return original(self, hidden, head, transform)

    original = CPORequest.compute
    monkeypatch.setattr(CPORequest, "compute", compute)
    model = attach_linear_loss(CASES[case]())
    fused_loss(model).backward()
    assert [p.gemms for p in plans] == pytest.approx([gemms])
    frozen = [p for n, p in model.named_parameters() if "lm_head" in n and not p.requires_grad]
    assert all(p.grad is None for p in frozen)


def test_pooled_states_and_statistics_know_the_adapters():
    model = attach_linear_loss(CASES["head"]().eval())
    ids, targets, layout, _ = contrast_inputs()
    out = model(input_ids=ids, linear_loss=LogpsRequest(targets, layout, pool=True))
    assert out.embeddings.shape == (5, 16), "of the body, without the columns of the adapter"
    tokens = model(input_ids=ids, linear_loss=StatisticsRequest(targets, layout.rows)).token_logps
    torch.testing.assert_close(tokens[:3].sum(), out.logps[0], rtol=1e-5, atol=1e-5)


def test_a_small_adapter_is_not_lost_to_a_half_precision_head():
    """Added to the weight it would round away: it is below half of the weight's last place."""
    model = CASES["head"]().eval()
    with torch.no_grad():
        model.base_model.model.lm_head.lora_B["default"].weight.mul_(1e-3)
    model.base_model.model.lm_head.base_layer.weight.data.fill_(1.0)
    ids, targets, layout, _ = contrast_inputs()
    head = attach_linear_loss(model).base_model.model.lm_head
    hidden = model.base_model.model.model(ids).last_hidden_state.flatten(0, 1).detach()
    exact = head(hidden).double().log_softmax(-1)[layout.rows, targets]
    head.base_layer.bfloat16()
    model.base_model.model.model.bfloat16()
    request = StatisticsRequest(targets, layout.rows, logits_dtype=torch.float32)
    got = model(input_ids=ids, linear_loss=request).token_logps
    base = torch.full_like(got, -torch.log(torch.tensor(float(tiny_models.VOCAB))))
    assert (exact - base).abs().max() > 1e-4
    assert (got - exact).abs().max() < 0.1 * (exact - base).abs().max()


def test_a_copy_and_a_saved_adapter_are_as_before(tmp_path):
    plain, model = CASES["head"](), attach_linear_loss(CASES["head"]())
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = attach_linear_loss(peft.PeftModel.from_pretrained(tiny_models.llama(), tmp_path))
    clone = copy.deepcopy(model)
    want = fused_loss(model).detach()
    assert torch.equal(fused_loss(loaded), want)
    with torch.no_grad():
        model.base_model.model.lm_head.lora_B["default"].weight.mul_(2)
    assert torch.equal(fused_loss(clone), want) and not torch.equal(fused_loss(model), want)


def prompt_learning(kind):
    return lambda: peft.get_peft_model(tiny_models.llama(), kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))


def other_kind(kind, **options):
    config = kind(target_modules=["lm_head"], task_type="CAUSAL_LM", **options)
    return lambda: peft.get_peft_model(tiny_models.llama(), config)


def tokens_of_a_tied_head():
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[1, 2])
    return peft.get_peft_model(tiny_models.gpt2(), config)


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (prompt_learning(peft.PromptTuningConfig), "PROMPT_TUNING.* puts virtual tokens before the prompt"),
        (prompt_learning(peft.PrefixTuningConfig), "PREFIX_TUNING.* puts virtual tokens before the prompt"),
        (other_kind(peft.IA3Config, feedforward_modules=[]), r"wrapped in an adapter \(peft.*ia3"),
        (other_kind(peft.LoHaConfig), r"wrapped in an adapter \(peft.*loha"),
        (tokens_of_a_tied_head, "wrapped in an adapter .*TrainableTokens"),
        (lambda: adapted(tiny_models.llama(), lora(use_dora=True), lora()), "DoraLinear and not the only active one"),
        (lambda: adapted(tiny_models.llama(), lora(use_dora=True, lora_dropout=0.1)), "DoraLinear with dropout"),
        (
            lambda: adapted(tiny_models.llama(), lora(alora_invocation_tokens=[1])),
            "'default' of .* is ALoraLinear",
        ),
    ],
)
def test_an_adapter_that_is_not_applied_is_refused(make_model, message):
    with pytest.raises(RuntimeError, match=message):
        attach_linear_loss(make_model())


def test_an_adapter_added_later_is_refused_when_it_counts():
    model = attach_linear_loss(adapted(tiny_models.llama(), lora()))
    model.add_adapter("dora", lora(use_dora=True))
    fused_loss(model)
    model.base_model.set_adapter(["default", "dora"])
    with pytest.raises(RuntimeError, match="'dora' of the head is DoraLinear and not the only active one"):
        fused_loss(model)


@pytest.mark.parametrize("case", ["head", "trained copy"])
def test_an_adapter_per_example_is_refused(case):
    model = attach_linear_loss(CASES[case]().eval())
    ids, targets, layout, _ = contrast_inputs()
    with pytest.raises(RuntimeError, match="adapter_names, an adapter per example"):
        model(input_ids=ids, adapter_names=["default", "__base__"], linear_loss=LogpsRequest(targets, layout))
