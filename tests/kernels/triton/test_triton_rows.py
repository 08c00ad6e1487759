"""The Triton row kernels against the reference in float64, with blocks so small that a short row has several."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
from devices import DEVICE
from tolerance import assert_accurate
from torch import Tensor

pytest.importorskip("triton")

from cpo_kernels.kernels import numerics, plain
from cpo_kernels.kernels.device import architecture
from cpo_kernels.kernels.transform import fold_transform
from cpo_kernels.kernels.triton import gradients, rows, tuning

pytestmark = pytest.mark.triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = 64
CONFIG = {"BLOCK": BLOCK, "TOKENS": 4, "num_warps": 1, "num_stages": 1}
SEVERAL_WARPS = {"BLOCK": 512, "TOKENS": 4, "num_warps": 4, "num_stages": 1}
PLAIN = (None, 1.0, 0.0, 1.0)


HEADS = {
    "plain": lambda V: PLAIN,
    "scaled": lambda V: (None, 1.7, 0.0, 0.6),
    "negative scale": lambda V: (None, -0.8, 0.0, 1.0),  # the largest y is at the smallest x
    "zero scale": lambda V: (None, 0.0, 0.0, 1.0),
    "bias": lambda V: (torch.randn(V), 1.0, 0.0, 1.0),
    "softcap": lambda V: (None, 1.0, 3.0, 1.0),
    "all": lambda V: (torch.randn(V).bfloat16(), 1.3, 30.0, 0.7),
}


class Tokens(NamedTuple):
    """Targets, row_starts and coefs."""

    targets: Tensor
    row_starts: Tensor | None
    coef: Tensor


def one_token_a_row(V: int, R: int) -> Tokens:
    """The second token is absent."""
    targets = torch.randint(0, V, (R,))
    targets[1] = -100
    return Tokens(targets, None, torch.randn(R))


def shared_rows(V: int, counts: list[int]) -> Tokens:
    """Rows with these numbers of tokens; every fourth token is absent, with a coef of NaN."""
    row_starts = torch.tensor([0, *torch.tensor(counts, device="cpu").cumsum(0).tolist()])
    targets, coef = torch.randint(0, V, (sum(counts),)), torch.randn(sum(counts))
    targets[3::4], coef[3::4] = -100, torch.nan
    return Tokens(targets, row_starts, coef)


def double(head):
    bias, *numbers = head
    return (None if bias is None else bias.double(), *numbers)


def forward(logits: Tensor, tokens: Tokens, head=PLAIN, config=CONFIG) -> tuple[Tensor, Tensor]:
    return rows.row_forward(logits, tokens.targets, tokens.row_starts, *head, config=config)


def backward(logits: Tensor, tokens: Tokens, stats: Tensor, head=PLAIN, config=CONFIG) -> Tensor:
    return rows.row_backward(logits, *tokens[:2], stats, tokens.coef, *head, config=config)


def backward_(logits: Tensor, tokens: Tokens, stats: Tensor, head=PLAIN, grad_dtype=None, config=CONFIG) -> None:
    rows.row_backward_(logits, *tokens[:2], stats, tokens.coef, *head, grad_dtype, config=config)


def check_against_reference(logits: Tensor, tokens: Tokens, head=PLAIN, config=CONFIG) -> None:
    """Forward and backward by the rule of tolerance; the reference computes in float32 and rounds the gradient once."""
    targets, row_starts, coef = tokens
    stats, logps = forward(logits, tokens, head, config)
    eager_stats, eager_logps = plain.row_forward(logits, targets, row_starts, *head)
    oracle_stats, oracle_logps = plain.row_forward(logits.double(), targets, row_starts, *double(head))
    present = torch.unique(plain.token_rows(targets, row_starts)[targets != -100])
    for part, name in ((lambda stats: stats[0], "max"), (lambda stats: stats.sum(0), "log-sum-exp")):
        assert_accurate(*(part(s[:, present]) for s in (stats, eager_stats, oracle_stats)), name)
    assert_accurate(logps, eager_logps, oracle_logps, "logps")

    grad = backward(logits, tokens, stats, head, config)
    eager = plain.row_backward(logits, targets, row_starts, eager_stats, coef, *head)
    oracle = plain.row_backward(logits.double(), targets, row_starts, oracle_stats, coef.double(), *double(head))
    assert_accurate(grad, eager, oracle, "gradient")


V_GRID = [
    1,  # the only probability is 1
    2,
    31,  # prime, less than a block: rows off every vector boundary
    2 * BLOCK,  # no tail
    2 * BLOCK + 16,  # a tail of whole vectors
    3 * BLOCK - 1,  # prime, several blocks; with a lead of 1, a tail longer than a block
]


@pytest.mark.parametrize("shared", [False, True], ids=["one token a row", "shared rows"])
@pytest.mark.parametrize("V", V_GRID)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_vocabulary(dtype, V, shared):
    logits = (torch.randn(4, V) * 4).to(dtype)
    check_against_reference(logits, shared_rows(V, [1, 3, 0, 5]) if shared else one_token_a_row(V, 4))


@pytest.mark.parametrize("shared", [False, True], ids=["one token a row", "shared rows"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head(dtype, head, shared):
    V = 2 * BLOCK + 9
    logits = (torch.randn(3, V) * 4).to(dtype)
    check_against_reference(logits, shared_rows(V, [2, 0, 3]) if shared else one_token_a_row(V, 3), head(V))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_blocks_of_the_table(dtype):
    V = 9001  # prime, crosses the largest block
    check_against_reference(torch.randn(2, V).to(dtype), shared_rows(V, [2, 1]), config=None)


@pytest.mark.parametrize("count", [4, 5, 11])
def test_many_tokens_in_a_row_with_repeated_targets(count):
    """On both sides of the number of tokens that are taken at a time."""
    V = 5
    check_against_reference(torch.randn(3, V), shared_rows(V, [2, count, 1]))


@pytest.mark.parametrize("extreme", ["both", "first", "last"])
def test_huge_logits_lose_nothing(extreme):
    V = 2 * BLOCK + 3
    logits = torch.randn(3, V)
    if extreme == "both":
        logits += torch.where(torch.rand(3, V) < 0.5, 1e4, -1e4)
    else:
        logits[:, 0 if extreme == "first" else V - 1] = 1e4
    check_against_reference(logits, shared_rows(V, [2, 1, 2]))
    check_against_reference(logits, one_token_a_row(V, 3))


@pytest.mark.parametrize("slope", [5000.0, -5000.0])
def test_maximum_that_moves_from_block_to_block(slope):
    V = 4 * BLOCK + 13
    logits = torch.linspace(-slope, slope, V).repeat(2, 1) + torch.randn(2, V)
    check_against_reference(logits, shared_rows(V, [1, 2]))


@pytest.mark.parametrize(("V", "stretch"), [(3, 2), (3 * BLOCK, 2 * BLOCK + 5)])
@pytest.mark.parametrize("leading", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_is_probability_zero(dtype, V, stretch, leading):
    logits = torch.randn(2, V).to(dtype)
    where = slice(0, stretch) if leading else slice(V - stretch, V)
    logits[:, where] = -torch.inf
    finite = V - 1 if leading else 0
    tokens = Tokens(torch.tensor([finite, finite]), None, torch.randn(2))
    check_against_reference(logits, tokens)
    stats, _ = forward(logits, tokens)
    assert (backward(logits, tokens, stats)[:, where] == 0).all()
    _, logps = forward(logits, tokens._replace(targets=torch.full((2,), where.start)))
    assert (logps == -torch.inf).all()


def test_row_of_minus_infinity_is_nan_as_in_log_softmax():
    logits = torch.full((1, 127), -torch.inf)
    tokens = Tokens(torch.tensor([3]), None, torch.ones(1))
    stats, logps = forward(logits, tokens)
    assert logps.isnan().all() and torch.log_softmax(logits, -1).isnan().all()
    assert backward(logits, tokens, stats).isnan().all()


@pytest.mark.parametrize("shared", [False, True], ids=["one token a row", "shared rows"])
@pytest.mark.parametrize("column", [0, BLOCK + 3, 2 * BLOCK + 6])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_reach_their_row_and_no_other(bad, column, shared):
    V = 2 * BLOCK + 7
    logits = torch.randn(3, V)
    logits[1, column] = bad
    tokens = Tokens(torch.tensor([5, 6, 7]), torch.arange(4) if shared else None, torch.ones(3))
    stats, logps = forward(logits, tokens)
    assert logps.isnan().tolist() == [False, True, False]
    grad = backward(logits, tokens, stats)
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_gradient_come_out_zero(dtype):
    """Zero coefs, absent tokens, no tokens: exactly 0 whatever the row holds; a NaN coef is a gradient."""
    V = 2 * BLOCK + 3
    logits = torch.full((4, V), torch.nan, dtype=dtype)
    targets, coef = torch.tensor([1, 2, -100, 3]), torch.tensor([0.0, -0.0, torch.nan, torch.nan])
    stats = torch.full((2, 4), torch.nan)
    for tokens in (Tokens(targets, torch.tensor([0, 2, 3, 3, 4]), coef), Tokens(targets, None, coef)):
        grad = backward(logits, tokens, stats)
        assert (grad[:3] == 0).all() and grad[3].isnan().all()
        over = logits.clone()
        backward_(over, tokens, stats)
        assert torch.equal(over[:3], grad[:3]) and over[3].isnan().all()


def test_rows_without_a_token_are_not_read():
    logits = torch.full((3, 5), torch.nan)
    tokens = Tokens(torch.tensor([-100, -100]), torch.tensor([0, 1, 1, 2]), torch.ones(2))
    stats, logps = forward(logits, tokens)
    assert (stats == 0).all() and (logps == 0).all()


def test_coefs_that_cancel_are_a_gradient_elsewhere():
    """The sum of the coefs is 0, the coefs are not."""
    tokens = Tokens(torch.tensor([1, 2]), torch.tensor([0, 2]), torch.tensor([1.0, -1.0]))
    logits = torch.randn(1, 5)
    stats, _ = forward(logits, tokens)
    exact = torch.tensor([[0.0, 1.0, -1.0, 0.0, 0.0]])
    assert_accurate(backward(logits, tokens, stats), exact, exact.double(), "gradient")


@pytest.mark.parametrize("count", [1, 3, 9])
def test_certain_words_have_no_gradient(count):
    """All tokens of a row have one target, and it has all the probability: coefs cancel to exactly 0."""
    logits = torch.full((1, 5), -200.0)
    logits[0, 3] = 7.7
    tokens = Tokens(torch.full((count,), 3), torch.tensor([0, count]), torch.randn(count))
    stats, logps = forward(logits, tokens)
    assert (logps == 0).all() and (backward(logits, tokens, stats) == 0).all()
    if count == 1:
        assert (backward(logits, tokens._replace(row_starts=None), stats) == 0).all()


@pytest.mark.parametrize("shared", [False, True], ids=["one token a row", "shared rows"])
@pytest.mark.parametrize("V", [3, 127, 4 * BLOCK])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_a_wider_buffer(dtype, V, shared):
    """In place and out of place give the same bits wherever the rows begin, and the surroundings keep theirs."""
    head = HEADS["all"](V)
    buffer = torch.randn(3, V + 9).to(dtype)
    before, logits = buffer.clone(), buffer[:, 5 : 5 + V]
    tokens = shared_rows(V, [2, 0, 4]) if shared else one_token_a_row(V, 3)
    check_against_reference(logits, tokens, head)
    stats, _ = forward(logits, tokens, head)
    grad = backward(logits, tokens, stats, head)
    assert torch.equal(buffer, before) and grad.is_contiguous()
    assert torch.equal(grad, backward(logits.contiguous(), tokens, stats, head))
    backward_(logits, tokens, stats, head)
    assert torch.equal(logits, grad)
    assert torch.equal(buffer[:, :5], before[:, :5]) and torch.equal(buffer[:, 5 + V :], before[:, 5 + V :])


@pytest.mark.parametrize("shared", [False, True], ids=["one token a row", "shared rows"])
@pytest.mark.parametrize(
    ("V", "width", "config"),
    [
        (2, 2, CONFIG),
        (191, 192, CONFIG),  # rows at vector boundaries, a tail
        (197, 200, CONFIG),  # rows at vector boundaries, by a stride that is no multiple of 16
        (197, 197, CONFIG),  # rows off vector boundaries
        (2 * BLOCK, 2 * BLOCK, CONFIG),  # no tail
        (2017, 2048, SEVERAL_WARPS),  # warps that may overtake each other
    ],
)
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_gradient_over_its_logits(grad_dtype, V, width, config, shared):
    logits = torch.empty(3, width)[:, :V].copy_(torch.randn(3, V))
    tokens = shared_rows(V, [2, 0, 5]) if shared else one_token_a_row(V, 3)
    stats, _ = forward(logits, tokens, config=config)
    apart = torch.empty(3, V, dtype=grad_dtype)
    rows.row_backward_into(apart, logits, *tokens[:2], stats, tokens.coef, *PLAIN, config=config)
    eager = plain.row_backward(logits, *tokens[:2], stats, tokens.coef, *PLAIN)
    oracle = plain.row_backward(logits.double(), *tokens[:2], stats.double(), tokens.coef.double(), *PLAIN)
    assert_accurate(apart, eager.to(grad_dtype), oracle, "gradient")
    backward_(logits, tokens, stats, grad_dtype=grad_dtype, config=config)
    assert torch.equal(numerics.narrow_view(logits, grad_dtype), apart)


def test_gradient_into_rows_of_another_layout():
    V = 2 * BLOCK + 5
    logits, wide = torch.randn(3, V), torch.full((3, V + 4), 9.0)
    tokens = one_token_a_row(V, 3)
    stats, _ = forward(logits, tokens)
    rows.row_backward_into(wide[:, 3 : 3 + V], logits, *tokens[:2], stats, tokens.coef, *PLAIN, config=CONFIG)
    assert torch.equal(wide[:, 3 : 3 + V], backward(logits, tokens, stats))
    assert (wide[:, :3] == 9).all() and (wide[:, 3 + V :] == 9).all()


def test_expanded_logits_can_be_read():
    logits = torch.randn(1, 127).expand(3, 127)
    tokens = Tokens(torch.tensor([1, 1, 2]), None, torch.tensor([1.0, 1.0, 2.0]))
    stats, logps = forward(logits, tokens)
    grad = backward(logits, tokens, stats)
    assert logps[0] == logps[1] and torch.equal(grad[0], grad[1]) and not torch.equal(grad[1], grad[2])


@pytest.mark.parametrize("shared", [False, True], ids=["one token a row", "shared rows"])
@pytest.mark.parametrize("target", [7, -1, 8, -101, 2**32 + 3, -(2**40)])
def test_target_that_no_word_has(target, shared):
    """NaN, and no read or write outside the row; -1 and V would be words of its neighbours."""
    V = 7
    buffer = torch.randn(5, V)
    before, logits = buffer.clone(), buffer[1:4]
    tokens = Tokens(torch.tensor([2, target, 4]), torch.arange(4) if shared else None, torch.ones(3))
    stats, logps = forward(logits, tokens)
    assert logps.isnan().tolist() == [False, True, False]
    hits = torch.eye(V)[[2, 0, 4]]
    hits[1] = 0
    eager, oracle = (hits - torch.softmax(before[1:4].to(dtype), -1) for dtype in (torch.float32, torch.float64))
    backward_(logits, tokens, stats)
    assert_accurate(logits, eager, oracle, "gradient")
    assert torch.equal(buffer[[0, 4]], before[[0, 4]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(dtype):
    V = 3 * BLOCK + 5
    logits, tokens = torch.randn(3, V).to(dtype), shared_rows(V, [3, 1, 6])
    (stats, logps), (other_stats, other_logps) = (forward(logits, tokens) for _ in range(2))
    assert torch.equal(stats, other_stats) and torch.equal(logps, other_logps)
    assert torch.equal(backward(logits, tokens, stats), backward(logits, tokens, stats))


@pytest.mark.parametrize(("R", "N"), [(0, 0), (3, 0)])
def test_no_rows_and_no_tokens(R, N):
    logits = torch.randn(R, 7)
    tokens = Tokens(torch.zeros(N, dtype=torch.int64), torch.zeros(R + 1, dtype=torch.int64), torch.ones(N))
    stats, logps = forward(logits, tokens)
    assert stats.shape == (2, R) and logps.shape == (N,) and (stats == 0).all()
    backward_(logits, tokens, stats)
    assert (logits == 0).all()


def test_tanh_of_the_softcap():
    """A vocabulary of one word shows y itself: within 8 roundings on both branches and at their seam."""
    u = torch.cat([torch.logspace(-6, 1.5, 24), torch.tensor([0.6249, 0.6251, 40.0, 1e4])])
    u = torch.cat([u, -u, torch.zeros(1)])
    tokens = Tokens(torch.zeros(u.numel(), dtype=torch.int64), None, torch.ones(u.numel()))
    stats, _ = forward(u[:, None], tokens, (None, 1.0, 1.0, 1.0), {**CONFIG, "BLOCK": 4})
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


@pytest.mark.parametrize("r", [1, 7, 16, 41])  # less than a step; a tail; one program; several, the last cut short
@pytest.mark.parametrize("V", [1, 31, 64, 97])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_stats(dtype, V, r):
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
