"""Precomputed references, and inputs sampled from the model."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import tiny_models
import torch
from trainer_runs import steps, trainer
from trainer_steps import NONE, micro_batch

from cpo_kernels.trainer.dropout import disable_dropout

pytestmark = pytest.mark.cpu


def test_precomputed_scores_train_as_the_frozen_reference_does(tmp_path):
    runs = []
    for reference in ("frozen", "precomputed"):
        options = {"reference": reference, "resample_negatives": False, "eval_dataset": tiny_models.examples(5, seed=9)}
        runs.append(trainer(tmp_path / reference, tiny_models.llama(), **options))
        runs[-1].train()
        runs[-1].evaluate()
    assert runs[1].ref_model is None and runs[1].reference is None
    for whole, kept in zip(runs[0].state.log_history[:-1], runs[1].state.log_history[:-1], strict=True):
        for name in ("contrastive_loss", "nll_loss", "accuracy", "eval_contrastive_loss", "eval_accuracy/batch"):
            assert (name in whole) == (name in kept)
            if name in whole:
                assert kept[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name


def test_precomputed_scores_are_of_the_examples_and_of_their_negatives(tmp_path):
    """The same data as a list, and as training and evaluation set at once; other data has no scores."""
    data = tiny_models.examples(6)
    options = {"resample_negatives": False, "eval_dataset": data}
    frozen = trainer(tmp_path, examples=data, ref_model=tiny_models.llama(seed=1), **options)
    kept = trainer(tmp_path, examples=data, ref_model=tiny_models.llama(seed=1), reference="precomputed", **options)
    want, got = frozen.evaluate(), kept.evaluate(data)
    for name in ("eval_loss", "eval_rewards/chosen", "eval_accuracy/truncation"):
        assert got[name] == pytest.approx(want[name], rel=1e-5), name
    with pytest.raises(ValueError, match="has no scores of these examples"):
        kept.evaluate(tiny_models.examples(6, seed=1))


def test_a_precomputed_reference_is_let_go(tmp_path):
    reference = tiny_models.llama(seed=1)
    gone = weakref.ref(reference)
    run = trainer(tmp_path, ref_model=reference, reference="precomputed", resample_negatives=False)
    del reference
    gc.collect()
    assert gone() is None
    run.train()


def test_precomputed_scores_are_kept_by_model_and_data(tmp_path, monkeypatch):
    from cpo_kernels.trainer.reference import Reference

    asked = []
    score = Reference.score
    monkeypatch.setattr(
        Reference, "score", lambda self, *args, **kwargs: asked.append(1) or score(self, *args, **kwargs)
    )
    options = {"reference": "precomputed", "resample_negatives": False, "reference_cache": str(tmp_path / "cache")}

    def scored(model, examples, **changed) -> bool:
        asked.clear()
        trainer(tmp_path, model, examples, **(options | changed))
        return bool(asked)

    data = tiny_models.examples(6)
    assert scored(tiny_models.llama(), data)
    assert not scored(tiny_models.llama(), data)
    assert scored(tiny_models.llama(seed=1), data)
    assert scored(tiny_models.llama(), tiny_models.examples(6, seed=1))
    assert scored(tiny_models.llama(), data, num_batch_negatives=1)
    assert scored(tiny_models.llama(), data, data_seed=5)


# What is trained besides adapters

GPT2_ADAPTERS = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
BESIDES = {
    "biases": lambda: tiny_models.adapted(tiny_models.gpt2(), bias="all", **GPT2_ADAPTERS),
    "tied embeddings": lambda: with_trained(tiny_models.adapted(tiny_models.gpt2(), **GPT2_ADAPTERS), "wte.weight"),
    "norms": lambda: with_trained(tiny_models.adapted(), "norm.weight"),
    "embeddings": lambda: with_trained(tiny_models.adapted(), "embed_tokens.weight"),
    "a trained copy": lambda: tiny_models.adapted(modules_to_save=["lm_head"]),
    "nothing": tiny_models.adapted,
}


def with_trained(model, suffix: str):
    for name, parameter in model.named_parameters():
        if name.endswith(suffix):
            parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize("make", BESIDES.values(), ids=BESIDES)
def test_the_reference_stays_whatever_is_trained_besides_adapters(tmp_path, make):
    """Its log-likelihoods stay those of the model without adapters as it was given, and the model is left as it is."""
    untouched = make()
    run = trainer(tmp_path, make(), learning_rate=0.1, max_steps=6, prefix_sharing="off")
    inputs = micro_batch(run, [0, 1])
    run.train()
    before = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    scores = run.reference.score(inputs, {}, pool=False).logps
    assert all(torch.equal(value, before[name]) for name, value in run.model.named_parameters())
    with torch.no_grad(), untouched.disable_adapter():
        logits = untouched(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    logps = logits.log_softmax(-1).flatten(0, 1)[inputs["rows"]].gather(1, inputs["targets"][:, None])[:, 0]
    expected = torch.stack([own.sum() for own in logps.split(torch.tensor(inputs["cu_tokens"]).diff().tolist())])
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_what_no_checkpoint_holds_is_not_resumed_without_asking(tmp_path):
    """PEFT saves biases with ``bias="all"``, and nothing else of the base model that is trained besides adapters."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = trainer(tmp_path / "biases", BESIDES["biases"](), **options)
    whole.train()
    resumed = trainer(tmp_path / "biases", BESIDES["biases"](), **options)
    assert resumed.reference.fingerprint == whole.reference.fingerprint == whole.reference.take_fingerprint()
    resumed.train(resume_from_checkpoint=str(tmp_path / "biases" / "checkpoint-1"))
    for (name, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), name
    trainer(tmp_path / "norms", BESIDES["norms"](), **options).train()
    resumed = trainer(tmp_path / "norms", BESIDES["norms"](), **options)
    with pytest.raises(ValueError, match=r"norm.weight' is trained besides the adapters, and checkpoints .* not hold"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "norms" / "checkpoint-1"))


