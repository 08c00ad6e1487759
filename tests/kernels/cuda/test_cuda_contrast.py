"""What the CUDA contrast alone has: the codes of its losses, numbers of threads, and its place in the engine.

Its numbers are held against objective.py in tests/kernels/test_contrast.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from contrast_chunks import Chunk, arguments, expected, full, token_logps
from pair_formulas import SMOOTHED
from project import ROOT
from simt_host import EmulatorError
from tolerance import assert_accurate
from torch import Tensor

from cpo_kernels import cpo_loss, linear_cpo_loss
from cpo_kernels.kernels.cuda.groups import contrast
from cpo_kernels.loss_table import KERNEL_CODES, LOSSES
from cpo_kernels.options import Objective

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("emulator")]


def launch(chunk: Chunk, objective: Objective, **changes: Any) -> tuple[Tensor, Tensor]:
    return contrast(chunk.logps, **(arguments(chunk, objective) | changes))


def test_the_codes_of_the_header_are_those_of_the_table():
    header = (ROOT / "csrc" / "common" / "preference.h").read_text()
    entries = re.search(r"enum class Loss : int \{(.*?)\}", header, re.DOTALL)[1].split(",")
    codes = dict(re.fullmatch(r"\s*k(\w+) = (\d+)\s*", entry).groups() for entry in entries)
    assert {name: int(code) for name, code in codes.items()} == {
        name.title().replace("_", ""): code for name, code in KERNEL_CODES.items()
    }
    assert sorted(KERNEL_CODES.values()) == list(range(len(KERNEL_CODES)))
    assert int(re.search(r"kNumLosses = (\d+);", header)[1]) == len(KERNEL_CODES)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_what_the_kernel_lacks_runs_in_plain_torch(emulated_cuda, emulator, monkeypatch, loss_type):
    """From hidden states and from logits: the launch is used where the table says that the kernel has the loss."""
    launches = []
    for name in ("contrast", "cpo_loss"):
        launch = getattr(emulator, name)
        monkeypatch.setattr(
            emulator, name, lambda name=name, launch=launch, **given: launches.append(name) or launch(**given)
        )
    hidden, weight, targets = torch.randn(3, 2, 4, 8), torch.randn(65, 8), torch.randint(0, 65, (3, 2, 4))
    options = {
        "loss_type": loss_type,
        "label_smoothing": SMOOTHED.get(loss_type, 0.0),
        "ref_logps": torch.randn(3, 2) - 20,
    }
    results = []
    for kind, dtype in (("cuda", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight, hidden @ weight.T)]
        loss = linear_cpo_loss(*leaves[:2], targets, backend=kind, **options).loss
        of_logits = cpo_loss(leaves[2], targets, backend=kind, **options).loss
        grads = (*torch.autograd.grad(loss, leaves[:2]), *torch.autograd.grad(of_logits, leaves[2]))
        results.append((loss.detach(), of_logits.detach(), *grads))
    for what, *tensors in zip(("loss", "of logits", "hidden", "weight", "logits"), *results, strict=True):
        assert_accurate(*tensors, what)
    assert launches == (["contrast", "cpo_loss"] if loss_type in KERNEL_CODES else [])


@pytest.mark.parametrize("threads", [0, 32, 256])
@pytest.mark.parametrize("candidates", [1, 37, 100])
def test_any_number_of_threads(candidates, threads):
    layout = full([1 + c % 3 for c in range(candidates)], [2] * candidates)
    chunk, objective = Chunk(layout, token_logps(layout)), Objective(mle_weight=0.3)
    chunk.ranks = torch.randint(0, 5, (2 * candidates,))
    chunk.ranks[::candidates] = 0
    eager, oracle = (expected(chunk, objective, 1.0, dtype) for dtype in (torch.float32, torch.float64))
    for name, *tensors in zip(("sums", "coef"), launch(chunk, objective, threads=threads), eager, oracle, strict=True):
        assert_accurate(*tensors, name)


def test_the_order_of_the_threads_changes_no_bit(emulator):
    layout = full([1 + c % 5 for c in range(20)], [3] * 7)
    chunk = Chunk(layout, token_logps(layout), ranks=torch.randint(0, 4, (27,)))
    results = []
    for emulator.seed in range(6):
        results.append(launch(chunk, Objective(mle_weight=0.3), threads=128))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("threads", [16, 48, 512])
def test_threads_that_make_no_whole_warps_are_refused(threads):
    """Their last warp would wait for lanes that do not exist."""
    chunk = Chunk([[(1, 2), (1, 1)]], -torch.rand(3))
    with pytest.raises(EmulatorError, match=f"threads is {threads}; expected a multiple of 32 up to 256"):
        launch(chunk, Objective(), threads=threads)
