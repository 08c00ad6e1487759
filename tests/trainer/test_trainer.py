"""The trainer: its loss, accumulation, resumption, evaluation and logs, on tiny random models."""

from __future__ import annotations

import copy
import json
import logging
import math

import pytest
import tiny_models
import torch
from processes import run_script
from project import SUPPORT
from sharded_cases import GLOO_AVERAGES
from trainer_runs import DISTRIBUTED, config, held_out, parameters, steps, trainer

from cpo_kernels import CPOTrainer

pytestmark = pytest.mark.cpu  # samplers draw from host generators; test_cuda_device.py trains on the GPU


# The loss


def dense_loss(model, reference, run: CPOTrainer, indices, step: int) -> torch.Tensor:
    """alpha * CPO + (1 - alpha) * MLE from the logits of every candidate's own text, one at a time."""
    args = run.args

    def logps(lm, prompt, completion):
        text = torch.tensor([[*prompt, *completion]])
        token_logps = lm(input_ids=text).logits[0, :-1].log_softmax(-1).gather(-1, text[0, 1:, None])[:, 0]
        return token_logps[len(prompt) - 1 :]

    contrasts, nll, count = [], 0.0, 0
    for index in indices:
        batch = run._batches.build(run.train_dataset, [index], step, contrast=True)
        prompt = run.train_dataset.prompts[index]
        scores = []
        for c, completion in enumerate(segment.tokens for segment in batch.segments):
            own = logps(model, prompt, completion)
            ref = logps(reference, prompt, completion).detach() if reference is not None else torch.zeros_like(own)
            difference = own - ref
            reward = difference.mean() if args.length_normalized else difference.sum()
            scores.append(args.beta * reward + args.margin * (c > 0))
            if c == 0:
                nll, count = nll - own.sum(), count + len(own)
        contrasts.append(-torch.stack(scores).log_softmax(0)[0])
    return args.alpha * torch.stack(contrasts).mean() + args.mle_weight * nll / count


