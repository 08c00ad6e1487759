"""Help texts. Options are read from the fields of :mod:`.options`; those of training are the ones people look for."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable

from .options import CourseOptions, DataOptions, DryRunOptions, EvaluationOptions, ModelOptions, NegativesOptions

WIDTH = 100
COMMANDS = {
    "train": "train a model on prompts, completions and synthetic negatives",
    "negatives": "write negatives ahead of time, with the model or a server",
    "evaluate": "perplexity, contrast accuracy, free generations and their win rate",
    "ensemble": "average the weights of two trained models",
    "info": "what is installed and which backends it can use",
}

OVERVIEW = """\
usage: cpo-kernels COMMAND ...

Contrastive preference optimization of language models: the true continuation of a prompt against synthetic negatives.

{commands}

cpo-kernels COMMAND --help says more. A run begins with a file such as

    model: gpt2
    data: examples.jsonl          # one {{"prompt": ..., "completion": ...}} a line
    output_dir: runs/first

and `cpo-kernels train FILE`; examples/recipes of the repository has whole ones.
"""

FILE = """\
CONFIG.yaml has one `option: value` a line; the command line takes the same options as `--option value`, and what it
says wins. Every field of transformers.TrainingArguments works as well: learning_rate, save_steps, report_to, ...
One file can serve train, negatives and evaluate: a command leaves alone what is not its concern.
"""

TRAIN = """\
usage: cpo-kernels train CONFIG.yaml [--option value ...]

Trains the model and leaves it, its tokenizer and its metrics in output_dir. Called again after an interruption, it goes
on from the last checkpoint.

    cpo-kernels train examples/recipes/gpt2-xl-dolly.yaml --tiny          # try it out in seconds, offline
    cpo-kernels train my.yaml --learning_rate 5e-6 --num_mean_field_negatives 2
    torchrun --nproc_per_node 8 -m cpo_kernels train my.yaml              # one process a GPU

Examples are {"prompt", "completion"}, with "negatives": [...] where there are some, or {"prompt", "chosen",
"rejected"}: texts, conversations or token ids.
"""

NEGATIVES = """\
usage: cpo-kernels negatives CONFIG.yaml [--option value ...]

Lets the model (or a server, with autoregressive_url) continue the prompt of every training example and writes the
examples with these negatives to negatives_file, which train reads in place of data. It saves as it goes: called again
after an interruption, it keeps what there is.

    cpo-kernels negatives my.yaml --negatives_file runs/negatives.parquet
    cpo-kernels train my.yaml --negatives_file runs/negatives.parquet
"""

EVALUATE = """\
usage: cpo-kernels evaluate CONFIG.yaml [--option value ...]

Evaluates what train left in output_dir on the held-out examples and writes report.json and report.md to eval_dir.
A judge's verdicts are kept there too: called again, it asks nothing twice.

    cpo-kernels evaluate my.yaml --judge likelihood --judge_model gpt2-xl
    CPO_KERNELS_JUDGE_KEY=... cpo-kernels evaluate my.yaml --judge chat --judge_url URL --judge_model NAME
"""

# The fields of CPOConfig that a newcomer needs, told in a line each.
OBJECTIVE = {
    "objective": "cpo, dpo, xu_cpo, simpo, mle or scheduled_sampling; the default of what is not given.",
    "alpha": "Weight of the contrast; the rest is next-token prediction.",
    "beta": "How sharply candidates are told apart.",
    "reference": "frozen, precomputed or none.",
    "ranking": "none, or similarity: negatives more like the ground truth rank higher.",
    "prefix_sharing": "Run a prompt and its candidates as one row: auto, required or off.",
}
KINDS = {
    "num_batch_negatives": "Completions of other examples, for each ground truth.",
    "num_truncation_negatives": "The ground truth, cut early.",
    "num_mean_field_negatives": "Every token drawn by itself, along the ground truth.",
    "num_autoregressive_negatives": "Written by the model itself as it trains.",
}
WRITING = {
    "autoregressive_temperature": "Temperature of what the model writes.",
    "autoregressive_top_p": "Nucleus that it is sampled from.",
    "autoregressive_max_new_tokens": "Its length, at most.",
    "autoregressive_batch_size": "Continuations written at a time.",
    "autoregressive_url": "An OpenAI-compatible completions endpoint that writes in place of the model, .../v1. Its "
    "key is read from CPO_KERNELS_COMPLETIONS_KEY.",
    "autoregressive_model": "The model's name there.",
    "embedding_model": "A sentence-transformers model for ranks. Default: the model's own hidden states.",
}
TRAINING = {
    "output_dir": "Where the model, checkpoints and logs go.",
    "max_length": "Tokens of prompt and completion together, at most.",
    "learning_rate": "Its initial value.",
    "num_train_epochs": "Passes over the data; or max_steps.",
    "per_device_train_batch_size": "Examples a device takes at a time.",
    "gradient_accumulation_steps": "Such batches for one step of the optimizer.",
    "bf16": "Compute in bfloat16.",
    "gradient_checkpointing": "Less memory for more time.",
    "max_logits_bytes": "Memory that logits may take.",
}


def overview() -> str:
    """The text of ``cpo-kernels --help``."""
    return OVERVIEW.format(commands="\n".join(f"    {name:<10} {text}" for name, text in COMMANDS.items()))


def of(command: str) -> str:
    """The text of ``cpo-kernels COMMAND --help``."""
    model, data, course, dry_run = map(_group, (ModelOptions, DataOptions, CourseOptions, DryRunOptions))
    ahead, evaluation = _group(NegativesOptions), _group(EvaluationOptions)
    made = {"negatives_file": ahead[1]["negatives_file"]}
    groups = {
        "train": [
            model,
            (data[0], data[1] | made),
            ("Objective", OBJECTIVE),
            ("Negatives of each example", KINDS),
            ("Training", TRAINING),
            course,
            dry_run,
        ],
        "negatives": [ahead, ("How they are written", WRITING), model, data, dry_run],
        "evaluate": [evaluation, model, data, ("Negatives that accuracy is measured with", KINDS), dry_run],
    }
    introduction = {"train": TRAIN, "negatives": NEGATIVES, "evaluate": EVALUATE}[command]
    return "\n".join([introduction, FILE, *(_section(title, options) for title, options in groups[command])])


def _group(cls: type) -> tuple[str, dict[str, str]]:
    return (cls.__doc__ or "").rstrip("."), {item.name: _described(item) for item in dataclasses.fields(cls)}


def _described(item: dataclasses.Field) -> str:
    text = item.metadata["help"]
    if item.default in (None, False) or "Default" in text:
        return text
    return f"{text} Default: {item.default}."


def _section(title: str, options: dict[str, str]) -> str:
    return "\n".join([f"{title}:", *_lines(options.items())]) + "\n"


def _lines(options: Iterable[tuple[str, str]]) -> Iterable[str]:
    for name, text in options:
        head = f"  --{name}"
        lines = textwrap.wrap(text, WIDTH - 34)
        if len(head) < 33:
            yield f"{head:<34}{lines[0]}"
            lines = lines[1:]
        else:
            yield head
        yield from (" " * 34 + line for line in lines)
