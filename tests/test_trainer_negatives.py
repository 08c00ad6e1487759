"""What the trainer contrasts: kinds of negatives, their weights and ranks, who draws them, and shared prefixes."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import logging
import math
import weakref

import pytest
import tiny_models
import torch
from test_trainer import parameters, steps, trainer

from cpo_kernels import contrastive_loss
from cpo_kernels.negatives import Completion
from cpo_kernels.trainer import CPOConfig, TokenizedExamples
from cpo_kernels.trainer.along_truth import Reading
from cpo_kernels.trainer.metrics import contrast_metrics

pytestmark = pytest.mark.cpu

NONE = {"num_batch_negatives": 0, "num_truncation_negatives": 0}
GIVEN = [
    {"prompt": "the cat", "completion": "sat on the mat", "negatives": ["ran", "slept on a tree", "flew"]},
    {"prompt": "a dog ran", "completion": "over the river", "negatives": ["sat", "swam near", "and then"]},
]


def micro_batch(run, indices):
    """The inputs of one step on some examples."""
    ((inputs,), _) = run.get_batch_samples(iter([{"index": torch.tensor(indices)}]), 1, torch.device("cpu"))
    return inputs


def candidates(run, inputs) -> list[list[list[int]]]:
    """The tokens of the candidates of each group."""
    bounds = inputs["cu_tokens"]
    tokens = [inputs["targets"][a:b].tolist() for a, b in itertools.pairwise(bounds)]
    groups = inputs["cu_groups"]
    return [tokens[a:b] for a, b in itertools.pairwise(groups)]


def dense_logps(model, prompt, completion) -> torch.Tensor:
    text = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logps = model(input_ids=text).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, text[0, 1:, None])[len(prompt) - 1 :, 0].sum()


# Weights and ranks


@pytest.mark.parametrize("ranks", [None, [2, 1, 3], [0, 1, 1]], ids=["unranked", "ranked", "two positives"])
@pytest.mark.parametrize("sharing", ["off", "required"])
def test_given_negatives_with_ranks_and_weights_equal_the_dense_contrast(tmp_path, ranks, sharing):
    examples = [example | ({} if ranks is None else {"ranks": ranks}) for example in GIVEN]
    model, reference = tiny_models.llama(), tiny_models.llama(seed=1)
    options = {"given_weight": 3.0, "beta": 0.5, "prefix_sharing": sharing, **NONE}
    run = trainer(tmp_path, copy.deepcopy(model), examples, ref_model=reference, **options)
    inputs = micro_batch(run, [0, 1])
    out = run._forward(run.model, inputs)

    scores, nll, tokens, group_ranks = [], 0.0, 0, [0, *(ranks or [1, 1, 1])]
    for index, group in enumerate(candidates(run, inputs)):
        prompt = run.train_dataset.prompts[index]
        own = torch.stack([dense_logps(model, prompt, completion) for completion in group])
        ref = torch.stack([dense_logps(reference, prompt, completion) for completion in group])
        log_weights = torch.tensor([math.log(3) * (rank > 0) for rank in group_ranks])
        scores.append(own - ref + log_weights / 0.5)
        torch.testing.assert_close(
            out.rewards[4 * index : 4 * index + 4], 0.5 * (own - ref), rtol=1e-4, atol=1e-5, msg="without the weights"
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


# Mean-field


@pytest.mark.parametrize("source", ["model", "reference"])
def test_mean_field_negatives_come_from_who_was_asked(tmp_path, source):
    """One of the two is sure of a single word after anything: its negatives are that word over and over."""
    sure, other = tiny_models.llama(), tiny_models.llama(seed=1)
    word = tiny_models.tokenizer()("river")["input_ids"][0]
    with torch.no_grad():
        sure.model.norm.weight.zero_()
        sure.model.norm.weight[0] = 1.0
        sure.lm_head.weight.zero_()
        sure.model.embed_tokens.weight[:, 0] = 100.0
        for layer in sure.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        sure.lm_head.weight[word, 0] = 100.0
    model, reference = (sure, other) if source == "model" else (other, sure)
    options = {"num_mean_field_negatives": 2, "mean_field_source": source, **NONE}
    run = trainer(tmp_path, model, ref_model=reference, **options)
    for truth, *drawn in candidates(run, micro_batch(run, [0, 1, 2])):
        assert drawn == [[word] * len(truth)] * 2


def test_mean_field_negatives_are_a_function_of_step_and_example(tmp_path):
    run = trainer(tmp_path, num_mean_field_negatives=2, **NONE)
    alone = candidates(run, micro_batch(run, [5]))[0]
    assert candidates(run, micro_batch(run, [1, 5, 2]))[1] == alone
    run.state.global_step = 1
    assert candidates(run, micro_batch(run, [5]))[0] != alone


def test_drawing_leaves_generators_and_modes_alone(tmp_path):
    model = tiny_models.gpt2(resid_pdrop=0.5)
    run = trainer(
        tmp_path, model, num_mean_field_negatives=1, num_autoregressive_negatives=1, mean_field_source="model"
    )
    run.model.train()
    before = torch.random.get_rng_state()
    first = candidates(run, micro_batch(run, [0, 1]))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module.training for module in run.model.modules())
    run._negatives.store.negatives.clear()
    assert candidates(run, micro_batch(run, [0, 1])) == first, "dropout takes no part"


def test_a_draw_equal_to_the_truth_alone_has_no_gradient(tmp_path, monkeypatch):
    run = trainer(tmp_path, num_mean_field_negatives=2, alpha=1.0, **NONE)
    truth = run.train_dataset.completions[0]
    reading = Reading(torch.tensor([truth, truth]), logp=0.0, cut_logps=[])
    monkeypatch.setattr(run._negatives, "_read", lambda *_: [reading])
    monkeypatch.setattr(type(run._negatives), "_reads_with_reference", False)
    inputs = micro_batch(run, [0])
    assert candidates(run, inputs) == [[truth, truth]]
    run._forward(run.model, inputs).loss.backward()
    assert max(p.grad.abs().max() for p in run.model.parameters()) < 1e-6


@pytest.mark.parametrize("sharing", ["off", "required"])
def test_the_reference_reads_no_ground_truth_twice(tmp_path, sharing):
    """The pass that draws gives the log-likelihoods of ground truths and truncations, which are those of a full one."""
    options = {"num_mean_field_negatives": 2, "num_batch_negatives": 1, "num_truncation_negatives": 2}
    options |= {"prefix_sharing": sharing, "ref_model": tiny_models.llama(seed=1)}
    run = trainer(tmp_path, mean_field_source="reference", **options)
    rows = []
    run.ref_model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["input_ids"]), with_kwargs=True
    )
    inputs = micro_batch(run, [0, 3, 5])
    got = run._reference_logps(inputs)
    drawn, rest = rows
    assert drawn.shape[0] == 3
    assert rest.shape[0] == 3 * 3 or sharing == "required"
    without = {name: value for name, value in inputs.items() if name not in ("ref_logps", "unknown", "unread")}
    torch.testing.assert_close(got, run._reference_logps(without), rtol=1e-5, atol=1e-5)
    assert rows[-1].numel() > rest.numel()


# Autoregressive


def test_autoregressive_negatives_are_written_for_several_steps_at_once(tmp_path, monkeypatch):
    run = trainer(
        tmp_path,
        num_autoregressive_negatives=2,
        autoregressive_every=3,
        max_steps=5,
        gradient_accumulation_steps=2,
        **NONE,
    )
    calls = []
    write = run._negatives._write
    monkeypatch.setattr(run._negatives, "_write", lambda e, i, s: calls.append((s, len(i))) or write(e, i, s))
    run.train()
    # 16 examples are 2 steps of 8 an epoch: the window of 3 steps ends with the epoch.
    assert [step for step, _ in calls] == [0, 2, 3, 4]
    assert calls[0] == (0, 16)
    assert len(steps(run)) == 5


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_resumed_within_a_window_has_the_negatives_of_the_uninterrupted_one(tmp_path, stop):
    kwargs = {
        "num_autoregressive_negatives": 1,
        "autoregressive_every": 3,
        "num_mean_field_negatives": 1,
        "max_steps": 5,
    }
    kwargs |= {"save_strategy": "steps", "save_steps": stop, "per_device_train_batch_size": 2, **NONE}
    kwargs |= {"mean_field_source": "model"}
    whole = trainer(tmp_path, **kwargs)
    whole.train()
    resumed = trainer(tmp_path, **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    for name, value in parameters(whole).items():
        assert torch.equal(parameters(resumed)[name], value), name
    assert steps(resumed) == steps(whole)


def test_negatives_that_are_not_resampled_are_written_once(tmp_path, monkeypatch):
    run = trainer(
        tmp_path, num_autoregressive_negatives=1, num_batch_negatives=1, resample_negatives=False, max_steps=6
    )
    seen: dict[int, list] = {}
    build = run._batches.build

    def record(examples, indices, step, contrast):
        batch = build(examples, indices, step, contrast)
        for index, (start, end) in zip(indices, zip(batch.groups, batch.groups[1:], strict=False), strict=True):
            own = [list(segment.tokens) for segment in batch.segments[start:end]]
            assert seen.setdefault(index, own) == own
        return batch

    monkeypatch.setattr(run._batches, "build", record)
    run.train()
    assert len(seen) == 16


def test_a_server_writes_in_place_of_the_model(tmp_path, monkeypatch):
    asked = []

    class Endpoint:
        def __init__(self, url, model, api_key=None):
            asked.append((url, model, api_key))

        def negatives(self, prompts, count, sampling):
            asked.append(list(prompts))
            return [[Completion("river tree", ended=True), Completion("mat", ended=False)] for _ in prompts]

    monkeypatch.setattr("cpo_kernels.trainer.writing.CompletionsEndpoint", Endpoint)
    monkeypatch.setenv("CPO_KERNELS_COMPLETIONS_KEY", "secret")
    options = {"autoregressive_url": "http://localhost/v1", "autoregressive_model": "writer"}
    run = trainer(tmp_path, num_autoregressive_negatives=2, **options, **NONE)
    words = tiny_models.tokenizer()
    for truth, *written in candidates(run, micro_batch(run, [0, 1])):
        assert truth not in written
        assert written == [[*words("river tree")["input_ids"], words.eos_token_id], words("mat")["input_ids"]]
    assert asked[0] == ("http://localhost/v1", "writer", "secret")
    assert asked[1] == [example["prompt"] for example in tiny_models.examples(2)]


# Ranking


@pytest.mark.parametrize("sharing", ["off", "required"])
def test_negatives_ranked_by_mean_hidden_states_of_the_reference(tmp_path, sharing):
    reference = tiny_models.llama(seed=1)
    run = trainer(tmp_path, examples=GIVEN, ref_model=reference, ranking="similarity", prefix_sharing=sharing, **NONE)
    inputs = micro_batch(run, [0, 1])
    out = run._forward(run.model, inputs)
    ranks = []
    for index, group in enumerate(candidates(run, inputs)):
        prompt = run.train_dataset.prompts[index]
        embeddings = []
        for completion in group:
            hidden = reference.model(torch.tensor([[*prompt, *completion[:-1]]])).last_hidden_state[0]
            embeddings.append(hidden[len(prompt) - 1 :].mean(0))
        similarity = torch.cosine_similarity(embeddings[0], torch.stack(embeddings[1:]), dim=-1)
        ranks += [0, *(1 + similarity.argsort(descending=True).argsort()).tolist()]
    assert inputs["ranks"] == ranks
    scores = out.rewards.reshape(2, 4) / 0.1
    want = contrastive_loss(scores, ranks=torch.tensor(ranks).reshape(2, 4), beta=0.1)
    torch.testing.assert_close(out.contrastive_loss, want, rtol=1e-5, atol=1e-6)


def test_similarity_orders_only_what_the_data_ranks_equal(tmp_path):
    examples = [example | {"ranks": [0, 2, 1]} for example in GIVEN]
    run = trainer(tmp_path, examples=examples, ranking="similarity", **NONE)
    inputs = micro_batch(run, [0, 1])
    run._forward(run.model, inputs)
    assert inputs["ranks"] == [0, 0, 2, 1] * 2


# Precomputed references


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


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"objective": "ppo"}, "objective must be one of cpo, dpo, .* got 'ppo'"),
        ({"given_weight": 0.0}, "given_weight must be a positive number, got 0.0"),
        ({"ranking": "alphabet"}, r"ranking must be one of .* got 'alphabet'"),
        ({"ranking": "similarity", "reference": "none"}, "needs an embedding_model or the hidden states"),
        (
            {"mean_field_source": "reference", "reference": "none", "num_mean_field_negatives": 1},
            "needs reference='froz",
        ),
        ({"reference": "precomputed", "num_mean_field_negatives": 1}, "num_mean_field_negatives=1 makes new ones"),
        ({"autoregressive_top_p": 0.0}, r"autoregressive_top_p must be in \(0, 1\], got 0.0"),
        ({"autoregressive_every": 0}, "autoregressive_every must be at least 1, got 0"),
        ({"autoregressive_url": "http://localhost/v1"}, "needs autoregressive_model"),
        ({"prefix_sharing": "yes"}, "prefix_sharing must be one of"),
        ({"logits_dtype": "bfloat16"}, "logits_dtype must be one of"),
        (
            {"mean_field_source": "reference", "alpha": 0.0, "num_mean_field_negatives": 1},
            "and a contrast, got .* alpha=0.0",
        ),
        (
            {"mean_field_source": "model", "num_mean_field_negatives": 1, "resample_negatives": False},
            "draws them from a model that changes",
        ),
        ({"scheduled_sampling_probability": 2.0}, "scheduled_sampling_probability must be in"),
        (
            {"loss_type": "ipo", "num_batch_negatives": 1, "num_truncation_negatives": 0, "batch_weight": 2.0},
            "batch_weight=2.0 has no meaning",
        ),
    ],
)
def test_a_configuration_that_contradicts_itself(tmp_path, kwargs, message):
    from test_trainer import config

    with pytest.raises(ValueError, match=message):
        config(tmp_path, **kwargs)


def test_contrasts_without_negatives_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there are none: the data brings none"):
        trainer(tmp_path, **NONE)
    some = [GIVEN[0], {name: GIVEN[1][name] for name in ("prompt", "completion")}]
    with pytest.raises(ValueError, match="example 1 brings no negatives and none are drawn"):
        trainer(tmp_path, examples=some, **NONE)
    with pytest.raises(ValueError, match="resample_negatives=True draws new ones"):
        trainer(tmp_path, reference="precomputed")


def test_too_few_completions_are_found_before_training(tmp_path):
    with pytest.raises(ValueError, match="2 batch negatives need as many other completions, but 2 examples have 2"):
        trainer(tmp_path, examples=tiny_models.examples(2))
    with pytest.raises(ValueError, match="but 1 examples have 1 distinct"):
        trainer(tmp_path, eval_dataset=tiny_models.examples(1))


def test_tokens_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"example 1 has 30 \+ 5 tokens, max_length is 32"):
        trainer(tmp_path, examples=TokenizedExamples([[3], [3] * 30], [[4, 2], [4, 5, 6, 7, 2]]))
    with pytest.raises(ValueError, match="a negative of example 0 is empty"):
        TokenizedExamples([[3]], [[4, 2]], negatives=[[[]]])
    with pytest.raises(ValueError, match="example 0 has 1 negatives but 2 ranks"):
        TokenizedExamples([[3]], [[4, 2]], negatives=[[[5]]], ranks=[[1, 2]])


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
        run = trainer(tmp_path, tiny_models.llama().bfloat16(), logits_dtype=logits_dtype, reference="none")
        logps.append(run._forward(run.model, micro_batch(run, [0, 1])).logps)
    assert not torch.equal(*logps)
    torch.testing.assert_close(logps[0], logps[1], rtol=0.05, atol=0.3)


def test_logs_of_negatives_are_plain_json(tmp_path):
    run = trainer(tmp_path, num_mean_field_negatives=1, num_autoregressive_negatives=1, max_steps=2)
    run.train()
    assert json.loads(json.dumps(steps(run))) == steps(run)
