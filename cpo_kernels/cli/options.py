"""The options of a configuration file beside the fields of ``CPOConfig``: model, data, and the commands' outputs.

The text of a field is what ``--help`` shows; ``_argument_group_name`` is the title above the fields of a class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

JUDGES = ("none", "chat", "likelihood")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelOptions:
    """Which model and tokenizer a command starts from, and which adapters are trained on it."""

    _argument_group_name = "Model"

    model: str | None = _option(None, "Model to start from: a directory, or a name on the hub.")
    tokenizer: str | None = _option(
        None,
        "Tokenizer, a directory or a name on the hub. None: the model's own. The word none: there is none; the data "
        "holds token ids alone.",
    )
    revision: str | None = _option(None, "Revision of the model on the hub.")
    torch_dtype: Literal["float32", "bfloat16", "float16", "auto"] = _option(
        "float32", "Type of the weights; auto takes them as they are stored."
    )
    attn_implementation: str | None = _option(
        None, "Implementation of attention: sdpa, eager, flex_attention, flash_attention_2, ..."
    )
    trust_remote_code: bool = _option(False, "Run code that comes with the model.")
    load_in_4bit: bool = _option(
        False,
        "Load the model with its weights in 4 bits of bitsandbytes, but for the head (QLoRA); training needs lora_r.",
    )
    load_in_8bit: bool = _option(
        False, "Load the model with its weights in 8 bits of bitsandbytes, but for the head; training needs lora_r."
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _option("nf4", "Type of weights in 4 bits.")
    use_bnb_nested_quant: bool = _option(False, "Also quantise the scales of weights in 4 bits.")
    lora_r: int = _option(0, "Train LoRA adapters of this rank in place of the weights; 0 trains the weights.")
    lora_alpha: int = _option(16, "Scale of the adapters, which is divided by their rank.")
    lora_dropout: float = _option(0.0, "Dropout in front of the adapters.")
    lora_targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that get adapters, by name, or all-linear. None: those that peft knows for the model."
        },
    )


@dataclass
class DataOptions:
    """Where examples come from and how rows become examples."""

    _argument_group_name = "Data"

    data: str | None = _option(
        None,
        "Training examples: a .jsonl, .json, .csv, .parquet or .txt file, a pattern such as 'data/*.jsonl', a "
        "directory that datasets saved, or the name of a data set on the hub.",
    )
    data_name: str | None = _option(None, "Name of a configuration of the data set on the hub.")
    data_split: str = _option("train", "Split of the data set; slices such as train[:1000] work.")
    eval_data: str | None = _option(
        None, "Held-out examples, from the same places as data. None: data, with eval_split."
    )
    eval_split: str | None = _option(None, "Split of the held-out examples.")
    eval_fraction: float = _option(0.0, "Share of data to hold out where it has no split for that.")
    max_examples: int | None = _option(
        None, "Use only so many rows of data, the first ones; of negatives_file all are used."
    )
    max_eval_examples: int | None = _option(None, "Use only so many rows of the held-out examples, the first ones.")
    columns: dict | str | None = field(
        default=None,
        metadata={
            "help": "Names of the data's own fields, where they differ, as {prompt: question, completion: answer}."
        },
    )
    prompt_template: str | None = _option(None, "A Jinja template over a row's fields that makes its prompt.")
    completion_template: str | None = _option(None, "A Jinja template over a row's fields that makes its completion.")
    text_column: str = _option("text", "Field of a document to be cut into prompt and completion.")
    prompt_fraction: float = _option(0.5, "Share of a document's words that is its prompt.")
    prompt_tokens: int | None = _option(
        None, "Cut documents into pieces whose prompt has so many tokens; needs completion_tokens."
    )
    completion_tokens: int | None = _option(
        None, "Cut documents into pieces whose completion has so many tokens; needs prompt_tokens."
    )


@dataclass
class NegativesOptions:
    """What ``cpo-kernels negatives`` writes."""

    _argument_group_name = "Negatives made ahead of time"

    negatives_file: str | None = _option(
        None,
        "A .jsonl or .parquet file. The command negatives writes it; train reads its examples in place of data.",
    )
    negatives_count: int = _option(4, "Negatives written for each example.")
    negatives_format: Literal["ids", "text"] = _option(
        "ids",
        "ids keeps the tokens as they were drawn, also of texts that were cut off, and is of use with one tokenizer "
        "only; text is of use with any tokenizer, but every text counts as ended.",
    )
    negatives_ranking: Literal["none", "similarity"] = _option(
        "none", "similarity ranks them by likeness to the ground truth, for training that reads ranks."
    )
    negatives_part: int = _option(256, "Save what is written after every so many examples.")
    overwrite: bool = _option(False, "Replace a negatives_file that is there already.")


@dataclass
class EvaluationOptions:
    """What ``cpo-kernels evaluate`` measures and where its report goes."""

    _argument_group_name = "Evaluation"

    checkpoint: str | None = _option(None, "Model to evaluate. None: what train left in output_dir.")
    eval_reference: bool = _option(
        False, "Compare log-likelihoods as ratios to those of model, which training started from."
    )
    eval_generations: int | None = _option(
        None, "Continue so many prompts freely; 0 continues none. None: all of them."
    )
    eval_temperature: float = _option(1.0, "Temperature that continuations are sampled at.")
    eval_top_p: float = _option(1.0, "Nucleus (top-p) that continuations are sampled from.")
    eval_max_new_tokens: int | None = _option(
        None, "Tokens of a continuation, at most. None: as many as the longest ground truth has."
    )
    eval_dir: str | None = _option(None, "Where reports and verdicts go. None: evaluation in output_dir.")
    judge: str = _option(
        "none",
        "Compares continuations with ground truths. chat: an OpenAI-compatible chat endpoint; likelihood: a model's "
        "likelihood; none; or MODULE:FUNCTION, a Python callable (prompt, first, second) -> 1, 0.5 or 0.",
    )
    judge_url: str | None = _option(None, "The chat endpoint, .../v1. Its key is read from CPO_KERNELS_JUDGE_KEY.")
    judge_model: str | None = _option(None, "The judge's name at the endpoint, or the model whose likelihood judges.")


@dataclass
class DryRunOptions:
    """Whether a configuration is only tried out, and on what."""

    _argument_group_name = "Dry run"

    tiny: bool = _option(
        False,
        "Try the configuration out, offline and in seconds: a tiny random model of the same family, a tokenizer made "
        "from the data, a few examples and steps, and text that comes with Python in place of data on the hub. Writes "
        "to output_dir with -tiny behind it. What the command line says is kept.",
    )
    tiny_model: dict | str | None = field(
        default=None,
        metadata={
            "help": "Configuration of the tiny model, as {model_type: gpt2}; needed where model is a name on the hub."
        },
    )
    tiny_data: str | None = _option(None, "A file that a dry run takes in place of data on the hub.")


@dataclass
class CourseOptions:
    """How ``cpo-kernels train`` begins and ends."""

    _argument_group_name = "Course of a run"

    resume: str = _option(
        "auto",
        "auto goes on from the newest checkpoint in output_dir that is whole and leaves a finished run as it is; none "
        "begins anew; or the path of a checkpoint.",
    )
    ensemble_with: str | None = _option(
        None, "At the end, also write the average of the weights with those of this model, to ensemble in output_dir."
    )
    ensemble_alpha: float = _option(0.5, "Weight of the trained model in the average with ensemble_with.")


# In the order in which help shows them.
GROUPS = (ModelOptions, DataOptions, NegativesOptions, CourseOptions, EvaluationOptions, DryRunOptions)


@dataclass
class RunConfig(ModelOptions, DataOptions, NegativesOptions, EvaluationOptions, CourseOptions, DryRunOptions):
    """All options; a configuration file has the fields of this class and those of ``CPOConfig``."""

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be in [0, 1), got {self.eval_fraction}")
        if self.eval_fraction and (self.eval_data or self.eval_split):
            raise ValueError(
                f"eval_fraction={self.eval_fraction} holds out a part of data; expected no eval_data and no eval_split "
                f"beside it, got {self.eval_data or self.eval_split!r}"
            )
        for name, least in (
            ("lora_r", 0),
            ("max_examples", 1),
            ("max_eval_examples", 1),
            ("negatives_count", 1),
            ("negatives_part", 1),
            ("eval_generations", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; give one")
        if self.judge not in JUDGES and ":" not in self.judge:
            raise ValueError(f"judge must be one of {', '.join(JUDGES)} or MODULE:FUNCTION, got {self.judge!r}")
        if self.judge == "chat" and not (self.judge_url and self.judge_model):
            raise ValueError(
                f"judge='chat' needs judge_url and judge_model, got {self.judge_url!r} and {self.judge_model!r}"
            )
        for name in ("columns", "tiny_model"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name} must be a mapping, got {value!r}")
