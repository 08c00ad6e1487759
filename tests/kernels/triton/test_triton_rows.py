"""What Triton's row kernels alone have: the tanh of a softcap, statistics of columns, scaling, and the table of blocks.

Their numbers are held against the reference in tests/kernels/test_rows.py.
"""

from __future__ import annotations

import re

import pytest
import torch
from devices import DEVICE
from pairwise import pairwise
from row_kernels import DTYPES, Tokens, triton_rows
from tolerance import assert_accurate

pytest.importorskip("triton")

from cpo_kernels.kernels import plain
from cpo_kernels.kernels.device import architecture
from cpo_kernels.kernels.transform import fold_transform
from cpo_kernels.kernels.triton import gradients, tuning

pytestmark = pytest.mark.triton


def test_tanh_of_the_softcap():
    """A vocabulary of one word shows y itself: within 8 roundings on both branches and at their seam."""
    u = torch.cat([torch.logspace(-6, 1.5, 24), torch.tensor([0.6249, 0.6251, 40.0, 1e4])])
    u = torch.cat([u, -u, torch.zeros(1)])
    tokens = Tokens(torch.zeros(u.numel(), dtype=torch.int64), None, torch.ones(u.numel()))
    kernels = triton_rows()
    config = {**kernels.small["config"], "BLOCK": 4}
    stats, _ = kernels.forward(u[:, None], tokens, (None, 1.0, 1.0, 1.0), config=config)
    exact = u.double().tanh()
    assert ((stats[0].double() - exact).abs() <= 8 * torch.finfo(torch.float32).eps * exact.abs()).all()


BAD_HEADS = {
    "scale": ((float("nan"), 0.0, 1.0), "logit_scale is nan; expected a finite number"),
    "softcap": ((1.0, -1.0, 1.0), r"softcap is -1.0; expected a finite number above 0, or 0 for none"),
    "temperature": ((1.0, 0.0, 0.0), r"temperature is 0.0; expected a finite number above 0"),
}


@pytest.mark.parametrize(("head", "message"), BAD_HEADS.values(), ids=BAD_HEADS)
def test_bad_head_is_named(head, message):
    with pytest.raises(ValueError, match=message):
        fold_transform(*head)


STATS_CONFIG = {"BLOCK": 32, "ROWS": 4, "ROWS_PER_PROGRAM": 16, "num_warps": 1, "num_stages": 1}


# Rows: less than a step; a tail; one program; several, the last cut short.
@pairwise({"r": [1, 7, 16, 41], "V": [1, 31, 64, 97], "dtype": DTYPES})
def test_column_stats(r, V, dtype):
    grad = torch.randn(r, V + 3).to(dtype)[:, 1 : 1 + V]
    stats = gradients.column_stats(grad, config=STATS_CONFIG)
    oracle = plain.column_stats(grad.double())
    assert torch.equal(stats[0].double(), oracle[0])
    assert_accurate(stats[1], plain.column_stats(grad.float())[1], oracle[1], "sums")
    assert torch.equal(stats, gradients.column_stats(grad, config=STATS_CONFIG))


def test_column_stats_keep_nan_in_the_sum_of_its_column():
    grad = torch.randn(41, 37)
    grad[20, 5] = torch.nan
    assert gradients.column_stats(grad, config=STATS_CONFIG)[1].isnan().nonzero().tolist() == [[5]]


def test_column_stats_of_no_rows():
    assert torch.equal(gradients.column_stats(torch.empty(0, 5)), torch.zeros(2, 5))


SCALE_CONFIG = {"BLOCK": 32, "PROGRAMS": 2, "num_warps": 1, "num_stages": 1}


