"""Forward and unit gradient in one read of each row, by a cluster of CUDA blocks, run thread by thread on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from pairwise import pairwise
from row_kernels import DTYPES, HEADS, NARROW, PLAIN, SHARED, Tokens, shared_rows
from simt_host import EmulatorError
from tolerance import assert_accurate

from cpo_kernels.kernels import numerics
from cpo_kernels.kernels.cuda import rows as cuda_rows
from cpo_kernels.kernels.transform import transform_logits

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("emulator")]

# Bytes of a row in a block, for rows of some thousand: one block, two, eight, and eight that hold more than asked.
SLICES = {"one": 0, "two": 3000, "eight": 700, "eight at most": 64}
# Target and coef of each token of each row; NaN is what a coef without a token may be.
NAN = float("nan")
ONE_TOKEN = [[(1, 0.7)], [(-100, NAN)], [(-1, -1.3)], [(3, 0.0)], [(0, 2.0)]]
SHARED_ROWS = [
    [(5, 0.7)],
    [(5, 0.1), (5, -0.7), (-100, NAN), (5, 0.3)],
    [],
    [(-100, NAN), (-100, NAN)],
    [(1, 0.5), (6, -0.25)],
    [(-100, NAN), (-1, 1.5)],
    [(2, 0.3), (3, 0.0), (2, -0.9)],
    [(4, 0.0), (4, 0.0)],
    [(4, -0.0), (7, 0.0)],
    [(3, 1.0), (3, -1.0)],
    [(3, 1.0), (4, -1.0)],
    [(n % 2, 0.1 * n) for n in range(40)],
    [(9, 0.1 * n) for n in range(40)],
]


def tokens_of(rows, V) -> Tokens:
    """Make the tokens of rows; targets count modulo V."""
    targets, coef = ([token[part] for row in rows for token in row] for part in (0, 1))
    starts = [sum(map(len, rows[:n])) for n in range(len(rows) + 1)]
    targets = torch.tensor([target if target == -100 else target % V for target in targets])
    return Tokens(targets, torch.tensor(starts), torch.tensor(coef))


def some_tokens(V, shared) -> Tokens:
    return tokens_of(SHARED_ROWS, V) if shared else tokens_of(ONE_TOKEN, V)._replace(row_starts=None)


def by_row(tokens):
    """Targets and coefs of the tokens that count, row by row."""
    starts = range(len(tokens.targets) + 1) if tokens.row_starts is None else tokens.row_starts.tolist()
    for begin, end in itertools.pairwise(starts):
        there = tokens.targets[begin:end] != -100
        yield tokens.targets[begin:end][there], tokens.coef[begin:end][there]


def unit_(logits, tokens, head=PLAIN, grad_dtype=None, threads=32, slice_bytes=0):
    options = {"threads": threads, "slice_bytes": slice_bytes}
    return cuda_rows.unit_forward_(logits, *tokens[:2], *head, grad_dtype, **options)


def finish_(logits, tokens, stats, head=PLAIN, grad_dtype=None, threads=32):
    return cuda_rows.unit_finish_(logits, *tokens[:2], stats, tokens.coef, *head, grad_dtype, threads=threads)


def plain_torch(logits, tokens, head):
    """Log-sum-exp (R,), log-probabilities (N,), unit gradients (R, V) of one target, whole gradient (R, V)."""
    raw = logits.clone().requires_grad_()
    bias, *numbers = head
    y = transform_logits(raw, None if bias is None else bias.to(raw.dtype), *numbers)
    logps, units, losses = [], [], []
    for row, (targets, coef) in zip(y.log_softmax(-1), by_row(tokens), strict=True):
        logps.append(row[targets])
        units.append(row[targets[:1]].sum() if len(targets.unique()) == 1 else 0 * row[0])
        losses.append((logps[-1] * coef).sum())
    unit, whole = (torch.autograd.grad(sum(terms), raw, retain_graph=True)[0] for terms in (units, losses))
    found = torch.zeros(len(tokens.targets), dtype=raw.dtype)
    found[tokens.targets != -100] = torch.cat(logps).detach()
    return y.detach().logsumexp(-1), found, unit, whole


def check(logits, tokens, head=PLAIN, grad_dtype=None, threads=32, slice_bytes=0):
    """Against plain PyTorch in float64, by the rule of tolerance; what is to stay, to the last bit."""
    before, dtype = logits.clone(), grad_dtype or logits.dtype
    lse, logps, unit, whole = zip(
        plain_torch(before.float(), tokens, head), plain_torch(before.double(), tokens, head), strict=True
    )
    rows = list(by_row(tokens))
    numbers = torch.tensor([len(targets.unique()) for targets, _ in rows])
    active = torch.tensor([bool(coef.any()) for _, coef in rows])

    out_stats, out_logps = unit_(logits, tokens, head, grad_dtype, threads, slice_bytes)
    grad = numerics.narrow_view(logits, dtype)
    assert (out_stats[:, numbers == 0] == 0).all() and (grad[numbers == 0] == 0).all()
    assert_accurate(out_stats.sum(0)[numbers > 0], *(each[numbers > 0] for each in lse), "log-sum-exp")
    assert_accurate(out_logps, *logps, "logps")
    eager, oracle = (each[numbers == 1] for each in unit)
    assert_accurate(grad[numbers == 1], eager.to(dtype), oracle, "unit gradient")
    assert torch.equal(logits[numbers > 1], before[numbers > 1])

    held = grad[numbers == 1]
    held[~active[numbers == 1]] = 0
    scale = finish_(logits, tokens, out_stats, head, grad_dtype, threads)
    assert torch.equal(grad[numbers == 1], held)
    assert (grad[~active] == 0).all()
    in_order = torch.stack([sum(coef, torch.zeros(())) for _, coef in rows])
    assert torch.equal(scale, torch.where(numbers > 1, active.float(), in_order))
    apart = before.clone()
    cuda_rows.row_backward_(apart, *tokens[:2], out_stats, tokens.coef, *head, grad_dtype, threads=threads)
    several = numerics.narrow_view(apart, dtype)[numbers > 1]
    assert torch.equal(grad[numbers > 1], several)
    assert_accurate((grad * scale[:, None]).to(dtype), whole[0].to(dtype), whole[1], "gradient")


@pairwise({"dtype": DTYPES, "V": [1, 31, 1024, 1031], "slice_bytes": SLICES, "shared": SHARED})
def test_every_cluster(dtype, V, slice_bytes, shared):
    tokens = some_tokens(V, shared)
    check((torch.randn(len(list(by_row(tokens))), V) * 4).to(dtype), tokens, slice_bytes=slice_bytes)


@pairwise({"dtype": DTYPES, "head": HEADS, "shared": SHARED})
def test_every_head(dtype, head, shared):
    tokens = some_tokens(1031, shared)
    check((torch.randn(len(list(by_row(tokens))), 1031) * 4).to(dtype), tokens, head(1031), slice_bytes=1024)


WIDTHS = {
    f"{V} of {width}": (V, width) for V, width in [(2, 2), (1200, 1200), (1201, 1201), (1202, 1202), (1031, 1040)]
}


@pairwise({"seed": [0, 1, 2], "V, width": WIDTHS, "grad_dtype": NARROW, "shared": SHARED})
def test_narrow_gradient_over_its_logits(emulator, seed, V, width, grad_dtype, shared):
    emulator.seed = seed
    tokens = some_tokens(V, shared)
    logits = torch.randn(len(list(by_row(tokens))), width)[:, :V]
    check(logits, tokens, grad_dtype=grad_dtype, slice_bytes=1000)


def test_statistics_as_in_row_forward():
    """The same sums in another order, and nothing else."""
    logits, tokens = torch.randn(3, 4099), shared_rows(4099, [2, 3, 1])
    expected = cuda_rows.row_forward(logits, *tokens[:2], *PLAIN)
    for a, b in zip(unit_(logits, tokens, slice_bytes=4096), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_rows_that_hold_nan():
    """One without a token is not read; one whose coefs are all 0 is NaN until they are known, and then 0."""
    logits = torch.full((4, 1031), torch.nan)
    logits[3] = 1.0
    tokens = tokens_of([[(-100, NAN)], [(3, 0.0)], [(3, 0.0), (4, 0.0)], [(5, NAN)]], 1031)
    stats, logps = unit_(logits, tokens, slice_bytes=512)
    assert (stats[:, 0] == 0).all() and logps.isnan().tolist() == [False, True, True, True, False]
    assert (logits[0] == 0).all() and logits[1:3].isnan().all()
    scale = finish_(logits, tokens, stats)
    assert (logits[:3] == 0).all() and scale[:3].tolist() == [0, 0, 0]
    assert logits[3].isfinite().all() and scale[3].isnan()  # a NaN coef is a gradient


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("target", [7, -1, 8, 2**32 + 3, -(2**63)])
def test_target_that_no_word_has(target, shared):
    """It is one target like another, without a column; -1 and V would be columns of the neighbours."""
    buffer = torch.randn(5, 7)
    before, rows = buffer.clone(), [[2], [target, target] if shared else [target], [4, target] if shared else [4]]
    starts = torch.tensor([0, 1, 3, 5]) if shared else None
    targets = torch.tensor([token for row in rows for token in row])
    tokens = Tokens(targets, starts, torch.linspace(0.5, 1.5, len(targets)))
    stats, logps = unit_(buffer[1:4], tokens, slice_bytes=16)
    assert torch.equal(logps.isnan(), targets == target)
    probabilities = before[1:4].double().softmax(-1)
    hits = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(buffer[1].double(), hits[2] - probabilities[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(buffer[2].double(), -probabilities[1], rtol=1e-5, atol=1e-7)
    assert not shared or torch.equal(buffer[3], before[3])
    scale = finish_(buffer[1:4], tokens, stats)
    if shared:
        torch.testing.assert_close(scale, torch.tensor([0.5, 1.75, 1.0]))
        torch.testing.assert_close(buffer[3].double(), 1.25 * hits[4] - 2.75 * probabilities[2], rtol=1e-5, atol=1e-6)
    assert torch.equal(buffer[[0, 4]], before[[0, 4]])


def test_nan_reaches_its_row_and_no_other():
    logits = torch.randn(3, 1031)
    logits[1, 1000] = torch.nan
    _, logps = unit_(logits, Tokens(torch.tensor([1, 2, 3]), None, torch.ones(3)), slice_bytes=600)
    assert logps.isnan().tolist() == [False, True, False]
    assert logits[1].isnan().all() and logits[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_a_certain_word_has_no_gradient(shared):
    """It has all the probability: exactly 0, as in the two kernels for coefs that are known."""
    logits = torch.full((1, 5), -200.0)
    logits[0, 3] = 7.7
    tokens = tokens_of([[(3, 0.3), (3, 0.4)] if shared else [(3, 0.3)]], 5)
    _, logps = unit_(logits, tokens if shared else tokens._replace(row_starts=None))
    assert (logps == 0).all() and (logits == 0).all()


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_the_order_of_the_threads_changes_no_bit(emulator, shared):
    tokens, results = some_tokens(2063, shared), []
    logits = torch.randn(len(list(by_row(tokens))), 2063).bfloat16()
    for emulator.seed in range(5):
        over = logits.clone()
        stats, logps = unit_(over, tokens, threads=64, slice_bytes=600)
        held = over.clone()
        results.append((stats, logps, held, finish_(over, tokens, stats, threads=64), over))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_no_rows():
    tokens = Tokens(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.zeros(0))
    stats, logps = unit_(torch.zeros(0, 7), tokens)
    assert stats.shape == (2, 0) and logps.shape == (0,)
    assert finish_(torch.zeros(0, 7), tokens, stats).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_longest_rows(dtype):
    """8 blocks of 227 KB, less what the blocks keep beside the row."""
    longest = 8 * (227 * 1024 - 208) // dtype.itemsize
    assert cuda_rows.unit_takes(torch.empty(1, longest, dtype=dtype))
    assert not cuda_rows.unit_takes(torch.empty(1, longest + 1, dtype=dtype))
    assert not cuda_rows.unit_takes(torch.empty(1, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.randn(2, 5).double()}, "logits has dtype torch.float64"),
        ({"logits": torch.randn(1, 5).expand(2, 5)}, "rows overlap and cannot be overwritten"),
        ({"targets": torch.tensor([1, 2, 3])}, r"targets has shape \(3,\); expected \(2\)"),
        ({"grad_dtype": torch.float64}, "grad_dtype is torch.float64"),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    given = {"logits": torch.randn(2, 5), "targets": torch.tensor([1, -100]), "row_starts": None, "grad_dtype": None}
    given |= dict(zip(("bias", "logit_scale", "softcap", "temperature"), PLAIN, strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        cuda_rows.unit_forward_(**given)
    with pytest.raises(ValueError, match=message):
        cuda_rows.unit_finish_(**given, stats=torch.zeros(2, 2), coef=torch.ones(2))


@pytest.mark.parametrize("name", ["stats", "coef"])
def test_numbers_of_another_size_do_not_fit(name):
    numbers = {"stats": torch.zeros(2, 2), "coef": torch.ones(2)} | {name: torch.zeros(3)}
    with pytest.raises(ValueError, match=rf"{name} has shape \(3,?\)"):
        cuda_rows.unit_finish_(torch.randn(2, 5), torch.tensor([1, 2]), None, *numbers.values(), *PLAIN)


def test_rows_that_no_cluster_holds():
    with pytest.raises(
        EmulatorError, match="a row of 2000000 bytes; expected what the shared memory of 8 blocks holds"
    ):
        unit_(torch.zeros(1, 500_000), Tokens(torch.tensor([1]), None, torch.ones(1)))
