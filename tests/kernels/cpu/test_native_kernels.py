"""The compiled row kernels, on every instruction set that this machine runs, against plain torch in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cpu_rows import BLOCK, BUILD, DTYPES, HEADS, ISAS, NO_PRODUCT, Head, call, tokens_for
from pairwise import pairwise
from tolerance import assert_accurate
from torch import Tensor

from cpo_kernels.kernels import ops
from cpo_kernels.kernels.cpu import extension as cpu_extension
from cpo_kernels.kernels.cpu import gemm as cpu_gemm
from cpo_kernels.kernels.cpu import rows as cpu_rows

pytestmark = pytest.mark.cpu  # the CPU extension


@pytest.fixture(params=ISAS)
def isa(request):
    return request.param


def dense_logps(y: Tensor, targets: Tensor, row_starts: Tensor) -> Tensor:
    """(R, V) transformed logits to (N,) log-probabilities, by torch."""
    rows = torch.repeat_interleave(torch.arange(len(y)), row_starts.diff())
    logps = torch.log_softmax(y, -1)[rows, targets.clamp(min=0)]
    return torch.where(targets == -100, 0.0, logps)


def dense_gradient(logits: Tensor, targets, row_starts, coef, head: Head) -> Tensor:
    """Gradient of sum_n coef_n logp_n by torch's autograd, in the dtype of the logits."""
    x = logits.detach().clone().requires_grad_()
    (dense_logps(head.transform(x), targets, row_starts) * coef.to(x.dtype)).sum().backward()
    return x.grad


def check_against_torch(logits: Tensor, targets, row_starts, coef, head: Head, isa: str) -> None:
    """Forward and backward by the rule of tolerance; eager torch computes in float32 and rounds the gradient once."""
    stats, logps = cpu_rows.row_forward(logits, targets, row_starts, *head.args(), isa=isa)
    grad = cpu_rows.row_backward(logits, targets, row_starts, stats, coef, *head.args(), isa=isa)

    single, double = logits.float(), logits.double()
    oracle_y = head.transform(double)
    assert_accurate(stats[0], head.transform(single).amax(-1), oracle_y.amax(-1), "max")
    eager, oracle = (dense_logps(head.transform(x), targets, row_starts) for x in (single, double))
    assert_accurate(logps, eager, oracle, "logps")
    eager, oracle = (dense_gradient(x, targets, row_starts, coef, head) for x in (single, double))
    assert_accurate(grad, eager.to(logits.dtype), oracle, "gradient")


SIZES = [
    1,  # the only probability is 1
    2,
    3,
    17,  # prime, less than two vectors of the widest instruction set
    127,  # prime, some vectors and a tail
    2 * BLOCK,  # no tail
    50257,  # many blocks, a tail
]


