"""Log-probabilities without gradients: row kernels on a second stream, beside the products of the first."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from problems import BACKENDS, budget_of, packed_problem, random_problem

from cpo_kernels import linear_cpo_loss, linear_sequence_logps, plan
from cpo_kernels.engine import ways
from cpo_kernels.kernels import registry


class Streams:
    """A second stream that records what the first one waits for: how many launches beside it must have ended."""

    made: list[Streams]

    def __init__(self, device):
        self.launches, self.seen = 0, []
        self.made.append(self)

    @contextmanager
    def beside(self):
        yield
        self.launches += 1

    def mark(self):
        return self.launches

    def wait(self, mark):
        self.seen.append(mark)

    def join(self):
        self.seen.append(self.launches)


@pytest.fixture
def streams(monkeypatch):
    """The way of a GPU on CPU tensors, in blocks of at most 3 rows."""
    Streams.made = []
    monkeypatch.setattr(ways, "is_gpu", lambda device: True)
    cpu = registry.BACKENDS["cpu"]
    monkeypatch.setitem(registry.BACKENDS, "cpu", replace(cpu, linear_softmax=None))  # which no GPU has
    monkeypatch.setattr(ways, "SideStream", Streams)
    monkeypatch.setattr(ways.BesideTheNextProduct, "block_rows", 3)
    return Streams.made


PROBLEMS = {"padded": lambda: random_problem(bias=True, softcap=3.0), "packed": packed_problem}


@pytest.mark.parametrize("rows", [None, 4, 1])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_the_same_numbers(streams, backend, name, rows):
    problem = PROBLEMS[name]().to(torch.float32)
    head = {"backend": backend, "max_logits_bytes": rows and budget_of(problem, rows)}
    arguments = problem.arguments() | problem.options | head
    found = linear_cpo_loss(**arguments)
    assert len(streams) == 1
    expected = linear_cpo_loss(**arguments | {"backend": "torch", "max_logits_bytes": None})
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logps, expected.logps)
    made = plan(**arguments)
    assert made.buffers == (1 if rows == 1 else 2)
    assert made.rows_held <= min(rows or 6, 6)


def test_a_part_of_the_workspace_is_written_again_only_when_it_was_read(streams):
    """Block i waits for the row kernel of block i - 2, and the end for all of them."""
    hidden, weight, targets = torch.randn(14, 8), torch.randn(11, 8), torch.randint(11, (14,))
    linear_sequence_logps(hidden, weight, targets, backend="torch")
    (made,) = streams
    assert made.launches == 5
    assert made.seen == [1, 2, 3, 5]


def test_a_gradient_needs_the_logits_and_runs_one_stream(streams):
    hidden, weight, targets = torch.randn(14, 8, requires_grad=True), torch.randn(11, 8), torch.randint(11, (14,))
    linear_sequence_logps(hidden, weight, targets, backend="torch")
    assert streams == []
