"""The differences between devices: architecture, memory, float32 sums, capture, streams.

A new kind of GPU is described in this module. AMD's GPUs are devices of type "cuda" to torch; ``is_amd`` finds them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from threading import get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor

CPU = "cpu"
# What torch calls the devices that Triton's kernels run on.
GPUS = ("cuda",)
# The architecture of a CPU, where Triton's kernels run in its interpreter.
DEFAULT_ARCHITECTURE = "default"
# The first compute capability with products of bfloat16 and asynchronous copies, which the kernels use.
OLDEST_CAPABILITY = (8, 0)
# In elements: Triton takes rows to be aligned if it divides their stride, and matrix products are faster then.
ROW_ALIGNMENT = 16
# Rows of fewer columns are not padded: the padding would take a large share of the memory budget.
SMALLEST_PADDED = 1024
# Large enough that GEMM 3 amortises its pass over grad_weight (about 1,000 rows of GPT-2's vocabulary in float32).
DEFAULT_LOGITS_BYTES = 256 * 2**20
# The default budget on a GPU, whose products need thousands of rows: this share of its memory, up to the limit. Half of
# it loses nothing where no gradient of a weight is summed over chunks and no row waits for its group.
GPU_MEMORY_SHARE = 1 / 32
GPU_LOGITS_BYTES = 2 * 2**30


def is_host(device: torch.device) -> bool:
    """Tell whether values on ``device`` can be read without waiting for it."""
    return device.type == CPU


def is_gpu(device: torch.device) -> bool:
    """Tell whether the kernels of a GPU run on ``device``, NVIDIA's or AMD's."""
    return device.type in GPUS


def is_amd() -> bool:
    """Tell whether the GPUs of this torch are AMD's."""
    return torch.version.hip is not None


def count_gpus() -> int:
    """Count the GPUs that torch sees, without creating a context on any of them."""
    return torch.cuda.device_count()


@cache
def architecture(device: torch.device) -> str:
    """Name the architecture: ``"sm_90"``, ``"gfx942"``, ...; ``"default"`` for a CPU."""
    if not is_gpu(device):
        return DEFAULT_ARCHITECTURE
    if is_amd():
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def why_too_old(backend: str, device: torch.device) -> str | None:
    """Say why a GPU is too old for a backend, or None."""
    if not is_gpu(device) or is_amd():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return None
    found, needed = (".".join(map(str, c)) for c in (capability, OLDEST_CAPABILITY))
    return f"backend {backend!r} needs compute capability {needed}, {device} has {found}"


@cache
def multiprocessors_and_cache(device: torch.device) -> tuple[int, int]:
    """Count multiprocessors and bytes of L2 cache; (1, 0) for a CPU, where programs run one after the other."""
    if not is_gpu(device):
        return 1, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def default_logits_bytes(device: torch.device, *, of_weight: bool = True) -> int:
    """Return the bytes of logits held at once on ``device`` where the user names no budget.

    ``of_weight`` says that the gradient of the weight is computed, or that rows wait for the coefficients of a group.
    """
    if not is_gpu(device) or not count_gpus():
        return DEFAULT_LOGITS_BYTES
    return gpu_logits_bytes(torch.cuda.get_device_properties(device).total_memory, of_weight=of_weight)


