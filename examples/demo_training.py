"""The demo's training: a small GPT-2 by MLE, continued with MLE alone and with CPO against each kind of negative.

Why so many steps: how often a held-out text wins against its negative is compared between two runs on the same texts
and negatives. The standard error of the difference is at most ``sqrt(d / n)``, n being the number of texts and d the
share of them that the two runs decide differently. A pilot on another split of the text (``--seed 1``) had d = 0.36 at
most, so n = 400 gives 3 points, and a difference of 2.84 standard errors, 8.5 points, is beyond two of them in 4 of 5
runs. The pilot's differences after 100 and 200 steps were, in points: batch 4 and 11, truncation 47 and 36, mean-field
28 and 17, autoregressive -4 and -1. So 200 steps show all but the last, of which docs/objective.md, section 6, expects
no more than of MLE. Text, sizes, learning rates and the score were chosen on that split too: in smaller pilots, batch
negatives showed nothing.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from demo_text import MAX_LENGTH, MAX_PROMPT_LENGTH, Corpus
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, TrainerCallback

from cpo_kernels import CPOConfig, CPOTrainer
from cpo_kernels.models import LogpsRequest
from cpo_kernels.negatives import (
    Negative,
    Sampling,
    autoregressive_negatives,
    is_wrong,
    mean_field_negatives,
    token_seeds,
)
from cpo_kernels.trainer import ContrastBatch, NegativeSampler, TokenizedExamples
from cpo_kernels.trainer.batch import body_inputs, layout_of

KINDS = ("batch", "truncation", "mean_field", "autoregressive")
HELD_OUT = 400
DECIDED_DIFFERENTLY = 0.36
BATCH_SIZE = 16


def make_model(corpus: Corpus) -> GPT2LMHeadModel:
    """A GPT-2 with random weights; without dropout, which CPO switches off, so that it differs in nothing else."""
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": MAX_LENGTH}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), corpus.eos)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(corpus.tokenizer), **sizes, **dropout, **special))


class Advance(TrainerCallback):
    """Shows each step on a progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.progress.advance(self.task)


