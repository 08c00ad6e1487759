"""From text to a small language model trained with MLE, then continued with CPO against each kind of negative.

    python examples/demo.py [--data FILE] [--minutes M | --steps N] [--out DIR]

Everything runs offline. The default text is the language reference that comes with Python (``pydoc_data.topics``). The
script prints what each kind of negative costs a step and what it brings on held-out text, what the head costs, and
writes ``demo.png``; what the numbers say is what it prints.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that spin at every barrier make a step ten times slower where another program has one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from demo_head import LOGITS_BYTES, HeadCost, measure_head
from demo_report import Row, print_head, print_rows, write_curves
from demo_scores import (
    GENERATIONS,
    HELD_OUT_NEGATIVES,
    SAMPLING,
    Scores,
    cheap_negatives,
    every_negative,
    generations,
    score,
    true_continuations,
)
from demo_text import MAX_LENGTH, Corpus, make_corpus
from demo_training import (
    BATCH_SIZE,
    CONTINUATIONS,
    NEGATIVES,
    Curve,
    console,
    make_model,
    make_trainer,
    negatives,
    run,
    seconds_of_a_step,
)
from torch import nn

from cpo_kernels.trainer import ContrastBatch, Negative, NegativeSampler

CURVE_EXAMPLES = 48  # of the held-out continuations, for scores along the way; the table uses all
# Of the time for training; the rest goes to scores, which must not be in the way of it.
SCRATCH_SHARE, TRAINING_SHARE = 0.35, 0.75


@dataclass(frozen=True)
class Plan:
    """Steps from scratch and of each continuation, and by when the first of them has to be through."""

    scratch: int
    continuation: int
    first_share: float = 1.0  # of the time of all continuations


def plan_steps(corpus: Corpus, out: Path, seconds: float) -> Plan:
    """The steps that fit, from the time that a few take here."""
    scratch = seconds_of_a_step(corpus, corpus.texts, out, **negatives())
    costs = [seconds_of_a_step(corpus, corpus.train, out, **options) for options in CONTINUATIONS.values()]
    steps = (SCRATCH_SHARE * seconds / scratch, (1 - SCRATCH_SHARE) * seconds / sum(costs))
    return Plan(max(8, int(steps[0])), max(8, int(steps[1])), costs[0] / sum(costs))


@dataclass
class Outcome:
    """Of all runs: models and curves by name, and the negatives that all of them are scored with."""

    models: dict[str, nn.Module]
    curves: dict[str, Curve]
    held_out: list[list[Negative]]


SCRATCH = "from scratch"


def train(corpus: Corpus, out: Path, plan: Plan, begun: float, budget: float) -> Outcome:
    """MLE from scratch, then continuations of it with as many steps each."""
    model = make_model(corpus)
    options = {"max_steps": plan.scratch, "learning_rate": 2e-3, "warmup_steps": 20} | negatives()
    trainer = make_trainer(model, corpus, corpus.texts, out, **options)
    held_out = cheap_negatives(corpus.held_out, corpus.eos)

    def evaluate(current: nn.Module) -> Scores:
        return score(current, corpus.held_out, held_out, corpus.eos, CURVE_EXAMPLES)

    deadline = begun + 0.4 * budget
    curves = {SCRATCH: run(trainer, "MLE from scratch", evaluate, deadline, evaluate(model), records=4)}
    models: dict[str, nn.Module] = {SCRATCH: model}
    held_out = every_negative(model, corpus.held_out, corpus.eos)
    first = evaluate(model)
    limit, left = plan.continuation, begun + 0.85 * budget - time.monotonic()
    deadline = time.monotonic() + plan.first_share * left
    # Should the clock cut the first short, the others take as many steps and no more.
    for name, kinds in CONTINUATIONS.items():
        models[name] = copy.deepcopy(model)
        options = {"max_steps": limit, "learning_rate": 5e-4, "warmup_steps": 5} | kinds
        trainer = make_trainer(models[name], corpus, corpus.train, out, **options)
        curves[name] = run(trainer, f"continued with {name}", evaluate, deadline, first, records=3)
        limit, deadline = trainer.state.global_step, float("inf")
    return Outcome(models, curves, held_out)


def head_costs(model: nn.Module, corpus: Corpus) -> tuple[dict[str, HeadCost], str]:
    """Fused and eager on one training batch with batch and truncation negatives, and its shape."""
    sampler = NegativeSampler(corpus.train, corpus.eos, NEGATIVES, NEGATIVES, seed=0)
    batch = ContrastBatch(corpus.eos, corpus.eos, MAX_LENGTH)
    for index in range(BATCH_SIZE):
        batch.add_group(corpus.train.prompts[index], corpus.train.completions[index], sampler.draw(index, step=0))
    inputs = batch.tensors()
    with torch.no_grad():
        hidden = model.base_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    hidden = hidden.flatten(0, 1)
    inputs["ref_logps"] = torch.zeros(len(batch.segments))
    rows = inputs["rows"].unique().numel()
    shape = f"R={rows}, N={inputs['rows'].numel()}, H={hidden.shape[1]}, V={len(corpus.tokenizer)}"
    return measure_head(hidden, model.lm_head.weight.detach(), inputs), shape


def report(corpus: Corpus, outcome: Outcome, out: Path) -> None:
    """The tables, what their columns are, and the curves."""
    curves, mle = outcome.curves, outcome.curves["MLE"]
    rows = {
        name: Row(
            seconds=curves[name].cost,
            times_mle=None if name == SCRATCH else curves[name].cost / mle.cost,
            scores=score(model, corpus.held_out, outcome.held_out, corpus.eos),
            generated=generations(model, corpus.held_out, corpus.eos),
        )
        for name, model in outcome.models.items()
    }
    rows["ground truth"] = Row(generated=true_continuations(corpus.held_out, corpus.eos))
    title = f"{curves[SCRATCH].steps[-1]} steps from scratch, {mle.steps[-1]} of each continuation"
    print_rows(console, rows, title, sections=(SCRATCH, list(CONTINUATIONS)[-1]))
    explain(corpus, outcome)
    head, shape = head_costs(outcome.models[SCRATCH], corpus)
    print_head(console, head)
    console.print(
        f"Head: loss and gradients of one batch with {NEGATIVES} batch negatives and {NEGATIVES} truncations "
        f"({shape}); memory above inputs, gradients included; fused with max_logits_bytes={LOGITS_BYTES >> 20} MiB."
    )
    write_curves(out / "demo.png", curves, SCRATCH, 1 / (1 + HELD_OUT_NEGATIVES))
    count = min(CURVE_EXAMPLES, len(corpus.held_out))
    console.print(f"Curves, on the first {count} held-out continuations: {out / 'demo.png'}")


def explain(corpus: Corpus, outcome: Outcome) -> None:
    """What was run, and what the columns are."""
    console.print(
        f"Runs: each continuation starts from the model from scratch and takes {BATCH_SIZE} examples a step: MLE, or "
        f"half MLE and half CPO against {NEGATIVES} negatives of the kind named, or one of each kind."
    )
    console.print(
        "Step: median time, with the making of negatives, the reference, forward, backward and optimizer. "
        + sharing(corpus, outcome)
    )
    count, chance = len(corpus.held_out), 1 / (1 + HELD_OUT_NEGATIVES)
    console.print(
        f"Beats: how many of {count} held-out continuations have a higher log-likelihood per token than "
        f"{HELD_OUT_NEGATIVES} negatives of the kind (chance: {chance:.0%}; standard error: up to "
        f"{0.5 / count**0.5:.0%}), the same ones for all models; the mean-field and autoregressive ones are drawn from "
        "the model from scratch."
    )
    console.print(
        f"Samples: {GENERATIONS} continuations that the model writes behind held-out prompts, of at most "
        f"{SAMPLING.max_new_tokens} tokens: mean length, and the share of pairs of tokens that repeat an earlier one."
    )


def sharing(corpus: Corpus, outcome: Outcome) -> str:
    """In which runs a prompt and its candidates were one row of the transformer."""
    lengths = [sum(map(len, texts)) / len(texts) for texts in (corpus.train.prompts, corpus.train.completions)]
    shares = {name: sum(curve.shared) / len(curve.shared) for name, curve in outcome.curves.items()}
    used = [f"{name} {share:.0%}" for name, share in shares.items() if share]
    return (
        f"A prompt has {lengths[0]:.0f} tokens on average, a completion {lengths[1]:.0f}; prompt and candidates ran as "
        f"one row in so many steps: {', '.join(used)}; the other runs have one row a prompt."
        if used
        else f"A prompt has {lengths[0]:.0f} tokens on average; no run shared it between rows."
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="FILE", help="plain text, paragraphs separated by blank lines")
    parser.add_argument("--minutes", type=float, default=4.0, help="about how long to take (default: 4)")
    parser.add_argument("--steps", type=int, help="steps of each continuation, and twice as many from scratch")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="where to write (default: demo_output)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """The whole demo."""
    arguments = parse_arguments()
    begun = time.monotonic()
    transformers.logging.set_verbosity_error()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    corpus = make_corpus(arguments.data, arguments.seed)
    console.print(
        f"{len(corpus.texts)} paragraphs, {len(corpus.train)} continuations to train on, {len(corpus.held_out)} held "
        f"out; a GPT-2 of {make_model(corpus).num_parameters() / 1e6:.1f}M parameters and {len(corpus.tokenizer)} "
        f"tokens, on {torch.get_num_threads()} threads"
    )
    budget = 60 * arguments.minutes if arguments.steps is None else float("inf")
    if arguments.steps is None:
        console.print("Timing a few steps of each run, to see how many there is time for ...")
        plan = plan_steps(corpus, arguments.out, TRAINING_SHARE * (budget - (time.monotonic() - begun)))
    else:
        plan = Plan(2 * arguments.steps, arguments.steps)
    report(corpus, train(corpus, arguments.out, plan, begun, budget), arguments.out)
    console.print(f"Took {(time.monotonic() - begun) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
