"""Memory that calls write to and forget: the logits of a pass, and what products pack.

On a CPU the system zeroes fresh pages one at a time, and small ones slow down the products that read them. So a thread
keeps what its last call has used, in huge pages where Linux gives them to those who ask.
A GPU's memory comes from torch, which keeps it likewise.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .device import is_host

# A smaller buffer comes from torch: mapping pages costs more than they are worth.
SMALLEST = 2**20

_kept = threading.local()


@contextmanager
def scratch(elements: int, dtype: torch.dtype, device: torch.device, *, keep: bool) -> Iterator[Tensor]:
    """Provide a buffer (elements,) of undefined numbers within the context.

    ``keep`` says that this thread's next call may have the same pages. Without it they go back to the system at the end
    of the context: malloc might keep them, below what was allocated later, so that the next buffer comes on top.
    """
    size = elements * dtype.itemsize
    if not keep or not is_host(device) or size < SMALLEST:
        yield lasting(elements, dtype, device, own_pages=not keep)
        return
    buffer = getattr(_kept, "buffer", None)
    _kept.buffer = None  # a call within this one gets another
    if buffer is None or buffer.numel() < size:
        del buffer  # before there is another
        buffer = pages(1 << (size - 1).bit_length(), huge=True)
    try:
        yield buffer[:size].view(dtype)
    finally:
        _kept.buffer = buffer


def lasting(elements: int, dtype: torch.dtype, device: torch.device, *, own_pages: bool) -> Tensor:
    """Allocate a buffer (elements,) of undefined numbers, on a CPU in pages of its own if ``own_pages``."""
    size = elements * dtype.itemsize
    if own_pages and is_host(device) and size >= SMALLEST:
        return pages(size).view(dtype)
    return torch.empty(elements, dtype=dtype, device=device)


def pages(size: int, *, huge: bool = False) -> Tensor:
    """Map zeroed pages (size,) of uint8, which go back to the system when nothing refers to them any more.

    A forked process writes to a copy of them.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(size, dtype=torch.uint8, device="cpu")
    found = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        found.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(found, dtype=torch.uint8)
