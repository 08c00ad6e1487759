"""Configurations and data that the trainer refuses, with the reason."""

from __future__ import annotations

import pytest
import tiny_models
from trainer_runs import trainer
from trainer_steps import GIVEN, NONE

from cpo_kernels.trainer import TokenizedExamples

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"objective": "ppo"}, "objective must be one of cpo, dpo, .* got 'ppo'"),
        ({"given_weight": 0.0}, "given_weight must be a positive number, got 0.0"),
        ({"ranking": "alphabet"}, r"ranking must be one of .* got 'alphabet'"),
        ({"ranking": "similarity", "reference": "none"}, "needs an embedding_model or the hidden states"),
        (
            {"mean_field_source": "reference", "reference": "none", "num_mean_field_negatives": 1},
            "needs reference='froz",
        ),
        ({"mean_field_fraction": 0.0}, r"mean_field_fraction must be in \(0, 1\], got 0.0"),
        ({"mean_field_fraction": 1.25}, r"mean_field_fraction must be in \(0, 1\], got 1.25"),
        ({"reference": "precomputed", "num_mean_field_negatives": 1}, "num_mean_field_negatives=1 makes new ones"),
        ({"autoregressive_top_p": 0.0}, r"autoregressive_top_p must be in \(0, 1\], got 0.0"),
        ({"autoregressive_every": 0}, "autoregressive_every must be at least 1, got 0"),
        ({"autoregressive_url": "http://localhost/v1"}, "needs autoregressive_model"),
        ({"prefix_sharing": "yes"}, "prefix_sharing must be one of"),
        ({"logits_dtype": "bfloat16"}, "logits_dtype must be one of"),
        (
            {"mean_field_source": "reference", "alpha": 0.0, "num_mean_field_negatives": 1},
            "and a contrast, got .* alpha=0.0",
        ),
        (
            {"mean_field_source": "model", "num_mean_field_negatives": 1, "resample_negatives": False},
            "draws them from a model that changes",
        ),
        ({"scheduled_sampling_probability": 2.0}, "scheduled_sampling_probability must be in"),
        (
            {"loss_type": "ipo", "num_batch_negatives": 1, "num_truncation_negatives": 0, "batch_weight": 2.0},
            "batch_weight=2.0 has no meaning",
        ),
    ],
)
def test_a_configuration_that_contradicts_itself(tmp_path, kwargs, message):
    from trainer_runs import config

    with pytest.raises(ValueError, match=message):
        config(tmp_path, **kwargs)


def test_contrasts_without_negatives_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there are none: the data brings none"):
        trainer(tmp_path, **NONE)
    some = [GIVEN[0], {name: GIVEN[1][name] for name in ("prompt", "completion")}]
    with pytest.raises(ValueError, match="example 1 brings no negatives and none are drawn"):
        trainer(tmp_path, examples=some, **NONE)
    with pytest.raises(ValueError, match="resample_negatives=True draws new ones"):
        trainer(tmp_path, reference="precomputed")


def test_too_few_completions_are_found_before_training(tmp_path):
    with pytest.raises(ValueError, match="2 batch negatives need as many other completions, but 2 examples have 2"):
        trainer(tmp_path, examples=tiny_models.examples(2))
    with pytest.raises(ValueError, match="but 1 examples have 1 distinct"):
        trainer(tmp_path, eval_dataset=tiny_models.examples(1))


def test_tokens_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"example 1 has 30 \+ 5 tokens, max_length is 32"):
        trainer(tmp_path, examples=TokenizedExamples([[3], [3] * 30], [[4, 2], [4, 5, 6, 7, 2]]))
    with pytest.raises(ValueError, match="a negative of example 0 is empty"):
        TokenizedExamples([[3]], [[4, 2]], negatives=[[[]]])
    with pytest.raises(ValueError, match="example 0 has 1 negatives but 2 ranks"):
        TokenizedExamples([[3]], [[4, 2]], negatives=[[[5]]], ranks=[[1, 2]])
