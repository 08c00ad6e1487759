"""TRL's DPO on the fused loss: equal to stock with one negative, to the dense computation with several."""

from __future__ import annotations

import inspect
import math
import re
import runpy

import peft
import pytest
import torch
from project import ROOT

pytest.importorskip("trl")

import tiny_models
import trl
from datasets import Dataset, IterableDataset
from expert_models import experts
from pair_formulas import SMOOTHED, loss_of_pairs
from tolerance import assert_accurate
from transformers import TrainerCallback
from trl.trainer import dpo_trainer
from trl_runs import assert_histories_equal, dense_logps, first_batch, history, make, preferences, step, untied, untimed

from cpo_kernels import attach_linear_loss, contrastive_loss
from cpo_kernels.integrations.host import require_names
from cpo_kernels.integrations.trl import FusedDPOTrainer
from cpo_kernels.loss_table import TRL_NAMES
from cpo_kernels.models import requests

pytestmark = pytest.mark.cpu
NOT_LOGGED = {"entropy", "mean_token_accuracy"}  # unless token_metrics
ALL_METRICS = {"token_metrics": True}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Data sets made from generators are cached on disk."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def dpo(trainer, tmp_path, arguments=None, **keywords):
    if "ref_model" not in keywords and "peft_config" not in keywords and "model" not in keywords:
        keywords["ref_model"] = tiny_models.llama(1)
    return make(trainer, trl.DPOConfig, tmp_path, arguments=arguments, **keywords)


def dense(batch, loss_of, dtype):
    """Loss and gradients of ``loss_of(logps, ref, counts)`` of a batch of ours, from the logits of fresh models."""
    model, ref_model = (untied(seed).to(dtype) for seed in (0, 1))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = batch["input_ids"], batch["attention_mask"], labels
    logps, counts = dense_logps(model, *inputs)
    with torch.no_grad():
        ref = dense_logps(ref_model, *inputs)[0]
    loss = loss_of(logps, ref, counts)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def pair_loss(loss_type: str, beta: float):
    """Of candidates in the order chosen, rejected, chosen, ...: the formulas of the papers."""

    def loss_of(logps, ref, counts):
        ratios = (logps - ref) / (counts if loss_type in ("ipo", "sigmoid_norm") else 1)
        logistic = loss_type.startswith("sigmoid")
        options = {"smoothing": 0.0} if logistic else {}
        name = "plackett_luce" if logistic else loss_type
        return loss_of_pairs(name, ratios[::2], ratios[1::2], beta, **options).mean()

    return loss_of


# The table may have losses that TRL lacks.
STOCK = [name for name in TRL_NAMES if f'"{name}"' in inspect.getsource(trl.DPOTrainer._compute_loss)]


@pytest.mark.parametrize("loss_type", STOCK)
def test_loss_and_gradients_of_pairs_by_the_policy(tmp_path, loss_type):
    arguments = {"loss_type": [loss_type], "label_smoothing": SMOOTHED.get(loss_type, 0.0)}
    stock, ours = (
        dpo(trainer, tmp_path, arguments, model=untied(), ref_model=untied(1))
        for trainer in (trl.DPOTrainer, FusedDPOTrainer)
    )
    batch = first_batch(ours)
    exact_loss, exact = dense(batch, pair_loss(loss_type, beta=0.3), torch.float64)
    stock_loss, stock_grads = step(stock, first_batch(stock))
    loss, grads = step(ours, batch)
    assert_accurate(loss, stock_loss, exact_loss, "loss")
    assert grads.keys() == exact.keys()
    for name, grad in grads.items():
        assert_accurate(grad, stock_grads[name], exact[name], name)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.2], "gradient_accumulation_steps": 2},
        {"max_length": 9, "truncation_mode": "keep_end", "pad_to_multiple_of": 4},
        {"gradient_checkpointing": True},
    ],
    ids=lambda arguments: ",".join(arguments) or "default",
)
def test_a_run_with_one_negative_logs_what_stock_logs(tmp_path, arguments):
    stock, ours = dpo(trl.DPOTrainer, tmp_path, arguments), dpo(FusedDPOTrainer, tmp_path, arguments, **ALL_METRICS)
    assert_histories_equal(history(stock), history(ours))


