"""``FusedTrainer`` against ``transformers.Trainer``: what a run logs, gradients, and where it steps aside."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from attach_cases import WITHOUT_GROUPED_PRODUCTS
from problems import GemmCounter
from torch.nn.utils.rnn import pad_sequence
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments
from trl_runs import ARGUMENTS, assert_histories_equal, history

from cpo_kernels.integrations.hf_trainer import FusedTrainer

pytestmark = pytest.mark.cpu


def rows(count: int = 12) -> list[dict[str, list[int]]]:
    """Prompts that are no labels and completions that are; the last row has no label at all."""
    encode = tiny_models.tokenizer()
    made = []
    for example in tiny_models.examples(count):
        prompt, completion = (encode(example[name])["input_ids"] for name in ("prompt", "completion"))
        made.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    made[-1]["labels"] = [-100] * len(made[-1]["labels"])
    return made


def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids, labels = ([torch.tensor(e[name]) for e in examples] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny_models.VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, **heads, output_router_logits=True, router_aux_loss_coef=0.1, **WITHOUT_GROUPED_PRODUCTS)
    )


MODELS = {"llama": tiny_models.llama, "tied": tiny_models.gpt2, "adapters": tiny_models.adapted, "experts": mixtral}


def make(trainer, directory, model, **arguments):
    # Adam would turn the rounding of a gradient that is 0 into a step.
    arguments = ARGUMENTS | {"optim": "sgd"} | arguments
    args = TrainingArguments(output_dir=str(directory), remove_unused_columns=False, **arguments)
    data = rows()
    return trainer(model, args, train_dataset=data, eval_dataset=data[:5], data_collator=collate)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("llama", {}),
        ("llama", {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}),
        ("llama", {"label_smoothing_factor": 0.1}),
        ("tied", {"gradient_checkpointing": True}),
        ("adapters", {}),
        ("experts", {}),
    ],
)
def test_a_run_logs_what_stock_logs(name, arguments, tmp_path):
    model = MODELS[name]()
    stock, ours = (make(t, tmp_path, copy.deepcopy(model), **arguments) for t in (Trainer, FusedTrainer))
    assert_histories_equal(history(stock), history(ours))
    weights = dict(ours.model.named_parameters())
    for key, expected in stock.model.named_parameters():
        torch.testing.assert_close(weights[key], expected, rtol=1e-4, atol=1e-5, msg=key)


class OfHead(GemmCounter):
    """A counter that lets attention's batched products pass, which some versions of torch have as operators."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::bmm", "aten::baddbmm"):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_the_labels_alone_enter_the_products_of_the_head(tmp_path):
    trainer = make(FusedTrainer, tmp_path, tiny_models.llama())
    batch = collate(rows()[:4])
    with OfHead() as counter:
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        loss.backward()
    assert outputs.logits is None
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    of_head = sorted(tuple(sorted(shape)) for shape in counter.shapes if tiny_models.VOCAB in shape)
    assert of_head == [tuple(sorted((labelled, tiny_models.VOCAB, 16)))] * 3


def test_a_batch_without_labels_is_left_to_stock(tmp_path):
    """Neither an error nor a number of ours: what transformers makes of it."""
    stock, ours = (make(t, tmp_path, tiny_models.llama()) for t in (Trainer, FusedTrainer))
    batch = collate(rows()[-1:])
    losses = [t.compute_loss(t.model, dict(batch), num_items_in_batch=7) for t in (stock, ours)]
    assert torch.equal(*losses)


def test_options_of_the_head_reach_it(tmp_path):
    trainer = make(FusedTrainer, tmp_path, tiny_models.llama())
    trainer.head_options["max_logits_bytes"] = 1
    with pytest.raises(ValueError, match="max_logits_bytes=1 does not hold one row"):
        trainer.compute_loss(trainer.model, collate(rows()[:4]))
    trainer.head_options = {"max_logit_bytes": 1}
    with pytest.raises(TypeError, match="did you mean 'max_logits_bytes'"):
        trainer.compute_loss(trainer.model, collate(rows()[:4]))
