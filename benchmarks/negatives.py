"""What negatives cost: whole training steps of CPOTrainer with and without them, in turns.

Two families of cases. "K": a step with K batch negatives, prefixes shared or not, beside an MLE step. "kinds": what
truncations and other kinds of negatives add. Every step but MLE's has a frozen reference.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.measure import free_memory
from benchmarks.models import (
    GPT2_SMALL,
    GPT2_TINY,
    LLAMA_1B,
    LLAMA_TINY,
    Sizes,
    make_model,
    make_tokenizer,
)
from benchmarks.own_step import OwnStep
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.timing import Effort, Timing, clock_for, round_robin
from cpo_kernels import CPOConfig, CPOTrainer
from cpo_kernels.trainer import TokenizedExamples

POOL = 16  # examples to draw batch negatives from, for every one of a step
MLE, BASE = "MLE", "K = 1"
GROWTH = {"on": (1, 2, 4, 8, 16), "off": (1, 4)}  # K by prefix sharing
TRUNCATIONS = (1, 4, 16)
TRUNCATED = tuple(f"truncation {count}" for count in TRUNCATIONS)


@dataclass(frozen=True)
class Contestant:
    """One step: the options of CPOConfig by which it differs from the others, and what they are in the results."""

    name: str
    options: Mapping[str, Any]
    conditions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Steps on one model that are compared with each other.

    Attributes:
        name: in the results, without the model's.
        sizes: of policy and reference.
        contestants: among them MLE.
        groups: examples of a step.
        tokens: of a prompt, and of a completion.
        always: who runs in every round; who takes longer than three MLE steps runs in one.
        rounds: of those.
        dtype: of the parameters.
    """

    name: str
    sizes: Sizes
    contestants: tuple[Contestant, ...]
    groups: int
    tokens: int
    always: tuple[str, ...]
    rounds: int
    dtype: torch.dtype = torch.float32

    @property
    def conditions(self) -> dict[str, object]:
        """Of all its records."""
        rest = {"dtype": str(self.dtype).removeprefix("torch."), "groups": self.groups, "prompt": 0.5}
        return self.sizes.conditions | rest


def negatives(sharing: str = "required", **counts: Any) -> dict[str, Any]:
    """Options for so many negatives of each kind, and others."""
    kinds = ("batch", "truncation", "mean_field", "autoregressive")
    options = {f"num_{kind}_negatives": counts.pop(kind, 0) for kind in kinds}
    return options | {"prefix_sharing": sharing} | counts


def growth() -> tuple[Contestant, ...]:
    """K batch negatives, with prefixes shared and not."""
    setting = {"on": "required", "off": "off"}
    return (
        Contestant(MLE, {"objective": "mle"}, {"K": 0, "sharing": "off"}),
        *(
            Contestant(f"K = {k}", negatives(setting[sharing], batch=k), {"K": k, "sharing": sharing})
            for sharing in GROWTH
            for k in GROWTH[sharing]
        ),
    )


def kinds() -> tuple[Contestant, ...]:
    """One batch negative, truncations beside it, and one of another kind in its place."""
    others = {
        "mean-field 1, by the reference": negatives(mean_field=1, mean_field_source="reference"),
        "mean-field 1, by the model": negatives(mean_field=1, mean_field_source="model"),
        "autoregressive 1": negatives(autoregressive=1),
    }
    cut = {name: negatives(batch=1, truncation=count) for name, count in zip(TRUNCATED, TRUNCATIONS, strict=True)}
    everyone = {MLE: {"objective": "mle"}, BASE: negatives(batch=1)} | cut | others
    counts = {MLE: 0} | {name: 1 + count for name, count in zip(TRUNCATED, TRUNCATIONS, strict=True)}
    return tuple(Contestant(name, own, {"K": counts.get(name, 1), "sharing": "on"}) for name, own in everyone.items())


