"""TRL trainers on tiny models and data sets in memory, and the dense computation that they are compared with."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import tiny_models
from datasets import Dataset
from torch.nn.functional import log_softmax

ARGUMENTS = {
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 3,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
BETA = 0.3


def text(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(tiny_models.WORDS, k=rng.randint(low, high)))


def preferences(count: int = 9, negatives: int | tuple[int, ...] | None = None, seed: int = 0) -> Dataset:
    """Make preference data whose ``rejected`` is a text, or a list of these numbers of texts, cycled through."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        row = {"prompt": text(rng, 2, 6) + " ", "chosen": text(rng, 2, 9)}
        if negatives is None:
            row["rejected"] = text(rng, 2, 9)
        else:
            number = negatives if isinstance(negatives, int) else negatives[index % len(negatives)]
            row["rejected"] = [text(rng, 2, 9) for _ in range(number)]
        rows.append(row)
    return Dataset.from_list(rows)


def make(trainer, config, directory, model=None, data=None, arguments=None, **keywords):
    """Make a trainer of a Llama with an untied head; every call gets models of the same weights."""
    model = copy.deepcopy(tiny_models.llama() if model is None else model)
    beta = {"beta": BETA} if hasattr(config, "beta") else {}
    args = config(output_dir=str(directory), **(ARGUMENTS | beta | (arguments or {})))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TRL and of PEFT
        return trainer(
            model=model,
            args=args,
            train_dataset=preferences() if data is None else data,
            processing_class=tiny_models.tokenizer(),
            **keywords,
        )


def step(trainer, batch):
    """Return loss, gradients by name and metrics of one batch."""
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def history(trainer) -> list[dict[str, float]]:
    """Return what a run logs, without times."""
    trainer.train()
    return [untimed(row) for row in trainer.state.log_history]


def untimed(row: dict[str, float]) -> dict[str, float]:
    left_out = ("runtime", "per_second", "_time", "flos", "epoch", "learning_rate")
    return {name: value for name, value in row.items() if not any(part in name for part in left_out)}


def untied(seed: int = 0):
    """Make a GPT-2 with an untied head; its layers compute in float64 where its weights are float64."""
    return tiny_models.gpt2(seed, tie_word_embeddings=False)


def dense_logps(model, input_ids, attention_mask, labels):
    """Compute log-likelihoods (B,) and token counts (B,) from the model's own logits."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    labels = labels[:, 1:]
    present = labels != -100
    picked = log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return (picked * present).sum(-1), present.sum(-1)


def assert_histories_equal(stock: list[dict], ours: list[dict], left_out: set[str] = frozenset()) -> None:
    """Check for the same names, but for those left out, and values that differ by float32 rounding only."""
    assert len(stock) == len(ours)
    for expected, logged in zip(stock, ours, strict=True):
        expected = {name: value for name, value in expected.items() if name not in left_out}
        assert logged == pytest.approx(expected, rel=1e-4, abs=1e-5)
