"""The fused linear forward for Hopper against the reference in float64: the sources that nvcc compiles, run on the CPU.

tests/simt/simt_hopper.h stands in for the copy engine, its barriers and the tensor cores, as late as they may be.
The tiles are the GPU's: 128 rows x 256 columns x 64 hidden units, four stages of them under way.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace

import hopper_host
import pytest
import simt_host
import small_run
import torch
from hopper_host import Schedule, Unit
from linear_cases import case, check, check_gradient, coefs
from pairwise import pairwise
from row_kernels import HEADS, SHARED
from row_kernels import NARROW as DTYPES
from tolerance import assert_accurate

from cpo_kernels.kernels.cuda import extension as cuda_extension

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(simt_host.compiler() is None, reason="needs g++"),
]

ROWS, COLUMNS, DEPTH, STAGES = 128, 256, 64, 4  # of a tile; tiles under way


@pytest.fixture(autouse=True)
def gpu(hopper_library, monkeypatch):
    """The CUDA extension that is found; tensors of the CPU are those of its device."""
    module = hopper_host.HopperModule(hopper_library)
    monkeypatch.setattr(cuda_extension, "_load", lambda: (module, None))
    monkeypatch.setattr(cuda_extension, "queue", lambda device: {"device": 0, "stream": 0})
    return module


@pairwise({"dtype": DTYPES, "V": [1, 2, 101, COLUMNS, COLUMNS + 1, 2 * COLUMNS + 129], "shared": SHARED})
def test_every_vocabulary(dtype, V, shared):
    check(case(dtype, V=V, counts=[1, 3, 0, 5, 2] if shared else None))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head(dtype, head):
    V = COLUMNS + 77
    check(case(dtype, V=V, counts=[1, 3, 0, 5, 2], head=head(V)))


@pytest.mark.parametrize("H", [1, 7, 8, 16, DEPTH, DEPTH + 1, (STAGES + 2) * DEPTH + 5])
def test_every_depth(H):
    """Less than a stage and more than all; two vocabulary tiles, so that the ring turns between them."""
    check(case(H=H, V=COLUMNS + 53))


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 8])
@pytest.mark.parametrize("R", [1, ROWS // 2 + 1, ROWS, ROWS + 1, 3 * ROWS])
def test_every_number_of_rows(gpu, R, multiprocessors):
    """One block and two of a cluster, a second one without rows, units in turns."""
    gpu.multiprocessors = multiprocessors
    check(case(R=R, V=COLUMNS + 1, H=8))


@pytest.mark.parametrize("seed", range(4))
def test_a_ring_that_turns_in_every_order(gpu, seed):
    """Splits of several tiles, several units a cluster, more steps than stages; the order of events changes no bit."""
    c = case(R=2 * ROWS + 9, V=3 * COLUMNS + 5, H=3 * DEPTH)
    gpu.multiprocessors = 2
    expected = check(c)
    gpu.seed = seed + 1
    assert all(torch.equal(a, b) for a, b in zip(c.run(), expected, strict=True))


@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_splits_change_nothing_but_rounding(gpu, multiprocessors):
    gpu.multiprocessors = multiprocessors
    check(case(V=4 * COLUMNS + 3, H=8, counts=[1, 3, 0, 5, 2]))


def test_rows_in_a_wider_buffer():
    c = case(R=9, V=67, H=40)
    buffer = torch.full((11, 64), math.nan, dtype=torch.bfloat16)
    rows = buffer[1:10, 8:48].copy_(c.hidden)
    assert all(torch.equal(a, b) for a, b in zip(replace(c, hidden=rows).run(), c.run(), strict=True))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_logits(scale):
    c = case(V=2 * COLUMNS + 7, H=8)
    check(replace(c, head=(None, scale, 0.0, 1.0)))


@pytest.mark.parametrize("where", [slice(0, COLUMNS + 5), slice(COLUMNS - 5, 2 * COLUMNS)], ids=["first", "last"])
def test_minus_infinity_is_probability_zero(gpu, where):
    gpu.multiprocessors = 1  # tiles of nothing but -inf before others, and after
    V = 2 * COLUMNS
    bias = torch.zeros(V)
    bias[where] = -math.inf
    finite = COLUMNS + 9 if where.start == 0 else 9
    c = case(V=V, H=8)
    check(replace(c, targets=torch.full((5,), finite), head=(bias, 1.0, 0.0, 1.0)))
    _, logps = replace(c, targets=torch.full((5,), where.start), head=(bias, 1.0, 0.0, 1.0)).run()
    assert (logps == -math.inf).all()


def test_row_of_minus_infinity_is_nan_as_in_log_softmax():
    V = COLUMNS + 3
    _, logps = case(V=V, H=8, head=(torch.full((V,), -math.inf), 1.0, 0.0, 1.0)).run()
    assert logps[[0, 2, 3, 4]].isnan().all() and logps[1] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_reach_their_row_and_no_other(bad):
    c = case(R=ROWS + 2, V=2 * COLUMNS - 9, H=8)
    c.targets[:] = 3
    for row in (9, ROWS):
        c.hidden[row, 5] = bad
    _, logps = c.run()
    assert logps.isnan().nonzero().flatten().tolist() == [9, ROWS]


@pytest.mark.parametrize("shared", [False, True], ids=["one token a row", "shared rows"])
def test_wrong_targets_are_nan(shared):
    V = COLUMNS - 5
    c = case(R=6, V=V, H=8)
    c.targets[:] = torch.tensor([-1, V, 2**40, -(2**40), 0, -100])
    _, logps = replace(c, row_starts=torch.tensor([0, 4, 4, 6, 6, 6, 6]) if shared else None).run()
    assert logps[:4].isnan().all() and logps[4].isfinite() and logps[5] == 0


def test_a_row_of_many_tokens():
    """More than one of them in the same vocabulary tile, and the same target twice."""
    c = case(V=COLUMNS + 77, H=8, counts=[70, 1, 0])
    c.targets[:2] = 5
    _, logps = check(c)
    assert logps[0] == logps[1]


def test_no_rows_and_no_tokens():
    stats, logps = case(R=0).run()
    assert stats.shape == (2, 0) and logps.shape == (0,)
    _, logps = case(counts=[0, 0, 0]).run()
    assert logps.shape == (0,)


def test_what_the_copy_engine_does_not_take():
    c = case(R=4, H=16)
    hidden = c.hidden.contiguous()
    for matrix in (torch.zeros(4, 17).bfloat16()[:, :16], torch.zeros(4, 24).bfloat16()[:, 1:17]):
        with pytest.raises(ValueError, match="expected rows at multiples of 16 bytes"):
            replace(c, hidden=matrix).run()
    with pytest.raises(ValueError, match="column stride of 1"):
        replace(c, hidden=hidden.T.contiguous().T).run()
    with pytest.raises(ValueError, match="do not overlap"):
        replace(c, hidden=hidden[:1].expand(4, -1)).run()
    with pytest.raises(ValueError, match=r"hidden has dtype torch\.float32"):
        replace(c, hidden=hidden.float()).run()
    with pytest.raises(ValueError, match=r"weight has dtype torch\.float16"):
        replace(c, weight=c.weight.half()).run()
    with pytest.raises(ValueError, match="expected at least one row and one column"):
        replace(c, weight=c.weight[:0]).run()


def test_another_gpu_is_refused(gpu):
    gpu.capability = (10, 0)
    with pytest.raises(simt_host.EmulatorError, match=r"needs compute capability 9.0 \(Hopper\); device 0 has 10.0"):
        case().run()


@pairwise({"dtype": DTYPES, "V": [1, 2, 101, COLUMNS, COLUMNS + 9, 2 * COLUMNS + 128], "shared": SHARED})
def test_gradient_of_every_vocabulary(dtype, V, shared):
    check_gradient(case(dtype, V=V, counts=[1, 3, 0, 5, 2] if shared else None))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_every_head(dtype, head):
    V = COLUMNS + 77
    check_gradient(case(dtype, V=V, counts=[1, 3, 0, 5, 2], head=head(V)))


def test_gradient_near_a_softcap():
    """Every logit is within a millionth of its bound, where 1 - tanh^2 would cancel, as it does in eager."""
    V = COLUMNS + 5
    c = case(V=V, H=8, head=(torch.full((V,), 68.0), 1.0, 8.0, 1.0))
    coef = coefs(c)
    grad, oracle = c.gradient(coef), c.expected_gradient(torch.float64, coef)
    assert_accurate(grad, oracle.to(grad.dtype), oracle, "gradient")


@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_gradient_of_several_row_tiles_in_every_order(gpu, multiprocessors):
    gpu.multiprocessors = multiprocessors
    c = case(R=ROWS + 66, V=2 * COLUMNS + 3, H=DEPTH)
    coef = coefs(c)
    expected = check_gradient(c, coef)
    gpu.seed = 1
    assert torch.equal(c.gradient(coef), expected)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_gradient_of_huge_logits(scale):
    c = case(V=2 * COLUMNS + 7, H=8)
    check_gradient(replace(c, head=(None, scale, 0.0, 1.0)))


def test_a_gradient_that_is_no_rows_business():
    """Zero coefs, absent tokens, no tokens: exactly 0, whatever the row holds; a NaN coef is a gradient."""
    c = case(counts=[2, 1, 0, 1], V=COLUMNS + 3, H=8)
    c.hidden[:] = math.nan
    c.targets[:] = torch.tensor([1, 2, -100, 3])
    grad = c.gradient(torch.tensor([0.0, -0.0, math.nan, math.nan]))
    assert (grad[:3] == 0).all() and grad[3].isnan().all()


def test_certain_words_have_no_gradient():
    """All tokens of a row have one target, and it has all the probability: coefs cancel to exactly 0."""
    V = COLUMNS + 3
    bias = torch.full((V,), -200.0)
    bias[7] = 7.7
    c = case(counts=[40], V=V, H=8, head=(bias, 1.0, 0.0, 1.0))
    c.targets[:] = 7
    assert (c.gradient(torch.randn(40)) == 0).all()


def test_nan_infinity_and_wrong_targets_in_a_gradient():
    c = case(R=4, V=COLUMNS + 3, H=8)
    c.targets[:] = torch.tensor([3, 5, len(c.weight), 9])
    c.hidden[0, 5], c.hidden[3, 5] = math.nan, math.inf
    coef = torch.ones(4)
    grad = c.gradient(coef)
    assert grad[[0, 3]].isnan().all() and grad[1].isfinite().all()
    # A target that no word has leaves the gradient of the others.
    absent = replace(c, hidden=c.hidden.nan_to_num(0, 0), targets=torch.tensor([3, 5, 0, 9]))
    expected = absent.expected_gradient(torch.float32, coef)[2]
    expected[0] -= 1
    assert_accurate(grad[2], expected.to(grad.dtype), expected.double(), "gradient")


def schedule_of(library, R: int, V: int, H: int, multiprocessors: int) -> Schedule:
    schedule = Schedule()
    library.simt_make_schedule(R, V, 2 * H, multiprocessors, 50 * 2**20, ctypes.byref(schedule))
    return schedule


SHAPES = [
    (8192, 128256, 4096, 132),
    (1, 128256, 4096, 132),
    (300, 151936, 2048, 114),
    (8192, 100, 64, 132),
    (5, 1, 1, 1),
]


@pytest.mark.parametrize(("R", "V", "H", "multiprocessors"), [*SHAPES, (100000, 50257, 768, 132), (129, 513, 64, 3)])
def test_every_tile_is_computed_once(hopper_library, R, V, H, multiprocessors):
    schedule, unit = schedule_of(hopper_library, R, V, H, multiprocessors), Unit()
    assert schedule.clusters * schedule.cluster <= multiprocessors
    assert schedule.row_groups * schedule.cluster * ROWS >= R and schedule.vocab_tiles == -(-V // COLUMNS)
    seen: dict[tuple[int, int], int] = {}
    for index in range(schedule.row_groups * schedule.splits):
        hopper_library.simt_unit_of(ctypes.byref(schedule), index, ctypes.byref(unit))
        assert unit.first_tile < unit.last_tile
        for tile in range(unit.first_tile, unit.last_tile):
            key = unit.row_group, tile
            assert key not in seen
            seen[key] = unit.split
    assert len(seen) == schedule.row_groups * schedule.vocab_tiles
    # A row group's partial sums have one place per split.
    for group in range(schedule.row_groups):
        splits = [seen[group, tile] for tile in range(schedule.vocab_tiles)]
        assert splits == sorted(splits) and set(splits) == set(range(schedule.splits))


@pytest.mark.parametrize(("R", "V", "H", "multiprocessors"), SHAPES[:3])
def test_no_multiprocessor_waits_long(hopper_library, R, V, H, multiprocessors):
    """The busiest cluster has at most 10 % more tiles than the average one, and what runs together fits the cache."""
    schedule = schedule_of(hopper_library, R, V, H, multiprocessors)
    slots = multiprocessors // schedule.cluster
    busiest = -(-schedule.row_groups * schedule.splits // slots) * schedule.split_tiles
    assert busiest <= 1.1 * schedule.row_groups * schedule.vocab_tiles / slots
    assert schedule.together * schedule.cluster * ROWS * 2 * H <= 25 * 2**20


@pytest.mark.parametrize(("R", "V", "H"), [(8192, 128256, 4096), (16384, 128256, 4096), (8192, 151936, 1024)])
def test_the_weight_is_read_few_times(hopper_library, R, V, H):
    """Beside products of 700 TFLOP/s, at an eighth of an H200's bandwidth."""
    schedule = schedule_of(hopper_library, R, V, H, 132)
    reads = -(-schedule.row_groups // schedule.together)
    assert reads * V * H * 2 / (2 * R * V * H / 700e12) <= 0.48e12


FAULTS = {
    "a stage is filled before it is empty": (
        "linear_kernel.cuh",
        "hopper::barrier_wait(slot.empty(),",
        "if (!FAULT) hopper::barrier_wait(slot.empty(),",
    ),
    "a stage is read before it is full": (
        "linear_kernel.cuh",
        "hopper::barrier_wait(slot.full(),",
        "if (!FAULT) hopper::barrier_wait(slot.full(),",
    ),
    "a stage is given back while it is read": (
        "linear_kernel.cuh",
        "hopper::wgmma_wait<1>();",
        "if (!FAULT) hopper::wgmma_wait<1>();",
    ),
    "accumulators are read early": (
        "linear_kernel.cuh",
        "hopper::wgmma_wait<0>();",
        "if (!FAULT) hopper::wgmma_wait<0>();",
    ),
    "the other block's barriers do not exist yet": (
        "linear_kernel.cuh",
        "hopper::cluster_sync();  // no barrier",
        "if (FAULT) simt::block_barrier(); else hopper::cluster_sync();  // no barrier",
    ),
    "a descriptor with another stride": ("hopper.h", "| kStrideOfGroups |", "| kStrideOfGroups << (FAULT ? 1 : 0) |"),
    "a descriptor without a swizzle": ("hopper.h", "return kSwizzle128 |", "return (FAULT ? 0 : kSwizzle128) |"),
    "a step along K of another length": ("linear_kernel.cuh", "b + 2 * k", "b + (FAULT ? 1 : 2) * k"),
    "accumulators of other columns": (
        "linear_epilogue.cuh",
        "column % 8 / 2 != quad_lane",
        "(FAULT ? column / 2 % 8 : column % 8 / 2) != quad_lane",
    ),
    "half of a row's threads": ("linear_epilogue.cuh", "mask <= 2", "mask <= (FAULT ? 1 : 2)"),
    "vectors of other threads' columns": (
        "linear_keep.cuh",
        "(upper ? word[i] : word[i + mask]) =",
        "(FAULT || upper ? word[i] : word[i + mask]) =",
    ),
    "columns of targets written too early": (
        "linear_backward.cu",
        "simt::block_barrier();  // what other",
        "if (!FAULT) simt::block_barrier();  // what other",
    ),
}


@pytest.fixture
def faulty(gpu, shared_folder):
    """The library with all faults, none of which is in effect yet."""
    gpu.library = hopper_host.build(shared_folder, FAULTS)
    return gpu


def small_case():
    return case(R=ROWS + 9, V=COLUMNS + 53, H=(STAGES + 2) * DEPTH)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(faulty, fault):
    """These tests can fail: each of these lines wrong is an error, or a number far off."""
    with simt_host.in_effect(faulty.library, FAULTS, fault), pytest.raises(AssertionError):
        for faulty.seed in range(4):
            check_gradient(small_case())


def test_no_fault_is_found_where_none_is_in_effect(faulty):
    for faulty.seed in range(2):
        check_gradient(small_case())


def test_what_the_sanitizer_watches_is_every_launch(gpu, monkeypatch):
    """With exponentials that are kept and without; two tiles of rows and of words, more steps than stages."""
    made = simt_host.record(gpu, monkeypatch, ("linear_forward", "linear_backward"))
    monkeypatch.setattr(small_run, "V", COLUMNS + 45)
    monkeypatch.setattr(small_run, "LINEAR_SIZES", ((5, DEPTH), (ROWS + 3, (STAGES + 1) * DEPTH)))
    small_run.hopper_linear(torch.device("cpu"), torch.bfloat16)
    assert made == ["linear_forward", "linear_forward", "linear_backward"] * 4
