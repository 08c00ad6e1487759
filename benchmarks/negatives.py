"""Part `negatives`: what negatives cost, by whole training steps of CPOTrainer with and without them, in turns.

Two families of cases. "K": a step with K batch negatives, prefixes shared or not, beside an MLE step. "kinds": what
truncations and other kinds of negatives add. Every step but MLE's has a frozen reference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.measure import Case, Contestant, each, measure
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.training import GPT2_SMALL, GPT2_TINY, LLAMA_1B, LLAMA_TINY, Given, OwnStep, draw_tokens, make_tokenizer
from cpo_kernels import CPOConfig, CPOTrainer
from cpo_kernels.trainer import TokenizedExamples

POOL = 16  # examples to draw batch negatives from, for every one of a step
MLE, BASE, OFF = "MLE", "K = 1", ", sharing off"
MEAN_FIELD = {f"by the {who}": {"mean_field_source": who} for who in ("reference", "model")}
MEAN_FIELD |= {f"c = {c}": {"mean_field_fraction": c} for c in (0.1, 0.5, 1.0)}
TRUNCATED = {f"truncation {count}": count for count in (1, 4, 16)}


@dataclass(frozen=True)
class Way:
    """Describes a step by its K, and the options of CPOConfig in which it differs."""

    name: str
    k: int
    options: dict[str, Any]
    shared: bool = True


def contrasting(name: str, *, shared: bool = True, options: Mapping[str, Any] = {}, **counts: int) -> Way:
    """Describe a step with so many negatives of each kind."""
    kinds = {f"num_{kind}_negatives": 0 for kind in ("batch", "truncation", "mean_field", "autoregressive")}
    chosen = kinds | {f"num_{kind}_negatives": count for kind, count in counts.items()}
    chosen |= {"prefix_sharing": "required" if shared else "off", "mean_field_source": "reference"} | options
    return Way(name + OFF * (not shared), sum(counts.values()), chosen, shared)


WAYS = {
    "K": [
        Way(MLE, 0, {"objective": "mle"}, shared=False),
        *(contrasting(f"K = {k}", batch=k) for k in (1, 2, 4, 8, 16)),
        *(contrasting(f"K = {k}", batch=k, shared=False) for k in (1, 4)),
    ],
    "kinds": [
        Way(MLE, 0, {"objective": "mle"}),
        contrasting(BASE, batch=1),
        *(contrasting(name, batch=1, truncation=count) for name, count in TRUNCATED.items()),
        *(contrasting(f"mean-field 1, {name}", mean_field=1, options=more) for name, more in MEAN_FIELD.items()),
        *(contrasting(f"autoregressive {count}", autoregressive=count) for count in (1, 2)),
        contrasting("autoregressive 1, written every step", autoregressive=1, options={"autoregressive_every": 1}),
    ],
}


def cases(setting: Setting) -> list[Given]:
    """Return what is run on a device."""
    small = replace(GPT2_SMALL, name="GPT-2 small, 2 layers", layers=2, vocabulary=8192)
    return setting.choose(
        [Given("K", GPT2_TINY, 2, 20), Given("kinds", LLAMA_TINY, 2, 20)],
        [Given("K", GPT2_SMALL, 2, 32), Given("kinds", small, 4, 32)],
        [Given(family, model, 4, 512, torch.bfloat16) for family in WAYS for model in (GPT2_SMALL, LLAMA_1B)],
    )


def run(setting: Setting) -> Iterator[Record]:
    """Measure all steps of all cases."""
    transformers.logging.set_verbosity_error()
    yield from each({f"{own.kind}, {own.sizes.name}": partial(beside_mle, own, setting) for own in cases(setting)})


def beside_mle(steps: Given, setting: Setting) -> Iterator[Record]:
    """Measure one case."""
    model, reference = (steps.model(setting.device) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        made = make_steps(steps, model.train(), reference, folder)
        contestants = []
        for way in WAYS[steps.kind]:
            step, shared = made[way.name], {"K": way.k, "sharing": "on" if way.shared else "off"}
            options = {"needed": way.name in (MLE, BASE), "conditions": shared, "steps": step.at_once}

            def values(_seconds: float, way: Way = way, step: OwnStep = step) -> dict[str, float]:
                least = multiply_adds(steps, way, step) / multiply_adds(steps, WAYS[steps.kind][0], made[MLE])
                return step.values() | {"multiply_adds": least}

            contestants.append(Contestant(way.name, lambda step=step: step, values=values, **options))
        case = Case(
            f"{steps.kind}, {steps.sizes.name}",
            contestants,
            steps.conditions | {"groups": steps.groups},
            {"of_mle": MLE, "of_base": BASE},
            rounds=setting.rounds(6, 8),
            before=lambda: model.zero_grad(set_to_none=True),
            peaks=True,
        )
        yield from measure(case, setting.device)


def make_steps(steps: Given, model: PreTrainedModel, reference: PreTrainedModel, folder: str) -> dict[str, OwnStep]:
    """Make the steps by their names; they share the parameters of the model and of its reference."""
    examples, tokenizer = make_examples(steps), make_tokenizer(steps.sizes.vocabulary)
    on_host = next(model.parameters()).device.type == "cpu"
    shared = {"output_dir": folder, "use_cpu": on_host, "bf16": False, "report_to": "none", "seed": 0}

    def step(way: Way) -> OwnStep:
        config = CPOConfig(**shared, max_length=2 * steps.tokens, **way.options)
        frozen = reference if config.contrasts else None
        trainer = CPOTrainer(model, config, train_dataset=examples, processing_class=tokenizer, ref_model=frozen)
        return OwnStep(trainer, steps.groups, trainer.steps_written_at_once)

    return {way.name: step(way) for way in WAYS[steps.kind]}


def multiply_adds(steps: Given, way: Way, step: OwnStep) -> float:
    """Count those of a step's products with parameters: forward, backward, reference, and writing with one prompt."""
    sizes, written = steps.sizes, way.options.get("num_autoregressive_negatives", 0)
    layer = (14.5 if sizes.llama else 12) * sizes.width**2  # parameters; a Llama of ours has a quarter of the keys
    body, head = sizes.layers * layer, sizes.vocabulary * sizes.width
    total = (3 + (way.k > 0)) * (body * step.positions + head * step.tokens)
    if written:
        positions = steps.groups * (steps.tokens + written * (steps.tokens - 1))
        total += body * positions + head * steps.groups * written * steps.tokens
    return total


def make_examples(steps: Given) -> TokenizedExamples:
    """Draw texts, all of the same length, so that no step has more to do for the texts that it happens to draw."""
    count, vocabulary = POOL * steps.groups, steps.sizes.vocabulary
    prompts = draw_tokens(vocabulary, *[steps.tokens] * count)
    completions = draw_tokens(vocabulary, *[steps.tokens - 1] * count, seed=1)
    return TokenizedExamples(prompts, [[*completion, vocabulary - 1] for completion in completions])
