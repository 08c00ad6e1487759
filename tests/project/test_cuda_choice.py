"""Which architectures a build compiles CUDA for, on machines made of stand-ins for nvidia-smi, libcuda and nvcc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

from build_tools import cuda_choice
from build_tools.cuda_choice import RELEASE_ARCHITECTURES, choose

pytestmark = pytest.mark.cpu  # files and commands, no device

KNOWN = "sm_80 sm_86 sm_89 sm_90 sm_100"


def command(path: Path, text: str, status: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nprintf '%s\\n' {text}\nexit {status}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Sets up a machine: what nvidia-smi prints (None: it is missing), whether there is nvcc, the build's switches."""

    def set_up(
        gpus: str | None, nvcc: bool = True, demand: str | None = None, archs: str | None = None, status: int = 0
    ):
        if gpus is not None:
            command(tmp_path / "bin" / "nvidia-smi", gpus, status)
        if nvcc:
            command(tmp_path / "cuda" / "bin" / "nvcc", KNOWN)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
        monkeypatch.setattr(cuda_choice, "_from_driver", lambda: [])
        for name, value in (("CPO_KERNELS_CUDA", demand), ("CPO_KERNELS_CUDA_ARCHS", archs)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return set_up


@pytest.mark.parametrize(
    ("gpus", "demand", "archs", "expected"),
    [
        ("8.0", None, None, ("80",)),
        ("9.0 8.6 9.0", None, None, ("86", "90a")),
        ("7.5 8.0", None, None, ("80",)),
        ("9.0", "1", None, ("90a",)),
        ("9.0", None, "80 90a+PTX", ("80", "90a+PTX")),
        (None, "1", None, RELEASE_ARCHITECTURES),
        (None, "1", "89", ("89",)),
        ("7.5", "1", None, RELEASE_ARCHITECTURES),
        ("12.0", "1", "100+PTX", ("100+PTX",)),
    ],
)
def test_cuda_is_compiled_for_the_gpus_that_are_there_or_asked_for(machine, gpus, demand, archs, expected):
    machine(gpus, demand=demand, archs=archs)
    choice = choose()
    assert choice.architectures == expected
    assert choice.nvcc.endswith("nvcc")
    assert choice.summary.startswith("compiled for " + ", ".join(f"sm_{name}" for name in expected))


@pytest.mark.parametrize(
    ("gpus", "nvcc", "demand", "archs", "why"),
    [
        (None, True, None, None, "no NVIDIA GPU was visible"),
        (None, True, None, "80", "no NVIDIA GPU was visible"),
        (None, False, None, None, "no NVIDIA GPU was visible"),
        ("9.0", False, None, None, "nvcc was not found"),
        ("7.5", True, None, None, "and this one has 7.5"),
        ("12.0", True, None, None, "does not know the visible GPU's compute capability 12.0"),
        ("9.0", True, "0", "80", "CPO_KERNELS_CUDA=0"),
    ],
)
def test_cuda_that_is_left_out_says_why_and_how_to_change_it(machine, gpus, nvcc, demand, archs, why):
    machine(gpus, nvcc, demand, archs)
    choice = choose()
    assert choice.architectures == () and choice.flags() == []
    assert choice.summary.startswith("left out because ") and why in choice.summary
    assert "(to change it: " in choice.summary and "\n" not in choice.summary


@pytest.mark.parametrize(
    ("gpus", "nvcc", "demand", "archs", "message"),
    [
        (None, False, "1", None, "CPO_KERNELS_CUDA=1, but nvcc was not found"),
        ("12.0", True, "1", None, "CPO_KERNELS_CUDA=1, but this nvcc does not know"),
        (None, True, "yes", None, "CPO_KERNELS_CUDA is 'yes'; expected 0 (never), 1 (required)"),
        ("9.0", True, None, "9.0", "CPO_KERNELS_CUDA_ARCHS holds '9.0'"),
        ("9.0", True, None, "sm_90a", "CPO_KERNELS_CUDA_ARCHS holds 'sm_90a'"),
    ],
)
def test_what_cannot_be_done_is_an_error(machine, gpus, nvcc, demand, archs, message):
    machine(gpus, nvcc, demand, archs)
    with pytest.raises(SystemExit, match=message.replace("(", r"\(").replace(")", r"\)")):
        choose()


def test_an_nvidia_smi_that_fails_is_no_gpu(machine):
    machine("'NVIDIA-SMI has failed because it could not communicate with the driver 9.0'", status=9)
    assert "no NVIDIA GPU was visible" in choose().summary


def test_flags_hold_machine_code_for_each_architecture_and_ptx_where_asked(machine):
    machine(None, demand="1", archs="80 100+PTX")
    made = {re.search(r",code=(\w+)", flag)[1] for flag in choose().flags()}
    assert made == {"sm_80", "sm_100", "compute_100"}


LIBCUDA = """
extern "C" int cuInit(unsigned flags) { return flags; }
extern "C" int cuDeviceGetCount(int* count) { return *count = 2, 0; }
extern "C" int cuDeviceGetAttribute(int* value, int attribute, int device) {
  return *value = attribute == 75 ? 8 + device : attribute == 76 ? 6 * (1 - device) : -1, 0;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile a stand-in for libcuda")
def test_gpus_are_found_through_the_driver_where_nvidia_smi_is_missing(tmp_path):
    (tmp_path / "cuda.cpp").write_text(LIBCUDA)
    subprocess.run(["g++", "-shared", "-fPIC", "cuda.cpp", "-o", "libcuda.so.1"], cwd=tmp_path, check=True)
    code = "from build_tools.cuda_choice import visible_capabilities; print(visible_capabilities())"
    settings = {"PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **settings}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[(8, 6), (9, 0)]"
