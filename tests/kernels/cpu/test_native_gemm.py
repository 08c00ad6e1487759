"""The compiled matrix product, on every instruction set that has one, against torch in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from cpu_rows import BUILD, DTYPES, NO_PRODUCT, PRODUCT_ISAS
from pairwise import pairwise
from tolerance import assert_accurate, relative_error

from cpo_kernels.kernels.checks import DTYPE_CODES
from cpo_kernels.kernels.cpu import extension as cpu_extension
from cpo_kernels.kernels.cpu import gemm as cpu_gemm

pytestmark = pytest.mark.cpu  # the CPU extension


SIZES = {  # (M, K, N); tiles are 8 x 48 (AVX-512) and 6 x 16 (AVX2), a block of k 768 units
    "one number": (1, 1, 1),
    "one row": (1, 50, 97),
    "one column": (97, 50, 1),
    "k of one": (9, 1, 49),
    "one tile": (8, 16, 48),
    "one tile of AVX2": (6, 8, 16),
    "tile edges": (17, 33, 49),
    "tile edges of AVX2": (7, 9, 25),
    "primes": (61, 101, 131),
    "two blocks of fp32, one of bf16 pairs": (41, 769, 53),
    "odd k over several blocks": (23, 3079, 101),
    "several blocks of rows": (2011, 1543, 50),
    "several spans of columns": (19, 1601, 2203),
}


@pytest.fixture(params=PRODUCT_ISAS)
def isa(request):
    return request.param


def row_major(rows, cols):
    return torch.randn(rows, cols)


def transposed(rows, cols):
    return torch.randn(cols, rows).t()


def slice_of_wider(rows, cols):
    return torch.randn(rows, cols + 5)[:, 3 : 3 + cols]


def strided(rows, cols):
    return torch.randn(2 * rows, 3 * cols)[::2, ::3]


def repeated_row(rows, cols):
    return torch.randn(1, cols).expand(rows, cols)


LAYOUTS = {make.__name__: make for make in (row_major, transposed, slice_of_wider, strided, repeated_row)}


def with_dtype(x, dtype):
    """``x`` in another dtype, keeping its strides: a conversion would make it contiguous."""
    if 0 in x.stride():
        return x[:1].to(dtype).expand(x.shape)
    out = torch.zeros(x.untyped_storage().nbytes() // 4, dtype=dtype)
    return out.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def guarded_out(rows, cols, dtype):
    """NaN-filled (rows, cols) inside a wider buffer, and the buffer's columns beside it."""
    buffer = torch.full((rows, cols + 7), torch.nan, dtype=dtype)
    return buffer[:, 2 : 2 + cols], (buffer[:, :2], buffer[:, 2 + cols :])


def check(a, b, out_dtype, isa, *, accumulate=False, threads=2):
    out, guards = guarded_out(a.shape[0], b.shape[1], out_dtype)
    start = torch.randn(out.shape) if accumulate else torch.zeros(out.shape)
    if accumulate:
        out.copy_(start)
    cpu_gemm.gemm(a, b, out, accumulate=accumulate, isa=isa, threads=threads)
    oracle = a.double() @ b.double() + start.double()
    # Float32 products of the same numbers, rounded once: stricter than torch.mm in half precision.
    eager = (torch.mm(a.float(), b.float()) + start).to(out_dtype)
    assert_accurate(out, eager, oracle, "product")
    assert all(guard.isnan().all() for guard in guards)
    return out


@pairwise({"dtype": DTYPES, "out_dtype": DTYPES, "size": SIZES})
def test_sizes(isa, dtype, out_dtype, size):
    m, k, n = size
    check(torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), out_dtype, isa)


# Of bfloat16, pairs are read where they lie for an even k.
@pairwise({"dtype": DTYPES, "k": [66, 67], "a_layout": LAYOUTS, "b_layout": LAYOUTS})
def test_layouts(isa, dtype, k, a_layout, b_layout):
    a, b = with_dtype(a_layout(37, k), dtype), with_dtype(b_layout(k, 71), dtype)
    check(a, b, torch.float32, isa)


def test_layouts_keep_their_strides():
    for layout in LAYOUTS.values():
        x = layout(37, 67)
        assert with_dtype(x, torch.bfloat16).stride() == x.stride()


@pytest.mark.parametrize("a_dtype, b_dtype", [p for p in itertools.product(DTYPES, repeat=2) if p[0] != p[1]], ids=str)
def test_mixed_dtypes(isa, a_dtype, b_dtype):
    check(torch.randn(33, 801).to(a_dtype), torch.randn(801, 65).to(b_dtype), torch.float32, isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [0, 5, 2000])