def train(
    model: nn.Module,
    corpus: Corpus,
    kind: str | None,
    steps: int,
    learning_rate: float,
    out: Path,
    progress: Progress,
    title: str,
) -> float:
    """Train with CPO against one negative of a kind, or with MLE alone; return the seconds of a step, on average."""
    config = CPOConfig(
        output_dir=str(out),
        objective="mle" if kind is None else "cpo",
        **{f"num_{name}_negatives": int(name == kind) for name in KINDS},
        autoregressive_every=4,
        autoregressive_batch_size=4 * BATCH_SIZE,
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=steps,
        learning_rate=learning_rate,
        warmup_steps=steps // 10,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT_LENGTH,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = CPOTrainer(model, config, train_dataset=corpus.train, processing_class=corpus.tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Advance(progress, progress.add_task(title, total=steps)))
    begun = time.perf_counter()
    trainer.train()
    return (time.perf_counter() - begun) / steps


def name_of(kind: str | None) -> str:
    return "none (MLE)" if kind is None else kind.replace("_", "-")


def write(model: nn.Module, prompts: list[list[int]], eos: int, temperature: float = 1.0) -> list[list[int]]:
    """What the model writes behind each prompt, with the same seed whatever the model."""
    sampling = Sampling(temperature, max_new_tokens=MAX_LENGTH - MAX_PROMPT_LENGTH, batch_size=4 * BATCH_SIZE)
    options = {"eos_token_id": eos, "pad_token_id": eos, "sampling": sampling}
    return [own for (own,) in autoregressive_negatives(model, prompts, 1, **options)]


@torch.no_grad()
def draw(model: nn.Module, prompt: list[int], truth: list[int], index: int, eos: int) -> list[list[int]]:
    """A mean-field negative, or none where the draw is the truth."""
    batch = ContrastBatch(eos, eos)
    batch.add_group(prompt, truth)
    inputs = batch.tensors()
    hidden = model.base_model(**body_inputs(inputs)).last_hidden_state.flatten(0, 1)[inputs["rows"]]
    options = {"seeds": token_seeds(0, 0, index, len(truth)), "eos_token_id": eos}
    (drawn,) = mean_field_negatives(hidden, model.lm_head.weight, inputs["targets"], **options)
    return drawn


class HeldOut:
    """Held-out texts, each with one negative of every kind, by the model that all continuations start from.

    Attributes:
        kinds: of each of the S candidates; ``"truth"`` for the E texts themselves.
        owners: (S,) the text that each candidate belongs to.
        lengths: (S,) tokens.
        start: (S,) log-likelihoods under that model.
    """

    def __init__(self, model: nn.Module, examples: TokenizedExamples, eos: int) -> None:
        model.eval()
        sampler = NegativeSampler(examples, eos, 1, 1, seed=0, max_length=MAX_LENGTH)
        written = write(model, examples.prompts, eos)
        self.batches, self.kinds, owners, lengths = [], list[str](), list[int](), list[int]()
        for start in range(0, len(examples), BATCH_SIZE):
            batch = ContrastBatch(eos, eos, MAX_LENGTH, share_prefixes=True)
            for index in range(len(examples))[start : start + BATCH_SIZE]:
                prompt, truth = examples.prompts[index], examples.completions[index]
                made = [Negative("mean_field", text) for text in draw(model, prompt, truth, index, eos)]
                made += [Negative("autoregressive", written[index])] * is_wrong(written[index], truth, eos)
                batch.add_group(prompt, truth, [*sampler.draw(index, step=0), *made])
                owners += [index] * (len(batch.segments) - batch.groups[-2])
            self.batches.append(batch.tensors())
            self.kinds += [segment.kind for segment in batch.segments]
            lengths += [len(segment.tokens) for segment in batch.segments]
        self.owners, self.lengths = torch.tensor(owners), torch.tensor(lengths)
        self.start = self.logps(model)

    @torch.no_grad()
    def logps(self, model: nn.Module) -> Tensor:
        """Return the log-likelihoods (S,) of all candidates."""
        model.eval()
        requests = [(body_inputs(own), LogpsRequest(own["targets"], layout_of(own))) for own in self.batches]
        return torch.cat([model(**body, linear_loss=request).logps for body, request in requests])

    def of(self, kind: str) -> Tensor:
        """Return the indices of the candidates of a kind."""
        return torch.tensor([place for place, own in enumerate(self.kinds) if own == kind])

    def losses(self, logps: Tensor) -> Tensor:
        """Return the negative log-likelihoods per token (E,) of the texts."""
        return -(logps / self.lengths)[self.of("truth")]

    def wins(self, logps: Tensor, kind: str) -> Tensor:
        """Tell, as 0 or 1, for each text with a negative of a kind whether it has gained more likelihood than that."""
        scores, negatives = logps - self.start, self.of(kind)
        return (scores[self.of("truth")[self.owners[negatives]]] > scores[negatives]).double()


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and two standard errors of it."""

    mean: float
    margin: float

    @classmethod
    def of(cls, ours: Tensor, theirs: Tensor) -> Difference:
        paired = (ours - theirs).double()
        return cls(float(paired.mean()), 2 * float(paired.std()) / len(paired) ** 0.5)

    def exp(self) -> Difference:
        """Of logarithms: by what part of itself their exponential grows."""
        growth = math.exp(self.mean)
        return Difference(growth - 1, growth * self.margin)

    def text(self, unit: str = "") -> str:
        """In percent or points, or that none is seen."""
        if not abs(self.mean) > self.margin:
            return "none seen"
        return f"{100 * self.mean:+.1f}{unit} ± {100 * self.margin:.1f}{unit}"


def power(count: int) -> tuple[float, float]:
    """Return, in points, the standard error of a difference at most, and what is seen in 4 of 5 runs."""
    error = 100 * math.sqrt(DECIDED_DIFFERENTLY / count)
    return error, 2.84 * error


@dataclass
class Outcome:
    """The models by kind, None for MLE; the seconds of a step; and the log-likelihoods of what is held out."""

    held_out: HeldOut
    models: dict[str | None, nn.Module] = field(default_factory=dict)
    seconds: dict[str | None, float] = field(default_factory=dict)
    logps: dict[str | None, Tensor] = field(default_factory=dict)


def train_all(corpus: Corpus, start_steps: int, steps: int, seed: int, out: Path, console: Console) -> Outcome:
    """Train a model from scratch with MLE, and continuations of it, with equally many steps on the same examples."""
    torch.manual_seed(seed)
    start = make_model(corpus)
    columns = TextColumn("{task.description:>15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        train(start, corpus, None, start_steps, 4e-3, out, progress, "from scratch")
        outcome = Outcome(HeldOut(start, corpus.held_out, corpus.eos))
        for kind in (None, *KINDS):
            model = outcome.models[kind] = copy.deepcopy(start)
            outcome.seconds[kind] = train(model, corpus, kind, steps, 1e-3, out, progress, name_of(kind))
            outcome.logps[kind] = outcome.held_out.logps(model)
    return outcome