def test_evaluation_equals_stock(tmp_path):
    data = preferences(7, seed=5)
    rows = []
    for trainer, keywords in ((trl.DPOTrainer, {}), (FusedDPOTrainer, ALL_METRICS)):
        made = dpo(trainer, tmp_path, eval_dataset=data, **keywords)
        rows.append([untimed(made.evaluate()), untimed(made.evaluate(data.select([2, 3])))])
    assert_histories_equal(*rows)


def test_predictions_have_the_models_logits(tmp_path):
    made = [dpo(trainer, tmp_path) for trainer in (trl.DPOTrainer, FusedDPOTrainer)]
    order = torch.arange(6).view(2, 3).T.flatten()  # stock has all chosen before all rejected
    logits = []
    for trainer in made:
        with pytest.warns(FutureWarning) if trainer is made[0] else torch.no_grad():
            logits.append(trainer.prediction_step(trainer.model, first_batch(trainer), False)[1])
    torch.testing.assert_close(logits[1], logits[0][order])


@pytest.mark.parametrize("negatives", [3, (2, 3, 1)], ids=["3", "2, 3 or 1"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_several_negatives_equal_the_dense_contrast(tmp_path, negatives, loss_type):
    keywords = {"model": untied(), "ref_model": untied(1), "data": preferences(negatives=negatives)}
    trainer = dpo(FusedDPOTrainer, tmp_path, {"loss_type": [loss_type]}, **keywords)
    batch = first_batch(trainer)
    sizes = batch["group_sizes"]
    assert len(batch["input_ids"]) == sum(sizes) and max(sizes) > 2

    def contrast(logps, ref, counts):
        divisor = counts if loss_type == "sigmoid_norm" else torch.ones_like(counts)
        pairs = zip((logps / divisor).split(sizes), (ref / divisor).split(sizes), strict=True)
        losses = [contrastive_loss(own[None], ref_logps=r[None], beta=0.3) for own, r in pairs]
        return torch.stack(losses).mean()

    exact_loss, exact = dense(batch, contrast, torch.float64)
    eager_loss, eager_grads = dense(batch, contrast, torch.float32)
    loss, grads = step(trainer, batch)
    assert_accurate(loss, eager_loss, exact_loss, "loss")
    for name, grad in grads.items():
        assert_accurate(grad, eager_grads[name], exact[name], name)


def test_head_options_hold_for_the_reference(tmp_path, monkeypatch):
    """A reference that equals the policy gives log 2 at any temperature."""
    seen, original = [], requests.linear_sequence_logps
    watched = lambda *args, **options: seen.append(options) or original(*args, **options)  # noqa: E731
    monkeypatch.setattr(requests, "linear_sequence_logps", watched)
    trainer = dpo(FusedDPOTrainer, tmp_path, model=untied(), ref_model=untied())
    head = {"temperature": 0.5, "max_logits_bytes": 3000}
    trainer.objective.update(head)
    assert step(trainer, first_batch(trainer))[0].item() == pytest.approx(math.log(2))
    assert [{name: options[name] for name in head} for options in seen] == [head]
    assert "beta" not in seen[0]


def test_metrics_of_several_negatives(tmp_path):
    trainer = dpo(FusedDPOTrainer, tmp_path, data=preferences(negatives=(2, 3, 1)))
    batch = first_batch(trainer)
    step(trainer, batch)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        logps, ref = (
            dense_logps(m, batch["input_ids"], batch["attention_mask"], labels)[0].split(batch["group_sizes"])
            for m in (trainer.model, trainer.ref_model)
        )
    rewards = [0.3 * (own - r) for own, r in zip(logps, ref, strict=True)]
    mean = lambda values: sum(float(v) for v in values) / len(values)  # noqa: E731
    expected = {
        "rewards/chosen": mean([r[0] for r in rewards]),
        "rewards/rejected": mean([r[1:].mean() for r in rewards]),
        "rewards/accuracies": mean([r[0] > r[1:].max() for r in rewards]),
        "rewards/margins": mean([r[0] - r[1:].mean() for r in rewards]),
        "logps/chosen": mean([own[0] for own in logps]),
        "logps/rejected": mean([own[1:].mean() for own in logps]),
        "num_tokens": float(batch["attention_mask"].sum()),
    }
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_prepared_data_set_is_left_as_it_is(tmp_path):
    """As in TRL, whose ``evaluate`` prepares what it is given."""
    trainer = dpo(FusedDPOTrainer, tmp_path, eval_dataset=preferences(5, negatives=(2, 3, 1), seed=4))
    prepared = trainer.eval_dataset
    assert trainer._prepare_dataset(prepared, trainer.processing_class, trainer.args, "eval") is prepared
    assert untimed(trainer.evaluate(prepared)) == untimed(trainer.evaluate())


@pytest.mark.parametrize("negatives", [None, (2, 3, 1)], ids=["pairs", "2, 3 or 1"])
def test_precomputed_reference_of_data_that_another_trainer_prepared(tmp_path, negatives):
    texts, precomputed = preferences(negatives=negatives), {"precompute_ref_log_probs": True}
    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    prepared = dpo(FusedDPOTrainer, tmp_path, data=texts).train_dataset.select_columns(names)
    made = [dpo(FusedDPOTrainer, tmp_path, precomputed, data=data).train_dataset for data in (texts, prepared)]
    for name in (*names, "ref_chosen_logps", "ref_rejected_logps"):
        assert made[0][name][:] == made[1][name][:]


def test_a_list_of_one_is_a_pair(tmp_path):
    texts = preferences()
    lists = Dataset.from_list([row | {"rejected": [row["rejected"]]} for row in texts])
    runs = [history(dpo(FusedDPOTrainer, tmp_path, data=data)) for data in (texts, lists)]
    assert runs[0] == runs[1]


def test_several_negatives_of_a_stream(tmp_path):
    data = preferences(negatives=(2, 3, 1))
    stream = IterableDataset.from_generator(lambda: iter(data))
    runs = [
        history(dpo(FusedDPOTrainer, tmp_path, {"train_sampling_strategy": "sequential"}, data=source))
        for source in (data, stream)
    ]
    for logged, expected in zip(*runs, strict=True):
        assert logged == pytest.approx(expected, rel=1e-6)


def test_conversations(tmp_path):
    """``rejected`` is a list of messages, which is one negative, or a list of such lists."""
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    say = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    rows = [
        {
            "prompt": say("user", row["prompt"].strip()),
            "chosen": say("assistant", row["chosen"]),
            "rejected": [say("assistant", text) for text in row["rejected"]],
        }
        for row in preferences(negatives=2)
    ]
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = template
    several = FusedDPOTrainer._prepare_dataset
    trainer = dpo(FusedDPOTrainer, tmp_path)
    trainer._tokenizer = tokenizer
    made = several(trainer, Dataset.from_list(rows), tokenizer, trainer.args, "train")
    pairs = [row | {"rejected": row["rejected"][1]} for row in rows]
    stock = trl.DPOTrainer._prepare_dataset(trainer, Dataset.from_list(pairs), tokenizer, trainer.args, "train")
    one = several(trainer, Dataset.from_list(pairs), tokenizer, trainer.args, "train")
    assert [len(row["rejected_ids"]) for row in made] == [2] * len(rows)
    for got, single, expected in zip(made, one, stock, strict=True):
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        assert {n: single[n] for n in names} == {n: expected[n] for n in names}
        assert (got["prompt_ids"], got["chosen_ids"]) == (expected["prompt_ids"], expected["chosen_ids"])
        assert got["rejected_ids"][1] == expected["rejected_ids"]


@pytest.mark.parametrize("negatives", [2, (2, 3, 1)], ids=["2", "2, 3 or 1"])
def test_precomputed_reference(tmp_path, negatives):
    """The same losses as those of a reference that is asked at every step."""
    arguments = {"train_sampling_strategy": "sequential"}
    runs = [
        history(dpo(FusedDPOTrainer, tmp_path, arguments | more, data=preferences(negatives=negatives)))
        for more in ({}, {"precompute_ref_log_probs": True})
    ]
    for logged, expected in zip(*runs, strict=True):
        assert logged == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_precomputed_reference_of_pairs_is_interchangeable_with_stock(tmp_path):
    made = [dpo(trainer, tmp_path, {"precompute_ref_log_probs": True}) for trainer in (trl.DPOTrainer, FusedDPOTrainer)]
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        values = [torch.tensor(trainer.train_dataset[name][:]) for trainer in made]
        torch.testing.assert_close(*values)
    assert_histories_equal(*map(history, made), left_out=NOT_LOGGED)


def test_new_adapters_have_the_base_as_reference(tmp_path):
    runs = [
        history(dpo(trainer, tmp_path, peft_config=peft.LoraConfig(**LORA)))
        for trainer in (trl.DPOTrainer, FusedDPOTrainer)
    ]
    assert_histories_equal(*runs, left_out=NOT_LOGGED)
    assert runs[0][0]["loss"] == pytest.approx(math.log(2)) and runs[0][-2]["rewards/margins"] != 0


def test_trained_adapters_have_their_copy_as_reference(tmp_path):
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_models.llama(), peft.LoraConfig(**LORA, init_lora_weights=False))
    runs = [history(dpo(trainer, tmp_path, model=model)) for trainer in (trl.DPOTrainer, FusedDPOTrainer)]
    assert_histories_equal(*runs, left_out=NOT_LOGGED)
    assert runs[1][0]["loss"] == pytest.approx(math.log(2))


PROMPT_LEARNING = {"PROMPT_TUNING": peft.PromptTuningConfig, "P_TUNING": peft.PromptEncoderConfig}


@pytest.mark.parametrize(("name", "config"), PROMPT_LEARNING.items(), ids=PROMPT_LEARNING)
def test_virtual_tokens_are_refused(tmp_path, name, config):
    """They would shift every row, and the base model that TRL hands over does not know of them."""
    with pytest.raises(
        RuntimeError, match=rf"adapter 'default' \({name}\) puts virtual tokens before the prompt.*patch_fu"
    ):
        dpo(FusedDPOTrainer, tmp_path, peft_config=config(num_virtual_tokens=3, task_type="CAUSAL_LM"))


def test_a_compiled_reference(tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    plain, trainer = (dpo(FusedDPOTrainer, tmp_path, arguments) for arguments in ({}, compiled))
    assert isinstance(trainer.ref_model, torch._dynamo.OptimizedModule)
    batch = first_batch(plain)
    torch.testing.assert_close(step(trainer, batch), step(plain, batch))


def test_models_by_path(tmp_path):
    """The policy and its reference are loaded by TRL."""
    tiny_models.gpt2().save_pretrained(tmp_path / "model")
    losses = []
    for trainer in (trl.DPOTrainer, FusedDPOTrainer):
        args = trl.DPOConfig(
            output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True, max_steps=2, logging_steps=1,
            learning_rate=1e-2, disable_tqdm=True, save_strategy="no", gradient_checkpointing=False,
        )  # fmt: skip
        keywords = {"train_dataset": preferences(), "processing_class": tiny_models.tokenizer()}
        made = trainer(str(tmp_path / "model"), args=args, **keywords)
        losses.append(history(made))
        assert made.ref_model is not None
    assert_histories_equal(*losses, left_out=NOT_LOGGED)


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model, **others):
        self.by_name = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_bfloat16_autocast_is_as_close_as_stock(tmp_path):
    arguments = {"bf16": True, "max_steps": 1, "max_grad_norm": 0.0}
    seen = Gradients(), Gradients()
    made = [
        dpo(trainer, tmp_path, arguments, model=untied(), ref_model=untied(1), callbacks=[callback])
        for trainer, callback in zip((trl.DPOTrainer, FusedDPOTrainer), seen, strict=True)
    ]
    exact_loss, exact = dense(first_batch(made[1]), pair_loss("sigmoid", beta=0.3), torch.float64)
    stock, ours = (torch.tensor(history(trainer)[0]["loss"], dtype=torch.bfloat16) for trainer in made)
    assert_accurate(ours, stock, exact_loss, "loss")
    stock_grads, grads = (callback.by_name for callback in seen)
    assert grads.keys() == exact.keys()
    for name, grad in grads.items():
        assert_accurate(grad, stock_grads[name], exact[name], name)


def test_a_saved_model_is_a_plain_one(tmp_path):
    trainer = dpo(FusedDPOTrainer, tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(tiny_models.llama()).from_pretrained(tmp_path / "saved")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])


