"""`transformers.Trainer` with the fused loss: `attach_linear_loss` and a `compute_loss` of five lines.

The model learns to continue arithmetic progressions, contrasting each true continuation with three wrong ones.
`python examples/plugging_in/transformers_trainer.py`; a few seconds on a CPU.
"""

from __future__ import annotations

import copy
import random
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from cpo_kernels import CandidateLayout
from cpo_kernels.models import CPORequest, LogpsRequest, attach_linear_loss

WORDS, CANDIDATES = 31, 4  # numbers 0 to 30; candidate 0 is true


class ContrastTrainer(Trainer):
    loss_is_scaled_for_ga = False  # the loss is a mean over the groups of one batch, not of the accumulated one
    reference: PreTrainedModel

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        targets, layout = inputs.pop("targets").flatten(), padded_layout(*inputs["input_ids"].shape)
        with torch.no_grad():
            ref_logps = self.reference(**inputs, linear_loss=LogpsRequest(targets, layout)).logps
        out = model(**inputs, linear_loss=CPORequest(targets, layout, ref_logps=ref_logps, beta=1.0))
        return (out.loss, out) if return_outputs else out.loss


def padded_layout(rows: int, length: int) -> CandidateLayout:
    """A row a candidate, every position of it a token; what targets of -100 leave out costs the loss nothing."""
    return CandidateLayout(list(range(0, rows * length + 1, length)), list(range(0, rows + 1, CANDIDATES)))


def make_example(rng: random.Random) -> dict[str, list[Any]]:
    """Two or three terms of a progression, how it goes on, and ways in which it does not."""
    start, step, length = rng.randrange(WORDS), rng.randint(1, 3), rng.randint(4, 8)
    terms = [(start + i * step) % WORDS for i in range(length)]
    shown = rng.randint(2, 3)
    candidates = [terms[shown:]]
    for _ in range(CANDIDATES - 1):
        wrong = list(candidates[0])
        wrong[rng.randrange(len(wrong))] += rng.randrange(1, WORDS)
        candidates.append([term % WORDS for term in wrong])
    return {"prompt": terms[:shown], "candidates": candidates}


def collate(examples: list[dict[str, list[Any]]]) -> dict[str, Tensor]:
    """One right-padded row a candidate; targets are the next tokens, -100 where that is prompt or padding."""
    rows = [(e["prompt"], candidate) for e in examples for candidate in e["candidates"]]
    ids = [torch.tensor([*prompt, *candidate]) for prompt, candidate in rows]
    targets = [torch.tensor([-100] * (len(prompt) - 1) + candidate + [-100]) for prompt, candidate in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "targets": pad_sequence(targets, batch_first=True, padding_value=-100),
    }


def make_trainer(model: PreTrainedModel, examples: list[dict[str, list[Any]]], **arguments: Any) -> ContrastTrainer:
    """The trainer of `model`, whose reference is a copy of it as it is now."""
    attach_linear_loss(model)
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    # Without label_names, evaluate() would not ask for the loss.
    labels = {"label_names": ["targets"], "prediction_loss_only": True}
    args = TrainingArguments(remove_unused_columns=False, **labels, **quiet, **arguments)
    trainer = ContrastTrainer(model, args, train_dataset=examples, data_collator=collate)
    trainer.reference = copy.deepcopy(model).eval().requires_grad_(False)
    return trainer


def main() -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=16, **sizes))
    train = {"max_steps": 60, "per_device_train_batch_size": 32, "learning_rate": 3e-3, "logging_steps": 20}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, [make_example(rng) for _ in range(1920)], output_dir=folder, **train)
        trainer.train()
        held_out = trainer.evaluate([make_example(rng) for _ in range(64)])["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"contrastive loss, first and last 20 steps: {losses[0]:.4f} {losses[-1]:.4f}")
    print(f"of held-out progressions: {held_out:.4f}")


if __name__ == "__main__":
    main()
