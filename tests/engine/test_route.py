"""The way of a call: how deep it goes before the first product, and that signatures say what options there are."""

from __future__ import annotations

import inspect
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import cpo_kernels
from cpo_kernels import CPOLoss, LinearCPOLoss
from cpo_kernels.kernels.cpu import extension
from cpo_kernels.options import Head, Objective

pytestmark = pytest.mark.cpu
PACKAGE = str(Path(cpo_kernels.__file__).parent)
OF_HEAD = [
    cpo_kernels.token_logps,
    cpo_kernels.sequence_logps,
    cpo_kernels.linear_token_logps,
    cpo_kernels.linear_sequence_logps,
    cpo_kernels.linear_sequence_loss,
    cpo_kernels.linear_token_statistics,
]
OF_BOTH = [cpo_kernels.cpo_loss, cpo_kernels.linear_cpo_loss, cpo_kernels.plan, CPOLoss, LinearCPOLoss]


@pytest.mark.skipif(not extension.available(), reason="needs the compiled extension")
def test_at_most_six_frames_over_five_files_lead_to_the_first_product():
    hidden, weight = torch.randn(2, 2, 3, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    stacks = []

    def watch(frame, event, argument):
        if event == "c_call" and getattr(argument, "__name__", "") in ("gemm", "softmax_forward"):
            stack = []
            while frame is not None:
                if frame.f_code.co_filename.startswith(PACKAGE):
                    stack.append((Path(frame.f_code.co_filename).name, frame.f_code.co_name))
                frame = frame.f_back
            stacks.append(stack)

    targets = torch.randint(11, (2, 2, 3))
    cpo_kernels.linear_cpo_loss(hidden, weight, targets, backend="cpu")  # what is made once has been made
    sys.setprofile(watch)
    try:
        cpo_kernels.linear_cpo_loss(hidden, weight, targets, backend="cpu")
    finally:
        sys.setprofile(None)
    if not stacks:
        pytest.skip("products are torch's here")
    assert len(stacks[0]) <= 6, stacks[0]
    assert len({file for file, _ in stacks[0]}) <= 5, stacks[0]


def options_of(function) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return {name: default for name, default in named.items() if name not in TENSORS}


TENSORS = ("bias", "layout", "ref_logps", "ranks", "entropy", "top1", "seed", "num_samples", "sample_mask")


@pytest.mark.parametrize("function", [*OF_HEAD, *OF_BOTH], ids=lambda function: function.__name__)
def test_signatures_have_the_options_and_defaults_of_the_one_place(function):
    classes = [Head] if function in OF_HEAD else [Objective, Head]
    assert options_of(function) == {field.name: field.default for cls in classes for field in fields(cls)}


# A value that is not the default, for every option.
OTHERS = {
    "logit_scale": 1.5,
    "softcap": 9.0,
    "temperature": 0.7,
    "backend": "torch",
    "max_logits_bytes": 2**20,
    "logits_dtype": torch.float32,
    "grad_filter_eps": 0.01,
    "candidate_eps": 0.02,
    "skip_absent_rows": False,
    "frozen_columns": 1,
    "beta": 0.3,
    "margin": 0.4,
    "label_smoothing": 0.1,
    "length_normalized": True,
    "contrast_weight": 0.6,
    "mle_weight": 0.8,
    "num_groups": 3.0,
    "num_target_tokens": 5.0,
}


def test_every_option_of_a_module_arrives_under_its_name():
    """The modules pass options on by position, as the functions do."""
    for name, value in OTHERS.items():
        assert LinearCPOLoss(**{name: value}).options == {name: value}


@pytest.mark.parametrize("function", [*OF_HEAD, *OF_BOTH], ids=lambda function: function.__name__)
def test_every_option_reaches_its_place(function, monkeypatch):
    """Options are passed on by position; what the option objects get is compared by name."""
    made = {}

    class StopError(Exception):
        pass

    def record(cls):
        def build(*values):
            made.update(zip((field.name for field in fields(cls)), values, strict=True))
            if cls is Head:
                raise StopError

        return build

    home = sys.modules[function.__module__]
    monkeypatch.setattr(home, "Head", record(Head))
    if function in OF_BOTH:
        monkeypatch.setattr(home, "Objective", record(Objective))
    given = {name: object() for name in options_of(function)}
    tensors = () if inspect.isclass(function) else (torch.zeros(1, 1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1, 1))
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    count = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in required)
    with pytest.raises(StopError):
        function(*tensors[:count], *[None] * (count - len(tensors)), **given)
    assert made == given


@pytest.mark.parametrize("function", [*OF_HEAD, *OF_BOTH], ids=lambda function: function.__name__)
def test_a_misspelled_option_gets_the_right_one(function):
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    count = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in required)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'temprature'; did you mean 'temperature'\?"):
        function(*[None] * count, temprature=2.0)


def test_a_misspelled_argument_of_one_function_gets_the_right_one():
    """What only this function has is known to it, and what only others have is not."""
    with pytest.raises(TypeError, match=r"^contrastive_loss\(\) .* 'reducton'; did you mean 'reduction'\?"):
        cpo_kernels.contrastive_loss(None, reducton="sum")
    with pytest.raises(TypeError, match=r"^linear_token_statistics\(\) .* 'num_sample'; did you mean 'num_samples'\?"):
        cpo_kernels.linear_token_statistics(None, None, None, num_sample=2)
    with pytest.raises(TypeError, match=r"^token_logps\(\) .* 'num_sample'$"):
        cpo_kernels.token_logps(None, None, num_sample=2)
