"""The text of ``--help`` besides the options; this module imports nothing heavy."""

from __future__ import annotations

COMMANDS = {
    "train": "train a model on prompts, completions and synthetic negatives",
    "negatives": "write negatives ahead of time, with the model or a server",
    "evaluate": "perplexity, contrast accuracy, free generations and their win rate",
    "ensemble": "average the weights of two trained models",
    "info": "what is installed and which backends it can use",
    "options": "search all options: cpo-kernels options length",
}

OVERVIEW = """\
usage: cpo-kernels COMMAND ...

Contrastive preference optimization of language models: the true continuation of a prompt against synthetic negatives.

{commands}

cpo-kernels COMMAND --help says more, cpo-kernels --version which release this is. A run begins with a file such as

    model: gpt2
    data: examples.jsonl          # one {{"prompt": ..., "completion": ...}} a line
    output_dir: runs/first

and `cpo-kernels train FILE`; examples/recipes of the repository has whole ones.
"""

FILE = """\
CONFIG.yaml has one `option: value` a line; the command line takes the same options as `--option value`, and what it
says wins. One file can serve train, negatives and evaluate: a command leaves alone what is not its concern.
"""

DESCRIPTIONS = {
    "train": """\
Trains the model and leaves it, its tokenizer and its metrics in output_dir. Called again after an interruption, it goes
on from the newest checkpoint that is whole; called again at its end, it changes nothing.

    cpo-kernels train examples/recipes/gpt2-xl-dolly.yaml --tiny          # try it out in seconds, offline
    cpo-kernels train my.yaml --num_mean_field_negatives 2                # in place of the objective's negatives
    torchrun --nproc_per_node 8 -m cpo_kernels train my.yaml              # one process a GPU

Examples are {"prompt", "completion"}, with "negatives": [...] where there are some, or {"prompt", "chosen",
"rejected"}: texts, conversations or token ids.
""",
    "negatives": """\
Lets the model (or a server, with autoregressive_url) continue the prompt of every training example and writes the
examples with these negatives to negatives_file, which train reads in place of data. It saves as it goes: called again
after an interruption, it keeps what there is. A finished file is replaced with --overwrite only.

    cpo-kernels negatives my.yaml --negatives_file runs/negatives.parquet
    cpo-kernels train my.yaml --negatives_file runs/negatives.parquet
""",
    "evaluate": """\
Evaluates what train left in output_dir on the held-out examples and writes report.json and report.md to eval_dir.
A judge's verdicts are kept there too: called again, it asks nothing twice.

    cpo-kernels evaluate my.yaml --judge likelihood --judge_model gpt2-xl
    CPO_KERNELS_JUDGE_KEY=... cpo-kernels evaluate my.yaml --judge chat --judge_url URL --judge_model NAME
""",
}


OPTIONS = """\
usage: cpo-kernels options [WORD ...]

Shows the options whose name or text has all of the words, with defaults, and without a word all of them: those of the
functions (cpo_kernels.options), of CPOConfig with transformers.TrainingArguments, and of the commands.
"""


def version() -> str:
    """Return the text of ``cpo-kernels --version``."""
    import cpo_kernels

    return f"cpo-kernels {cpo_kernels.__version__}"


def overview() -> str:
    """Return the text of ``cpo-kernels --help``."""
    return OVERVIEW.format(commands="\n".join(f"    {name:<10} {text}" for name, text in COMMANDS.items()))