@pytest.mark.parametrize("make_model", [tiny_models.gpt2, tiny_models.llama])
@pytest.mark.parametrize(
    "objective",
    [
        {"alpha": 0.7, "beta": 0.3},
        {"alpha": 1.0, "reference": "none", "length_normalized": True, "margin": 0.5, "beta": 2.0},
        {"alpha": 0.5, "length_normalized": True},
    ],
    ids=["paper", "simpo", "normalised with a reference"],
)
def test_loss_and_gradients_equal_the_dense_computation(tmp_path, make_model, objective):
    model = make_model()
    dense = copy.deepcopy(model)
    reference = None if objective.get("reference") == "none" else make_model(seed=1)
    run = trainer(tmp_path, model, ref_model=reference, **objective)
    batches, _ = run.get_batch_samples(iter([{"index": torch.tensor([3, 1, 7])}]), 1, torch.device("cpu"))
    loss = run.compute_loss(run.model.train(), batches[0])
    loss.backward()
    want = dense_loss(dense, reference, run, [3, 1, 7], step=0)
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for (name, got), expected in zip(run.model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_one_body_pass_and_no_head_pass_a_step(tmp_path):
    model = tiny_models.llama()
    calls = {"body": 0, "head": 0}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    run = trainer(tmp_path, model, eval_dataset=tiny_models.examples(4, seed=1))
    model.model.register_forward_pre_hook(count("body"))
    for lm in (model, run.ref_model):
        lm.lm_head.register_forward_pre_hook(count("head"))
    run.train()
    assert calls == {"body": 3, "head": 0}
    run.evaluate()
    assert calls["head"] == 0


def test_plain_mle_runs_no_negatives_and_no_reference(tmp_path):
    run = trainer(tmp_path, alpha=0.0)
    assert run.ref_model is None
    batches, _ = run.get_batch_samples(iter([{"index": torch.tensor([0, 1])}]), 1, torch.device("cpu"))
    assert batches[0]["input_ids"].shape[0] == 2
    run.train()
    assert steps(run)[0]["loss"] == pytest.approx(steps(run)[0]["nll_loss"], rel=1e-6)
    assert "contrastive_loss" not in steps(run)[0]


def test_training_lowers_the_loss(tmp_path):
    run = trainer(tmp_path, examples=tiny_models.examples(8), max_steps=100)
    run.train()
    for name in ("loss", "contrastive_loss", "nll_loss"):
        values = [entry[name] for entry in steps(run)]
        assert sum(values[-5:]) < 0.5 * sum(values[:5]), name


@pytest.mark.parametrize("make_model", [tiny_models.gpt2, tiny_models.llama])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_four_batches_of_two_equal_one_of_eight(tmp_path, make_model, alpha):
    """SGD, so that parameters differ by what the gradients differ by and not by Adam's division of it."""
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        kwargs = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        runs.append(trainer(tmp_path, make_model(), alpha=alpha, max_steps=4, **kwargs))
        runs[-1].train()
    for whole, parts in zip(steps(runs[0]), steps(runs[1]), strict=True):
        for name in set(whole) - {"step", "epoch", "learning_rate"}:
            assert parts[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name
    start = dict(make_model().named_parameters())
    for name, whole in parameters(runs[0]).items():
        torch.testing.assert_close(parameters(runs[1])[name], whole, rtol=1e-5, atol=1e-6)
        assert not torch.equal(whole, start[name])


def test_a_short_last_accumulation_is_weighed_by_what_it_holds(tmp_path):
    """10 examples as 2x4 leave an update of a single batch of 2, which must weigh as much as a batch of 2 does."""
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        kwargs = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        runs.append(trainer(tmp_path, examples=tiny_models.examples(10), max_steps=2, **kwargs))
        runs[-1].train()
    assert steps(runs[1])[1]["loss"] == pytest.approx(steps(runs[0])[1]["loss"], rel=1e-5)
    for name, whole in parameters(runs[0]).items():
        torch.testing.assert_close(parameters(runs[1])[name], whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp2", marks=GLOO_AVERAGES)])
def test_two_processes_equal_one(tmp_path, how):
    """Over gloo, 2 processes x 2 accumulated batches of 2, against one process with batches of 8."""
    run_script(SUPPORT / "distributed_worker.py", str(tmp_path), how, processes=2)
    parts = torch.load(tmp_path / "run.pt")
    assert parts["sharded"] == (how == "fsdp2")

    kwargs = {"per_device_train_batch_size": 8, "eval_dataset": held_out(), **DISTRIBUTED}
    kwargs["resample_negatives"] = how == "fsdp2"  # the second epoch gives examples to the other process
    # With the model itself as reference, the first accuracies would compare roundings of zero.
    whole = trainer(tmp_path, ref_model=tiny_models.llama(seed=1), **kwargs)
    whole.train()
    metrics = whole.evaluate()
    for want, got in zip(steps(whole), parts["steps"], strict=True):
        for name in METRICS | {"loss", "grad_norm"}:
            assert got[name] == pytest.approx(want[name], rel=1e-5, abs=1e-6), name
    (evaluation,) = parts["evaluation"]
    for name in {"eval_" + name for name in METRICS | {"loss", "perplexity", "accuracy/given", "accuracy/batch"}}:
        assert evaluation[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name
    for name, value in parameters(whole).items():
        torch.testing.assert_close(parts["parameters"][name], value, rtol=1e-5, atol=1e-6)
    if how == "fsdp2":
        # In bfloat16 two runs part after a few steps: each may be off as far as the rule of tolerance.py allows.
        losses = {}
        for bf16 in (False, True):
            one = trainer(tmp_path, tiny_models.adapted(), bf16=bf16, **kwargs)
            one.train()
            losses[bf16] = torch.tensor([entry["loss"] for entry in steps(one)])
        allowed = 2 * (losses[True] - losses[False]).abs().max()
        assert allowed < 0.05 * losses[False].max()
        assert (torch.tensor(parts["adapted_losses"]) - losses[False]).abs().max() <= allowed


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("stop", [3, 4], ids=["mid-epoch", "end of an epoch"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, dropout, stop):
    kwargs = {"max_steps": 7, "save_strategy": "steps", "save_steps": stop, "per_device_train_batch_size": 2}
    kwargs |= {"gradient_accumulation_steps": 2, "disable_dropout": False}

    def model():
        return tiny_models.gpt2(resid_pdrop=dropout, embd_pdrop=dropout)

    whole = trainer(tmp_path, model(), **kwargs)
    whole.train()
    resumed = trainer(tmp_path, model(), **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    for name, value in parameters(whole).items():
        assert torch.equal(parameters(resumed)[name], value), name
    assert steps(resumed) == steps(whole)


def test_resuming_with_another_reference_is_refused(tmp_path):
    kwargs = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, **kwargs).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"reference of this trainer is not the one that .*checkpoint-1"):
        trainer(tmp_path, tiny_models.llama(seed=1), **kwargs).train(resume_from_checkpoint=checkpoint)
    moved = type(tiny_models.llama()).from_pretrained(checkpoint)
    trainer(tmp_path, moved, ref_model=tiny_models.llama(), **kwargs).train(resume_from_checkpoint=checkpoint)


def test_the_saved_model_is_the_trained_one(tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "final"))
    loaded = type(tiny_models.llama()).from_pretrained(tmp_path / "final")
    assert all(torch.equal(dict(loaded.named_parameters())[name], p) for name, p in parameters(run).items())
    assert not torch.equal(loaded.lm_head.weight, tiny_models.llama().lm_head.weight)
    assert torch.equal(run.ref_model.lm_head.weight, tiny_models.llama().lm_head.weight), "the reference is frozen"


# Logs and evaluation

METRICS = {"contrastive_loss", "nll_loss", "rewards/chosen", "rewards/rejected", "accuracy", "margin"}


def test_logs_are_means_over_the_logging_window(tmp_path):
    each, window = (trainer(tmp_path, max_steps=4, logging_steps=n, alpha=0.3) for n in (1, 4))
    each.train()
    window.train()
    (entry,) = steps(window)
    assert set(entry) >= METRICS | {"loss"}
    for name in METRICS | {"loss"}:
        assert entry[name] == pytest.approx(sum(e[name] for e in steps(each)) / 4, rel=1e-5, abs=1e-7), name
    for e in steps(each):
        assert e["loss"] == pytest.approx(0.3 * e["contrastive_loss"] + 0.7 * e["nll_loss"], rel=1e-5)
        assert e["margin"] == pytest.approx(e["rewards/chosen"] - e["rewards/rejected"], rel=1e-4, abs=1e-6)


def test_before_the_first_step_the_model_is_its_own_reference(tmp_path):
    run = trainer(tmp_path, max_steps=1, num_batch_negatives=2, num_truncation_negatives=1)
    run.train()
    assert steps(run)[0]["rewards/chosen"] == steps(run)[0]["rewards/rejected"] == 0.0
    assert steps(run)[0]["contrastive_loss"] == pytest.approx(math.log(4), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_evaluation_does_not_depend_on_the_batch_size(tmp_path, alpha):
    results = []
    for size in (1, 3, 8):
        kwargs = {"alpha": alpha, "per_device_eval_batch_size": size, "beta": 0.5}
        run = trainer(tmp_path, ref_model=tiny_models.llama(seed=1), eval_dataset=tiny_models.examples(7, 5), **kwargs)
        results.append(run.evaluate())
    for metrics in results:
        assert {"eval_" + name for name in METRICS | {"loss", "perplexity"}} <= set(metrics)
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_nll_loss"]))
        want = alpha * metrics["eval_contrastive_loss"] + (1 - alpha) * metrics["eval_nll_loss"]
        assert metrics["eval_loss"] == pytest.approx(want, rel=1e-6)
        for name in METRICS:
            assert metrics["eval_" + name] == pytest.approx(results[0]["eval_" + name], rel=1e-5, abs=1e-6), name


def test_evaluation_equals_the_models_own_cross_entropy(tmp_path):
    data = tiny_models.examples(5, seed=5)
    model = tiny_models.llama()
    run = trainer(tmp_path, model, eval_dataset={"held_out": data})
    metrics = run.evaluate()
    tokens = run.eval_dataset["held_out"]
    total = count = 0.0
    for prompt, completion in zip(tokens.prompts, tokens.completions, strict=True):
        ids = torch.tensor([prompt + completion])
        labels = torch.tensor([[-100] * len(prompt) + completion])
        total += model(input_ids=ids, labels=labels).loss.item() * len(completion)
        count += len(completion)
    assert metrics["eval_held_out_nll_loss"] == pytest.approx(total / count, rel=1e-5)


def test_evaluation_leaves_the_run_as_it_is(tmp_path):
    plain = trainer(tmp_path, tiny_models.gpt2(resid_pdrop=0.1), disable_dropout=False)
    plain.train()
    kwargs = {"eval_strategy": "steps", "eval_steps": 1, "disable_dropout": False}
    evaluated = trainer(tmp_path, tiny_models.gpt2(resid_pdrop=0.1), eval_dataset=tiny_models.examples(6, 5), **kwargs)
    evaluated.train()
    assert sum("eval_loss" in entry for entry in evaluated.state.log_history) == 3
    assert all(torch.equal(parameters(evaluated)[name], value) for name, value in parameters(plain).items())


def test_nan_is_reported_by_name(tmp_path, caplog, monkeypatch):
    model = tiny_models.llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    run = trainer(tmp_path, model, max_steps=1)
    run.train()
    (entry,) = steps(run)
    assert math.isnan(entry["loss"]) and math.isnan(entry["nll_loss"])
    assert entry["nonfinite/nll_loss"] == entry["nonfinite/contrastive_loss"] == 1
    assert "NaN or Inf at step 1 in: nll_loss (1 times), contrastive_loss (1 times)" in caplog.text


def test_logs_are_plain_json(tmp_path):
    run = trainer(tmp_path)
    run.train()
    assert json.loads(json.dumps(steps(run))) == steps(run)


def test_bfloat16_autocast_trains_in_step_with_float32(tmp_path):
    losses = []
    for bf16 in (False, True):
        run = trainer(tmp_path, bf16=bf16)
        run.train()
        losses.append([entry["loss"] for entry in steps(run)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"beta": 0.0}, r"beta must be .* got 0.0"),
        ({"label_smoothing": 0.6}, r"label_smoothing must be .* got 0.6"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 smooths cross entropy"),
        ({"loss_type": "dpo"}, "loss_type must be one of .* got 'dpo'"),
        ({"reference": "moving"}, r"reference must be one of .* got 'moving'"),
        ({"num_batch_negatives": -1}, "num_batch_negatives must not be negative, got -1"),
        ({"loss_type": "ipo"}, "loss_type='ipo' is defined for one negative, got num_batch_negatives=2"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 is defined for one negative"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"max_prompt_length": 32}, r"max_prompt_length must be in \[1, max_length\) = \[1, 32\), got 32"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
    ],
)
def test_a_configuration_that_contradicts_itself(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **kwargs)


def test_more_positions_than_the_model_has(tmp_path):
    with pytest.raises(ValueError, match="max_length=65 exceeds the 64 positions of a llama model"):
        trainer(tmp_path, max_length=65)


@pytest.mark.parametrize(("positions", "length"), [(64, 64), (1024, 1024), (4096, 1024), (-1, 1024)])
def test_the_length_is_the_models_where_none_is_given(tmp_path, positions, length):
    """Of a long example as many tokens are kept, half of them of the prompt; -1 is XLNet's for no limit."""
    long = {"prompt": "the cat " * 2000, "completion": "sat on " * 2000}
    args = config(tmp_path, max_length=None)
    model = tiny_models.llama(max_position_embeddings=max(positions, length))
    model.config.max_position_embeddings = positions
    run = CPOTrainer(model, args, [long, *tiny_models.examples(3)], processing_class=tiny_models.tokenizer())
    data = run.train_dataset
    assert (len(data.prompts[0]), len(data.completions[0])) == (length // 2, length // 2)
    assert (run.args.max_length, args.max_length) == (length, None)  # args may make a trainer of another model
    with pytest.raises(ValueError, match=r"max_length is None, the model's own"):
        _ = args.prompt_budget


def test_a_prompt_as_long_as_the_model(tmp_path):
    with pytest.raises(ValueError, match=r"max_prompt_length must be in \[1, max_length\) = \[1, 64\), got 64"):
        trainer(tmp_path, max_length=None, max_prompt_length=64)
    with pytest.raises(ValueError, match="max_prompt_length must be at least 1, got 0"):
        config(tmp_path, max_length=None, max_prompt_length=0)


def test_arguments_that_have_no_place(tmp_path):
    with pytest.raises(ValueError, match="compute_metrics is not supported"):
        CPOTrainer(
            tiny_models.llama(),
            config(tmp_path),
            tiny_models.examples(2),
            processing_class=tiny_models.tokenizer(),
            compute_metrics=len,
        )
    with pytest.raises(ValueError, match="ref_model was given together with reference='none'"):
        trainer(tmp_path, ref_model=tiny_models.llama(), reference="none")
