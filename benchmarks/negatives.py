"""Part `negatives`: what negatives cost, by whole training steps of CPOTrainer with and without them, in turns.

Two families of cases. "K": a step with K batch negatives, prefixes shared or not, beside an MLE step. "kinds": what
truncations and other kinds of negatives add. Every step but MLE's has a frozen reference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
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
TRUNCATED = {f"truncation {count}": count for count in (1, 4, 16)}


@dataclass(frozen=True)
class Way:
    """Describes a step by its K, and the options of CPOConfig in which it differs."""

    name: str
    k: int
    options: dict[str, Any]
    shared: bool = True


def contrasting(name: str, *, shared: bool = True, source: str = "reference", c: float = 0.25, **counts: int) -> Way:
    """Describe a step with so many negatives of each kind; c is the share of mean-field negatives' replaced tokens."""
    kinds = {f"num_{kind}_negatives": 0 for kind in ("batch", "truncation", "mean_field", "autoregressive")}
    options = kinds | {f"num_{kind}_negatives": count for kind, count in counts.items()}
    options |= {"prefix_sharing": "required" if shared else "off"}
    options |= {"mean_field_source": source, "mean_field_fraction": c}
    return Way(name + OFF * (not shared), sum(counts.values()), options, shared)


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
        *(contrasting(f"mean-field 1, by the {who}", mean_field=1, source=who) for who in ("reference", "model")),
        *(contrasting(f"mean-field 1, c = {c}", mean_field=1, c=c) for c in (0.1, 0.5, 1.0)),
        contrasting("autoregressive 1", autoregressive=1),
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
            options = {"needed": way.name in (MLE, BASE), "conditions": shared}
            own = Contestant(way.name, lambda step=step: step, values=lambda s, step=step: step.values(), **options)
            contestants.append(own)
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
        return OwnStep(trainer, steps.groups)

    return {way.name: step(way) for way in WAYS[steps.kind]}


def make_examples(steps: Given) -> TokenizedExamples:
    """Draw texts, all of the same length, so that no step has more to do for the texts that it happens to draw."""
    count, vocabulary = POOL * steps.groups, steps.sizes.vocabulary
    prompts = draw_tokens(vocabulary, *[steps.tokens] * count)
    completions = draw_tokens(vocabulary, *[steps.tokens - 1] * count, seed=1)
    return TokenizedExamples(prompts, [[*completion, vocabulary - 1] for completion in completions])
