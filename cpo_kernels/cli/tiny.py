"""``--tiny``: a configuration cut down to a dry run that needs no network and takes seconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpo_kernels.negatives.files import write_whole

from .errors import InputError
from .options import RunConfig

VOCABULARY = 384
EOS = "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Upper limits of numbers in the file.
LIMITS = {
    "max_examples": 16,
    "max_eval_examples": 4,
    "max_length": 48,
    "max_prompt_length": 24,
    "prompt_tokens": 24,
    "completion_tokens": 24,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "autoregressive_every": 2,
    "autoregressive_batch_size": 4,
    "autoregressive_max_new_tokens": 8,
    "negatives_count": 2,
    "negatives_part": 8,
    "eval_generations": 2,
    "eval_max_new_tokens": 8,
    "lora_r": 2,
}
# The limits that are also set where the file has no value.
ALWAYS = (
    "max_examples",
    "max_eval_examples",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "negatives_count",
    "negatives_part",
    "autoregressive_max_new_tokens",
    "eval_generations",
    "eval_max_new_tokens",
)
# Values that keep a dry run from using other machines, other programs and special hardware.
REPLACED = {
    "report_to": "none",
    "push_to_hub": False,
    "logging_steps": 1,
    "dataloader_num_workers": 0,
    "torch_compile": False,
    "torch_dtype": "float32",
    "resume": "none",
    "judge": "none",
    "optim": "adamw_torch",
}
DROPPED = (
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "embedding_model",
    "autoregressive_url",
    "autoregressive_model",
    "warmup_steps",
    "eval_steps",
    "save_steps",
    "data_name",
    "ensemble_with",
    "dataloader_prefetch_factor",
    "torch_compile_mode",
    "torch_compile_backend",
)


def cut_down(given: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce the values of a configuration file to those of a dry run."""
    import torch

    values: dict[str, Any] = {name: value for name, value in given.items() if name not in DROPPED} | REPLACED
    for name, limit in LIMITS.items():
        value = values.get(name)
        if value is None or value < 0:
            value = limit if name in ALWAYS else value
        if value is not None:
            values[name] = min(value, limit)
    if values.get("max_length") is None and "prompt_tokens" not in values:
        values["max_length"] = LIMITS["max_length"]
    if not torch.cuda.is_available():
        values |= {"use_cpu": True, "bf16": False, "fp16": False, "tf32": None}
        if str(values.get("attn_implementation", "")).startswith("flash"):
            values["attn_implementation"] = "sdpa"
    if values.get("eval_fraction"):
        # A single held-out example would have no batch negatives.
        values["eval_fraction"] = max(values["eval_fraction"], 0.25)
    values["output_dir"] = f"{str(values.get('output_dir') or 'trainer_output').rstrip('/')}-tiny"
    if values.get("negatives_file") is not None:
        path = Path(values["negatives_file"])
        values["negatives_file"] = str(path.with_name(f"{path.stem}-tiny{path.suffix}"))
    return values


# Data


def tiny_rows(run: RunConfig) -> Iterator[dict[str, str]]:
    """Yield rows with the fields that columns and templates of the configuration read, of text that Python ships."""
    firsts, seconds = _fields(run)
    for paragraph in _paragraphs():
        words = paragraph.split()
        cut = len(words) // 2
        row = dict.fromkeys(seconds, " ".join(words[cut:])) | dict.fromkeys(firsts, " ".join(words[:cut]))
        yield row or {run.text_column: paragraph}


def _fields(run: RunConfig) -> tuple[set[str], set[str]]:
    """Return the fields of which the prompt is made, and those of the completion alone."""
    columns: Mapping[str, str] = run.columns if isinstance(run.columns, dict) else {}
    firsts, seconds = _variables(run.prompt_template), _variables(run.completion_template)
    firsts |= {columns[name] for name in ("prompt",) if name in columns}
    seconds |= {own for name, own in columns.items() if name != "prompt"}
    if seconds and not firsts:
        firsts = {"prompt"}
    if firsts and not seconds:
        seconds = {"completion"}
    return firsts, seconds - firsts


def _variables(template: str | None) -> set[str]:
    import jinja2.meta

    if template is None:
        return set()
    try:
        return jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(template))
    except jinja2.TemplateSyntaxError:
        return set()  # The error is raised where the template is used.


def _paragraphs() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        for block in topics[name].split("\n\n"):
            text = " ".join(block.split())
            if len(text.split()) >= 24 and sum(c.isalpha() or c == " " for c in text) >= 0.85 * len(text):
                yield text


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path, count: int) -> str:
    """Write the first ``count`` rows as JSON lines, and return the path."""
    lines = [json.dumps(row) + "\n" for row, _ in zip(rows, range(count), strict=False)]
    write_whole(path, "".join(lines))
    return str(path)


# Model and tokenizer


def tiny_tokenizer(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Train a byte-level BPE tokenizer, with a plain chat template, on the texts in some rows alone."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [text for row in rows for text in _texts(row)]
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[EOS], show_progress=False)
    special = {"bos_token": EOS, "eos_token": EOS, "pad_token": EOS}
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, chat_template=TEMPLATE, **special)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)


def tiny_model(run: RunConfig, tokenizer: Any, max_length: int | None, seed: int) -> Any:
    """Make a random model of the family that the configuration names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    asked = dict(run.tiny_model) if isinstance(run.tiny_model, dict) else {"model_type": _family(run)}
    if "model_type" not in asked:
        raise InputError(f"tiny_model must name a model_type, as {{model_type: gpt2}}, got {asked}")
    family = asked.pop("model_type")
    try:
        usual = AutoConfig.for_model(family)
    except ValueError as error:
        raise InputError(f"tiny_model: transformers knows no model_type {family!r}") from error
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": max(64, max_length or 0),
    }
    known = {*usual.to_dict(), *usual.attribute_map}
    sizes = {name: size for name, size in sizes.items() if name in known and getattr(usual, name) is not None}
    special = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **({"vocab_size": len(tokenizer)} | special | sizes | asked))
    return AutoModelForCausalLM.from_config(config, attn_implementation=run.attn_implementation)


def _family(run: RunConfig) -> str:
    from transformers import AutoConfig

    if run.model is not None and Path(run.model, "config.json").is_file():
        return AutoConfig.from_pretrained(run.model, trust_remote_code=run.trust_remote_code).model_type
    raise InputError(
        f"--tiny cannot ask the hub what family {run.model!r} is of; say it, as 'tiny_model: {{model_type: llama}}'"
    )
