"""TRL's CPOTrainer on the fused loss against stock: every loss, its gradients and its metrics."""

from __future__ import annotations

import peft
import pytest
import torch

pytest.importorskip("trl")

import tiny_models
from expert_models import experts
from tolerance import assert_accurate
from torch.nn.functional import logsigmoid
from transformers import T5Config, T5ForConditionalGeneration
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl_runs import (
    BETA,
    assert_histories_equal,
    dense_logps,
    first_batch,
    history,
    make,
    preferences,
    step,
    untied,
    untimed,
)

from cpo_kernels.integrations.trl import FusedCPOTrainer

pytestmark = pytest.mark.cpu
CASES = {
    "sigmoid": {},
    "smoothed": {"label_smoothing": 0.2, "cpo_alpha": 0.5},
    "hinge": {"loss_type": "hinge", "cpo_alpha": 0.0},
    "ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0},
    "AlphaPO": {"loss_type": "alphapo", "alpha": 0.25, "simpo_gamma": 0.7},
    "AlphaPO of ipo": {"loss_type": "ipo", "alpha": -0.2},
}


def cpo(trainer, tmp_path, arguments=None, **keywords):
    return make(trainer, CPOConfig, tmp_path, arguments=arguments, **{"model": untied(), **keywords})


def formula(config, chosen, rejected):
    """Losses of a batch as the papers have them, from log-likelihoods or their means per token."""
    if config.alpha:
        chosen, rejected = ((1 - (-config.alpha * x).exp()) / config.alpha for x in (chosen, rejected))
    difference = BETA * (chosen - rejected)
    if config.loss_type == "hinge":
        return (1 - difference).relu()
    if config.loss_type == "ipo":
        return (difference / BETA - 1 / (2 * BETA)).square()
    difference = difference - (config.simpo_gamma if config.loss_type == "simpo" else 0)
    smoothing = config.label_smoothing
    return -(1 - smoothing) * logsigmoid(difference) - smoothing * logsigmoid(-difference)


def exact(trainer, batch):
    """Loss and gradients in float64, of TRL's batch of chosen and rejected rows."""
    model, config = untied().double(), trainer.args
    rows = trainer.concatenated_inputs(batch, padding_value=trainer.pad_token_id)
    names = ("concatenated_input_ids", "concatenated_attention_mask", "concatenated_labels")
    sums, counts = dense_logps(model, *(rows[name] for name in names))
    averages = sums / counts if config.loss_type in ("ipo", "simpo") else sums
    half = len(sums) // 2
    nll = -sums[:half].sum() / counts[:half].sum()
    loss = formula(config, *averages.chunk(2)).mean() + config.cpo_alpha * nll
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_loss_and_gradients_by_the_policy_and_metrics(tmp_path, arguments):
    stock, ours = (cpo(trainer, tmp_path, arguments) for trainer in (CPOTrainer, FusedCPOTrainer))
    batch = first_batch(ours)
    exact_loss, exact_grads = exact(ours, batch)
    (stock_loss, stock_grads), (loss, grads) = step(stock, batch), step(ours, batch)
    assert_accurate(loss, stock_loss, exact_loss, "loss")
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        assert_accurate(grad, stock_grads[name], exact_grads[name], name)
    metrics = [{k: v[-1] for k, v in trainer._stored_metrics["train"].items()} for trainer in (stock, ours)]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "AlphaPO"])
def test_a_run_logs_what_stock_logs(tmp_path, name):
    arguments = CASES[name] | {"gradient_accumulation_steps": 2}
    assert_histories_equal(*(history(cpo(trainer, tmp_path, arguments)) for trainer in (CPOTrainer, FusedCPOTrainer)))


def test_evaluation_equals_stock(tmp_path):
    made = [cpo(t, tmp_path, eval_dataset=preferences(5, seed=4)) for t in (CPOTrainer, FusedCPOTrainer)]
    assert_histories_equal(*([untimed(trainer.evaluate())] for trainer in made))


def test_adapters(tmp_path):
    config = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    runs = [
        history(cpo(trainer, tmp_path, peft_config=peft.LoraConfig(**config)))
        for trainer in (CPOTrainer, FusedCPOTrainer)
    ]
    assert_histories_equal(*runs)


@pytest.mark.parametrize("name", ["sigmoid", "AlphaPO"])
def test_head_options(tmp_path, name):
    """A temperature is a factor of the head's weights."""
    temperature, sharper = 0.5, untied()
    sharper.lm_head.weight.data /= temperature
    stock = cpo(CPOTrainer, tmp_path, CASES[name], model=sharper)
    ours = cpo(FusedCPOTrainer, tmp_path, CASES[name])
    assert ours.head_options == {}
    ours.head_options["temperature"] = temperature
    batch = first_batch(ours)
    (expected, expected_grads), (loss, grads) = step(stock, batch), step(ours, batch)
    expected_grads["lm_head.weight"] /= temperature
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)


def test_several_chunks_of_logits(tmp_path, monkeypatch):
    """AlphaPO's formula sees a pair or two at a time."""
    pairs = []
    original = FusedCPOTrainer.cpo_loss
    monkeypatch.setattr(FusedCPOTrainer, "cpo_loss", lambda self, c, r: pairs.append(len(c)) or original(self, c, r))
    stock, ours = (cpo(trainer, tmp_path, CASES["AlphaPO"]) for trainer in (CPOTrainer, FusedCPOTrainer))
    ours.head_options["max_logits_bytes"] = 3000
    batch = first_batch(ours)
    exact_loss, exact_grads = exact(ours, batch)
    (stock_loss, stock_grads), (loss, grads) = step(stock, batch), step(ours, batch)
    assert len(pairs) > 2 and pairs[-1] == 3  # the last call is that of the metrics
    assert_accurate(loss, stock_loss, exact_loss, "loss")
    for name, grad in grads.items():
        assert_accurate(grad, stock_grads[name], exact_grads[name], name)


def encoder_decoder():
    sizes = {"vocab_size": tiny_models.VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def test_an_encoder_decoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a decoder-only model"):
        cpo(FusedCPOTrainer, tmp_path, {"max_completion_length": 16}, model=encoder_decoder())


@pytest.mark.parametrize("name", ["simpo", "AlphaPO"])
@pytest.mark.parametrize("asked", [True, False])
def test_the_routers_loss_is_added_as_stock_adds_it(tmp_path, name, asked):
    """By TRL's coefficient, which it reads from the model's configuration."""
    model = experts(output_router_logits=asked)
    stock, ours = (cpo(trainer, tmp_path, CASES[name], model=model) for trainer in (CPOTrainer, FusedCPOTrainer))
    batch = first_batch(ours)
    (want, want_grads), (loss, grads) = step(stock, batch), step(ours, batch)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[key], rtol=1e-4, atol=2e-5, msg=lambda m, n=key: f"{n}: {m}")
    ours.aux_loss_coef = 0.0
    assert bool(abs(step(ours, batch)[0] - loss) > 0.1) is asked


def test_what_is_not_computed_is_named(tmp_path, monkeypatch):
    monkeypatch.delattr(CPOTrainer, "cpo_loss")
    with pytest.raises(RuntimeError, match=r"has no CPOTrainer.cpo_loss.*tested with trl 1\.16"):
        cpo(FusedCPOTrainer, tmp_path)