def test_accumulate(isa, dtype, k):
    check(torch.randn(27, k).to(dtype), torch.randn(k, 59).to(dtype), torch.float32, isa, accumulate=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sum(isa, dtype):
    """The gradient of the hidden rows is a sum over the vocabulary."""
    check(torch.randn(9, 50257).to(dtype), torch.randn(50257, 50).to(dtype), dtype, isa)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=str)
def test_empty(isa, shape):
    m, k, n = shape
    out = torch.full((m, n), torch.nan)
    cpu_gemm.gemm(torch.randn(m, k), torch.randn(k, n), out, isa=isa)
    assert torch.equal(out, torch.zeros(m, n))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_for_any_number_of_threads(isa, dtype, out_dtype):
    a, b = torch.randn(331, 2003).to(dtype), torch.randn(2003, 401).to(dtype)
    first, *others = [check(a, b, out_dtype, isa, threads=threads) for threads in (1, 1, 2, 3, 7, 16)]
    assert all(torch.equal(first, other) for other in others)


@pairwise({"dtype": DTYPES, "k": [16, 777, 4096, 4097], "out_dtype": DTYPES, "subnormal": [False, True]})
def test_an_a_that_is_packed_and_one_that_is_not_give_the_same_bits(isa, dtype, k, out_dtype, subnormal):
    scale = 1.0 if not subnormal else 1e-4 if dtype == torch.float16 else 1e-19  # of inputs, or of their products
    a, b = (scale * torch.randn(37, k)).to(dtype), (scale * torch.randn(k, 112)).to(dtype)
    in_place, packed = torch.empty(37, 112, dtype=out_dtype), torch.empty(37, 112, dtype=out_dtype)
    cpu_gemm.gemm(a, b, in_place, isa=isa)
    cpu_gemm.gemm(a.t().contiguous().t(), b, packed, isa=isa)
    assert torch.equal(in_place, packed)


