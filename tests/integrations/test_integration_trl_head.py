"""Our products behind TRL's fused head: its outputs, their gradients, and the trainers that use it."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch

pytest.importorskip("trl")

import tiny_models
import trl
from attach_cases import biased, softcapped
from datasets import Dataset
from tolerance import assert_accurate, relative_error
from torch.nn.functional import log_softmax
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer import utils
from trl_runs import assert_histories_equal, history, make, preferences

from cpo_kernels.integrations.trl import fused_head, patch_fused_head
from cpo_kernels.integrations.trl_head import OF_LOGITS, FusedLogProbs

pytestmark = pytest.mark.cpu
NAMES = ("log_probs", "entropy", *OF_LOGITS)
TRANSFORMS = {
    "plain": (1.0, None, 1.0),
    "temperature": (0.7, None, 1.0),
    "softcap": (1.3, 5.0, 1.0),
    "scale": (1.0, None, 0.4),
}


def draw(rows: int, vocabulary: int, dtype: torch.dtype, bias: bool, frozen: bool = False):
    torch.manual_seed(0)
    hidden = torch.randn(rows, 32, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, 32) / 4).to(dtype).requires_grad_(not frozen)
    return hidden, weight, torch.randn(vocabulary, dtype=dtype, requires_grad=True) if bias else None


def dense(hidden, weight, bias, targets, transform):
    """Every field in the dtype of ``hidden``, from all logits."""
    temperature, softcap, scale = transform
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * scale
    logits = (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature
    log_p = log_softmax(logits, -1)
    log_probs = log_p.gather(-1, targets[:, None]).squeeze(-1)
    top1 = logits.argmax(-1) == targets
    return log_probs, -(log_p.exp() * log_p).sum(-1), (2 * log_p).logsumexp(-1), logits.mean(-1), top1


def gradients(outputs, inputs, upstream):
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    loss = sum((out * up.to(out.dtype)).sum() for out, up in zip(outputs[:2], upstream, strict=True))
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_outputs_and_gradients_by_the_policy(dtype, transform, bias):
    inputs = draw(11, 127, dtype, bias)
    targets = torch.arange(11) * 7 % 127
    temperature, softcap, scale = transform
    arguments = (targets, temperature, 32768, softcap, scale, NAMES)
    upstream = torch.randn(2, 11)
    exact_inputs = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    exact = dense(*exact_inputs, targets, transform)
    stock = ChunkedLogProbFunction.apply(*inputs, *arguments)
    ours = FusedLogProbs(ChunkedLogProbFunction).apply(*inputs, *arguments)
    for name, out, eager, oracle in zip(NAMES[:-1], ours, stock, exact, strict=False):
        assert out.dtype == eager.dtype == torch.float32
        assert out.requires_grad == eager.requires_grad
        assert_accurate(out.detach(), eager.detach(), oracle.detach(), name)
    assert torch.equal(ours[-1], stock[-1])
    for outputs in (1, 2):  # without and with a gradient of the entropy
        grads, eager, oracle = (
            gradients(fields[:outputs], x, upstream[:outputs])
            for fields, x in ((ours, inputs), (stock, inputs), (exact, exact_inputs))
        )
        fields = [FusedLogProbs(ChunkedLogProbFunction).apply(*inputs, *arguments) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*(x[0:1] for x in fields), strict=True))
        for name, *values in zip(("hidden", "weight", "bias"), grads, eager, oracle, strict=False):
            assert_accurate(*values, name)
        ours = FusedLogProbs(ChunkedLogProbFunction).apply(*inputs, *arguments)
        stock = ChunkedLogProbFunction.apply(*inputs, *arguments)
        exact = dense(*exact_inputs, targets, transform)


@pytest.mark.parametrize(
    "names", [("log_probs",), ("log_probs", "entropy"), ("log_probs", "is_top1"), ("mean_logits",)]
)
def test_only_what_is_asked_for(names):
    inputs, targets = draw(7, 50, torch.float32, bias=True), torch.arange(7)
    arguments = (*inputs, targets, 1.0, 32768, None, 1.0, names)
    stock, ours = ChunkedLogProbFunction.apply(*arguments), FusedLogProbs(ChunkedLogProbFunction).apply(*arguments)
    for expected, value in zip(stock, ours, strict=True):
        assert (expected is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_reference_without_entropies_rounds_as_the_policy_with_them(dtype):
    """TRL asks the policy for entropies and its reference for none; their difference is a reward or a KL."""
    hidden, weight, _ = draw(64, 509, dtype, bias=False)
    arguments = (None, torch.arange(64), 1.0, 32768, None, 1.0)
    apply = FusedLogProbs(ChunkedLogProbFunction).apply
    policy = apply(16 * hidden, weight, *arguments, ("log_probs", "entropy"))[0]
    with torch.no_grad():
        for names in (("log_probs",), ("log_probs", "entropy")):
            reference = apply(16 * hidden, weight, *arguments, names)[0]
            torch.testing.assert_close(policy.detach(), reference, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_and_no_rows():
    hidden, weight, _ = draw(6, 50, torch.float32, bias=False, frozen=True)
    apply = FusedLogProbs(ChunkedLogProbFunction).apply
    arguments = (None, torch.arange(6), 1.0, 32768, None, 1.0, NAMES)
    outputs = apply(hidden, weight, *arguments)
    expected = ChunkedLogProbFunction.apply(hidden, weight, *arguments)
    upstream = torch.randn(2, 6)
    grads = [gradients(fields, (hidden, weight), upstream)[0] for fields in (outputs, expected)]
    torch.testing.assert_close(*grads)
    nothing = apply(hidden[:0], weight, None, torch.arange(0), 1.0, 32768, None, 1.0, NAMES)
    assert [tuple(field.shape) for field in nothing] == [(0,)] * 5


def test_a_partitioned_head_keeps_trls_own_computation():
    """ZeRO-3 gathers the weight for one call, and again for the backward pass of TRL's function alone."""

    hidden, weight, _ = draw(6, 50, torch.float32, bias=False)
    arguments = (hidden, weight, None, torch.arange(6), 1.0, 32768, None, 1.0, NAMES)
    calls, answer = [], object()
    counting = SimpleNamespace(apply=lambda *given: calls.append(given) or answer)
    ours = FusedLogProbs(counting).apply(*arguments)
    assert not calls and len(ours) == len(NAMES)
    weight.ds_id = 0
    assert FusedLogProbs(counting).apply(*arguments) is answer
    (call,) = calls
    assert all(given is expected for given, expected in zip(call, arguments, strict=True))


