"""What the trainer contrasts: weights, ranks, presets, metrics by kind, shared prefixes, evaluation."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import tiny_models
import torch
from trainer_runs import steps, trainer
from trainer_steps import GIVEN, NONE, candidates, dense_logps, micro_batch

from cpo_kernels import contrastive_loss
from cpo_kernels.negatives.kinds import counted_kinds
from cpo_kernels.trainer import CPOConfig
from cpo_kernels.trainer.metrics import contrast_metrics

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("ranks", [None, [2, 1, 3], [0, 1, 1]], ids=["unranked", "ranked", "two positives"])
@pytest.mark.parametrize("sharing", ["off", "required"])
@pytest.mark.parametrize("averaged", [False, True], ids=["sums", "means"])
def test_given_negatives_with_ranks_and_weights_equal_the_dense_contrast(tmp_path, ranks, sharing, averaged):
    examples = [example | ({} if ranks is None else {"ranks": ranks}) for example in GIVEN]
    model, reference = tiny_models.llama(), tiny_models.llama(seed=1)
    options = {"given_weight": 3.0, "beta": 0.5, "prefix_sharing": sharing, "length_normalized": averaged, **NONE}
    run = trainer(tmp_path, copy.deepcopy(model), examples, ref_model=reference, **options)
    inputs = micro_batch(run, [0, 1])
    out = run._forward(run.model, inputs)

    scores, nll, tokens, group_ranks = [], 0.0, 0, [0, *(ranks or [1, 1, 1])]
    for index, group in enumerate(candidates(run, inputs)):
        prompt = run.train_dataset.prompts[index]
        own = torch.stack([dense_logps(model, prompt, completion) for completion in group])
        ref = torch.stack([dense_logps(reference, prompt, completion) for completion in group])
        log_weights = torch.tensor([math.log(3) * (rank > 0) for rank in group_ranks])
        ratios = (own - ref) / torch.tensor([len(completion) if averaged else 1 for completion in group])
        scores.append(ratios + log_weights / 0.5)
        torch.testing.assert_close(
            out.rewards[4 * index : 4 * index + 4], 0.5 * ratios, rtol=1e-4, atol=1e-5, msg="without the weights"
        )
        for rank, completion, logp in zip(group_ranks, group, own, strict=True):
            nll, tokens = nll - logp * (rank == 0), tokens + len(completion) * (rank == 0)
    want = contrastive_loss(torch.stack(scores), ranks=torch.tensor([group_ranks] * 2), beta=0.5)
    torch.testing.assert_close(out.contrastive_loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss.detach(), 0.5 * want + 0.5 * nll / tokens, rtol=1e-5, atol=1e-6)


def test_a_weight_of_two_counts_a_negative_twice(tmp_path):
    """Weight 2 against the same negative given twice, with a reference that differs from the model."""
    twice = [example | {"negatives": [example["negatives"][0]] * 2} for example in GIVEN]
    once = [example | {"negatives": example["negatives"][:1]} for example in GIVEN]
    losses = []
    for examples, weight in ((twice, 1.0), (once, 2.0)):
        run = trainer(
            tmp_path, examples=examples, ref_model=tiny_models.llama(seed=1), given_weight=weight, beta=0.5, **NONE
        )
        losses.append(run._forward(run.model, micro_batch(run, [0, 1])).contrastive_loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["batch", "truncation", "mean_field", "autoregressive"])
def test_a_drawn_negative_has_the_weight_of_its_kind(tmp_path, kind):
    """One negative of each kind: the contrast of dense log-likelihoods, with the one kind's score shifted by log w."""
    model, reference = tiny_models.llama(), tiny_models.llama(seed=1)
    counts = {name: 1 for name in counted_kinds()}
    options = {f"{kind}_weight": 5.0, "beta": 0.5, "autoregressive_max_new_tokens": 4}
    run = trainer(tmp_path, copy.deepcopy(model), ref_model=reference, **counts, **options)
    inputs = micro_batch(run, [2])
    ((*group,),) = candidates(run, inputs)
    prompt = run.train_dataset.prompts[2]
    assert inputs["kinds"] == ["truth", "batch", "truncation", "mean_field", "autoregressive"]
    scores = torch.stack([dense_logps(model, prompt, own) - dense_logps(reference, prompt, own) for own in group])
    shifts = torch.tensor([math.log(5.0) / 0.5 * (own == kind) for own in inputs["kinds"]])
    got = run._forward(run.model, inputs).contrastive_loss
    torch.testing.assert_close(got, contrastive_loss((scores + shifts)[None], beta=0.5), rtol=1e-5, atol=1e-5)
    assert abs(got - contrastive_loss(scores[None], beta=0.5)) > 1e-2, "the weight makes a difference"


def test_preference_pairs_train_by_dpo(tmp_path):
    pairs = [{"prompt": e["prompt"], "chosen": e["completion"], "rejected": e["negatives"][0]} for e in GIVEN]
    model, reference = tiny_models.gpt2(), tiny_models.gpt2(seed=1)
    counts = {"num_batch_negatives": None, "num_truncation_negatives": None}
    run = trainer(tmp_path, copy.deepcopy(model), pairs, ref_model=reference, objective="dpo", **counts)
    inputs = micro_batch(run, [0, 1])
    margins = []
    for index, group in enumerate(candidates(run, inputs)):
        prompt = run.train_dataset.prompts[index]
        chosen, rejected = (dense_logps(model, prompt, c) - dense_logps(reference, prompt, c) for c in group)
        margins.append(chosen - rejected)
    want = -torch.nn.functional.logsigmoid(0.1 * torch.stack(margins)).mean()
    torch.testing.assert_close(run._forward(run.model, inputs).loss.detach(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "weights", "reference"),
    [
        ("cpo", (0.5, 0.5), "frozen"),
        ("dpo", (1.0, 0.0), "frozen"),
        ("xu_cpo", (1.0, 1.0), "none"),
        ("simpo", (1.0, 0.0), "none"),
        ("mle", (0.0, 1.0), "none"),
    ],
)
def test_presets_are_what_their_papers_say(tmp_path, objective, weights, reference):
    config = CPOConfig(output_dir=str(tmp_path), objective=objective, report_to="none", use_cpu=True)
    assert (config.alpha, config.mle_weight) == weights
    assert config.reference == reference
    assert (config.margin > 0 and config.length_normalized) == (objective == "simpo")


