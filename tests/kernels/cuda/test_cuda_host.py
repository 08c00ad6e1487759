"""What the CUDA row kernels alone have: numbers of threads, and the order in which an emulator runs them.

Their numbers are held against the reference in tests/kernels/test_rows.py.
"""

from __future__ import annotations

import pytest
import torch
from row_kernels import DTYPES, SHARED, Tokens, cuda_rows, one_token_a_row, some_tokens
from simt_host import EmulatorError

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("emulator")]


@pytest.mark.parametrize("threads", [33, 16, 1024])
def test_number_of_threads_that_no_block_has(threads):
    with pytest.raises(EmulatorError, match=f"threads is {threads}; expected a multiple of 32 up to 512"):
        cuda_rows().forward(torch.randn(2, 5), one_token_a_row(5, 2), threads=threads)


def test_expanded_logits_are_not_overwritten():
    tokens = Tokens(torch.tensor([1, 1, 2]), None, torch.tensor([1.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="rows overlap and cannot be overwritten"):
        cuda_rows().backward_(torch.randn(1, 127).expand(3, 127), tokens, torch.zeros(2, 3))


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_the_threads_changes_no_bit(emulator, dtype, shared):
    """What a missing barrier leaves to chance differs from seed to seed."""
    kernels = cuda_rows()
    V = 2 * 4 * kernels.block(dtype) + 5
    logits, tokens = torch.randn(3, V).to(dtype), some_tokens(V, shared)
    results = []
    for emulator.seed in range(5):
        stats, logps = kernels.forward(logits, tokens, threads=128)
        results.append((stats, logps, kernels.backward(logits, tokens, stats, threads=128)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