@pytest.mark.parametrize(("asked", "coefficient"), [(True, None), (False, None), (True, 0.0), (False, 0.7)])
def test_the_routers_loss_is_added_as_stock_adds_it(tmp_path, asked, coefficient):
    """By TRL's coefficient, whatever the configuration of the model says of router logits."""
    arguments = {"router_aux_loss_coef": coefficient, "gradient_accumulation_steps": 2}

    def made_of(trainer):
        model, ref_model = (experts(output_router_logits=asked) for _ in range(2))
        return dpo(trainer, tmp_path, arguments, model=model, ref_model=ref_model)

    made = [made_of(trainer) for trainer in (trl.DPOTrainer, FusedDPOTrainer)]
    batches = [first_batch(trainer) for trainer in made]
    (want, want_grads), (loss, grads) = (step(*one) for one in zip(made, batches, strict=True))
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[key], rtol=1e-4, atol=2e-5, msg=lambda m, n=key: f"{n}: {m}")
    runs = [history(made_of(trainer)) for trainer in (trl.DPOTrainer, FusedDPOTrainer)]
    assert ("aux_loss" in runs[1][0]) is (coefficient != 0.0)
    assert_histories_equal(*runs, left_out=NOT_LOGGED)


def test_a_loss_that_is_not_computed_is_refused_before_the_reference_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(FusedDPOTrainer, "_ref_logps", lambda self, model, inputs: pytest.fail("the reference ran"))
    with pytest.raises(ValueError, match=r"loss_type='dpop' is not computed here; expected one of \('sigmoid', "):
        dpo(FusedDPOTrainer, tmp_path, {"loss_type": ["dpop"], "precompute_ref_log_probs": True})