def test_what_is_given_overrides_the_preset(tmp_path):
    config = CPOConfig(output_dir=str(tmp_path), objective="simpo", beta=3.0, alpha=0.25, report_to="none")
    assert (config.beta, config.alpha, config.mle_weight, config.margin) == (3.0, 0.25, 0.75, 1.0)


def test_metrics_by_kind():
    rewards = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0, -1.0])
    kinds = ["truth", "batch", "truncation", "truth", "batch", "batch"]
    metrics = contrast_metrics(rewards, [0, 3, 6], [0, 1, 1, 0, 1, 1], kinds, ["batch", "truncation", "given"])
    got = {name: (round(float(value), 4), count) for name, (value, count) in metrics.items()}
    assert got == {
        "rewards/chosen": (0.5, 2),
        "rewards/rejected": (round((1.25 + 1.0) / 2, 4), 2),
        "margin": (round((-0.25 - 1.0) / 2, 4), 2),
        "accuracy": (0.0, 2),
        "accuracy/batch": (0.5, 2),
        "accuracy/truncation": (0.0, 1),
        "accuracy/given": (0.0, 0),
    }


def test_kinds_are_logged_where_there_are_any(tmp_path):
    run = trainer(tmp_path, num_mean_field_negatives=1, max_steps=1, eval_dataset=tiny_models.examples(6, seed=3))
    run.train()
    logged = {name for name in steps(run)[0] if name.startswith("accuracy/")}
    assert logged == {"accuracy/batch", "accuracy/truncation", "accuracy/mean_field"}
    assert {"eval_" + name for name in logged} <= set(run.evaluate())


# Prefix sharing


@pytest.mark.parametrize("make_model", [tiny_models.gpt2, tiny_models.llama])
def test_shared_prefixes_give_the_loss_and_the_gradients_of_separate_rows(tmp_path, make_model):
    results = []
    for sharing in ("off", "required"):
        options = {"num_batch_negatives": 3, "prefix_sharing": sharing, "beta": 0.5}
        run = trainer(tmp_path, make_model(), ref_model=make_model(seed=1), **options)
        inputs = micro_batch(run, [3, 1, 7, 5])
        assert ("tree_groups" in inputs) == (sharing == "required")
        out = run._forward(run.model, inputs)
        out.loss.backward()
        results.append((out, {name: p.grad for name, p in run.model.named_parameters()}))
    (separate, want), (shared, got) = results
    torch.testing.assert_close(shared.logps, separate.logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared.loss, separate.loss, rtol=1e-5, atol=1e-6)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_that_cannot_share_is_named(tmp_path, caplog, monkeypatch):
    def refuse(model):
        raise RuntimeError("layers of kind 'mamba'")

    monkeypatch.setattr("cpo_kernels.trainer.trainer.check_prefix_sharing", refuse)
    with pytest.raises(RuntimeError, match="mamba"):
        trainer(tmp_path, prefix_sharing="required")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    run = trainer(tmp_path, prefix_sharing="auto")
    assert "attention_mask" in micro_batch(run, [0, 1])
    assert "layers of kind 'mamba'" in caplog.text


# Evaluation and the head


def test_predict_takes_examples_as_they_are(tmp_path):
    data = tiny_models.examples(5, seed=5)
    run = trainer(tmp_path, eval_dataset=data)
    metrics, want = run.predict(data).metrics, run.evaluate()
    for name in ("loss", "nll_loss", "accuracy/batch"):
        assert metrics[f"test_{name}"] == want[f"eval_{name}"]


def test_evaluation_weighs_groups_with_negatives_only(tmp_path):
    """Of data where only some examples bring negatives, the contrast is a mean over those, whatever the batches."""
    some = [
        example | ({"negatives": ["ran", "sat"]} if index % 3 == 0 else {})
        for index, example in enumerate(tiny_models.examples(7, seed=5))
    ]
    results = []
    for size in (1, 7):
        options = {"objective": "mle", "alpha": None, "per_device_eval_batch_size": size, "prefix_sharing": "off"}
        results.append(trainer(tmp_path, eval_dataset=some, **options, **NONE).evaluate())
    assert "eval_accuracy/given" in results[0] and "eval_accuracy/batch" not in results[0]
    for name in ("eval_nll_loss", "eval_contrastive_loss", "eval_accuracy", "eval_accuracy/given", "eval_margin"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-5, abs=1e-6), name


def test_float32_logits_reach_the_head(tmp_path):
    """Half-precision logits differ from float32 ones; the log-likelihoods that are contrasted say which were used."""
    logps = []
    for logits_dtype in (None, "float32"):
        head = {"logits_dtype": logits_dtype, "backend": "torch"}  # the CPU's kernels hold no logits
        run = trainer(tmp_path, tiny_models.llama().bfloat16(), reference="none", **head)
        logps.append(run._forward(run.model, micro_batch(run, [0, 1])).logps)
    assert not torch.equal(*logps)
    torch.testing.assert_close(logps[0], logps[1], rtol=0.05, atol=0.3)