def cases(setting: Setting) -> list[Case]:
    """What is run on a device."""
    rare, often = (MLE,), (BASE, *TRUNCATED)
    if setting.quick:
        return [
            Case("K", GPT2_TINY, growth(), groups=2, tokens=20, always=rare, rounds=1),
            Case("kinds", LLAMA_TINY, kinds(), groups=2, tokens=20, always=often, rounds=1),
        ]
    if setting.on_gpu:
        models, sizes = (GPT2_SMALL, LLAMA_1B), {"groups": 4, "tokens": 512, "dtype": torch.bfloat16}
        every = [Case("K", model, growth(), **sizes, always=rare, rounds=4) for model in models]
        return [*every, *(Case("kinds", model, kinds(), **sizes, always=often, rounds=8) for model in models)]
    small = replace(GPT2_SMALL, name="GPT-2 small, 2 layers", layers=2, vocabulary=8192)
    return [
        Case("K", GPT2_SMALL, growth(), groups=2, tokens=32, always=rare, rounds=2),
        Case("kinds", small, kinds(), 4, 32, often, rounds=6),
    ]


def run(setting: Setting) -> Iterator[Record]:
    """All steps of all cases."""
    transformers.logging.set_verbosity_error()
    for case in cases(setting):
        yield from measure(case, setting.device)
        free_memory()


def measure(case: Case, device: torch.device) -> Iterator[Record]:
    """The records of one case."""
    model, reference = (make_model(case.sizes, 2 * case.tokens).to(device, case.dtype) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        steps = make_steps(case, model.train(), reference, folder)
        timings = time_steps(case, steps, model)
    for contestant in case.contestants:
        name = unique(contestant)
        conditions = case.conditions | dict(contestant.conditions)
        yield Record(f"{case.name}, {case.sizes.name}", contestant.name, values(name, steps[name], timings), conditions)


def unique(contestant: Contestant) -> str:
    """A name that no other of the case has."""
    off = contestant.options.get("prefix_sharing") == "off"
    return contestant.name + ", sharing off" * off


def make_steps(case: Case, model: PreTrainedModel, reference: PreTrainedModel, folder: str) -> dict[str, OwnStep]:
    """The steps of a case by unique names; they share the parameters of the model and of its reference."""
    examples, tokenizer = make_examples(case), make_tokenizer(case.sizes.vocabulary)
    on_host = next(model.parameters()).device.type == "cpu"
    shared = {"output_dir": folder, "use_cpu": on_host, "bf16": False, "report_to": "none", "seed": 0}

    def step(options: Mapping[str, Any]) -> OwnStep:
        config = CPOConfig(**shared, max_length=2 * case.tokens, **options)
        frozen = reference if config.contrasts else None
        trainer = CPOTrainer(model, config, train_dataset=examples, processing_class=tokenizer, ref_model=frozen)
        return OwnStep(trainer, case.groups)

    return {unique(contestant): step(contestant.options) for contestant in case.contestants}


def make_examples(case: Case) -> TokenizedExamples:
    """Random texts, all of the same length, so that no step has more to do for the texts that it happens to draw."""
    rng, end = Random(0), case.sizes.vocabulary - 1

    def text(length: int) -> list[int]:
        return [rng.randrange(end) for _ in range(length)]

    count = POOL * case.groups
    prompts = [text(case.tokens) for _ in range(count)]
    return TokenizedExamples(prompts, [[*text(case.tokens - 1), end] for _ in range(count)])


class FreshGradients:
    """Drops the gradients of a model before each call, outside the time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def before(self, name: str) -> None:
        """Drop them."""
        self.model.zero_grad(set_to_none=True)

    def after(self, name: str, result: object) -> None:
        """Nothing."""


def time_steps(case: Case, steps: Mapping[str, OwnStep], model: PreTrainedModel) -> dict[str, Timing]:
    """Of all steps in turns, after one call of the two shortest, which warms up what all of them use."""
    for name in (MLE, BASE):
        steps[name]()
    for step in steps.values():
        step.making.clear()
    effort = Effort(rounds=case.rounds, seconds=3600.0, far=3.0, very_far=3.0)
    observer, clock = FreshGradients(model), clock_for(model.device)
    return round_robin(steps, effort, reference=MLE, always=case.always, observer=observer, clock=clock)


def values(name: str, step: OwnStep, timings: Mapping[str, Timing]) -> dict[str, float]:
    """Of the record of a step."""
    own = timings[name]
    return {
        "seconds": own.best,
        "median": own.median,
        "rounds": len(own.seconds),
        "of_mle": own.best / timings[MLE].best,
        "of_base": own.best / timings[BASE].best,
        "positions": step.positions,
        "tokens": step.tokens,
        "making": statistics.median(step.making),
    }