@pairwise({"dtype": DTYPES, "V": SIZES, "head": HEADS})
def test_matches_torch(isa, dtype, V, head):
    logits = (torch.randn(6, V) * 4).to(dtype)
    check_against_torch(logits, *tokens_for(V, [1, 3, 0, 5, 1, 2]), head(V), isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_a_row_needs_no_row_starts(isa, dtype):
    V = 127
    logits = torch.randn(5, V).to(dtype)
    targets, row_starts, coef = tokens_for(V, [1] * 5)
    head = Head().args()
    stats, logps = cpu_rows.row_forward(logits, targets, None, *head, isa=isa)
    same_stats, same_logps = cpu_rows.row_forward(logits, targets, row_starts, *head, isa=isa)
    assert torch.equal(stats, same_stats) and torch.equal(logps, same_logps)
    grad = cpu_rows.row_backward(logits, targets, None, stats, coef, *head, isa=isa)
    assert torch.equal(grad, cpu_rows.row_backward(logits, targets, row_starts, stats, coef, *head, isa=isa))


def test_a_default_device_is_not_where_results_go():
    """Under torch.set_default_device("cuda") an address there would be taken for one here."""
    logits = torch.randn(5, 127)
    targets, row_starts, coef = tokens_for(127, [1] * 5)
    wanted = [*cpu_rows.row_forward(logits, targets, row_starts, *Head().args())]
    wanted.append(cpu_rows.row_backward(logits, targets, row_starts, wanted[0], coef, *Head().args()))
    with torch.device("meta"):
        got = [*cpu_rows.row_forward(logits, targets, row_starts, *Head().args())]
        got.append(cpu_rows.row_backward(logits, targets, row_starts, got[0], coef, *Head().args()))
    assert all(torch.equal(mine, right) for mine, right in zip(got, wanted, strict=True))


@pytest.mark.parametrize("V", [3, 127, 50257])
@pytest.mark.parametrize("extreme", ["both", "first", "last"])
def test_huge_logits_lose_nothing(isa, V, extreme):
    logits = torch.randn(4, V)
    if extreme == "both":
        logits += torch.where(torch.rand(4, V) < 0.5, 1e4, -1e4)
    else:
        logits[:, 0 if extreme == "first" else V - 1] = 1e4
    check_against_torch(logits, *tokens_for(V, [2, 1, 1, 2]), Head(), isa)


@pytest.mark.parametrize("slope", [5000.0, -5000.0])
def test_maximum_that_moves_from_block_to_block(isa, slope):
    """Rising, every block exceeds the reference of the one before and is summed again."""
    V = 5 * BLOCK + 13
    logits = torch.linspace(-slope, slope, V).repeat(2, 1) + torch.randn(2, V)
    check_against_torch(logits, *tokens_for(V, [1, 2]), Head(), isa)


STRETCHES = [(3, 2), (127, 100), (3 * BLOCK, 2 * BLOCK + 5)]


@pairwise({"dtype": DTYPES, "V, stretch": STRETCHES, "leading": [True, False]})
def test_minus_infinity_is_probability_zero(isa, dtype, V, stretch, leading):
    logits = torch.randn(2, V).to(dtype)
    where = slice(0, stretch) if leading else slice(V - stretch, V)
    logits[:, where] = -torch.inf
    finite = V - 1 if leading else 0
    targets, row_starts, coef = torch.tensor([finite, finite]), torch.tensor([0, 1, 2]), torch.randn(2)
    check_against_torch(logits, targets, row_starts, coef, Head(), isa)
    stats, _ = cpu_rows.row_forward(logits, targets, row_starts, *Head().args(), isa=isa)
    grad = cpu_rows.row_backward(logits, targets, row_starts, stats, coef, *Head().args(), isa=isa)
    assert (grad[:, where] == 0).all()
    _, logps = cpu_rows.row_forward(logits, torch.full((2,), where.start), row_starts, *Head().args(), isa=isa)
    assert (logps == -torch.inf).all()


COLUMNS = [0, 70, BLOCK + 3, 2 * BLOCK + 6]


@pairwise({"dtype": DTYPES, "bad": [torch.nan, torch.inf], "column": COLUMNS, "head": ["plain", "bias", "softcap"]})
def test_nan_and_infinity_reach_their_row_and_no_other(isa, dtype, bad, column, head):
    V = 2 * BLOCK + 7
    logits = torch.randn(3, V).to(dtype)
    logits[1, column] = bad
    targets, coef, head = torch.tensor([5, 6, 7]), torch.ones(3), HEADS[head](V)
    stats, logps = cpu_rows.row_forward(logits, targets, None, *head.args(), isa=isa)
    grad = cpu_rows.row_backward(logits, targets, None, stats, coef, *head.args(), isa=isa)
    expected = dense_logps(head.transform(logits.float()), targets, torch.arange(4)).isnan()
    assert torch.equal(logps.isnan(), expected)
    if expected[1]:
        assert grad[1].isnan().all()
        assert not stats[:, 1].isfinite().all()
    assert grad[[0, 2]].isfinite().all()


def test_row_of_minus_infinity_is_nan_as_in_log_softmax(isa):
    logits = torch.full((1, 127), -torch.inf)
    _, logps = cpu_rows.row_forward(logits, torch.tensor([3]), None, *Head().args(), isa=isa)
    assert logps.isnan().all() and torch.log_softmax(logits, -1).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_gradient_come_out_zero(isa, dtype):
    """Zero coefs, absent tokens, no tokens: exactly 0 whatever the row holds; a NaN coef is a gradient."""
    V = 127
    logits = torch.full((4, V), torch.nan, dtype=dtype)
    row_starts = torch.tensor([0, 2, 3, 3, 4])
    targets, coef = torch.tensor([1, 2, -100, 3]), torch.tensor([0.0, 0.0, 5.0, torch.nan])
    stats = torch.full((2, 4), torch.nan)
    grad = cpu_rows.row_backward(logits, targets, row_starts, stats, coef, *Head().args(), isa=isa)
    assert (grad[:3] == 0).all() and grad[3].isnan().all()
    cpu_rows.row_backward_(logits, targets, row_starts, stats, coef, *Head().args(), isa=isa)
    assert (logits[:3] == 0).all() and logits[3].isnan().all()


@pairwise({"dtype": DTYPES, "V": [3, 127, 5003], "head": ["plain", "all"]})
def test_in_place_with_a_row_stride(isa, dtype, V, head):
    """A slice of a wider buffer gives the same bits, in place and not, and its surroundings keep theirs."""
    head = HEADS[head](V)
    buffer = torch.randn(5, V + 9).to(dtype)
    before, logits = buffer.clone(), buffer[:, 4 : 4 + V]
    targets, row_starts, coef = tokens_for(V, [2, 1, 0, 1, 4])
    stats, logps = cpu_rows.row_forward(logits, targets, row_starts, *head.args(), isa=isa)
    packed = logits.contiguous()
    same_stats, same_logps = cpu_rows.row_forward(packed, targets, row_starts, *head.args(), isa=isa)
    assert torch.equal(stats, same_stats) and torch.equal(logps, same_logps)
    grad = cpu_rows.row_backward(logits, targets, row_starts, stats, coef, *head.args(), isa=isa)
    assert torch.equal(buffer, before) and grad.is_contiguous()
    cpu_rows.row_backward_(logits, targets, row_starts, stats, coef, *head.args(), isa=isa)
    assert torch.equal(logits, grad)
    assert torch.equal(buffer[:, :4], before[:, :4]) and torch.equal(buffer[:, 4 + V :], before[:, 4 + V :])


def test_expanded_logits_can_be_read(isa):
    logits = torch.randn(1, 127).expand(3, 127)
    targets, coef = torch.tensor([1, 1, 2]), torch.tensor([1.0, 1.0, 2.0])
    stats, logps = cpu_rows.row_forward(logits, targets, None, *Head().args(), isa=isa)
    grad = cpu_rows.row_backward(logits, targets, None, stats, coef, *Head().args(), isa=isa)
    assert logps[0] == logps[1] and torch.equal(grad[0], grad[1]) and not torch.equal(grad[1], grad[2])


@pytest.mark.parametrize("count", [31, 32, 33, 500])
def test_many_tokens_in_a_row_with_repeated_targets(isa, count):
    """On both sides of the number from which repeated targets are found by sorting."""
    V = 17
    targets, row_starts, coef = tokens_for(V, [2, count, 1])
    check_against_torch(torch.randn(3, V), targets, row_starts, coef, Head(), isa)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_results_are_the_float32_results_rounded_once(isa, dtype):
    V = 5003
    logits = (torch.randn(4, V) * 3).to(dtype)
    targets, row_starts, _ = tokens_for(V, [1, 2, 1, 1])
    coef = torch.tensor([1.0, 1e-3, 1.0, 1e6, 3e9])  # up to overflow in float16, and down to its subnormals
    targets[3] = 5
    stats, logps = cpu_rows.row_forward(logits, targets, row_starts, *Head().args(), isa=isa)
    single = logits.float()
    stats_single, logps_single = cpu_rows.row_forward(single, targets, row_starts, *Head().args(), isa=isa)
    assert torch.equal(stats[0], stats_single[0])
    torch.testing.assert_close(stats[1], stats_single[1], rtol=0, atol=2e-6)  # summed in another order
    torch.testing.assert_close(logps, logps_single, rtol=0, atol=4e-6)
    grad = cpu_rows.row_backward(logits, targets, row_starts, stats, coef, *Head().args(), isa=isa)
    grad_single = cpu_rows.row_backward(single, targets, row_starts, stats, coef, *Head().args(), isa=isa)
    assert torch.equal(grad, grad_single.to(dtype))


def exponentials(x: Tensor, isa: str) -> Tensor:
    """e^x by the kernel: the gradient at other columns for max 0, log-sum 0 and a coef of -1."""
    logits = torch.cat([torch.zeros(1), x])[None]
    grad = cpu_rows.row_backward(
        logits, torch.tensor([0]), None, torch.zeros(2, 1), torch.tensor([-1.0]), *Head().args(), isa=isa
    )
    return grad[0, 1:]


def test_exponential_is_within_two_ulp(isa):
    x = torch.cat([torch.linspace(-87.33, 0, 2_000_003), -torch.logspace(-9, 1.9, 100_003)])
    exact = x.double().exp()
    _, exponent = torch.frexp(exact)
    ulp = torch.ldexp(torch.ones_like(exact), exponent - 24)
    assert ((exponentials(x, isa).double() - exact).abs() / ulp).max() <= 2


def test_exponential_underflows_to_zero(isa):
    x = torch.tensor([-87.4, -88.0, -104.0, -1e4, -1e30, -3e38, -torch.inf])
    assert (exponentials(x, isa) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_equal_for_any_number_of_threads(isa, dtype):
    R, V = 37, 5003
    logits = torch.randn(R, V).to(dtype)
    targets, row_starts, coef = tokens_for(V, [1, 0, 4] * 12 + [1])
    args = Head().args()
    results = []
    for threads in (1, 2, 2, 5):
        stats, logps = cpu_rows.row_forward(logits, targets, row_starts, *args, isa=isa, threads=threads)
        grad = cpu_rows.row_backward(logits, targets, row_starts, stats, coef, *args, isa=isa, threads=threads)
        results.append((stats, logps, grad))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("R", "N"), [(0, 0), (3, 0)])
def test_no_rows_and_no_tokens(isa, R, N):
    logits = torch.randn(R, 7)
    targets, row_starts, coef = torch.empty(N, dtype=torch.int64), torch.zeros(R + 1, dtype=torch.int64), torch.ones(N)
    stats, logps = cpu_rows.row_forward(logits, targets, row_starts, *Head().args(), isa=isa)
    assert stats.shape == (2, R) and logps.shape == (N,) and stats.isfinite().all()
    cpu_rows.row_backward_(logits, targets, row_starts, stats, coef, *Head().args(), isa=isa)
    assert (logits == 0).all()


BAD_CALLS = {
    "three dimensions": ({"logits": torch.ones(2, 5, 1)}, r"logits has shape \(2, 5, 1\); expected \(any, any\)"),
    "no columns": ({"logits": torch.ones(2, 0)}, r"shape \(2, 0\); expected at least one column"),
    "column stride": ({"logits": torch.ones(5, 2).T}, r"strides \(1, 2\); expected a column stride of 1"),
    "float64": ({"logits": torch.ones(2, 5).double()}, "float64; expected torch.float32 or"),
    "meta": ({"logits": torch.ones(2, 5, device="meta")}, "logits is on meta; expected a CPU tensor"),
    "overlapping rows": ({"logits": torch.ones(1, 5).expand(2, 5)}, "row stride 0: rows overlap"),
    "target too large": ({"targets": torch.tensor([1, -100, 5])}, r"targets\[2\] = 5; expected 0 <= target < V = 5"),
    "target negative": ({"targets": torch.tensor([-1, -100, 2])}, r"targets\[0\] = -1; expected"),
    "targets int32": ({"targets": torch.ones(3, dtype=torch.int32)}, "int32; expected torch.int64"),
    "targets on meta": ({"targets": torch.ones(3, dtype=torch.int64, device="meta")}, "targets is on meta"),
    "too few tokens": ({"row_starts": None, "targets": torch.ones(1).long()}, r"shape \(1,\); expected \(2\)"),
    "row_starts short": ({"row_starts": torch.tensor([0, 3])}, r"row_starts has shape \(2,\); expected \(3\)"),
    "row_starts end": ({"row_starts": torch.tensor([0, 2, 9])}, "goes from 0 to 9; expected 0 to N = 3"),
    "row_starts begin": ({"row_starts": torch.tensor([1, 2, 3])}, "goes from 1 to 3; expected 0 to N = 3"),
    "row_starts fall": (
        {"row_starts": torch.tensor([0, 7, 3])},
        r"row_starts\[2\] = 3 is less than row_starts\[1\] = 7",
    ),
    "row_starts negative": ({"row_starts": torch.tensor([0, -9, 3])}, r"row_starts\[1\] = -9 is less than"),
    "bias length": ({"bias": torch.ones(4)}, r"bias has shape \(4,\); expected \(5\)"),
    "stats shape": ({"stats": torch.zeros(2, 3)}, r"stats has shape \(2, 3\); expected \(2, 2\)"),
    "stats dtype": ({"stats": torch.zeros(2, 2).double()}, "stats has dtype torch.float64"),
    "coef shape": ({"coef": torch.ones(2)}, r"coef has shape \(2,\); expected \(3\)"),
    "coef dtype": ({"coef": torch.ones(3).half()}, "coef has dtype torch.float16"),
    "scale": ({"logit_scale": float("nan")}, "logit_scale is nan; expected a finite number"),
    "softcap": ({"softcap": -1.0}, "softcap is -1.0; expected"),
    "temperature": ({"temperature": 0.0}, "temperature is 0.0; expected"),
    "instruction set": ({"isa": "mmx"}, "instruction set 'mmx' cannot be used; compiled in: scalar"),
}


def test_the_small_call_is_valid():
    """The gradient of its rows: with statistics of 0, e to the logits, less 1 at the targets, times minus 1."""
    logits = torch.randn(2, 5)
    expected = -logits.exp()
    expected[0, 1] += 1
    expected[1, 2] += 1
    call(logits=logits)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_names_what_is_wrong_and_writes_nothing(changes, message):
    logits = changes.get("logits", torch.randn(2, 5))
    before = logits.clone()
    with pytest.raises(ValueError, match=message):
        call(**{"logits": logits, **changes})
    assert logits.is_meta or torch.equal(logits, before)


def test_operators_use_the_kernels_and_keep_their_schema():
    logits, coef, head = torch.randn(2, 127), torch.randn(2), Head().args()
    targets = torch.tensor([3, -100])
    stats, logps = cpu_rows.row_forward(logits, targets, None, *head)
    op_stats, op_logps = torch.ops.cpo_kernels.row_forward(logits, targets, None, *head)
    assert torch.equal(stats, op_stats) and torch.equal(logps, op_logps)
    torch.library.opcheck(ops.row_forward, (logits, targets, None, *head))
    torch.library.opcheck(ops.row_backward, (logits, targets, None, stats, coef, *head))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_environment_forces_the_instruction_set(isa, monkeypatch):
    monkeypatch.setenv(cpu_extension.ISA_VARIABLE, isa)
    cpu_extension.isa.cache_clear()
    cpu_gemm.gemm_supported.cache_clear()
    try:
        assert cpu_extension.isa() == isa
        kinds = ((torch.float32, torch.float32), (torch.float64, torch.float32), (torch.float32, torch.int8))
        assert [cpu_gemm.gemm_supported(*kind) for kind in kinds] == [isa not in NO_PRODUCT, False, False]
    finally:
        cpu_extension.isa.cache_clear()
        cpu_gemm.gemm_supported.cache_clear()


def test_environment_with_an_unknown_instruction_set_is_an_error():
    result = run_python("import cpo_kernels", CPO_KERNELS_CPU_ISA="mmx")
    assert result.returncode != 0
    assert f"CPO_KERNELS_CPU_ISA is 'mmx'; this machine runs {', '.join(BUILD.supported_isas)}" in result.stderr


COUNT_THREADS = """
import os, torch
from cpo_kernels.kernels.cpu import extension as cpu_extension
from cpo_kernels.kernels.cpu import gemm as cpu_gemm
from cpo_kernels.kernels.cpu import rows as cpu_rows
torch.set_num_threads(4)
count = lambda: len(os.listdir("/proc/self/task"))
logits, targets = torch.randn(64, 50257), torch.zeros(64, dtype=torch.int64)
start = count()
cpu_rows.row_forward(logits, targets, None, None, 1.0, 0.0, 1.0, threads=1)
alone = count()
logits.exp()
torch_pool = count()
stats, logps = cpu_rows.row_forward(logits, targets, None, None, 1.0, 0.0, 1.0)
cpu_rows.row_backward_(logits, targets, None, stats, logps, None, 1.0, 0.0, 1.0)
print(alone - start, torch_pool - start, count() - start)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_shares_the_threads_of_torch():
    """Torch's pool serves the kernels too: they start no thread beyond the three that torch had started."""
    result = run_python(COUNT_THREADS)
    assert result.stdout.split() == ["0", "3", "3"], result.stdout + result.stderr
