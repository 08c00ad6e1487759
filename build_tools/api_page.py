"""Makes docs/api.md, the public names of the library and every option of each, from signatures and docstrings."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from build_tools.docstrings import entries, markdown, sections, with_all_options

INTRODUCTION = """\
# Functions and classes

<!-- Written by `make docs-pages` from signatures and docstrings; a test fails when they differ. -->

The public names of the library, with every option of each; `help(cpo_kernels.linear_cpo_loss)` shows the same. Sizes:
R rows, N tokens, S segments (candidates), G groups (prompts), C = K + 1 candidates of a group, T tokens of a candidate,
V vocabulary entries, H hidden units. All options in one list: [Options A to Z](options.md).
"""
CONTENTS = {
    "The loss, from hidden states": (
        "cpo_kernels",
        "linear_cpo_loss linear_sequence_loss linear_sequence_logps linear_token_logps linear_token_statistics "
        "linear_token_entropy plan",
    ),
    "From logits and log-likelihoods": ("cpo_kernels", "cpo_loss sequence_logps token_logps contrastive_loss"),
    "What they take and return": (
        "cpo_kernels",
        "CandidateLayout CPOOutput TokenStatistics LogpsAndEntropy Plan VocabShard",
    ),
    "Modules": ("cpo_kernels", "CPOLoss LinearCPOLoss"),
    "Inside a Hugging Face model": (
        "cpo_kernels.models",
        "attach_linear_loss CPORequest SequenceLossRequest LogpsRequest StatisticsRequest LinearLossOutput",
    ),
    "Training": (
        "cpo_kernels.trainer",
        "CPOTrainer CPOConfig tokenize_examples evaluate ensemble_checkpoints",
    ),
    "Negatives": (
        "cpo_kernels.negatives",
        "batch_negatives truncation_negatives mean_field_negatives autoregressive_negatives is_wrong write_negatives "
        "token_seeds similarity_ranks",
    ),
    "In place of TRL's trainers": (
        "cpo_kernels.integrations.trl",
        "FusedDPOTrainer FusedCPOTrainer patch_fused_head fused_head",
    ),
    "In place of Liger's losses": (
        "cpo_kernels.integrations.liger",
        "LigerFusedLinearDPOLoss LigerFusedLinearCPOLoss LigerFusedLinearSimPOLoss LigerFusedLinearORPOLoss "
        "LigerFusedLinearKTOLoss LigerFusedLinearGRPOLoss LigerFusedLinearCrossEntropyLoss CrossEntropyOutput",
    ),
    "In place of Cut Cross-Entropy": (
        "cpo_kernels.integrations.cut_cross_entropy",
        "linear_cross_entropy LinearCrossEntropy VocabParallelOptions",
    ),
    "Other losses": ("cpo_kernels.integrations.losses", "kto kto_baseline orpo info_nca nca gspo"),
}


def docstring_of(name: str) -> str:
    """Return the docstring of a class, by its full name."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute).__doc__


def default(parameter: inspect.Parameter | None) -> str:
    """Return the default of a parameter as it is shown."""
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return ""
    value = parameter.default
    return f"`{value!r}`" if isinstance(value, (int, float, str, tuple, type(None))) else "made anew"


def table(title: str, texts: dict[str, str], parameters: dict[str, inspect.Parameter]) -> list[str]:
    """Return a table with a line for each name."""
    lines = ["", f"| {title} | default | |", "| --- | --- | --- |"]
    return lines + [
        f"| `{name}` | {default(parameters.get(name))} | {markdown(text)} |" for name, text in texts.items()
    ]


def entry(module: str, name: str) -> list[str]:
    """Return the lines of one public name."""
    thing: Any = getattr(import_module(module), name)
    parts = sections(with_all_options(thing.__doc__, docstring_of))
    parameters = dict(inspect.signature(thing).parameters)
    texts = entries(parts.get("Args", ""))
    if inspect.isfunction(thing):  # each of its arguments, in order, also one that shares a description
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        texts = {key: texts.get(key, "") for key, value in parameters.items() if value.kind not in kinds}
    lines = ["", f"### {name}", "", f"`{module}.{name}`", "", markdown(parts[""]).replace("\\|", "|")]
    if texts:
        lines += table("argument", texts, parameters)
    if "Attributes" in parts:
        lines += table("attribute", entries(parts["Attributes"]), {})
    for title in ("Returns", "Yields", "Raises"):
        if title in parts:
            lines += ["", f"**{title}.** {markdown(' '.join(parts[title].split()))}"]
    return lines


def page() -> str:
    """Return the text of docs/api.md."""
    lines = [INTRODUCTION.rstrip()]
    for title, (module, names) in CONTENTS.items():
        lines += ["", f"## {title}"]
        for name in names.split():
            lines += entry(module, name)
    return "\n".join(lines) + "\n"
