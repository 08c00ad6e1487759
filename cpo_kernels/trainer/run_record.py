"""The record of a run in its checkpoints: settings, data and models, compared when the run resumes.

A setting counts unless a table of this module excludes it, so that a new setting of ``transformers`` counts.
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import xxhash
from torch import nn

from cpo_kernels.models.sharded import whole_shape
from cpo_kernels.negatives.endings import SpecialTokens
from cpo_kernels.negatives.redaction import without_secrets

from .config import CPOConfig
from .data import TokenizedExamples
from .fingerprint import architecture, fingerprint

# Settings that do not change training: where a run writes, what it logs, saves and evaluates, and how it is shown.
IGNORED_PREFIXES = ("logging_", "log_", "save_", "eval_", "hub_", "trackio_", "include_", "do_", "_")
IGNORED = {
    *("output_dir", "overwrite_output_dir", "reference_cache", "run_name", "project", "report_to", "push_to_hub"),
    *("resume_from_checkpoint", "allow_partial_resume", "allow_changed_resume", "enable_jit_checkpoint"),
    *("restore_callback_states_from_checkpoint", "local_rank", "ddp_timeout", "debug"),
    *("disable_tqdm", "skip_memory_metrics", "torch_empty_cache_steps", "label_names", "prediction_loss_only"),
    *("per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval", "batch_eval_metrics"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
}
# Learning-rate schedules that read evaluations, so that settings of evaluation change training.
READS_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")
EVALUATIONS = ("eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better")
# The length of a run may be changed on purpose; a change is reported, because the learning rate depends on it.
STEPS, EPOCHS = "settings.max_steps", "settings.num_train_epochs"
# What a run did whose record lacks a setting of ours, and the setting without which that has no meaning.
ADDED = {"settings.mean_field_fraction": (1.0, "settings.num_mean_field_negatives")}
# A setting that is None until a model decides it, so that None says nothing of a change.
DECIDED_LATER = "settings.max_length"
MODELS = {
    "reference": "the reference of this trainer is not the one that {checkpoint} was trained with; construct "
    "CPOTrainer with the model that the run began with, or pass it as ref_model",
    "base": "the frozen weights under the adapters are not those that {checkpoint} was trained with",
}


def settings_of(config: CPOConfig) -> dict[str, Any]:
    """Return the settings of a configuration that change training, as plain values without secrets."""
    counted = EVALUATIONS if _plain(config.lr_scheduler_type) in READS_EVALUATIONS else ()
    values = {
        item.name: getattr(config, item.name)
        for item in dataclasses.fields(config)
        if item.name in counted or not (item.name in IGNORED or item.name.startswith(IGNORED_PREFIXES))
    }
    return plain_settings(values)


def plain_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in the form in which they are recorded: plain values without secrets."""
    return without_secrets(_plain(values))


def _plain(value: Any) -> Any:
    """Turn a value into the form that it has after a round trip through JSON."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    # The text of an arbitrary object contains its address, which differs from run to run.
    return value if value is None or isinstance(value, (str, bool, int, float)) else type(value).__name__


def model_record(model: nn.Module) -> dict[str, Any]:
    """Return what besides its weights decides how a model trains; a resumed run gets it from its caller."""
    trained = [(name, tuple(whole_shape(p))) for name, p in model.named_parameters() if p.requires_grad]
    about = {name: _plain(own) for name, own in architecture(model).items()}
    return {
        "class": type(model).__name__.removeprefix("FSDP"),
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "trained": f"{len(trained)} tensors, {xxhash.xxh3_64_hexdigest(repr(trained).encode())}",
        **{f"{name} {key}": value for name, own in about.items() for key, value in own.items()},
    }


def frozen_fingerprints(model: nn.Module, reference: Any) -> dict[str, str]:
    """Return fingerprints of models that no checkpoint holds: the reference, or frozen weights under adapters.

    Args:
        model: the model that is trained, before it is sharded.
        reference: a :class:`~.reference.Reference`, or None.
    """
    prints = {} if reference is None else {"reference": reference.fingerprint}
    if hasattr(model, "peft_config") and not (reference is not None and reference.adapters):
        prints["base"] = fingerprint(model, frozen_only=True)
    return prints


def tokens_record(tokenizer: Any, special: SpecialTokens) -> dict[str, Any]:
    """Return the special tokens of the tokenizer, or without one those that the model names."""
    if tokenizer is None:
        return {"bos": special.bos, "eos": list(special.ends), "pad": special.pad}
    return {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def data_record(examples: TokenizedExamples) -> dict[str, Any]:
    """Return digests of a data set: of all of it, of its prompts and completions, and of these in any order."""
    hashes = example_hashes(examples)
    return {
        "examples": len(examples),
        "digest": examples.digest,
        "texts": xxhash.xxh3_128_hexdigest(hashes.tobytes()),
        "texts_in_any_order": xxhash.xxh3_128_hexdigest(np.sort(hashes).tobytes()),
    }


def example_hashes(examples: TokenizedExamples) -> np.ndarray:
    """Hash the prompt and completion of every example; (E,) uint64."""

    def hashed(prompt: Any, completion: Any) -> int:
        return xxhash.xxh3_64_intdigest(array("q", [len(prompt), *prompt, *completion]).tobytes())

    pairs = zip(examples.prompts, examples.completions, strict=True)
    return np.fromiter((hashed(*pair) for pair in pairs), np.uint64, len(examples))


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: str = "the checkpoint"
) -> tuple[list[str], list[str]]:
    """Compare the records of two runs, ``before`` being that of ``checkpoint``, in the entries of both.

    Returns:
        Sentences about differences between the runs, and sentences about their lengths, which may change.
    """
    changed: list[str] = []
    lengths: list[str] = []
    if "data" in before and "data" in now and before["data"] != now["data"]:
        changed.append(_data_difference(before["data"], now["data"]))
    for name, text in MODELS.items():
        if before.get(name) is not None and now.get(name) is not None and before[name] != now[name]:
            changed.append(text.format(checkpoint=checkpoint))
    old, new = _entries(before), _entries(now)
    for name, (value, condition) in ADDED.items():
        if old.get(condition):
            old.setdefault(name, value)
    for name in sorted(old.keys() & new.keys()):
        if old[name] == new[name] or (name == EPOCHS and old[STEPS] > 0 and new[STEPS] > 0):
            continue
        if name == DECIDED_LATER and None in (old[name], new[name]):
            continue
        shown = name.removeprefix("settings.").removeprefix("options.")
        text = f"{shown}: {json.dumps(old[name])} before, {json.dumps(new[name])} now"
        (lengths if name in (STEPS, EPOCHS) else changed).append(text)
    return changed, lengths


def _data_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if before.get("texts") == now["texts"]:
        return "the training data has the same prompts and completions, but other negatives, ranks or kinds"
    if before.get("texts_in_any_order") == now["texts_in_any_order"]:
        return "the training data has the same prompts and completions in another order"
    return f"the training data is another: {before.get('examples')} examples before, {now['examples']} now"


def _entries(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a record that are compared by value, nested ones under dotted names."""
    entries: dict[str, Any] = {}
    for part, value in record.items():
        if part in ("data", *MODELS):
            continue
        within = {f"{part}.{name}": item for name, item in value.items()} if isinstance(value, Mapping) else {}
        entries |= within or {part: value}
    return entries
