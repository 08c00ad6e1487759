"""Memory that calls write to and forget: kept by the thread, or given back where a budget was named."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from cpo_kernels import linear_cpo_loss, linear_sequence_logps
from cpo_kernels.kernels import scratch

CPU = torch.device("cpu")
SIZE = 24 * 2**20
reads_memory = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads resident memory as Linux tells it"
)


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


@pytest.fixture(autouse=True)
def nothing_kept():
    scratch._kept.buffer = None
    yield
    scratch._kept.buffer = None


@reads_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_pages_of_its_own_go_back_although_later_allocations_stand_behind_them(dtype):
    before = resident_bytes()
    buffer = scratch.lasting(SIZE // dtype.itemsize, dtype, CPU, own_pages=True)
    assert (buffer.dtype, buffer.nbytes) == (dtype, SIZE)
    row = buffer.fill_(1).view(16, -1)[3]  # its memory lives as long as any view of it
    later = torch.ones(2**18)
    del buffer
    kept = resident_bytes()
    assert kept - before > 0.9 * SIZE
    assert row.double().sum() == row.numel()
    kept = resident_bytes()
    del row
    assert kept - resident_bytes() > 0.99 * SIZE
    del later


def test_a_small_buffer_is_an_ordinary_tensor():
    assert scratch.lasting(7, torch.float32, CPU, own_pages=True).shape == (7,)
    for keep in (True, False):
        with scratch.scratch(0, torch.float32, CPU, keep=keep) as nothing:
            assert nothing.numel() == 0


def test_a_thread_keeps_its_buffer_for_the_next_call_and_two_calls_at_once_have_two():
    with scratch.scratch(SIZE, torch.uint8, CPU, keep=True) as first:
        address = first.data_ptr()
        with scratch.scratch(SIZE, torch.uint8, CPU, keep=True) as second:
            assert second.data_ptr() != address
    with scratch.scratch(SIZE // 4, torch.float32, CPU, keep=True) as again:
        assert (again.dtype, again.numel()) == (torch.float32, SIZE // 4)
        assert again.data_ptr() == address
    found = []

    def other_thread():
        with scratch.scratch(SIZE, torch.uint8, CPU, keep=True) as mine:
            found.append(mine.data_ptr())

    with scratch.scratch(SIZE, torch.uint8, CPU, keep=True) as mine:
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        assert found != [mine.data_ptr()]


def test_an_error_leaves_the_buffer_for_the_next_call():
    with pytest.raises(ZeroDivisionError), scratch.scratch(SIZE, torch.uint8, CPU, keep=True) as buffer:
        address = buffer.data_ptr()
        _ = 1 / 0
    with scratch.scratch(SIZE, torch.uint8, CPU, keep=True) as buffer:
        assert buffer.data_ptr() == address


@reads_memory
def test_a_buffer_that_has_become_too_small_goes_back():
    before = resident_bytes()
    for size in (SIZE, 2 * SIZE):
        with scratch.scratch(size, torch.uint8, CPU, keep=True) as buffer:
            buffer.fill_(1)
    del buffer
    assert resident_bytes() - before < 2.2 * SIZE


def problem():
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 2, 32, 8, requires_grad=True), torch.randn(8192, 8, requires_grad=True)
    return hidden, weight, torch.randint(0, 8192, (1, 2, 32))


def test_the_default_keeps_its_logits_and_an_explicit_budget_does_not():
    inputs = problem()
    asked = linear_cpo_loss(*inputs, max_logits_bytes=2**24)
    assert scratch._kept.buffer is None
    default = linear_cpo_loss(*inputs)
    assert scratch._kept.buffer.nbytes >= 64 * 8192 * 4
    assert torch.equal(asked.loss, default.loss)


def test_logits_that_wait_for_their_gradient_are_not_those_of_the_next_call():
    hidden, weight, targets = problem()
    waiting = linear_sequence_logps(hidden, weight, targets)
    linear_cpo_loss(torch.randn_like(hidden).requires_grad_(), weight.detach(), targets).loss.backward()
    waiting.sum().backward()
    found, hidden.grad = hidden.grad, None
    linear_sequence_logps(hidden, weight, targets).sum().backward()
    assert torch.equal(found, hidden.grad)