@pytest.mark.parametrize("size", [0, 1, 31, 64, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(dtype, size):
    buffer = torch.randn(size + 4).to(dtype)
    before = buffer.clone()
    gradients.scale_(buffer[:size], torch.tensor([3.0]), 2.0, config=SCALE_CONFIG)
    exact, eager = before[:size].double() * 1.5, before[:size] * 1.5
    assert_accurate(buffer[:size], eager, exact, "scaled")
    assert torch.equal(buffer[size:], before[size:])


@pytest.mark.parametrize("factor", [torch.tensor(1.0), torch.tensor(3.0, dtype=torch.float64), torch.tensor([0.1])])
def test_scale_by_its_own_gain_changes_no_bit(factor):
    tensor = torch.randn(100)
    before = tensor.clone()
    gradients.scale_(tensor, factor.to(DEVICE), float(factor), config=SCALE_CONFIG)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_scale_by_nan_and_infinity(factor):
    tensor = torch.ones(40)
    gradients.scale_(tensor, torch.tensor(factor), config=SCALE_CONFIG)
    assert not tensor.isfinite().any()


def test_scale_by_the_table():
    tensor = torch.ones(3, 5)
    gradients.scale_(tensor, torch.tensor(2.0))
    assert (tensor == 2).all()


ROW_KERNELS = ("row_forward", "row_backward", "column_stats", "scale")
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
KERNELS = {(kernel, name) for kernel in ROW_KERNELS for name in NAMES}
for entry in tuning.entries():
    KERNELS |= {(entry["kernel"], name) for name in (NAMES if entry["dtype"] == "any" else [entry["dtype"]])}


@pytest.mark.parametrize(("kernel", "dtype"), sorted(KERNELS))
def test_table_covers_every_size(kernel, dtype):
    for vocab in (1, 2048, 2049, 50257, 128256, 2**31):
        for hidden_size in (1, 4096, 16384):
            sizes = tuning.config(kernel, torch.device("cpu"), vocab, getattr(torch, dtype), hidden_size)
            assert {"num_warps", "num_stages"} <= sizes.keys()


@pytest.mark.parametrize("entry", tuning.entries(), ids=lambda e: f"{e['kernel']}-{e['arch']}-{e['dtype']}")
def test_table_entries_are_sound(entry):
    known = {"kernel", "arch", "dtype", "vocab_at_most", "hidden_at_most", "config"}
    assert entry.keys() <= known and {"kernel", "arch", "dtype", "config"} <= entry.keys()
    assert re.fullmatch(r"default|sm_\d{2,3}|gfx\w+", entry["arch"])
    assert entry["dtype"] == "any" or isinstance(getattr(torch, entry["dtype"]), torch.dtype)
    for name, size in entry["config"].items():
        power_of_two = size > 0 and size & (size - 1) == 0
        assert isinstance(size, int) and (power_of_two or name == "num_stages"), f"{name} = {size}"


@pytest.fixture
def table(monkeypatch):
    """Replaces the entries of the table."""

    def replace(*entries):
        monkeypatch.setattr(tuning, "entries", lambda: entries)
        tuning._lookup.cache_clear()

    yield replace
    tuning._lookup.cache_clear()


def test_table_prefers_the_architecture_then_the_first_entry(table, monkeypatch):
    def entry(arch, block, **more):
        return {"kernel": "k", "arch": arch, "dtype": "any", "config": {"BLOCK": block}, **more}

    table(
        entry("default", 1, vocab_at_most=100),
        entry("default", 2),
        entry("sm_90", 4, hidden_at_most=64),
        entry("sm_90", 8, dtype="bfloat16", vocab_at_most=10),
    )

    def block(arch, vocab, dtype=torch.float32, hidden_size=0):
        monkeypatch.setattr(tuning, "architecture", lambda device: arch)
        return tuning.config("k", torch.device("cpu"), vocab, dtype, hidden_size)["BLOCK"]

    assert [block("default", 100), block("default", 101), block("sm_80", 7)] == [1, 2, 1]
    assert [block("sm_90", 7, hidden_size=64), block("sm_90", 7, hidden_size=65)] == [4, 1]
    assert [block("sm_90", 10, torch.bfloat16, 65), block("sm_90", 11, torch.bfloat16, 65)] == [8, 1]


def test_configurations_are_the_callers_own():
    device = torch.device("cpu")
    tuning.config("scale", device, 7, torch.float32).clear()
    assert tuning.config("scale", device, 7, torch.float32)


def test_kernel_that_the_table_does_not_have():
    with pytest.raises(LookupError, match=r"no entry for kernel 'nothing', default, V = 7, H = 0, float32"):
        tuning.config("nothing", torch.device("cpu"), 7, torch.float32)


def test_interpreted_kernels_are_of_no_architecture():
    assert architecture(torch.device("cpu")) == "default"
