"""Kernels compiled ahead of time in a process of its own, without the interpreter; and that its checks can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from project import ROOT

pytest.importorskip("triton")

from benchmarks.kernels import aot, aot_versions
from benchmarks.kernels.aot_cases import CASES, WGMMA, WIDE_LOAD, WIDE_STORE
from cpo_kernels.kernels.triton import tuning

pytestmark = pytest.mark.cpu

GOOD = aot.Kernel(
    case="row_forward bf16",
    target="sm_90",
    kernel="row_forward_kernel",
    warps=8,
    stages=1,
    registers=40,
    spill_bytes=0,
    scalar_spills=0,
    shared_bytes=32,
)

# Groups of 32 in tiles so large that a thread cannot hold its share of the vectors.
SPILLING = """
from functools import partial
from benchmarks.kernels import aot, aot_cases

if __name__ == "__main__":
    config = {"TILE": 65536, "num_warps": 4, "num_stages": 1}
    launch = partial(aot_cases.contrast_groups, 32, ranked=True, config=config)
    case = aot_cases.Case("spilling", launch, "contrast_kernel")
    for problem in aot.problems(aot.compile_case(case, aot.TARGETS["sm_90"])[0]):
        print(problem)
"""


def run_compiler(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process that compiles, with a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("target", "cases"),
    [
        ("sm_90", ["row_backward_ bf16, shared rows", "linear_forward bf16, odd V"]),
        ("sm_100", ["row_backward_ bf16 over fp32, shared rows"]),
        ("gfx942", ["contrast of 2, ipo"]),
    ],
)
def test_kernels_compile_without_problems(tmp_path, target, cases):
    done = run_compiler(
        tmp_path, "-m", "benchmarks.kernels.aot", "--targets", target, "--out", str(tmp_path), "--cases", *cases
    )
    if "ROCm linker" in done.stdout + done.stderr:
        pytest.skip("this version of Triton brings no linker for AMD's GPUs")
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = json.loads((tmp_path / "triton-aot.json").read_text())["kernels"]
    for part in cases:
        name = part if part in CASES else next(case for case in CASES if part in case)
        found = [k for k in kernels if k["case"] == name and k["kernel"] == CASES[name].kernel]
        assert len(found) == 1
        assert found[0]["registers"] > 0


def test_a_kernel_that_spills_is_found(tmp_path):
    done = run_compiler(tmp_path, "-c", SPILLING)
    assert done.returncode == 0, done.stderr
    assert "contrast_kernel spills" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes a thread"),
        ({"shared_bytes": 227 * 1024 + 1}, "takes 232449 bytes of shared memory, sm_90 has 232448"),
        ({"missing": ("HGMMA",)}, "no instruction matches HGMMA"),
        ({"failure": "PassManager::run failed"}, "does not compile: PassManager::run failed"),
    ],
)
def test_problems_are_named(change, message):
    assert aot.problems(GOOD) == []
    (problem,) = aot.problems(replace(GOOD, **change))
    assert problem == f"row_forward bf16 for sm_90: row_forward_kernel {message}"


SASS = {
    "HGMMA": "/*0a10*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;",
    "HMMA": "/*0a10*/ HMMA.16816.F32.BF16 R24, R4, R8, R24 ;",
    "wide": "/*0a10*/ LDG.E.128 R4, desc[UR6][R2.64] ;\n/*0a20*/ @!P1 STG.E.EF.128 desc[UR6][R2.64], R4 ;",
    "narrow": "/*0a10*/ LDG.E.64 R4, desc[UR6][R2.64] ;\n/*0a20*/ STG.E.U16 desc[UR6][R2.64], R4 ;",
    "amd_wide": "buffer_load_dwordx4 v[2:5], v1, s[8:11], 0 offen\nglobal_store_dwordx4 v1, v[2:5], s[2:3]",
    "amd_narrow": "global_load_dwordx2 v[2:3], v1, s[8:9]\nglobal_store_dword v1, v2, s[2:3]",
}


@pytest.mark.parametrize(
    ("required", "target", "code", "misses"),
    [
        ((WGMMA,), "sm_90", "HGMMA", 0),
        ((WGMMA,), "sm_90", "HMMA", 1),
        ((WGMMA,), "sm_80", "HMMA", 0),
        ((WIDE_LOAD, WIDE_STORE), "sm_90", "wide", 0),
        ((WIDE_LOAD, WIDE_STORE), "sm_90", "narrow", 2),
        ((WIDE_LOAD, WIDE_STORE), "gfx942", "amd_wide", 0),
        ((WIDE_LOAD, WIDE_STORE), "gfx942", "amd_narrow", 2),
    ],
)
def test_missing_instructions_are_found(required, target, code, misses):
    case = replace(CASES["row_forward bf16"], required=required)
    assert len(aot.missing_instructions(case, target, SASS[code])) == misses


def test_local_memory_is_read_from_what_the_tools_print():
    usage = " Function kernel:\n  REG:255 STACK:144 SHARED:1024 LOCAL:0 CONSTANT[0]:640 TEXTURE:0 SURFACE:0"
    assert aot.cuda_resources(usage) == {"registers": 255, "spill_bytes": 144, "scalar_spills": 0}
    counts = {"private_segment_fixed_size": 32, "sgpr_count": 90, "sgpr_spill_count": 3}
    assembly = "".join(f"    .{name}: {value}\n" for name, value in (counts | {"vgpr_count": 99}).items())
    found = aot.amd_resources(f"{assembly}    .vgpr_spill_count: 8\n")
    assert found == {"registers": 99, "spill_bytes": 32, "scalar_spills": 3}


def end_at_once(jobs: Connection, stderr: str) -> None:
    """In place of :func:`aot.serve`: a compiler that stops at what it finds impossible."""
    jobs.recv()
    with Path(stderr).open("a") as file:
        file.write("linear.py:159:0: error: no such layout\nnote: and more\n")
    os.abort()


def test_a_compiler_that_ends_is_named_and_the_next_case_gets_another(monkeypatch):
    monkeypatch.setattr(aot, "serve", end_at_once)
    compiler = aot.Compiler()
    first = compiler.process.pid
    for _ in range(2):
        (kernel,) = compiler.run(GOOD.case, GOOD.target)
        assert kernel.failure == "the compiler ended with SIGABRT (no such layout)"
        (problem,) = aot.problems(kernel)
        assert problem.startswith("row_forward bf16 for sm_90: row_forward_kernel does not compile: the compiler ended")
    assert compiler.process.pid != first
    compiler.end()


def test_a_case_that_raises_is_a_kernel_that_does_not_compile(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which runs kernels, and these tensors have no memory
    compiler = aot.Compiler()
    first = compiler.process.pid
    (kernel,) = compiler.run(GOOD.case, GOOD.target)
    assert "Error: " in kernel.failure
    assert compiler.process.pid == first
    compiler.end()


def test_programs_share_out_the_registers_of_an_nvidia_multiprocessor(monkeypatch):
    for arch, expected in (("sm_90", {(4, 1): 255, (16, 1): 128, (8, 4): 64}), ("gfx942", {}), ("default", {})):
        monkeypatch.setattr(tuning, "architecture", lambda device, arch=arch: arch)
        for warps, programs in ((4, 1), (16, 1), (8, 4)):
            options = tuning.sharing_registers(torch.device("cpu"), warps, programs)
            given = {"maxnreg": expected[warps, programs]} if expected else {}
            assert options == tuning.LAUNCH | given


def test_what_other_versions_found_is_in_the_report(tmp_path):
    other = aot.Report("3.6.0", [replace(GOOD, spill_bytes=8)])
    other.write(tmp_path)
    loaded = aot.Report.load(tmp_path)
    assert loaded == other
    report = aot.Report("3.9.0", [GOOD], {loaded.triton: loaded.problems()})
    (problem,) = report.problems()
    assert problem == "triton 3.6.0: row_forward bf16 for sm_90: row_forward_kernel spills 8 bytes a thread"
    written = aot.markdown(report)
    assert f"- {problem}" in written and "with triton 3.9.0, and checked with 3.6.0 too;" in written


def test_the_committed_report_is_of_all_cases_and_versions():
    """Made anew by `make check-triton` when a case is added or renamed."""
    report = aot.Report.load(aot.RESULTS)
    assert (*report.beside, report.triton) == aot_versions.VERSIONS
    assert {(k.case, k.target) for k in report.kernels} == {(c, t) for c in CASES for t in aot.TARGETS}
    assert report.problems() == []
    written = (aot.RESULTS / "triton-aot.md").read_text()
    assert written == aot.markdown(report)
