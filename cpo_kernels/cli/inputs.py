"""The model, tokenizer and examples that a configuration names."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cpo_kernels.negatives.seeds import chosen
from cpo_kernels.trainer.files import malformed
from cpo_kernels.trainer.loading import ExampleOptions, load_examples, read_rows

from .errors import InputError, input_errors
from .options import RunConfig
from .parsing import Settings
from .tiny import LIMITS, tiny_model, tiny_rows, tiny_tokenizer, write_rows

TOKENIZER_ROWS = 64  # rows of which a dry run makes its tokenizer
ADAPTERS = "adapter_config.json"
NO_MODEL = "model is not given: a directory, or a name on the hub"
NO_DATA = "data is not given: the training examples"
NO_TOKENIZER = "none"
HELD_OUT_SEED = 0  # Every command holds out the same examples.


class Inputs:
    """The model, tokenizer and examples of a command, loaded on first use.

    Args:
        settings: the settings of the command.
        tokenizer: a tokenizer to use in place of the configured one, or None.
    """

    def __init__(self, settings: Settings, tokenizer: Any = None) -> None:
        self.settings, self.run = settings, settings.run
        self._given_tokenizer = tokenizer

    @cached_property
    def data(self) -> str | None:
        """The source of the training examples."""
        return self._source(self.run.data)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model to start from; None where the settings say that there is none."""
        return self._tokenizer() if self._given_tokenizer is None else self._given_tokenizer

    def _source(self, source: str | None) -> str | None:
        """Return the source to read: in a dry run a local file, not the hub."""
        if source is None or not self.run.tiny or _is_local(source):
            return source
        if self.run.tiny_data is not None:
            return self.run.tiny_data
        output = Path(self.settings.training.output_dir or ".")
        # One file a process: processes that write to one file at once would read unfinished lines.
        path = output / f"tiny_data_{os.environ.get('RANK', '0')}.jsonl"
        return write_rows(tiny_rows(self.run), path, LIMITS["max_examples"] + LIMITS["max_eval_examples"])

    def _tokenizer(self) -> Any:
        if self.run.tiny:
            source = self.data or self.run.negatives_file or self._source(self.run.eval_data)
            if source is None:
                raise InputError(NO_DATA)
            with input_errors(RuntimeError):
                rows, _ = read_rows(source, split=self.run.data_split)
            return tiny_tokenizer(islice(rows, TOKENIZER_ROWS))
        if self.run.tokenizer == NO_TOKENIZER:
            return None
        name = self.run.tokenizer or self.run.model
        if name is None:
            raise InputError(NO_MODEL)
        return load_tokenizer(name, self.run)

    @cached_property
    def vocab_size(self) -> int | None:
        """The number of embeddings in the model's configuration, or None; the model is not loaded."""
        if self.run.tiny:
            return len(self.tokenizer)
        config = self.model_config
        return None if config is None else getattr(config.get_text_config(), "vocab_size", None)

    @cached_property
    def model_config(self) -> Any:
        """The configuration of the model to start from; None where there is none to read, as in a dry run."""
        from transformers import AutoConfig

        if self.run.tiny or self.run.model is None:
            return None
        try:
            return AutoConfig.from_pretrained(
                self.run.model, revision=self.run.revision, trust_remote_code=self.run.trust_remote_code
            )
        except (OSError, ValueError):  # Loading the model will report the error.
            return None

    def model(self) -> Any:
        """Make the model to start from."""
        training = self.settings.training
        if self.run.tiny:
            return tiny_model(self.run, self.tokenizer, training.max_length, training.seed)
        if self.run.model is None:
            raise InputError(NO_MODEL)
        return load_model(self.run.model, self.run)

    def adapted_model(self) -> Any:
        """Make the model to train, with LoRA adapters if ``lora_r`` is not 0."""
        bits = "load_in_4bit" if self.run.load_in_4bit else "load_in_8bit" if self.run.load_in_8bit else None
        if bits is not None and self.run.lora_r == 0:
            raise InputError(f"{bits} freezes the weights; give lora_r, the rank of the adapters to train")
        model = self.model()
        if self.run.lora_r == 0:
            return model
        import peft

        if getattr(model, "is_quantized", False):
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer sees to it

        targets: Any = self.run.lora_targets
        config = peft.LoraConfig(
            r=self.run.lora_r,
            lora_alpha=self.run.lora_alpha,
            lora_dropout=self.run.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            task_type="CAUSAL_LM",
        )
        with input_errors():
            return peft.get_peft_model(model, config)

    def trained_model(self, name: str) -> Any:
        """Load a trained model; adapters are put on the model to start from."""
        if not Path(name, ADAPTERS).is_file():
            return load_model(name, self.run)
        import peft

        with input_errors(RuntimeError), whole_files(name):
            return peft.PeftModel.from_pretrained(self.model(), name)

    def train_examples(self) -> Sequence[Any]:
        """Load all examples that are not held out."""
        if self.data is None:
            raise InputError(NO_DATA)
        examples = self._load(self.data, self.run.data_split, self.run.max_examples)
        return examples if not self.run.eval_fraction else self._split(examples)[0]

    def eval_examples(self) -> Sequence[Any] | None:
        """Load the held-out examples; None where the configuration holds none out."""
        run = self.run
        if run.eval_fraction and self.data is not None:
            examples = self._split(self._load(self.data, run.data_split, run.max_examples))[1]
            return _head(examples, run.max_eval_examples)
        if run.eval_data is None and run.eval_split is None:
            return None
        source = self._source(run.eval_data) if run.eval_data is not None else self.data
        if source is None:
            raise InputError("eval_split is a split of data, which is not given")
        if run.eval_data is None and not run.tiny and os.path.isfile(source):
            raise InputError(f"eval_split={run.eval_split!r}: {source} has no splits; give eval_data or eval_fraction")
        return self._load(source, run.eval_split or run.data_split, run.max_eval_examples)

    def _load(self, source: str, split: str, count: int | None) -> Sequence[Any]:
        run = self.run
        with input_errors(RuntimeError):
            return load_examples(
                source,
                split=split,
                name=run.data_name,
                tokenizer=self.tokenizer,
                max_examples=count,
                vocab_size=self.vocab_size,
                disable_tqdm=self.settings.training.hides_progress,
                **{item.name: getattr(run, item.name) for item in dataclasses.fields(ExampleOptions)},
            )

    def _split(self, examples: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        count = max(1, round(len(examples) * self.run.eval_fraction))
        if count == len(examples):
            raise InputError(f"eval_fraction={self.run.eval_fraction} of {count} examples leaves none to train on")
        held_out = chosen(HELD_OUT_SEED, len(examples), count)
        kept = sorted({*range(len(examples))} - {*held_out})
        return _take(examples, kept), _take(examples, held_out)


def _is_local(source: str) -> bool:
    return os.path.exists(source) or any(c in source for c in "*?[") or source.startswith((".", "/"))


def _take(examples: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
    return examples.select(indices) if hasattr(examples, "select") else [examples[i] for i in indices]


def _head(examples: Sequence[Any], count: int | None) -> Sequence[Any]:
    return examples if count is None else _take(examples, range(min(count, len(examples))))


@contextmanager
def whole_files(*names: str) -> Iterator[None]:
    """Turn errors within the context, if a file in these directories is cut off, into one that names the file."""
    try:
        yield
    except Exception as error:
        for path in (path for name in names for path in sorted(Path(name).glob("*"))):
            reason = malformed(path)
            if reason is not None:
                raise InputError(f"{path} {reason}; copy or train the model again") from error
        if isinstance(error, (SafetensorError, EOFError, pickle.UnpicklingError)):
            raise InputError(f"the weights of {', '.join(names)} cannot be read: {error}") from error
        raise


def load_tokenizer(name: str, run: RunConfig) -> Any:
    """Load a tokenizer from a directory or the hub."""
    from transformers import AutoTokenizer

    revision = run.revision if name == run.model else None
    with input_errors(OSError), whole_files(name):
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=run.trust_remote_code)


def load_model(name: str, run: RunConfig) -> Any:
    """Load a model from a directory or the hub."""
    from transformers import AutoModelForCausalLM

    with input_errors(OSError, ImportError, RuntimeError), whole_files(name):
        return AutoModelForCausalLM.from_pretrained(
            name,
            revision=run.revision if name == run.model else None,
            dtype=run.torch_dtype,
            attn_implementation=run.attn_implementation,
            trust_remote_code=run.trust_remote_code,
            **quantisation(run),
        )


def quantisation(run: RunConfig) -> dict[str, Any]:
    """Return what ``from_pretrained`` takes to quantise a model with bitsandbytes; nothing where none is asked for."""
    if not (run.load_in_4bit or run.load_in_8bit):
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=run.load_in_4bit,
        load_in_8bit=run.load_in_8bit,
        bnb_4bit_quant_type=run.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=run.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=None if run.torch_dtype == "auto" else run.torch_dtype,
    )
    return {"quantization_config": config}