def test_a_pair_loss_of_several_negatives_is_refused(tmp_path):
    trainer = dpo(FusedDPOTrainer, tmp_path, {"loss_type": ["hinge"]}, data=preferences(negatives=2))
    with pytest.raises(ValueError, match=r"needs one negative per group \(K = 1\), got K = 2"):
        step(trainer, first_batch(trainer))


def test_an_example_without_negatives_is_named(tmp_path):
    rows = [*preferences(2, negatives=2), {"prompt": "the ", "chosen": "cat", "rejected": []}]
    with pytest.raises(ValueError, match="example 2 has no negatives"):
        dpo(FusedDPOTrainer, tmp_path, data=Dataset.from_list(rows))


def test_data_without_rejected_answers_fail_as_in_stock(tmp_path):
    data = preferences().remove_columns("rejected")
    raised = []
    for trainer in (trl.DPOTrainer, FusedDPOTrainer):
        with pytest.raises(KeyError) as error:
            dpo(trainer, tmp_path, data=data)
        raised.append(str(error.value))
    assert raised[0] == raised[1]


def test_a_model_that_stock_has_patched_is_refused(tmp_path):
    """Its own forward would hide the one that computes the loss."""
    model = dpo(trl.DPOTrainer, tmp_path).model
    with pytest.raises(RuntimeError, match="forward of this LlamaForCausalLM object has been replaced"):
        attach_linear_loss(model)


def test_a_trl_without_the_private_names_is_named(tmp_path, monkeypatch):
    monkeypatch.delattr(trl.DPOTrainer, "_prepare_dataset")
    with pytest.raises(RuntimeError, match=r"trl 1\.\S+ has no DPOTrainer._prepare_dataset.*tested with trl 1\.16"):
        dpo(FusedDPOTrainer, tmp_path)
    with pytest.raises(RuntimeError, match=r"has no trl.trainer.dpo_trainer.add_a_head, trl.trainer.dpo_trainer.b"):
        require_names("trl", "1.16", dpo_trainer, "add_a_head", "b", "DPOTrainer")


def test_the_example_runs(monkeypatch, capsys):
    script = ROOT / "examples" / "plugging_in" / "trl_dpo.py"
    monkeypatch.setattr("sys.argv", [str(script), "--steps", "8"])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    accuracy = re.search(r"3 negatives: .* above all in (\d+)% of", printed)
    losses = re.search(r"ends at (\S+), that of ours at (\S+)", printed)
    assert int(accuracy[1]) > 50
    assert float(losses[1]) == pytest.approx(float(losses[2]), abs=1e-5)
