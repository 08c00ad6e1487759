"""The cluster kernel of CUDA that holds a row between forward and unit gradient, run thread by thread on the CPU."""

from __future__ import annotations

import pytest
import torch
from pairwise import pairwise
from row_kernels import DTYPES, NARROW, PLAIN, SHARED, Tokens
from simt_host import EmulatorError
from unit_kernels import by_row, cuda_unit, some_tokens

from cpo_kernels.kernels.cuda import rows as cuda_rows

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("emulator")]

# Bytes of a row in a block, for rows of some thousand: one block, two, eight, and eight that hold more than asked.
SLICES = {"one": 0, "two": 3000, "eight": 700, "eight at most": 64}
kernels = cuda_unit()


@pairwise({"dtype": DTYPES, "V": [1, 31, 1024, 1031], "slice_bytes": SLICES, "shared": SHARED})
def test_every_cluster(dtype, V, slice_bytes, shared):
    tokens = some_tokens(V, shared)
    kernels.check((torch.randn(len(list(by_row(tokens))), V) * 4).to(dtype), tokens, slice_bytes=slice_bytes)


WIDTHS = {
    f"{V} of {width}": (V, width) for V, width in [(2, 2), (1200, 1200), (1201, 1201), (1202, 1202), (1031, 1040)]
}


@pairwise({"seed": [0, 1, 2], "V, width": WIDTHS, "grad_dtype": NARROW, "shared": SHARED})
def test_narrow_gradient_over_its_logits(emulator, seed, V, width, grad_dtype, shared):
    emulator.seed = seed
    tokens = some_tokens(V, shared)
    logits = torch.randn(len(list(by_row(tokens))), width)[:, :V]
    kernels.check(logits, tokens, grad_dtype=grad_dtype, slice_bytes=1000)


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_the_order_of_the_threads_changes_no_bit(emulator, shared):
    tokens, results = some_tokens(2063, shared), []
    logits = torch.randn(len(list(by_row(tokens))), 2063).bfloat16()
    for emulator.seed in range(5):
        over = logits.clone()
        stats, logps = kernels.forward_(over, tokens, threads=64, slice_bytes=600)
        held = over.clone()
        results.append((stats, logps, held, kernels.finish_(over, tokens, stats), over))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_longest_rows(dtype):
    """8 blocks of 227 KB, less what the blocks keep beside the row."""
    longest = 8 * (227 * 1024 - 208) // dtype.itemsize
    assert cuda_rows.unit_takes(longest, dtype, torch.device("cpu"))
    assert not cuda_rows.unit_takes(longest + 1, dtype, torch.device("cpu"))
    assert not cuda_rows.unit_takes(5, torch.float64, torch.device("cpu"))


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
        kernels.forward_(torch.zeros(1, 500_000), Tokens(torch.tensor([1]), None, torch.ones(1)))
