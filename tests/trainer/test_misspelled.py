"""Misspelled arguments of the trainer get the name that was probably meant, whatever Python says of them."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import tiny_models
from trainer_runs import config

from cpo_kernels import CPOConfig, CPOTrainer
from cpo_kernels.trainer.loading import load_examples

pytestmark = pytest.mark.cpu


def test_loading_examples():
    """Not among the public functions of tests/project/test_misspelled_names.py."""
    with pytest.raises(TypeError, match=r"^load_examples\(\) .* 'prompt_tempalte'; did you mean 'prompt_template'\?$"):
        load_examples(None, prompt_tempalte=1)


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