def gpu_logits_bytes(memory: int, *, of_weight: bool) -> int:
    """Return the bytes of logits held at once on a GPU with so many bytes of memory."""
    whole = min(max(DEFAULT_LOGITS_BYTES, int(memory * GPU_MEMORY_SHARE)), GPU_LOGITS_BYTES)
    return whole if of_weight else max(DEFAULT_LOGITS_BYTES, whole // 2)


def row_width(vocab: int, device: torch.device) -> int:
    """Return the elements from one row of logits to the next; on a GPU padded so that rows begin at whole vectors."""
    padded = not is_host(device) and vocab >= SMALLEST_PADDED
    return -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT if padded else vocab


def float32_sums(device: torch.device) -> bool:
    """Tell whether a product of half precision can be added to float32 on ``device``: cuBLAS can."""
    return is_gpu(device) and not is_amd()


@cache
def adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether this torch adds a product of ``dtype`` to float32; early releases with ``out_dtype`` do not."""
    total, one = torch.ones((1, 1), device=device), torch.ones((1, 1), device=device, dtype=dtype)
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def is_capturing() -> bool:
    """Tell whether a CUDA graph is being captured, during which nothing may wait for the device."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """Return the handle of torch's current stream on a GPU."""
    return torch.cuda.current_stream(device).cuda_stream


def made_current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` the current one within the context: Triton launches on the current device's stream."""
    return torch.cuda.device(device) if is_gpu(device) else contextlib.nullcontext()


@cache
def second_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """Return the stream of a GPU for work beside that of the current one; no other thread launches on it."""
    return torch.cuda.Stream(device)


class SideStream:
    """Work on a GPU beside that of the current stream, which joins it at the end; capturable in a CUDA graph."""

    def __init__(self, device: torch.device) -> None:
        self.main, self.side = torch.cuda.current_stream(device), second_stream(device, get_ident())

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Launch beside what the current stream launches from now on, after what it has launched before."""
        self.side.wait_stream(self.main)
        with torch.cuda.stream(self.side):
            yield

    def mark(self) -> torch.cuda.Event:
        """Mark what has been launched beside the current stream."""
        return self.side.record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        """Let the current stream wait for what a mark stands for."""
        self.main.wait_event(mark)

    def join(self) -> None:
        """Let the current stream wait for all that was launched beside it."""
        self.main.wait_stream(self.side)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to ``device`` without waiting for it."""
    return tensor if is_host(device) else tensor.pin_memory().to(device, non_blocking=True)


def to_host(*tensors: Tensor | None) -> list[np.ndarray | None]:
    """Return int64 values of integer tensors (n,), on one device, in one copy that waits for it; None for None."""
    given = [tensor for tensor in tensors if tensor is not None]
    if is_host(given[0].device):
        return [None if tensor is None else tensor.long().numpy() for tensor in tensors]
    together = given[0] if len(given) == 1 else torch.cat(given)
    parts = iter(together.cpu().split([tensor.numel() for tensor in given]))
    return [None if tensor is None else next(parts).long().numpy() for tensor in tensors]


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, ...]:
    """Copy int64 arrays (n,) to ``device`` together, without waiting for it."""
    sizes = [array.size for array in arrays]
    together = torch.empty(sum(sizes), dtype=torch.int64, device="cpu", pin_memory=not is_host(device))
    np.concatenate(arrays, out=together.numpy())
    return together.to(device, non_blocking=True).split(sizes)


# Settings of torch by which products of half precision are summed in less than float32.
REDUCED_SUMS = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@contextlib.contextmanager
def float32_accumulation() -> Iterator[None]:
    """Sum products of half precision in float32 on a GPU within the context: torch lets cuBLAS round partial sums.

    The settings are those of the process, and are put back.
    """
    matmul = torch.backends.cuda.matmul
    before = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)) for name in REDUCED_SUMS}

    def put(name: str, allowed: bool, split_k: bool | None) -> None:
        setattr(matmul, name, allowed if split_k is None else (allowed, split_k))

    for name, (_, split_k) in before.items():
        put(name, False, split_k)
    try:
        yield
    finally:
        for name, values in before.items():
            put(name, *values)


@contextlib.contextmanager
def own_arithmetic(device: torch.device) -> Iterator[None]:
    """Compute within the context as the arguments say, whatever the caller's settings: without autocast, in float32.

    Tensors have been cast for autocast before, where the caller asks for it.
    """
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if is_gpu(device):
            stack.enter_context(float32_accumulation())
        yield