MODELS = {"llama": tiny_models.llama, "tied": tiny_models.gpt2, "bias": biased, "softcap": softcapped}


@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
def test_models_with_the_head(make_model):
    """Outputs as TRL's, and gradients of float64, as near as float32 comes with a tanh of its own."""
    model = make_model()
    ids = torch.arange(12).view(2, 6) % tiny_models.VOCAB
    labels = ids.masked_fill(torch.tensor([[True, True, False, False, False, False], [True] * 5 + [False]]), -100)
    utils.add_fused_lm_head(model, temperature=0.8, outputs=NAMES)
    results = []
    for context, dtype in ((torch.enable_grad, torch.float64), (torch.enable_grad, None), (fused_head, None)):
        model.to(dtype or torch.float32).zero_grad()
        with context():
            out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.loss + out.entropy.sum()).backward()
        results.append((out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (_, exact_grads), (expected, expected_grads), (out, grads) = results
    for name in ("loss", *NAMES):
        torch.testing.assert_close(out[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")
    assert grads.keys() == exact_grads.keys()
    for name, exact in exact_grads.items():
        assert relative_error(grads[name], exact) <= 5e-6 >= relative_error(expected_grads[name], exact), name
    with fused_head():  # nothing to score still is part of the graph
        model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True).loss.backward()


def sft(tmp_path):
    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in preferences()])
    return make(trl.SFTTrainer, trl.SFTConfig, tmp_path, data=data, arguments={"max_length": 16})


def dpo(tmp_path):
    return make(
        trl.DPOTrainer, trl.DPOConfig, tmp_path, ref_model=tiny_models.llama(1), arguments={"use_weighting": True}
    )


def kto(tmp_path):
    names = (("chosen", True), ("rejected", False))
    rows = [{"prompt": r["prompt"], "completion": r[n], "label": good} for r in preferences() for n, good in names]
    return make(trl.KTOTrainer, trl.KTOConfig, tmp_path, data=Dataset.from_list(rows), ref_model=tiny_models.llama(1))


def grpo(tmp_path):
    arguments = {"num_generations": 3, "max_completion_length": 6, "entropy_coef": 0.1, "max_steps": 2}
    return make(
        trl.GRPOTrainer,
        trl.GRPOConfig,
        tmp_path,
        data=Dataset.from_list([{"prompt": row["prompt"]} for row in preferences()]),
        arguments=arguments,
        reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )


@pytest.mark.parametrize("trainer", [sft, dpo, kto, grpo])
def test_trainers_log_what_stock_logs(tmp_path, trainer, monkeypatch):
    calls = []
    apply = FusedLogProbs.apply
    monkeypatch.setattr(FusedLogProbs, "apply", lambda self, *args: calls.append(args[-1]) or apply(self, *args))
    stock = history(trainer(tmp_path))
    assert not calls
    with fused_head():
        ours = history(trainer(tmp_path))
    assert calls
    assert_histories_equal(stock, ours)


def test_patching_is_for_good_and_once(monkeypatch):
    for name in ("_ChunkedLogProbFunction", "_use_triton"):
        monkeypatch.setattr(utils, name, getattr(utils, name))
    with fused_head():
        inside = utils._ChunkedLogProbFunction
        assert isinstance(inside, FusedLogProbs)
    assert utils._ChunkedLogProbFunction is inside.stock
    patch_fused_head()
    first = utils._ChunkedLogProbFunction
    patch_fused_head()
    with fused_head():
        assert utils._ChunkedLogProbFunction is first
    assert utils._ChunkedLogProbFunction is first and not isinstance(first.stock, FusedLogProbs)


def test_a_trl_that_is_otherwise_is_named(monkeypatch):
    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, labels):
            return hidden

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Other)
    with pytest.raises(RuntimeError, match=r"takes hidden, weight, labels; .* tested with trl 1\.16, where it takes"):
        patch_fused_head()
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(RuntimeError, match=r"has no trl.trainer.utils._ChunkedLogProbFunction, which"):
        patch_fused_head()
