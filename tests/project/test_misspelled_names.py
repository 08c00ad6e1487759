"""Every public function and class names the argument that was probably meant, for every argument that it has."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import replace
from importlib import import_module

import pytest

import cpo_kernels
from build_tools.api_page import CONTENTS
from cpo_kernels import CPOLoss, LinearCPOLoss, VocabShard, models, negatives, trainer
from cpo_kernels.options import suggests_arguments

pytestmark = pytest.mark.cpu
# What calls return, and a row of a table of the package: nobody else makes them.
RESULTS = {
    *("CPOOutput", "Completion", "CrossEntropyOutput", "Kind", "LinearLossOutput", "LogpsAndEntropy", "MeanField"),
    *("Plan", "Report", "SharedBatch", "TokenStatistics", "VocabShard"),
}
# All of its arguments are TRL's.
TRL = "cpo_kernels.integrations.trl"


def public() -> dict[str, object]:
    """Collect the callables of docs/api.md and of every ``__all__``, by full name."""
    pages = [contents for contents in CONTENTS.values() if contents[0] != TRL]
    named = [(module, name) for module, names in pages for name in names.split()]
    named += [(owner.__name__, name) for owner in (cpo_kernels, models, negatives, trainer) for name in owner.__all__]
    found = {}
    for module, name in named:
        thing = getattr(import_module(module), name)
        if callable(thing) and name not in RESULTS:
            found[thing.__module__, thing.__qualname__] = thing
    found["", "VocabShard.of"], found["", "CPOLoss.forward"] = VocabShard.of, CPOLoss.forward
    found["", "LinearCPOLoss.forward"] = LinearCPOLoss.forward
    return {name: thing for (_, name), thing in found.items()}


def by_keyword(thing) -> list[inspect.Parameter]:
    own = inspect.signature(thing).parameters.values()
    return [p for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


PUBLIC = public()


@pytest.mark.parametrize("name", PUBLIC)
def test_each_argument_is_named_when_it_is_misspelled(name):
    thing = PUBLIC[name]
    own = by_keyword(thing)
    count = sum(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in own)
    for right in [p.name for p in own]:
        wrong = right + right[-1]
        with pytest.raises(TypeError) as raised:
            thing(*[None] * count, **{wrong: None})
        message = f"{name}() got an unexpected keyword argument {wrong!r}; did you mean {right!r}?"
        assert str(raised.value) == message


PASSED_ON = {
    models.CPORequest: ("mle_wieght", "mle_weight"),
    models.SequenceLossRequest: ("max_logits_byte", "max_logits_bytes"),
    models.LogpsRequest: ("bakend", "backend"),
    models.StatisticsRequest: ("bakend", "backend"),
    negatives.mean_field_negatives: ("temprature", "temperature"),
    negatives.mean_field_samples: ("temprature", "temperature"),
    trainer.CPOTrainer: ("callback", "callbacks"),
    trainer.ChatJudge: ("max_retrys", "max_retries"),
    trainer.LikelihoodJudge: ("bakend", "backend"),
    trainer.NegativeSampler: ("num_mean_field_negative", "num_mean_field_negatives"),
}


@pytest.mark.parametrize("thing", PASSED_ON, ids=lambda thing: thing.__name__)
def test_so_is_what_is_passed_on_to_another_function(thing):
    wrong, right = PASSED_ON[thing]
    count = sum(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in by_keyword(thing))
    with pytest.raises(TypeError, match=rf"^{thing.__name__}\(\) .* argument '{wrong}'; did you mean '{right}'\?$"):
        thing(*[None] * count, **{wrong: None})


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [("FusedDPOTrainer", "train_datset", "train_dataset"), ("FusedCPOTrainer", "peft_confg", "peft_config")],
)
def test_so_are_the_arguments_of_trl(name, wrong, right):
    pytest.importorskip("trl")
    with pytest.raises(TypeError, match=rf"^{name}\(\) .* argument '{wrong}'; did you mean '{right}'\?$"):
        getattr(import_module(TRL), name)(None, **{wrong: None})


@suggests_arguments
class Parent:
    """A class that others extend."""

    def __init__(self, first, *, last=None):
        self.given = first, last


class Child(Parent):
    """Takes what its parent takes."""


def test_a_class_stays_what_it_was():
    assert Child(1, last=2).given == (1, 2)
    assert list(inspect.signature(Parent).parameters) == ["first", "last"]
    sampling = negatives.Sampling(temperature=0.5)
    assert pickle.loads(pickle.dumps(sampling)) == copy.deepcopy(sampling) == replace(sampling) == sampling
