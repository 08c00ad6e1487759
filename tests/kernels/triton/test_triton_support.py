"""Whether Triton can be used here, and what is said where it cannot."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from cpo_kernels.kernels.triton import gradients
from cpo_kernels.kernels.triton import support as triton_support

pytestmark = pytest.mark.cpu


@pytest.fixture
def failing_interpreter(monkeypatch):
    """Triton 3.6 with NumPy 2.4."""

    def scale_(*tensors):
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    monkeypatch.setattr(gradients, "scale_", scale_)


def unavailable_reason() -> str | None:
    """Asked anew: the answer is kept."""
    return triton_support.unavailable_reason.__wrapped__()


def test_an_interpreter_that_numpy_does_not_fit_is_named_with_what_to_install(failing_interpreter, monkeypatch):
    monkeypatch.setattr(triton_support, "interpreted", lambda: True)
    reason = unavailable_reason()
    assert "only 0-dimensional arrays can be converted" in reason
    assert "install triton 3.7 or newer, or NumPy below 2.4" in reason


def test_a_gpu_does_not_ask_the_interpreter(failing_interpreter, monkeypatch):
    monkeypatch.setattr(triton_support, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert unavailable_reason() is None


@pytest.mark.interpreter
def test_an_interpreter_that_runs_a_kernel_is_available():
    assert triton_support.interpreter_failure() is None
