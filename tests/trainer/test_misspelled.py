"""Misspelled arguments of trainer and negatives get the name that was probably meant, whatever Python says of them."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import tiny_models
from trainer_runs import config

from cpo_kernels import CPOConfig, CPOTrainer, negatives, trainer
from cpo_kernels.trainer.loading import load_examples

pytestmark = pytest.mark.cpu

WRONG = {
    negatives.batch_negatives: ("max_token", "max_tokens"),
    negatives.truncation_negatives: ("eos_tokn_id", "eos_token_id"),
    negatives.mean_field_negatives: ("sead", "seeds"),
    negatives.autoregressive_negatives: ("samplin", "sampling"),
    negatives.write_negatives: ("rank", "ranks"),
    trainer.tokenize_examples: ("max_lenght", "max_length"),
    trainer.evaluate: ("num_generation", "num_generations"),
    trainer.judge_pairs: ("cach", "cache"),
    load_examples: ("prompt_tempalte", "prompt_template"),
}


@pytest.mark.parametrize(("function", "names"), WRONG.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_functions(function, names):
    wrong, right = names
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    count = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in required)
    message = rf"^{function.__name__}\(\) got an unexpected keyword argument '{wrong}'; did you mean '{right}'\?$"
    with pytest.raises(TypeError, match=message):
        function(*[None] * count, **{wrong: 1})


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("betaa", "; did you mean 'beta'?"),
        ("learning_rat", "; did you mean 'learning_rate'?"),
        ("num_meanfield_negatives", "; did you mean 'num_mean_field_negatives'?"),
        ("xyzzy", ""),
    ],
)
def test_the_configuration(tmp_path, wrong, hint):
    with pytest.raises(TypeError) as raised:
        config(tmp_path, **{wrong: 1})
    assert str(raised.value) == f"CPOConfig() got an unexpected keyword argument {wrong!r}{hint}"


def test_the_trainer(tmp_path):
    args = config(tmp_path)
    for wrong, right in (("procesing_class", "processing_class"), ("callback", "callbacks"), ("ref_modl", "ref_model")):
        with pytest.raises(TypeError, match=rf"^CPOTrainer\(\) .* '{wrong}'; did you mean '{right}'\?$"):
            CPOTrainer(tiny_models.llama(), args, **{wrong: None})


def test_a_configuration_is_copied_as_before(tmp_path):
    args = config(tmp_path, beta=0.3)
    assert inspect.signature(CPOConfig).parameters["beta"].default is None
    copies = copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args))
    assert [other.beta for other in copies] == [0.3] * 3
