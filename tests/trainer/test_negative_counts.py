"""How many negatives of each kind are drawn by default: what fields, documents and log say is what is done."""

from __future__ import annotations

import dataclasses
import logging
import re

import pytest
import tiny_models
from project import ROOT
from trainer_runs import trainer

from cpo_kernels.negatives.kinds import counted_kinds
from cpo_kernels.trainer import CPOConfig
from cpo_kernels.trainer.config import PRESETS

pytestmark = pytest.mark.cpu

HELP = {item.name: item.metadata.get("help", "") for item in dataclasses.fields(CPOConfig)}
BY_OBJECTIVE = [name for name, kind in counted_kinds().items() if kind.default is None]
BY_MODEL = [name for name, kind in counted_kinds().items() if kind.by_model]


def counts(path, data_brings_negatives: bool = False, **options) -> dict[str, int]:
    config = CPOConfig(output_dir=str(path), report_to="none", use_cpu=True, **options)
    return config.negative_counts(data_brings_negatives)


@pytest.mark.parametrize("objective", PRESETS)
def test_a_number_that_is_not_given_is_what_its_help_says(tmp_path, objective):
    for name in BY_OBJECTIVE:
        kind = counted_kinds()[name].name
        (said,) = re.findall(rf"\b(\d+) for {objective}\b", HELP[name])
        assert counts(tmp_path, objective=objective)[kind] == int(said)


def test_the_help_names_what_leaves_the_objectives_negatives_out(tmp_path):
    for name in BY_OBJECTIVE:
        kind = counted_kinds()[name].name
        assert f"0 where the data brings negatives or {' or '.join(BY_MODEL)} is above 0" in HELP[name]
        assert counts(tmp_path)[kind] == 1
        assert counts(tmp_path, data_brings_negatives=True)[kind] == 0
        for other in BY_MODEL:
            assert counts(tmp_path, **{other: 1})[kind] == 0
            assert counts(tmp_path, **{other: 1, name: 3})[kind] == 3
            assert name in HELP[other] and "not given are 0" in HELP[other]
        for other in BY_OBJECTIVE:
            if other != name:
                assert counts(tmp_path, **{other: 2})[kind] == 1


def test_the_documents_have_the_numbers_of_the_table():
    """docs/training.md's table of objectives, row by row."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`.*\| ([^|]+) \|$", text.split("## Objectives")[1].split("##")[0], re.MULTILINE)
    assert [name for name, _ in rows] == ["objective", *PRESETS]
    for name, last in rows[1:]:
        said = {kind: int(number) for number, kind in re.findall(r"(\d+) (\w+)", last)}
        assert said == dict(PRESETS[name].negatives), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "2 batch, 2 truncation, 0 mean_field, 0 autoregressive"),
        (
            {"num_mean_field_negatives": 1, "num_batch_negatives": None, "num_truncation_negatives": None},
            "0 batch, 0 truncation, 1 mean_field, 0 autoregressive",
        ),
    ],
    ids=["given", "left out"],
)
def test_a_run_begins_with_the_numbers_in_its_log(tmp_path, caplog, options, said):
    run = trainer(tmp_path, max_steps=1, **options)
    with caplog.at_level(logging.INFO, logger="cpo_kernels.trainer.trainer"):
        run.train()
    assert f"Negatives drawn for an example: {said}" in caplog.text


def test_a_run_on_negatives_of_the_data_says_so(tmp_path, caplog):
    examples = [example | {"negatives": ["ran"]} for example in tiny_models.examples(8)]
    run = trainer(tmp_path, examples=examples, max_steps=1, num_batch_negatives=None, num_truncation_negatives=None)
    with caplog.at_level(logging.INFO, logger="cpo_kernels.trainer.trainer"):
        run.train()
    assert "0 batch, 0 truncation, 0 mean_field, 0 autoregressive; the data brings its own" in caplog.text
