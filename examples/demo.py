"""Why anyone should want this, in five minutes on two cores: what a head costs, what contrasts bring, and samples.

    python examples/demo.py [--data FILE] [--steps N] [--seed N] [--quick] [--out DIR]

First the head of GPT-2, plain PyTorch beside cpo-kernels, and its picture, ``head.png``. Then a small model of the text
that comes with Python, continued with MLE and with CPO against each kind of negative: what a step costs, and what it
brings on held-out text. Then what three of the models write. Everything runs offline. The numbers of steps are fixed,
so two runs on one machine differ in measured times and bytes alone.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that spin at every barrier make a step ten times slower where another program has one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from demo_head import LOGITS, QUICK, TOKENS, Sizes, draw_head, in_mib, largest_text, measure_head
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from demo_text import Corpus
    from demo_training import Outcome

# Fixed beforehand, see demo_training.
STEPS, START_STEPS = 200, 1200
SAMPLES = 3
NEXT = ".venv/bin/cpo-kernels train examples/recipes/gpt2-xl-dolly.yaml --tiny"
console = Console(width=80, highlight=False)


def new_table(*headings: str) -> Table:
    """A table whose first column holds names and whose others hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", vertical="bottom", no_wrap=True)
    return table


def show_head(sizes: Sizes, out: Path) -> None:
    """Measure the head, print what it costs, and draw it."""
    tokens = f"{sizes.groups * TOKENS:,}"
    console.rule(f"1. The head: {sizes.vocabulary:,} words, {sizes.hidden} hidden units, float32", align="left")
    costs = measure_head(sizes)
    table = new_table(
        "", f"time of\n{tokens} tokens", "peak memory", f"largest batch\nin {in_mib(sizes.limit)}, tokens"
    )
    for name, cost in costs.items():
        table.add_row(name, f"{cost.seconds:.2f} s", in_mib(cost.peak), largest_text(cost, sizes))
    console.print(table)
    first, last = costs.values()
    console.print(
        f"Loss and gradients of the same batch: {first.seconds / last.seconds:.1f} times faster, in "
        f"{first.peak / last.peak:.1f} times less memory. Times are medians of {sizes.rounds} rounds that alternate. "
        "Memory is the high-water mark of a process of its own beyond its inputs; gradients count for both. Of the "
        f"logits cpo-kernels holds {in_mib(LOGITS)} at once (max_logits_bytes)."
    )
    if last.largest == sizes.most_groups:
        console.print(
            f"The search for the largest batch ended at {last.largest * TOKENS:,} tokens, which take cpo-kernels "
            f"{in_mib(last.largest_peak)}."
        )
    draw_head(out / "head.png", costs, sizes)
    console.print(f"As a picture: {out / 'head.png'}\n")


def show_training(data: Path | None, steps: int, start_steps: int, seed: int, out: Path) -> tuple[Corpus, Outcome]:
    """Train, and print what the contrasts cost and bring."""
    # Here, because the processes that measure the head import this file too.
    import transformers
    from demo_text import make_corpus
    from demo_training import BATCH_SIZE, HELD_OUT, KINDS, Difference, name_of, power, train_all

    transformers.logging.set_verbosity_error()
    console.rule("2. Training: what each kind of negative costs and brings", align="left")
    corpus = make_corpus(data, HELD_OUT, seed)
    count = len(corpus.held_out)
    error, seen = power(count)
    console.print(
        f"A small GPT-2 reads {len(corpus.train):,} paragraphs in {start_steps:,} steps of {BATCH_SIZE}, by MLE. "
        f"Copies of it take {steps} more: MLE, or half MLE and half CPO against one negative of a kind. "
        f"{count} paragraphs are held out. Power: a difference in accuracy has a standard error of {error:.1f} "
        f"points at most, so {seen:.1f} points are seen in 4 of 5 runs."
    )
    outcome = train_all(corpus, start_steps, steps, seed, out, console)
    held_out, logps, seconds = outcome.held_out, outcome.logps, outcome.seconds
    mle = held_out.losses(logps[None])
    table = new_table("negatives", "time of\na step", "accuracy:\nMLE", "\nCPO", "\ndifference", "perplexity")
    table.add_row(name_of(None), "1.00", "", "", "", f"{mle.mean().exp():.1f}")
    for kind in KINDS:
        theirs, ours = (held_out.wins(logps[own], kind) for own in (None, kind))
        change = Difference.of(held_out.losses(logps[kind]), mle).exp()
        accuracies = (f"{theirs.mean():.0%}", f"{ours.mean():.0%}", Difference.of(ours, theirs).text())
        table.add_row(name_of(kind), f"{seconds[kind] / seconds[None]:.2f}", *accuracies, change.text("%"))
    console.print(table)
    console.print(
        f"Time: as a multiple of the {1e3 * seconds[None]:.0f} ms of MLE. Accuracy: how many held-out texts "
        "gain more likelihood than a negative of the kind, which is what the contrast optimises; 50% by chance. "
        "Perplexity: of the held-out texts; below, its change against MLE. Differences are paired, ± two standard "
        "errors; none seen: within them, as are 19 of 20 where there is none.\n"
    )
    return corpus, outcome


def show_samples(corpus: Corpus, outcome: Outcome) -> None:
    """Print what three models write behind the first held-out prompts, side by side."""
    from demo_training import write

    def texts(written: list[list[int]]) -> list[str]:
        decoded = corpus.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [escape("".join(filter(str.isprintable, text)).strip()) for text in decoded]

    console.rule("3. Samples: the same prompts and seed, temperature 0.7", align="left")
    prompts = corpus.held_out.prompts[:SAMPLES]
    columns = [texts(prompts)]
    table = Table("prompt", box=box.SIMPLE_HEAD, pad_edge=False, expand=True, show_lines=True)
    for heading, kind in (("MLE", None), ("CPO, mean-field", "mean_field"), ("CPO, truncation", "truncation")):
        table.add_column(heading)
        columns.append(texts(write(outcome.models[kind], prompts, corpus.eos, temperature=0.7)))
    for column in table.columns:
        column.ratio, column.overflow = 1, "fold"
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="FILE", help="plain text, paragraphs separated by blank lines")
    parser.add_argument("--steps", type=int, help="steps of each continuation, at least 1 (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the split of the text and of the model (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a dry run: a small head, 2 steps")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="where to write (default: demo_output)")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    return arguments


def main() -> None:
    """The whole demo."""
    arguments = parse_arguments()
    steps, start_steps = (2, 2) if arguments.quick else (STEPS, START_STEPS)
    begun = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    show_head(QUICK if arguments.quick else Sizes(), arguments.out)
    show_samples(*show_training(arguments.data, arguments.steps or steps, start_steps, arguments.seed, arguments.out))
    console.print(f"Took {(time.monotonic() - begun) / 60:.1f} minutes.")
    console.print(f"Next: {NEXT}", soft_wrap=True)


if __name__ == "__main__":
    main()
