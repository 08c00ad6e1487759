"""What nvcc made of the kernels: nothing spilled, nothing in local memory, wide loads several at a time; and that the
checks find what they are for."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import pytest
import sass
from project import ROOT

MODULE = ROOT / "cpo_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(sass.cuobjdump() is None, reason="needs cuobjdump, which triton and the CUDA toolkit hold"),
]
needs_module = pytest.mark.skipif(not MODULE.exists(), reason="no CUDA extension in this build (cpo_kernels/_cuda)")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


@cache
def kernels() -> list[tuple[str, sass.Kernel]]:
    return [(arch, kernel) for arch in sass.architectures(MODULE) for kernel in sass.kernels(MODULE, arch).values()]


@needs_module
def test_every_kernel_is_there():
    """Each head of five by three dtypes or, where the gradient has its own, by five pairs of them; and the contrast."""
    built = {arch for arch, _ in kernels()}
    assert built, "the module has no kernels"
    for arch in built:
        names = [kernel.name for a, kernel in kernels() if a == arch]
        assert sum(sass.FORWARD.search(name) is not None for name in names) == 15, arch
        assert sum(sass.BACKWARD.search(name) is not None for name in names) == 25, arch
        assert sum(sass.UNIT.search(name) is not None for name in names) == 25, arch
        assert sum(sass.LOSS.search(name) is not None for name in names) == 15, arch
        assert sum("contrast_kernel" in name for name in names) == 1, arch


@needs_module
def test_no_spills_no_local_memory_no_generic_accesses_no_atomics():
    # What prints has its arguments on a stack.
    found = [(arch, k.name, sass.complaints(k)) for arch, k in kernels() if "check_targets" not in k.name]
    assert not [entry for entry in found if entry[-1]]


@needs_module
def test_row_kernels_load_and_store_16_bytes_and_have_four_loads_in_flight():
    rows = [(arch, kernel) for arch, kernel in kernels() if sass.is_row_kernel(kernel)]
    assert rows
    found = [(arch, kernel.name, sass.vector_complaints(kernel)) for arch, kernel in rows]
    assert not [entry for entry in found if entry[-1]]


@needs_module
def test_a_softcap_is_no_branch_for_every_element():
    """A tile has 32 elements a thread, and each kernel has it twice or more."""
    branches: dict[tuple[str, str], dict[bool, int]] = {}
    for arch, kernel in kernels():
        head = sass.HEAD.search(kernel.name)
        if sass.is_row_kernel(kernel) and head is not None and head[2] == "0" and head[3] == "1":
            branches.setdefault((arch, head[1]), {})[sass.is_capped(kernel)] = kernel.count("BRA")
    assert branches
    assert not [(key, found) for key, found in branches.items() if found[True] > found[False] + 48]


def compiled(source: Path, folder: Path, *flags: str) -> dict[str, sass.Kernel]:
    output = folder / "kernels.o"
    command = [NVCC or "nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-arch=sm_80", *flags]
    run = subprocess.run([*command, "-c", str(source), "-o", str(output)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return sass.kernels(output, "sm_80")


CROWDED = """
#include "cuda/simt.h"
#undef CPO_KERNEL
#define CPO_KERNEL(threads, blocks) __global__ void __launch_bounds__(512, 4)
#include "cuda/row_forward.cuh"
using namespace cpo;
CPO_KERNEL(512, 4) crowded_kernel(ForwardArgs args, Head<false, false, false> head) {
  forward_row<bf16>(args, head, simt::block_index(), simt::shared_memory<Partials>());
}
"""


@needs_nvcc
def test_spills_are_found(tmp_path):
    """The forward of one dtype and head with 32 registers a thread, half of what it has."""
    source = tmp_path / "crowded.cu"
    source.write_text(CROWDED)
    (crowded,) = compiled(source, tmp_path).values()
    stack, accesses = sass.complaints(crowded)
    assert "of stack" in stack and "accesses to local memory" in accesses


FAULTS = """
__global__ void row_forward_kernelIf(const float* x, float* y, int n) {
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += exp2f(x[i]);
  y[threadIdx.x] = sum;
}
__global__ void row_backward_kernelIff(const float4* x, float* y, float* z, bool which) {
  float* out = which ? y : z;
  out[4 * threadIdx.x] = x[threadIdx.x].x;
}
__global__ void counting(int* counter) { atomicAdd(counter, 1); }
__global__ void indexed(const int* at, float* y, int n) {
  float numbers[64];
  for (int i = 0; i < n; ++i) numbers[at[i]] = i;
  y[threadIdx.x] = numbers[at[threadIdx.x]];
}
"""


@needs_nvcc
def test_narrow_accesses_local_arrays_and_atomics_are_found(tmp_path):
    source = tmp_path / "faults.cu"
    source.write_text(FAULTS)
    found = compiled(source, tmp_path)
    by_name = {
        word: next(k for name, k in found.items() if word in name) for word in ("forward", "counting", "indexed")
    }
    assert sass.vector_complaints(by_name["forward"]) == ["0 loads of 16 bytes in flight, not 4"]
    assert sass.complaints(by_name["forward"]) == []
    assert sass.complaints(by_name["counting"]) == ["atomics"]
    assert [c for c in sass.complaints(by_name["indexed"]) if "of stack" in c]
    backward = next(k for name, k in found.items() if "backward" in name)
    assert sass.vector_complaints(backward)[-1] == "no STG.E.128"
