"""The plan: whole groups, in order, within the budget; and what it says about itself."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import budget_of, packed_problem, random_problem

from cpo_kernels import linear_cpo_loss, plan
from cpo_kernels.engine.plan import Plan, fill_chunks, make_plan
from cpo_kernels.engine.tokens import find_tokens
from cpo_kernels.kernels.cpu import linear as cpu_linear
from cpo_kernels.kernels.device import DEFAULT_LOGITS_BYTES


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_chunks_are_whole_groups_in_order_within_the_budget(rows_per_group, rows_per_chunk):
    chunks = fill_chunks(rows_per_group, rows_per_chunk)
    assert [g for groups, _ in chunks for g in groups] == list(range(len(rows_per_group)))
    for groups, rows in chunks:
        assert rows == sum(rows_per_group[g] for g in groups)
        assert rows <= rows_per_chunk or sum(rows_per_group[g] > 0 for g in groups) == 1


@pytest.mark.parametrize(("groups", "rows", "expected"), [(10, 4, [4, 4, 4]), (8, 7, [4, 4]), (9, 3, [3, 3, 3])])
def test_chunks_are_filled_evenly(groups, rows, expected):
    """10 rows at 7 a chunk are two chunks of 5, not 7 and 3."""
    sizes = [rows for _, rows in fill_chunks([1] * groups, rows)]
    assert len(sizes) == len(expected)
    assert max(sizes) - min(sizes) <= 2


def test_default_budget_and_nothing_to_say():
    problem = random_problem().to(torch.float32)
    result = plan(**problem.arguments())
    present = int((problem.targets != -100).sum())
    # Absent rows lie in between, so that hidden states are copied; what is not kept of logits is summed in parts.
    beside = result.gathered_bytes // present
    assert result.budget_bytes == DEFAULT_LOGITS_BYTES + result.workspace_bytes + (
        DEFAULT_LOGITS_BYTES * beside // (4 * problem.weight.shape[0])
    )
    assert (result.num_rows, result.num_tokens) == (present, present)
    assert result.logits_bytes == budget_of(problem, present)
    copies = 2 if softmax_inside(problem) else 1  # the third product reads a scaled one
    sums = 4 * cpu_linear.floats_per_row(problem.weight.shape[0]) if softmax_inside(problem) else 0
    assert result.gathered_bytes == present * (copies * problem.weight.shape[1] * 4 + sums)
    assert result.bytes == result.logits_bytes + result.workspace_bytes + result.gathered_bytes
    assert result.note == ""
    assert result.gemms == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", range(1, 28))
def test_bytes_never_pass_the_budget(rows, dtype):
    """Unless the plan says by how much."""
    problem = random_problem(H=5).to(dtype)
    budget = budget_of(problem, rows)
    result = plan(**problem.arguments(), max_logits_bytes=budget)
    assert result.logits_bytes <= budget == result.budget_bytes
    if result.bytes > budget:
        assert f"{result.bytes - budget} bytes come on top of the budget" in result.note
        assert f"{result.accumulator_bytes} for the accumulator of grad_weight" in result.note
    assert dtype == torch.bfloat16 or result.accumulator_bytes == 0
    for chunk in result.chunks:
        assert chunk.rows_per_block * problem.weight.shape[0] * dtype.itemsize <= budget
        assert chunk.recomputed == (chunk.num_rows > chunk.rows_per_block)


def test_low_halves_come_out_of_the_budget_where_they_fit():
    problem = random_problem(G=16, H=2, V=31).to(torch.bfloat16)
    accumulator = 31 * 2 * 2
    budget = budget_of(problem, 40) + accumulator
    result = plan(**problem.arguments(), max_logits_bytes=budget, backend="torch")
    assert result.accumulator_bytes == accumulator
    assert result.bytes <= budget
    assert result.note == ""
    frozen = random_problem(G=16, H=2, V=31).to(torch.bfloat16)
    frozen.weight.requires_grad_(False)
    assert plan(**frozen.arguments(), max_logits_bytes=budget).accumulator_bytes == 0


def test_the_workspace_of_the_products_comes_out_of_the_budget_where_it_fits():
    problem = random_problem(G=16, H=2, V=31).to(torch.float32)
    workspace = plan(**problem.arguments()).workspace_bytes
    budget = 2 * workspace + budget_of(problem, 40)
    result = plan(**problem.arguments(), max_logits_bytes=budget)
    assert result.bytes <= budget
    assert result.note == ""
    tight = plan(**problem.arguments(), max_logits_bytes=budget_of(problem, 40))
    assert tight.logits_bytes <= tight.budget_bytes
    assert ("on top of the budget" in tight.note) == (workspace > 0)


def plan_of_rows(rows: int, max_logits_bytes: int | None) -> Plan:
    """A half-precision head of V = 1,048,576 and H = 64: 2 MiB a row, 128 MiB of low halves; groups of 4 rows."""
    vocab = 2**20
    targets = torch.zeros(rows, dtype=torch.int64)
    tokens = find_tokens(targets, rows, vocab, None, list(range(rows + 1)), list(range(0, rows + 1, 4)))
    return make_plan(
        tokens,
        row_bytes=2 * vocab,
        accumulator_bytes=vocab * 64 * 2,
        needs=(True, True, False),
        max_logits_bytes=max_logits_bytes,
        workspace_bytes=2**20,
    )


@pytest.mark.parametrize("rows", [4, 128, 192, 196, 1024])
@pytest.mark.parametrize("budget", [None, 400 * 2**20])
def test_one_chunk_may_use_what_low_halves_would_take(rows, budget):
    result = plan_of_rows(rows, budget)
    one = rows * 2 * 2**20 + 2**20 <= result.budget_bytes
    assert (len(result.chunks) == 1) == one
    assert (result.accumulator_bytes == 0) == one
    assert result.bytes <= result.budget_bytes
    assert result.note == ""


def test_recomputation_is_announced_and_counted_by_rows():
    """Group 2 of the packed problem alone does not fit: its share of the rows costs a fourth product."""
    problem = packed_problem().to(torch.float32)
    sizes = [chunk.num_rows for chunk in plan(**problem.arguments(), max_logits_bytes=budget_of(problem, 1)).chunks]
    assert len(sizes) == 3
    largest = max(sizes)
    result = plan(**problem.arguments(), max_logits_bytes=budget_of(problem, largest - 1))
    assert sorted(chunk.recomputed for chunk in result.chunks) == [False] * (len(result.chunks) - 1) + [True]
    assert result.gemms == pytest.approx(3 + largest / sum(sizes))
    assert f"{largest} rows" in result.note
    assert "recomputed" in result.note
    with torch.no_grad():
        without = plan(**problem.arguments(), max_logits_bytes=budget_of(problem, largest - 1))
    assert without.gemms == 1
    assert "recomputed" not in without.note
    assert not any(chunk.recomputed for chunk in without.chunks)


def test_bias_alone_is_one_product_and_recomputes_where_it_must():
    problem = random_problem(bias=True).to(torch.float32)
    problem.hidden.requires_grad_(False)
    problem.weight.requires_grad_(False)
    assert plan(**problem.arguments()).gemms == 1
    assert plan(**problem.arguments(), max_logits_bytes=budget_of(problem, 2)).gemms == 2


def softmax_inside(problem) -> bool:
    """Tell whether no logits are held of this problem here."""
    return cpu_linear.takes(problem.hidden, problem.weight)


def test_logits_dtype_counts_where_logits_are_held():
    problem = random_problem().to(torch.bfloat16)
    for backend, factor in (("torch", 2), ("auto", 1 if softmax_inside(problem) else 2)):
        arguments = problem.arguments() | {"backend": backend}
        plain, exact = (plan(**arguments, logits_dtype=dtype) for dtype in (None, torch.float32))
        assert exact.logits_bytes == factor * plain.logits_bytes


def test_a_plan_computes_nothing_and_takes_the_arguments_of_the_loss():
    problem = random_problem(bias=True).to(torch.float32)
    with torch.no_grad():
        problem.hidden.fill_(torch.nan)
    options = {"beta": 0.3, "mle_weight": 0.1, "softcap": 2.0, "num_groups": 7}
    assert plan(**problem.arguments(), **options).gemms == 3
    assert linear_cpo_loss(**problem.arguments(), **options).loss.isnan()
    with pytest.raises(TypeError, match="temprature"):
        plan(**problem.arguments(), temprature=1.0)


@pytest.mark.parametrize("budget", [None, 30 * 2**20], ids=["default", "explicit"])
def test_a_plan_prints_the_sum_that_its_peak_is(budget):
    """The default is 256 MiB for logits with what goes with them; the terms of either make up the bytes of the plan."""
    hidden = torch.zeros(24, 4, 32, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(50257, 64, dtype=torch.bfloat16, requires_grad=True)
    made = plan(hidden, weight, torch.zeros(24, 4, 32, dtype=torch.int64), max_logits_bytes=budget, backend="torch")
    first, memory, *_ = str(made).splitlines()
    assert first == f"{len(made.chunks)} chunks of 3072 rows in all, 3 GEMMs"
    terms, total, allowed = re.fullmatch(r"memory: (.+) = ([\d.]+) MiB, budget ([\d.]+) MiB", memory).groups()
    sizes = {name: float(size) for name, size in re.findall(r"(\w+) ([\d.]+)", terms)}
    assert sizes["accumulator"] == pytest.approx(50257 * 64 * 2 / 2**20, abs=0.06)
    assert sum(sizes.values()) == pytest.approx(float(total), abs=0.2) == pytest.approx(made.bytes / 2**20, abs=0.2)
    assert float(allowed) == pytest.approx(30 if budget else 256 + sizes["accumulator"], abs=0.2)
    assert made.bytes <= made.budget_bytes
