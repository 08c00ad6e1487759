"""From text to a small language model, trained with MLE and then continued two ways: MLE and CPO.

    python examples/demo.py [--data FILE] [--minutes M | --steps N] [--out DIR]

Everything runs offline. The default text is the language reference that comes with Python (``pydoc_data.topics``). The
script prints one table and writes ``demo.png``; what the numbers say is what it prints.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that spin at every barrier make a step ten times slower where another program has one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from demo_head import LOGITS_BYTES, OBJECTIVE, HeadCost, measure_head
from demo_report import print_table, write_curves
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback

from cpo_kernels import CandidateLayout, CPOConfig, CPOTrainer
from cpo_kernels.models import LogpsRequest
from cpo_kernels.trainer import ContrastBatch, NegativeSampler, TokenizedExamples, tokenize_examples

VOCABULARY = 8192
MAX_LENGTH = 96
MAX_PROMPT_LENGTH = 48
BATCH_NEGATIVES, TRUNCATION_NEGATIVES = 2, 2
HELD_OUT_NEGATIVES = 4
CURVE_EXAMPLES = 64  # of the held-out continuations, for scores along the way; the table uses all
EOS = "<|endoftext|>"
console = Console()


# Text


def paragraphs(text: str) -> list[str]:
    """The distinct paragraphs of a text, each on one line."""
    blocks = (" ".join(block.split()) for block in text.replace("\r\n", "\n").split("\n\n"))
    return list(dict.fromkeys(block for block in blocks if len(block.split()) >= 8))


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is long enough to be continued, and words rather than code or tables."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return len(paragraph.split()) >= 24 and letters >= 0.85 * len(paragraph)


def continuations(paragraph: str) -> Iterator[dict[str, str]]:
    """A paragraph as prompt and completion, cut at a third, a half and two thirds of its words."""
    words = paragraph.split()
    for numerator, denominator in ((1, 3), (1, 2), (2, 3)):
        cut = len(words) * numerator // denominator
        yield {"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])}


@dataclass
class Corpus:
    """What the demo trains and tests on; no held-out paragraph is in any other part."""

    tokenizer: PreTrainedTokenizerFast
    texts: TokenizedExamples  # whole paragraphs, for MLE from scratch
    train: TokenizedExamples
    held_out: TokenizedExamples


def load_text(path: str | None) -> str:
    if path is not None:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def make_corpus(path: str | None, seed: int) -> Corpus:
    blocks = paragraphs(load_text(path))
    prose = [block for block in blocks if is_prose(block)]
    if len(prose) < 50:
        raise SystemExit(f"{path}: the demo needs at least 50 paragraphs of prose of 24 words, found {len(prose)}")
    held_out = set(random.Random(seed).sample(prose, len(prose) // 8))
    seen = [block for block in blocks if block not in held_out]

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(seen, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[EOS], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS)

    def tokens(examples: list[dict[str, str]]) -> TokenizedExamples:
        limits = {"max_length": MAX_LENGTH, "max_prompt_length": MAX_PROMPT_LENGTH}
        return tokenize_examples(examples, tokenizer, **limits)

    def pairs(kept: bool) -> list[dict[str, str]]:
        return [pair for block in prose if (block in held_out) == kept for pair in continuations(block)]

    texts = tokens([{"prompt": "", "completion": block} for block in seen])
    return Corpus(tokenizer, texts, tokens(pairs(kept=False)), tokens(pairs(kept=True)))


# Held-out scores


@dataclass
class Scores:
    """Of a model on held-out text."""

    perplexity: float
    batch_wins: float
    truncation_wins: float


@torch.no_grad()
def score(model: nn.Module, examples: TokenizedExamples, eos: int, count: int | None = None) -> Scores:
    """Perplexity, and how often a true continuation has a higher log-likelihood per token than all its negatives."""
    model.eval()
    sampler = NegativeSampler(examples, eos, HELD_OUT_NEGATIVES, HELD_OUT_NEGATIVES, seed=0)
    indices = range(len(examples))[: count or len(examples)]
    nll, tokens, wins = 0.0, 0, [0, 0]
    for start in range(0, len(indices), 8):
        batch = ContrastBatch(eos, eos, MAX_LENGTH)
        for index in indices[start : start + 8]:
            batch.add_group(examples.prompts[index], examples.completions[index], sampler.draw(index, step=0))
        inputs = batch.tensors()
        layout = CandidateLayout(inputs["cu_tokens"], inputs["cu_groups"], rows=inputs["rows"])
        request = LogpsRequest(inputs["targets"], layout)
        logps = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], linear_loss=request).logps
        lengths = torch.tensor(layout.cu_tokens).diff()
        for first, last in zip(layout.cu_groups, layout.cu_groups[1:], strict=False):
            nll -= float(logps[first])
            tokens += int(lengths[first])
            means = (logps / lengths)[first:last]
            split = 1 + HELD_OUT_NEGATIVES
            wins[0] += bool(means[0] > means[1:split].max())
            wins[1] += bool(means[0] > means[split:].max())
    model.train()
    return Scores(float(torch.tensor(nll / tokens).exp()), wins[0] / len(indices), wins[1] / len(indices))


# Training


@dataclass
class Curve:
    """Held-out scores along a run."""

    steps: list[int] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)


class Watch(TrainerCallback):
    """A progress bar, held-out scores every so many steps, and an end by the clock."""

    def __init__(self, title: str, total: int, every: int, evaluate: Callable[[Any], Scores], deadline: float) -> None:
        self.title, self.total, self.every, self.evaluate, self.deadline = title, total, every, evaluate, deadline
        self.curve = Curve()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        columns = [TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        self.progress = Progress(*columns, TextColumn("{task.fields[loss]}"), console=console)
        self.task = self.progress.add_task(self.title, total=self.total, loss="")
        self.progress.start()
        self.record(state, kwargs["model"])

    def record(self, state: Any, model: Any) -> None:
        self.curve.steps.append(state.global_step)
        self.curve.scores.append(self.evaluate(model))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.progress.update(self.task, loss=f"loss {logs['loss']:.3f}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)
        if state.global_step % self.every == 0:
            self.record(state, kwargs["model"])
        control.should_training_stop |= time.monotonic() > self.deadline

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.curve.steps[-1] != state.global_step:
            self.record(state, kwargs["model"])
        self.progress.update(self.task, total=state.global_step)
        self.progress.stop()


def make_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    sizes = {"n_embd": 192, "n_layer": 4, "n_head": 6, "n_positions": MAX_LENGTH}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **special))


def make_trainer(model: nn.Module, corpus: Corpus, data: TokenizedExamples, out: Path, **arguments: Any) -> CPOTrainer:
    config = CPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=16,
        lr_scheduler_type="constant_with_warmup",
        train_sampling_strategy="group_by_length",
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT_LENGTH,
        num_batch_negatives=BATCH_NEGATIVES,
        num_truncation_negatives=TRUNCATION_NEGATIVES,
        max_logits_bytes=LOGITS_BYTES,
        beta=OBJECTIVE["beta"],
        **arguments,
    )
    trainer = CPOTrainer(model, config, train_dataset=data, processing_class=corpus.tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def run(trainer: CPOTrainer, title: str, corpus: Corpus, deadline: float, count: int) -> Curve:
    """Train; returns the held-out scores, of ``count`` examples along the way."""
    steps = trainer.args.max_steps
    eos = corpus.tokenizer.eos_token_id
    watch = Watch(title, steps, max(1, steps // 6), lambda m: score(m, corpus.held_out, eos, count), deadline)
    trainer.add_callback(watch)
    trainer.train()
    return watch.curve


# The demo


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def plan_steps(corpus: Corpus, out: Path, seconds: float) -> tuple[int, int]:
    """Steps from scratch and steps of each continuation that fit, from the time that a few steps take here."""
    cost = []
    for data, alpha in ((corpus.texts, 0.0), (corpus.train, 0.0), (corpus.train, OBJECTIVE["contrast_weight"])):
        clock = Clock()
        trainer = make_trainer(make_model(corpus.tokenizer), corpus, data, out, alpha=alpha, max_steps=4)
        trainer.add_callback(clock)
        trainer.train()
        cost.append(min(clock.seconds))  # too few seconds are made up for by the deadlines of train()
    scratch, mle, cpo = cost
    return max(8, int(0.45 * seconds / scratch)), max(8, int(0.55 * seconds / (mle + cpo)))


def head_costs(model: nn.Module, corpus: Corpus) -> tuple[dict[str, HeadCost], str]:
    """Fused and eager on one training batch of the CPO run, and its shape."""
    eos = corpus.tokenizer.eos_token_id
    sampler = NegativeSampler(corpus.train, eos, BATCH_NEGATIVES, TRUNCATION_NEGATIVES, seed=0)
    batch = ContrastBatch(eos, eos, MAX_LENGTH)
    for index in range(16):
        batch.add_group(corpus.train.prompts[index], corpus.train.completions[index], sampler.draw(index, step=0))
    inputs = batch.tensors()
    with torch.no_grad():
        hidden = model.base_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    hidden = hidden.flatten(0, 1)
    inputs["ref_logps"] = torch.zeros(len(batch.segments))
    rows = inputs["rows"].unique().numel()
    shape = f"R={rows}, N={inputs['rows'].numel()}, H={hidden.shape[1]}, V={len(corpus.tokenizer)}"
    return measure_head(hidden, model.lm_head.weight.detach(), inputs), shape


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="FILE", help="plain text, paragraphs separated by blank lines")
    parser.add_argument("--minutes", type=float, default=4.0, help="about how long to take (default: 4)")
    parser.add_argument("--steps", type=int, help="steps of each continuation, and twice as many from scratch")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="where to write (default: demo_output)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@dataclass
class Outcome:
    """Of the three runs: models by name, and the held-out scores along the way."""

    models: dict[str, nn.Module]
    scratch: Curve
    branches: dict[str, Curve]

    @property
    def title(self) -> str:
        steps = self.branches["CPO"].steps[-1]
        return f"{self.scratch.steps[-1]} steps from scratch, {steps} of each continuation"


def train(corpus: Corpus, out: Path, steps: tuple[int, int], begun: float, budget: float) -> Outcome:
    """MLE from scratch, then two continuations of it with as many steps each."""
    model = make_model(corpus.tokenizer)
    options = {"alpha": 0.0, "max_steps": steps[0], "learning_rate": 1e-3, "warmup_steps": 20}
    trainer = make_trainer(model, corpus, corpus.texts, out, **options)
    scratch = run(trainer, "MLE from scratch", corpus, begun + 0.5 * budget, count=CURVE_EXAMPLES)

    models: dict[str, nn.Module] = {"MLE from scratch": model}
    branches: dict[str, Curve] = {}
    limit, deadline = steps[1], begun + 0.75 * budget
    # CPO goes first: should the clock cut it short, MLE takes as many steps and no more.
    for name, alpha in (("CPO", OBJECTIVE["contrast_weight"]), ("MLE", 0.0)):
        branch = copy.deepcopy(model)
        options = {"alpha": alpha, "max_steps": limit, "learning_rate": 3e-4, "warmup_steps": 5}
        trainer = make_trainer(branch, corpus, corpus.train, out, **options)
        branches[name] = run(trainer, f"continued with {name}", corpus, deadline, count=CURVE_EXAMPLES)
        models[f"continued with {name}"] = branch
        limit, deadline = trainer.state.global_step, float("inf")
    return Outcome(models, scratch, branches)


def report(corpus: Corpus, outcome: Outcome, out: Path) -> None:
    """The table, what its columns are, and the curves."""
    eos = corpus.tokenizer.eos_token_id
    scores = {name: score(model, corpus.held_out, eos) for name, model in outcome.models.items()}
    head, shape = head_costs(outcome.models["MLE from scratch"], corpus)
    chance = 1 / (1 + HELD_OUT_NEGATIVES)
    print_table(console, scores, head, outcome.title)
    write_curves(out / "demo.png", outcome.scratch, outcome.branches, chance)
    console.print(
        f"Scores: {len(corpus.held_out)} held-out continuations, each against {HELD_OUT_NEGATIVES} other held-out "
        f"texts and {HELD_OUT_NEGATIVES} truncations of itself, by log-likelihood per token (chance: {chance:.0%})."
    )
    console.print(
        f"Head: loss and gradients of one CPO batch ({shape}); memory above inputs, gradients included; fused with "
        f"max_logits_bytes={LOGITS_BYTES >> 20} MiB."
    )
    console.print(f"Curves: {out / 'demo.png'}")


def main() -> None:
    arguments = parse_arguments()
    begun = time.monotonic()
    transformers.logging.set_verbosity_error()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    corpus = make_corpus(arguments.data, arguments.seed)
    console.print(
        f"{len(corpus.texts)} paragraphs, {len(corpus.train)} continuations to train on, {len(corpus.held_out)} held "
        f"out; a GPT-2 of {make_model(corpus.tokenizer).num_parameters() / 1e6:.1f}M parameters and "
        f"{len(corpus.tokenizer)} tokens, on {torch.get_num_threads()} threads"
    )
    budget = 60 * arguments.minutes if arguments.steps is None else float("inf")
    if arguments.steps is None:
        steps = plan_steps(corpus, arguments.out, 0.75 * (budget - (time.monotonic() - begun)) - 15)
    else:
        steps = 2 * arguments.steps, arguments.steps
    report(corpus, train(corpus, arguments.out, steps, begun, budget), arguments.out)
    console.print(f"Took {(time.monotonic() - begun) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