def test_the_model_is_as_it_was_where_the_reference_fails(tmp_path):
    run = trainer(tmp_path, BESIDES["norms"](), learning_rate=0.1)
    run.train()
    before = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    with pytest.raises(KeyError):
        run.reference.score({}, {}, pool=False)
    assert all(torch.equal(value, before[name]) for name, value in run.model.named_parameters())


# Dropout


def first_losses(path, model, count=2, **options) -> list[float]:
    """The loss of a first step of DPO, before anything is learned, in as many runs."""
    options = {"objective": "dpo", "learning_rate": 0.0, "max_steps": 1, "num_truncation_negatives": 0} | options
    losses = []
    for seed in range(count):
        run = trainer(path, model(), seed=seed, data_seed=0, num_batch_negatives=1, **options)
        run.train()
        losses.append(steps(run)[0]["loss"])
    return losses


DROPPING = {
    "layers": lambda: tiny_models.gpt2(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
    "attributes": lambda: tiny_models.llama(attention_dropout=0.3),
    "below adapters": lambda: tiny_models.adapted(
        tiny_models.gpt2(resid_pdrop=0.3), target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=True
    ),
}


@pytest.mark.parametrize("model", DROPPING.values(), ids=DROPPING)
def test_the_first_loss_of_dpo_is_ln_2_whatever_the_dropout(tmp_path, model):
    assert first_losses(tmp_path, model) == pytest.approx([math.log(2)] * 2, abs=1e-6)
    kept = first_losses(tmp_path, model, disable_dropout=False)
    assert kept[0] != kept[1]
    assert all(abs(loss - math.log(2)) > 1e-4 for loss in kept)


def test_dropout_of_a_model_with_few_positions():
    model = tiny_models.gpt2(n_positions=4, resid_pdrop=0.25)
    disable_dropout(model)
    assert model.transformer.h[0].mlp.dropout.p == 0


def test_dropout_is_switched_off_where_there_is_a_reference(tmp_path):
    def probability(**options) -> float:
        model = tiny_models.gpt2(resid_pdrop=0.25)
        trainer(tmp_path, model, **options)
        assert model.config.resid_pdrop == 0.25
        return model.transformer.h[0].mlp.dropout.p

    assert probability() == probability(objective="dpo", num_batch_negatives=1, num_truncation_negatives=0) == 0
    assert probability(reference="precomputed", resample_negatives=False) == 0
    assert probability(reference="none") == probability(objective="mle", **NONE) == 0.25
    assert probability(disable_dropout=False) == 0.25
    assert probability(reference="none", disable_dropout=True) == 0


def test_a_model_that_reads_its_configuration_is_named(tmp_path, caplog, monkeypatch):
    from transformers import FalconConfig, FalconForCausalLM
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    sizes = {"vocab_size": tiny_models.VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    trainer(tmp_path, FalconForCausalLM(FalconConfig(**sizes)))
    assert "disable_dropout" not in caplog.text
    trainer(tmp_path, FalconForCausalLM(FalconConfig(**sizes, hidden_dropout=0.5)))
    assert "disable_dropout: FalconForCausalLM is random in training" in caplog.text
    assert "Set to 0 there: hidden_dropout" in caplog.text


# Scheduled sampling


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_scheduled_sampling_conditions_on_the_models_own_tokens(tmp_path, probability):
    model = tiny_models.llama()
    options = {"objective": "scheduled_sampling", "scheduled_sampling_probability": probability, **NONE}
    run = trainer(tmp_path, model, alpha=None, **options)
    inputs = micro_batch(run, [3, 1])
    replaced = total = 0
    nll = 0.0
    for b, index in enumerate((3, 1)):
        prompt, completion = run.train_dataset.prompts[index], run.train_dataset.completions[index]
        seen = inputs["input_ids"][b][inputs["attention_mask"][b].bool()].tolist()
        assert seen[: len(prompt)] == list(prompt)
        own = seen[len(prompt) :]
        replaced += sum(a != b for a, b in zip(own, completion, strict=False))
        total += len(completion)
        logps = model(torch.tensor([seen])).logits[0, len(prompt) - 1 :].log_softmax(-1)
        nll = nll - logps.gather(-1, torch.tensor(completion)[:, None]).sum()
    torch.testing.assert_close(run._forward(run.model, inputs).loss, nll / total, rtol=1e-5, atol=1e-6)
    assert (replaced > 0) == (probability > 0)
    run.train()
    assert len(steps(run)) == 3
    evaluated = trainer(tmp_path, model, alpha=None, eval_dataset=tiny_models.examples(4, 5), **options).evaluate()
    plain = trainer(tmp_path, model, alpha=0.0, eval_dataset=tiny_models.examples(4, 5), **NONE).evaluate()
    assert evaluated["eval_nll_loss"] == pytest.approx(plain["eval_nll_loss"], rel=1e-6)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_every_pass_of_scheduled_sampling_reads_what_the_pass_before_has_drawn(tmp_path, passes):
    """A model that is sure of a successor of every token; with probability 1 all tokens are drawn."""
    model = tiny_models.llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        directions = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=1)
        model.lm_head.weight.copy_(1000 * directions.roll(1, 0))  # the token i + 1 follows the token i
    options = {"objective": "scheduled_sampling", "scheduled_sampling_probability": 1.0, **NONE}
    run = trainer(tmp_path, model, alpha=None, scheduled_sampling_passes=passes, **options)
    inputs = micro_batch(run, [3])
    prompt, completion = list(run.train_dataset.prompts[3]), list(run.train_dataset.completions[3])
    text = [*prompt, *completion]
    want = list(completion)
    for place in range(len(completion)):
        steps_back = min(passes, place + 1)  # the first drawn tokens lead back to the prompt after fewer passes
        want[place] = (text[len(prompt) + place - steps_back] + steps_back) % tiny_models.VOCAB
    assert inputs["input_ids"][0].tolist() == [*prompt, *want[:-1]]
