"""What a call launches around the products on a GPU, counted: nothing that the device would have to wait for."""

from __future__ import annotations

import pytest
import torch
from launches import PRODUCT, recorded

from cpo_kernels import CandidateLayout, linear_cpo_loss, linear_sequence_logps

pytestmark = pytest.mark.triton
G, C, T, H, V = 3, 4, 5, 16, 33
MOST = 6
CASES = {
    "default": {},
    "likelihood of the truth as well": {"ref_logps": torch.zeros(G, C), "mle_weight": 0.5},
    "ranks": {"ranks": torch.arange(C).expand(G, C).contiguous(), "mle_weight": 0.5},
    "means": {"length_normalized": True, "margin": 0.1},
    "means with a reference": {"length_normalized": True, "ref_logps": torch.zeros(G, C)},
    "no value read on the host": {"skip_absent_rows": False, "mle_weight": 0.5},
    "likelihood alone": {"contrast_weight": 0.0, "mle_weight": 1.0},
    "several chunks": {"max_logits_bytes": 4 * V * 2 * C * T},
}


def tensors(*, packed=False):
    """Hidden states, a weight and targets, some of them absent."""
    targets = torch.randint(V, (G, C, T))
    targets[:, 1, 3:] = -100
    hidden, weight = torch.randn(G, C, T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    if packed:
        return hidden.detach().flatten(0, 2).requires_grad_(), weight, targets.flatten()
    return hidden, weight, targets


def packed_layout():
    """Groups of unequal sizes, over rows in any order."""
    return CandidateLayout([0, 5, 9, 12, 20, 60], [0, 2, 5], rows=torch.randperm(G * C * T))


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("case", CASES)
def test_a_loss_and_its_gradients(monkeypatch, case, frozen):
    """Around the products at most six launches or copies each, with backward; a frozen head has no third product."""
    hidden, weight, targets = tensors()
    weight.requires_grad_(not frozen)
    with recorded(monkeypatch) as recorder:
        linear_cpo_loss(hidden, weight, targets, backend="triton", **CASES[case]).loss.backward()
    assert len(recorder.before()) <= MOST, recorder.before()
    waits = 1 if frozen else 0  # the gathered gradient, contrast and coefficients come after GEMM 2
    assert len(recorder.after()) <= MOST + waits, recorder.after()
    blocks = recorder.names.count("unit_forward_kernel")
    assert recorder.names.count(PRODUCT) == blocks * (2 if frozen else 3)
    assert "row_forward_kernel" not in recorder.names


def test_a_packed_loss(monkeypatch):
    hidden, weight, targets = tensors(packed=True)
    with recorded(monkeypatch) as recorder:
        linear_cpo_loss(hidden, weight, targets, layout=packed_layout(), backend="triton").loss.backward()
    assert len(recorder.before()) <= MOST, recorder.before()
    assert len(recorder.after()) <= MOST, recorder.after()


def test_the_gradient_of_a_bias(monkeypatch):
    """It has a sum, an addition and a scale of its own after its product."""
    hidden, weight, targets = tensors()
    bias = torch.randn(V, requires_grad=True)
    with recorded(monkeypatch) as recorder:
        linear_cpo_loss(hidden, weight, targets, bias=bias, backend="triton").loss.backward()
    assert len(recorder.before()) <= MOST, recorder.before()
    assert len(recorder.after()) <= MOST + 3, recorder.after()


@pytest.mark.parametrize("skip_absent_rows", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_log_likelihoods_without_gradients(monkeypatch, skip_absent_rows, packed):
    hidden, weight, targets = tensors(packed=packed)
    head = {"backend": "triton", "skip_absent_rows": skip_absent_rows, "layout": packed_layout() if packed else None}
    with torch.no_grad(), recorded(monkeypatch) as recorder:
        linear_sequence_logps(hidden, weight, targets, **head)
    assert len(recorder.before()) <= MOST, recorder.before()
    assert recorder.names.count(PRODUCT) == 1


def test_the_recorder_sees_launches_and_no_views(monkeypatch):
    x = torch.randn(4, 4)
    with recorded(monkeypatch) as recorder:
        x.view(16).reshape(2, 8).t()[0].detach()
        torch.empty(3)
        x + 1
        x.mul_(2)
        x.contiguous()
        x.t().contiguous()
    assert recorder.names == ["add", "mul_", "clone"]
