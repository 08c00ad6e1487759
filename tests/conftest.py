"""Device, seeds, threads, and allocations that hold garbage: an output that nobody wrote cannot pass a test."""

from __future__ import annotations

import gc
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

from interpreter import interpreter, rounding, sparing

from cpo_kernels.kernels import registry
from cpo_kernels.kernels.triton import support as triton_support

# Files with tests of ten seconds and more: at the end, one worker would wait for them.
LONG = {"test_build.py", "test_cli.py", "test_demo.py", "test_documentation.py", "test_integration_examples.py"}
LONG |= {"test_memory.py"}
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


def reasons_to_skip() -> dict[str, str | None]:
    """By marker, why its tests cannot run here; None where they can."""
    unavailable = triton_support.unavailable_reason()
    dry_run = "a dry run on the CPU, which Triton's interpreter makes possible"
    return {
        "cuda": None if DEVICE.type == "cuda" else f"needs an NVIDIA GPU; the tests run on {DEVICE}",
        "interpreter": unavailable if triton_support.interpreted() else dry_run,
        "triton": unavailable,
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests start first; those that need what is not here are skipped, and say what that is."""
    items.sort(key=lambda item: item.path.name not in LONG)
    for marker, reason in reasons_to_skip().items():
        for item in items:
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What is there before the first test stays: it is no garbage that each collection has to look through."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries look for leaks when the interpreter ends


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
    """Triton's interpreter rounds to bfloat16 as a GPU does, and spares itself what changes nothing."""
    if "triton" in registry.AVAILABLE and triton_support.interpreted():
        monkeypatch.setattr(interpreter(), "_convert_float", rounding(interpreter()._convert_float))
        for owner, name, value in sparing(interpreter()):
            monkeypatch.setattr(owner, name, value)


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
def shared_folder(tmp_path_factory):
    """A folder of this run, which all workers of pytest-xdist see."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def simt_library(shared_folder):
    """The CUDA kernels, compiled for the CPU."""
    if simt_host.compiler() is None:
        pytest.skip("needs g++")
    return simt_host.build(shared_folder)


@pytest.fixture
def emulator(simt_library, monkeypatch):
    """The CUDA extension is an emulator, and the CPU is its device."""
    from cpo_kernels.kernels.cuda import extension as cuda_extension

    module = simt_host.HostModule(simt_library)
    monkeypatch.setattr(cuda_extension, "_load", lambda: (module, None))
    monkeypatch.setattr(cuda_extension, "queue", lambda device: {"device": 0, "stream": 0})
    return module


@pytest.fixture(scope="session")
def hopper_library(shared_folder):
    """Hopper's linear path, compiled for the CPU."""
    if simt_host.compiler() is None:
        pytest.skip("needs g++")
    return hopper_host.build(shared_folder)


@pytest.fixture(scope="session")
def cuda_operators():
    """The row operators of the cuda backend once more: its own exist only where there is a GPU."""
    from cpo_kernels.kernels import ops
    from cpo_kernels.kernels.cuda import rows as cuda_rows

    kernels = ops.RowKernels(
        lambda *args: cuda_rows.row_forward(*args),
        lambda *args: cuda_rows.row_backward(*args),
        lambda *args: cuda_rows.row_backward_(*args),
    )
    return ops.declare_rows("emulated_cuda_", kernels)


@pytest.fixture
def emulated_cuda(emulator, hopper_library, cuda_operators, monkeypatch):
    """The cuda backend as users name it, on the CPU: all kernels emulated, of a GPU of compute capability 9.0."""
    from cpo_kernels.kernels.cuda import extension as cuda_extension

    hopper = hopper_host.HopperModule(hopper_library)
    for name in ("linear_workspace", "linear_tiles", "linear_forward", "linear_backward"):
        setattr(emulator, name, getattr(hopper, name))
    monkeypatch.setattr(cuda_extension, "capability", lambda device: hopper.capability)
    base = registry.cuda_backend() if "cuda" not in registry.BACKENDS else registry.BACKENDS["cuda"]
    emulated = replace(base, devices=("cpu",), differentiable_rows=cuda_operators.forward)
    monkeypatch.setitem(registry.BACKENDS, "cuda", emulated)
    monkeypatch.setattr(registry, "AVAILABLE", tuple(dict.fromkeys((*registry.AVAILABLE, "cuda"))))
    return emulated