@pytest.mark.parametrize("k", [64, 4000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_narrow_result_is_the_wide_one_rounded(isa, dtype, k):
    a, b = torch.randn(19, k).to(dtype), torch.randn(k, 71).to(dtype)
    a[3, 5], a[4, 6], b[7, 8] = torch.nan, torch.inf, -torch.inf
    wide = torch.empty(19, 71)
    cpu_gemm.gemm(a, b, wide, isa=isa)
    for narrow in (torch.bfloat16, torch.float16):
        out = torch.empty(19, 71, dtype=narrow)
        cpu_gemm.gemm(a, b, out, isa=isa)
        torch.testing.assert_close(out, wide.to(narrow), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_reach_their_row_and_column_only(isa, dtype):
    a, b = torch.randn(20, 31).to(dtype), torch.randn(31, 60).to(dtype)
    a[3, 30], b[30, 50] = torch.inf, torch.nan
    out = torch.empty(20, 60)
    cpu_gemm.gemm(a, b, out, isa=isa)
    expected = a.float() @ b.float()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


@pytest.mark.parametrize("out_dtype", DTYPES[1:], ids=str)
def test_results_are_rounded_to_nearest_even(isa, out_dtype):
    values = torch.randn(64, 64) * torch.logspace(-44, 38, 64)  # subnormal to overflowing, in either format
    values[0, :6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1 + 2**-9, 1 + 3 * 2**-9])
    out = torch.empty(64, 64, dtype=out_dtype)
    cpu_gemm.gemm(values, torch.eye(64), out, isa=isa)
    finite = values.isfinite().all(1)  # infinity times 0 is NaN in the others
    assert torch.equal(out[finite], (values[finite] @ torch.eye(64)).to(out_dtype))


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("shape", [(512, 50257, 768), (4096, 4096, 128256), (3, 1, 10**6), (5000, 770, 5000)], ids=str)
def test_workspace_is_bounded(isa, shape, threads):
    m, k, n = shape
    for dtype, out_dtype in itertools.product((0, 1), repeat=2):
        size = {"a_dtype": dtype, "b_dtype": dtype, "out_dtype": out_dtype, "threads": threads}
        allocated = cpu_extension.extension().gemm_workspace_bytes(isa=isa, m=m, n=n, k=k, **size)
        assert allocated <= threads * (4 if out_dtype == 0 else 8) * 2**20


@pytest.mark.parametrize("dtype", [0, 1])
@pytest.mark.parametrize("size", [(1024, 50257, 768), (300, 32000, 3200), (70, 999, 24)], ids=str)
def test_the_most_workspace_is_that_of_any_block_of_rows(isa, size, dtype):
    """A block of fewer rows may take more than all of them, since blocks are evened out: the plan counts the most."""
    rows, vocab, hidden = size
    threads, dtypes = 2, {"a_dtype": dtype, "b_dtype": dtype, "out_dtype": dtype}
    module = cpu_extension.extension()
    most = module.most_workspace_bytes(isa=isa, rows=rows, vocab=vocab, hidden=hidden, dtype=dtype, threads=threads)
    for r in (*range(1, rows, 13), rows):
        for m, n, k in ((r, vocab, hidden), (r, hidden, vocab), (vocab, hidden, r)):
            own = module.gemm_workspace_bytes(isa=isa, m=m, n=n, k=k, threads=threads, **dtypes)
            assert own <= 1.01 * most, (m, n, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_multiply_adds_is_measured(dtype):
    rate = cpu_gemm.peak_flops(dtype, 0.02)
    assert rate > 0 if cpu_gemm.gemm_supported(torch.float32, torch.float32) else rate >= 0
    with pytest.raises(ValueError, match="dtype code 9"):
        cpu_extension.extension().peak_multiply_adds(dtype=9, threads=1, seconds=0.01)


A, B, OUT = torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(3, 5)


@pytest.mark.parametrize(
    "a, b, out, message",
    [
        (A[0], B, OUT, r"a has shape \(4,\); expected \(any, any\)"),
        (A, B[:3], OUT, r"b has shape \(3, 5\); expected \(4, any\)"),
        (A, B[0], OUT, r"b has shape \(5,\); expected \(4, any\)"),
        (A, torch.tensor(1.0), OUT, r"b has shape \(\); expected \(4, any\)"),
        (A, B, OUT[:, :4], r"out has shape \(3, 4\); expected \(3, 5\)"),
        (A.double(), B, OUT, "a has dtype torch.float64; expected torch.float32 or"),
        (A, B.long(), OUT, "b has dtype torch.int64"),
        (A, B, OUT.double(), "out has dtype torch.float64"),
        (A.to("meta"), B, OUT, "a is on meta; expected a CPU tensor"),
        (A, B.to("meta"), OUT, "b is on meta"),
        (A, B, OUT.to("meta"), "out is on meta"),
        (A, B, torch.zeros(5, 3).t(), r"out has strides \(1, 3\)"),
        (A, B, torch.zeros(1, 5).expand(3, 5), r"out has strides \(0, 1\)"),
        (A, OUT.as_strided((4, 5), (1, 1)), OUT, "b and out share memory"),
    ],
)
def test_wrong_tensors_are_refused(a, b, out, message):
    before = out.clone() if out.device.type == "cpu" else None
    with pytest.raises(ValueError, match=message):
        cpu_gemm.gemm(a, b, out)
    assert before is None or torch.equal(out, before)


def test_an_input_that_is_the_output_is_refused():
    x = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="a and out share memory"):
        cpu_gemm.gemm(x, torch.zeros(4, 4), x)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sums_are_kept_in_float32_only(dtype):
    with pytest.raises(ValueError, match=f"out has dtype {dtype}; expected torch.float32"):
        cpu_gemm.gemm(A, B, OUT.to(dtype), accumulate=True)


@pytest.mark.parametrize("name", NO_PRODUCT)
def test_instruction_sets_without_a_product_say_so(name):
    if name not in BUILD.supported_isas:
        pytest.skip(f"this machine does not run {name}")
    with pytest.raises(ValueError, match=f"no matrix product for instruction set '{name}'"):
        cpu_gemm.gemm(A, B, OUT, isa=name)


@pytest.mark.parametrize("amx", [False, True])
def test_half_precision_is_left_to_amx(monkeypatch, amx):
    if cpu_extension.isa() in NO_PRODUCT:
        pytest.skip(f"{cpu_extension.isa()} has no matrix product")
    monkeypatch.setattr(cpu_extension.extension(), "has_amx_bf16", lambda: amx)
    cpu_gemm.gemm_supported.cache_clear()
    try:
        assert cpu_gemm.gemm_supported(torch.float32, torch.float32)
        assert cpu_gemm.gemm_supported(torch.bfloat16, torch.float32) != amx
        assert cpu_gemm.gemm_supported(torch.float16, torch.float32) != amx
    finally:
        cpu_gemm.gemm_supported.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (7, 49, 5), (61, 97, 33), (40, 128, 1601)])
