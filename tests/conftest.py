"""Device, seeds, threads, and allocations that hold garbage: an output that nobody wrote cannot pass a test."""

from __future__ import annotations

import os
from dataclasses import replace

import hopper_host
import pytest
import simt_host
import torch
from devices import DEVICE

# Triton reads it when its modules are imported, which importing the package under test does.
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    torch.set_default_device(DEVICE)  # from here on, so that what test modules make at import lies there too
    torch.zeros(0)  # lets torch list the factories that this concerns before the fixture below replaces some

from interpreter import interpreter, rounding

from cpo_kernels import backends
from cpo_kernels.backends import triton_support

ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN, or with the largest integer."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return tensor
    if tensor.is_floating_point():
        tensor.detach().fill_(torch.nan)  # detached, since torch itself asks for leaves that require a gradient
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


def poisoned(allocate):
    def allocate_poisoned(*args, **kwargs):
        return poison_(allocate(*args, **kwargs))

    return allocate_poisoned


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of CUDA itself are skipped where the tests run on another device."""
    missing = pytest.mark.skip(reason=f"needs an NVIDIA GPU; the tests run on {DEVICE}")
    for item in items:
        if item.get_closest_marker("cuda") and DEVICE.type != "cuda":
            item.add_marker(missing)


@pytest.fixture(autouse=True)
def host_tensors_by_default(request: pytest.FixtureRequest):
    """In tests of what runs on the CPU alone; the others get the device under test."""
    if DEVICE.type == "cpu" or not request.node.get_closest_marker("cpu"):
        yield
        return
    with torch.device("cpu"):
        yield


@pytest.fixture(autouse=True)
def rounding_interpreter(monkeypatch):
    """Triton's interpreter rounds to bfloat16 as a GPU does."""
    if "triton" in backends.AVAILABLE and triton_support.interpreted():
        monkeypatch.setattr(interpreter(), "_convert_float", rounding(interpreter()._convert_float))


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """Every uninitialised tensor that Python code asks for."""
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers in every order and in every worker; one thread, as pytest-xdist runs a worker per core."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def simt_library(tmp_path_factory):
    """The CUDA kernels, compiled for the CPU."""
    if simt_host.compiler() is None:
        pytest.skip("needs g++")
    return simt_host.build(tmp_path_factory.mktemp("simt"))


@pytest.fixture
def emulator(simt_library, monkeypatch):
    """The extension that native_cuda finds is an emulator, and the CPU is its device."""
    from cpo_kernels.backends import native_cuda

    module = simt_host.HostModule(simt_library)
    monkeypatch.setattr(native_cuda, "_load", lambda: (module, None))
    monkeypatch.setattr(native_cuda, "_queue", lambda device: {"device": 0, "stream": 0})
    return module


@pytest.fixture(scope="session")
def hopper_library(tmp_path_factory):
    """Hopper's linear path, compiled for the CPU."""
    if simt_host.compiler() is None:
        pytest.skip("needs g++")
    return hopper_host.build(tmp_path_factory.mktemp("hopper"))


@pytest.fixture(scope="session")
def cuda_operators():
    """The row operators of the cuda backend once more: its own exist only where there is a GPU."""
    from cpo_kernels import ops
    from cpo_kernels.backends import native_cuda

    kernels = ops.RowKernels(
        lambda *args: native_cuda.row_forward(*args),
        lambda *args: native_cuda.row_backward(*args),
        lambda *args: native_cuda.row_backward_(*args),
    )
    return ops.declare_rows("emulated_cuda_", kernels)


@pytest.fixture
def emulated_cuda(emulator, hopper_library, cuda_operators, monkeypatch):
    """The cuda backend as users name it, on the CPU: all kernels emulated, of a GPU of compute capability 9.0."""
    from cpo_kernels.backends import native_cuda

    hopper = hopper_host.HopperModule(hopper_library)
    for name in ("linear_workspace", "linear_tiles", "linear_forward", "linear_backward"):
        setattr(emulator, name, getattr(hopper, name))
    monkeypatch.setattr(native_cuda, "capability", lambda device: hopper.capability)
    base = backends.cuda_backend() if "cuda" not in backends.BACKENDS else backends.BACKENDS["cuda"]
    emulated = replace(base, devices=("cpu",), rows=cuda_operators)
    monkeypatch.setitem(backends.BACKENDS, "cuda", emulated)
    monkeypatch.setattr(backends, "AVAILABLE", tuple(dict.fromkeys((*backends.AVAILABLE, "cuda"))))
    return emulated
