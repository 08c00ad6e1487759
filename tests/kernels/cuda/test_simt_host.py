"""The emulator that the CUDA kernels are tested with: kernels with one mistake each, and it finds them."""

from __future__ import annotations

import ctypes
import re

import pytest
import simt_host
import torch

from cpo_kernels.kernels import numerics, plain
from cpo_kernels.kernels.cuda import groups as cuda_groups
from cpo_kernels.kernels.cuda import rows as cuda_rows
from cpo_kernels.options import Objective

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(simt_host.compiler() is None, reason="needs g++"),
]
KERNELS = ("read_beyond", "write_to_input", "misaligned", "barrier_for_some", "no_barrier", "with_barrier")
OPTIONS = ("beta", "margin", "label_smoothing", "loss_type", "length_normalized", "contrast_weight", "mle_weight")


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    library = simt_host.build(tmp_path_factory.mktemp("faults"), simt_host.ROOT / "tests" / "simt" / "faults.cpp")
    library.simt_fault.restype = ctypes.c_char_p
    library.simt_fault.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p]
    return library


def run(faults, name: str, seed: int = 0) -> tuple[str, torch.Tensor]:
    x, y = torch.arange(64, dtype=torch.float32), torch.full((64,), torch.nan)
    error = faults.simt_fault(KERNELS.index(name), seed, x.data_ptr(), y.data_ptr()).decode()
    return error, y


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "read_beyond",
            r"read of 4 bytes outside of every region, thread 63 of block 0; 256 bytes into region 0 of 256",
        ),
        ("write_to_input", r"write of 4 bytes outside of every region, thread \d+ of block 0"),
        ("misaligned", r"16 bytes at an address that is no multiple of 16"),
        ("barrier_for_some", r"40 threads wait at a barrier that the others do not reach"),
    ],
)
def test_mistakes_are_found(faults, kernel, message):
    error, _ = run(faults, kernel)
    assert re.match(message, error), error


def test_a_missing_barrier_gives_what_depends_on_the_seed(faults):
    expected = torch.arange(64, dtype=torch.float32).roll(-1)
    outcomes = []
    for seed in range(4):
        error, y = run(faults, "with_barrier", seed)
        assert error == "" and torch.equal(y, expected)
        error, y = run(faults, "no_barrier", seed)
        assert error == ""
        outcomes.append(y)
    assert not any(torch.equal(y, expected) for y in outcomes)
    assert any(not torch.equal(y.nan_to_num(), outcomes[0].nan_to_num()) for y in outcomes[1:])


FAULTS = {
    "narrow gradients without a barrier between loads and stores": (
        "row_backward.cuh",
        "if (kNarrow) simt::block_barrier();\n  CPO_UNROLL",
        "if (kNarrow && !FAULT) simt::block_barrier();\n  CPO_UNROLL",
    ),
    "reductions without a barrier before the partials are read": (
        "reduce.cuh",
        "simt::block_barrier();\n  value = lane_index()",
        "if (!FAULT) simt::block_barrier();\n  value = lane_index()",
    ),
    "a vector too many": ("vectors.cuh", "(vocab - lead) / K;", "(vocab - lead) / K + (FAULT ? 1 : 0);"),
    "targets that are not in their row": (
        "row_tokens.cuh",
        "target >= 0 && target < vocab",
        "target >= 0 && (FAULT || target < vocab)",
    ),
    "a grid that does not wait for its coefficients": (
        "cpo_loss.cu",
        "simt::grid_barrier();\n\n  const BackwardArgs",
        "if (!FAULT) simt::grid_barrier();\n\n  const BackwardArgs",
    ),
    "a cluster that does not wait for its slices": (
        "unit_forward.cuh",
        "simt::cluster_barrier();\n  OnlineSoftmax whole;",
        "if (!FAULT) simt::cluster_barrier();\n  OnlineSoftmax whole;",
    ),
    "a target's column that another thread overwrites": (
        "unit_forward.cuh",
        "simt::block_barrier();  // what another thread wrote to the column of the target comes first",
        "if (!FAULT) simt::block_barrier();",
    ),
}


def small_loss() -> bool:
    """Whether the loss in one launch is what its parts are; five groups, three blocks."""
    logits, targets = torch.randn(20, 257), torch.randint(0, 257, (20,))
    starts, lengths = torch.arange(0, 22, 2), torch.full((10,), 2)
    head, groups = (None, 1.0, 0.0, 1.0), (starts, None, lengths, None, None)
    objective = Objective()
    options = {name: getattr(objective, name) for name in OPTIONS} | {"num_groups": 5, "num_target_tokens": 10}
    options |= {"gain": 1.0, "max_candidates": 2, "threads": 64}
    stats, logps = cuda_rows.row_forward(logits, targets, None, *head, threads=64)
    _, coef = cuda_groups.contrast(logps, *groups, **options)
    apart = cuda_rows.row_backward(logits, targets, None, stats, coef, *head, threads=64)
    cuda_groups.cpo_loss(logits, targets, logits, *groups, *head, **options)
    return torch.equal(logits, apart)


def small_unit() -> bool:
    """Whether forward and unit gradient in one read are about what they are in two launches; clusters of two."""
    logits, targets, coef = torch.randn(3, 1031), torch.tensor([1, 700, 1030]), torch.ones(3)
    head = (None, 1.0, 0.0, 1.0)
    stats, _ = cuda_rows.row_forward(logits, targets, None, *head, threads=64)
    apart = cuda_rows.row_backward(logits, targets, None, stats, coef, *head, threads=64)
    cuda_rows.unit_forward_(logits, targets, None, *head, threads=64, slice_bytes=2500)
    return torch.allclose(logits, apart, rtol=1e-5, atol=1e-7)


def small_run() -> bool:
    """Whether forward, backward and the narrow gradient of a few rows are what the reference gives."""
    V, threads = 4500, 128
    logits, targets, coef = torch.randn(3, V), torch.tensor([1, V, 2]), torch.randn(3)
    head = (None, 1.0, 0.0, 1.0)
    stats, logps = cuda_rows.row_forward(logits, targets, None, *head, threads=threads)
    exact = plain.row_forward(logits.double(), targets.clamp(max=V - 1), None, *head)[1].float()
    apart = cuda_rows.row_backward(logits, targets, None, stats, coef, *head, threads=threads)
    cuda_rows.row_backward_(logits, targets, None, stats, coef, *head, torch.bfloat16, threads=threads)
    narrow = numerics.narrow_view(logits, torch.bfloat16)
    right = torch.allclose(logps[[0, 2]], exact[[0, 2]], rtol=1e-5)
    return right and bool(logps[1].isnan()) and torch.equal(narrow, apart.bfloat16())


def holds_for_every_seed(emulator: simt_host.HostModule) -> bool:
    try:
        for emulator.seed in range(4):
            if not (small_run() and small_loss() and small_unit()):
                return False
    except simt_host.EmulatorError:
        return False
    return True


def test_the_kernels_as_they_are_pass_the_small_run(emulator):
    assert holds_for_every_seed(emulator)


@pytest.fixture
def faulty(emulator, shared_folder):
    """The emulator of kernels with all faults, none of which is in effect yet."""
    emulator.library = simt_host.build(shared_folder, faults=FAULTS, optimize="-O0")
    return emulator


@pytest.mark.parametrize("fault", FAULTS)
def test_mistakes_in_the_kernels_are_found(fault, faulty):
    with simt_host.in_effect(faulty.library, FAULTS, fault):
        assert not holds_for_every_seed(faulty)


def test_no_mistake_is_found_where_none_is_in_effect(faulty):
    assert holds_for_every_seed(faulty)