def test_a_pair_keeps_sixteen_more_bits(isa, dtype, m, n, k):
    """Eight products are summed: the pair is as exact as a float32 sum of them, its high half its rounding."""
    terms = [(torch.randn(k, m).to(dtype).t(), torch.randn(k, n).to(dtype)) for _ in range(8)]
    wide = torch.full((2, m, n + 3), torch.nan, dtype=torch.bfloat16)
    high, low = wide[0, :, :n], wide[1, :, :n]
    single = torch.empty(m, n)
    for index, (a, b) in enumerate(terms):
        cpu_gemm.gemm(a, b, high, low=low, accumulate=index > 0, isa=isa)
        cpu_gemm.gemm(a, b, single, accumulate=index > 0, isa=isa)
    exact = sum(a.double() @ b.double() for a, b in terms)
    pair = high.double() + low.double()
    limit = relative_error(single, exact) + len(terms) * 2.0**-16
    assert relative_error(pair, exact) <= limit
    assert (low.double().abs() <= high.double().abs() * 2.0**-8).all()  # half a unit in the last place, at most
    assert relative_error(high, exact) <= relative_error(exact.bfloat16(), exact) + limit
    assert wide[:, :, n:].isnan().all()


def test_pairs_are_bitwise_the_same_for_any_number_of_threads(isa):
    a, b = torch.randn(300, 210).bfloat16(), torch.randn(210, 97).bfloat16()
    results = []
    for threads in (1, 2, 3):
        high, low = torch.ones(300, 97).bfloat16(), torch.full((300, 97), 2.0**-12).bfloat16()
        cpu_gemm.gemm(a, b, high, low=low, accumulate=True, isa=isa, threads=threads)
        results.append(torch.stack([high, low]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_nan_and_inf_stay_in_a_pair(isa):
    high, low = torch.zeros(2, 3).bfloat16(), torch.zeros(2, 3).bfloat16()
    a = torch.tensor([[torch.nan], [torch.inf]])
    cpu_gemm.gemm(a, torch.ones(1, 3), high, low=low, accumulate=True, isa=isa)
    assert high[0].isnan().all() and (high[1] == torch.inf).all()


def test_a_pair_must_be_two_like_tensors():
    high = OUT.bfloat16()
    with pytest.raises(ValueError, match=r"low has strides .* expected those of out"):
        cpu_gemm.gemm(A, B, high, low=high.clone().t().contiguous().t())
    with pytest.raises(ValueError, match="out and low share memory"):
        cpu_gemm.gemm(A, B, high, low=high)
    with pytest.raises(ValueError, match=r"out has dtype torch\.float32; expected torch\.bfloat16"):
        cpu_gemm.gemm(A, B, OUT, low=high)


# Products of heads: (rows, V, H), of a step of GPT-2's, of Llama 3's, of a small one.
HEADS_OF_MODELS = {"gpt2": (1024, 50257, 768), "llama3": (512, 128256, 4096), "small": (512, 8192, 256)}


@pytest.mark.parametrize("threads", [1, 2, 8, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HEADS_OF_MODELS)
def test_no_thread_of_many_has_much_more_than_its_share(isa, name, dtype, threads):
    """A simulation: what each of 64 threads would make, on a machine that has two. None waits before the end."""
    R, V, H = HEADS_OF_MODELS[name]
    products = {"logits": (R, V, H, True), "grad_hidden": (R, H, V, False), "grad_weight": (V, H, R, False)}
    for product, (m, n, k, softmax) in products.items():
        sizes = {"m": m, "n": n, "k": k, "dtype": DTYPE_CODES[dtype], "threads": threads, "softmax": softmax}
        shares = cpu_extension.extension().gemm_shares(isa=isa, **sizes)
        areas = [(rows_end - rows) * (cols_end - cols) for rows, rows_end, cols, cols_end in shares]
        assert sum(areas) == m * n, f"{product}: the shares are not the whole"
        corners = {(rows, cols) for rows, _, cols, _ in shares}
        assert len(corners) == len(shares) <= threads
        assert max(areas) <= 1.1 * m * n / threads, f"{product}: {max(areas) / (m * n / threads):.2f} of a share"
        # Neighbours begin at whole vectors, and what they add up together is never one sum.
        assert all(cols % (48 if softmax else 16) == 0 for _, _, cols, _ in shares)
