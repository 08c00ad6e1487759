"""Part `negatives`: what negatives cost, by whole training steps of CPOTrainer with and without them, in turns.

Two families of cases. "K": a step with K batch negatives, prefixes shared or not, beside an MLE step. "kinds": what
truncations and other kinds of negatives add. Every step but MLE's has a frozen reference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.measure import Case, Contestant, dtype_name, each, measure
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.training import (
    GPT2_SMALL,
    GPT2_TINY,
    LLAMA_1B,
    LLAMA_TINY,
    OwnStep,
    Sizes,
    make_model,
    make_tokenizer,
)
from cpo_kernels import CPOConfig, CPOTrainer
from cpo_kernels.trainer import TokenizedExamples

POOL = 16  # examples to draw batch negatives from, for every one of a step
MLE, BASE = "MLE", "K = 1"
GROWTH = {"on": (1, 2, 4, 8, 16), "off": (1, 4)}  # K by prefix sharing
TRUNCATED = {f"truncation {count}": count for count in (1, 4, 16)}


@dataclass(frozen=True)
class Way:
    """Describes a step by the options of CPOConfig in which it differs, and what they are in the results."""

    name: str
    options: Mapping[str, Any]
    k: int
    sharing: str = "on"


@dataclass(frozen=True)
class Ways:
    """Describes steps on one model that are compared with each other.

    Attributes:
        family: "K" or "kinds".
        sizes: of policy and reference.
        groups: examples of a step.
        tokens: of a prompt, and of a completion.
        rounds: of every step.
        dtype: of the parameters.
    """

    family: str
    sizes: Sizes
    groups: int
    tokens: int
    rounds: int
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """Return that of the case in the results."""
        return f"{self.family}, {self.sizes.name}"

    @property
    def ways(self) -> list[Way]:
        """Return the steps."""
        return growing() if self.family == "K" else kinds()


def negatives(sharing: str = "required", **counts: Any) -> dict[str, Any]:
    """Return the options for so many negatives of each kind, and others."""
    kinds = ("batch", "truncation", "mean_field", "autoregressive")
    options = {f"num_{kind}_negatives": counts.pop(kind, 0) for kind in kinds}
    return options | {"prefix_sharing": sharing} | counts


def growing() -> list[Way]:
    """Return steps with K batch negatives, with prefixes shared and not."""
    found = [Way(MLE, {"objective": "mle"}, 0, "off")]
    for sharing, counts in GROWTH.items():
        setting = "required" if sharing == "on" else "off"
        found += [Way(f"K = {k}", negatives(setting, batch=k), k, sharing) for k in counts]
    return found


def kinds() -> list[Way]:
    """Return one batch negative, truncations beside it, and one of another kind in its place."""
    return [
        Way(MLE, {"objective": "mle"}, 0),
        Way(BASE, negatives(batch=1), 1),
        *(Way(name, negatives(batch=1, truncation=count), 1 + count) for name, count in TRUNCATED.items()),
        Way("mean-field 1, by the reference", negatives(mean_field=1, mean_field_source="reference"), 1),
        Way("mean-field 1, by the model", negatives(mean_field=1, mean_field_source="model"), 1),
        Way("autoregressive 1", negatives(autoregressive=1), 1),
    ]


def cases(setting: Setting) -> list[Ways]:
    """Return what is run on a device."""
    small = replace(GPT2_SMALL, name="GPT-2 small, 2 layers", layers=2, vocabulary=8192)
    rounds = {"K": 4, "kinds": 8}
    on_gpu = [Ways(f, model, 4, 512, rounds[f], torch.bfloat16) for f in rounds for model in (GPT2_SMALL, LLAMA_1B)]
    return setting.choose(
        [Ways("K", GPT2_TINY, 2, 20, 1), Ways("kinds", LLAMA_TINY, 2, 20, 1)],
        [Ways("K", GPT2_SMALL, 2, 32, 3), Ways("kinds", small, 4, 32, 6)],
        on_gpu,
    )


def run(setting: Setting) -> Iterator[Record]:
    """Measure all steps of all cases."""
    transformers.logging.set_verbosity_error()
    yield from each({ways.name: partial(beside_mle, ways, setting) for ways in cases(setting)})


def beside_mle(ways: Ways, setting: Setting) -> Iterator[Record]:
    """Measure one case."""
    model, reference = (make_model(ways.sizes, 2 * ways.tokens).to(setting.device, ways.dtype) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        steps = make_steps(ways, model.train(), reference, folder)
        dtype = {"dtype": dtype_name(ways.dtype), "groups": ways.groups, "prompt": 0.5}
        case = Case(
            ways.name,
            [contestant(name, steps) for name in steps],
            ways.sizes.conditions | dtype,
            {"of_mle": MLE, "of_base": BASE},
            rounds=ways.rounds,
            before=lambda: model.zero_grad(set_to_none=True),
            peaks=True,
        )
        records = measure(case, setting.device)
    for way, record in zip(ways.ways, records, strict=True):
        conditions = {**record.conditions, "K": way.k, "sharing": way.sharing}
        yield replace(record, contestant=way.name, conditions=conditions)


def contestant(name: str, steps: Mapping[str, OwnStep]) -> Contestant:
    """Describe one step."""
    step, needed = steps[name], name in (MLE, BASE)
    return Contestant(name, lambda: step, needed=needed, values=lambda seconds: step.values())


def unique(way: Way) -> str:
    """Return a name that no other of the case has."""
    return way.name + ", sharing off" * (way.options.get("prefix_sharing") == "off")


def make_steps(ways: Ways, model: PreTrainedModel, reference: PreTrainedModel, folder: str) -> dict[str, OwnStep]:
    """Make the steps by unique names; they share the parameters of the model and of its reference."""
    examples, tokenizer = make_examples(ways), make_tokenizer(ways.sizes.vocabulary)
    on_host = next(model.parameters()).device.type == "cpu"
    shared = {"output_dir": folder, "use_cpu": on_host, "bf16": False, "report_to": "none", "seed": 0}

    def step(way: Way) -> OwnStep:
        config = CPOConfig(**shared, max_length=2 * ways.tokens, **way.options)
        frozen = reference if config.contrasts else None
        trainer = CPOTrainer(model, config, train_dataset=examples, processing_class=tokenizer, ref_model=frozen)
        return OwnStep(trainer, ways.groups)

    return {unique(way): step(way) for way in ways.ways}


def make_examples(ways: Ways) -> TokenizedExamples:
    """Draw texts, all of the same length, so that no step has more to do for the texts that it happens to draw."""
    rng, end = Random(0), ways.sizes.vocabulary - 1

    def text(length: int) -> list[int]:
        return [rng.randrange(end) for _ in range(length)]

    count = POOL * ways.groups
    prompts = [text(ways.tokens) for _ in range(count)]
    return TokenizedExamples(prompts, [[*text(ways.tokens - 1), end] for _ in range(count)])
