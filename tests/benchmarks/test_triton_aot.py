"""Kernels compiled ahead of time in a process of its own, without the interpreter; and that its checks can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from project import ROOT

pytest.importorskip("triton")

from benchmarks.kernels import aot
from benchmarks.kernels.aot_cases import CASES, WGMMA, WIDE_LOAD, WIDE_STORE
from benchmarks.records import Part, Record
from cpo_kernels.kernels.triton import tuning

pytestmark = pytest.mark.cpu

SM_90 = aot.TARGETS["sm_90"]
GOOD = {"warps": 8, "stages": 1, "registers": 40, "spill_bytes": 0, "shared_bytes": 32}

# Some cases, and groups of 32 in tiles so large that a thread cannot hold its share of the vectors.
COMPILED = """
import sys
from functools import partial
from benchmarks.kernels import aot, aot_cases

config = {"TILE": 65536, "num_warps": 4, "num_stages": 1}
launch = partial(aot_cases.contrast_groups, 32, ranked=True, config=config)
case = aot_cases.Case("spilling", launch, "contrast_kernel")
spilling = aot.compile_case(case, aot.TARGETS["sm_90"])
jobs = [("gfx942", "contrast of 2, ipo"), ("sm_90", "row_backward_ bf16, shared rows, bias and softcap")]
found = []
for target, case in jobs:
    try:
        found += aot.compile_case(aot.CASES[case], aot.TARGETS[target])
    except Exception as error:  # versions of Triton that bring no linker for AMD's GPUs
        if "ROCm linker" not in str(error):
            raise
aot.write(aot.Part(aot.REPORT, {"triton": [aot.triton.__version__]}, spilling + found), aot.Path(sys.argv[1]))
"""


def test_kernels_compile_without_problems_and_one_that_spills_is_found(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILED, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilling, *found = aot.load(tmp_path).records
    assert spilling.note.startswith("spills ") and not any(kernel.note for kernel in found)
    assert {kernel.contestant for kernel in found} >= {"row_backward_ bf16, shared rows, bias and softcap"}
    assert all(kernel.values["registers"] > 0 for kernel in found)


@pytest.mark.parametrize(
    ("change", "missing", "message"),
    [
        ({"spill_bytes": 8}, (), "spills 8 bytes a thread"),
        ({"shared_bytes": 227 * 1024 + 1}, (), "takes 232449 bytes of shared memory, sm_90 has 232448"),
        ({}, ("HGMMA",), "no instruction matches HGMMA"),
        ({}, (), ""),
    ],
)
def test_problems_are_named(change, missing, message):
    assert aot.problems(SM_90, GOOD | change, missing) == message


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
    assert aot.cuda_resources(usage) == {"registers": 255, "spill_bytes": 144}
    counts = {"private_segment_fixed_size": 32, "sgpr_count": 90, "sgpr_spill_count": 3}
    assembly = "".join(f"    .{name}: {value}\n" for name, value in (counts | {"vgpr_count": 99}).items())
    found = aot.amd_resources(f"{assembly}    .vgpr_spill_count: 8\n")
    assert found == {"registers": 99, "spill_bytes": 32, "moved_scalars": 3}


def end_at_once(case: str, target: str, stderr: str) -> None:
    """In place of :func:`aot.compile_named`: a compiler that stops at what it finds impossible."""
    with Path(stderr).open("a") as file:
        file.write("linear.py:159:0: error: no such layout\nnote: and more\n")
    os.abort()


def test_a_compiler_that_ends_is_named_with_its_last_words(monkeypatch):
    monkeypatch.setattr(aot, "compile_named", end_at_once)
    (kernel,) = aot.compile_in_a_process("row_forward bf16", "sm_90")
    assert kernel.note == "does not compile: ended with SIGABRT (no such layout)"
    assert (kernel.case, kernel.contestant, kernel.values) == ("sm_90", "row_forward bf16", {})


def test_programs_share_out_the_registers_of_an_nvidia_multiprocessor(monkeypatch):
    for arch, expected in (("sm_90", {(4, 1): 255, (16, 1): 128, (8, 4): 64}), ("gfx942", {}), ("default", {})):
        monkeypatch.setattr(tuning, "architecture", lambda device, arch=arch: arch)
        for warps, programs in ((4, 1), (16, 1), (8, 4)):
            options = tuning.sharing_registers(torch.device("cpu"), warps, programs)
            given = {"maxnreg": expected[warps, programs]} if expected else {}
            assert options == tuning.LAUNCH | given


def test_what_other_versions_found_is_in_the_report(tmp_path, monkeypatch):
    spilled = Record("sm_90", "row_forward bf16", GOOD, {"kernel": "row_forward_kernel"}, "spills 8 bytes a thread")
    good = replace(spilled, note="")
    aot.write(Part(aot.REPORT, {"triton": ["3.6.0"]}, [good, spilled]), tmp_path / "other")
    monkeypatch.setattr(aot, "compile_all", lambda cases, targets: [good])
    monkeypatch.setattr(aot.triton, "__version__", "3.9.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert aot.main(["--out", str(tmp_path), "--beside", str(tmp_path / "other")]) == 1
    found = aot.load(tmp_path)
    assert found.environment["triton"] == ["3.9.0", "3.6.0"]
    assert [(r.case, r.note) for r in found.records] == [("sm_90", ""), ("sm_90, triton 3.6.0", spilled.note)]
    assert "spills 8 bytes" in (tmp_path / "triton-aot.md").read_text()
    assert aot.main(["--out", str(tmp_path)]) == 0


def test_the_committed_report_is_of_all_cases_and_versions():
    """Made anew by `make check-triton` when a case is added or renamed."""
    part = aot.load(aot.RESULTS)
    assert set(part.environment["triton"]) == set(aot.VERSIONS)
    assert {(r.contestant, r.case) for r in part.records} == {(c, t) for c in CASES for t in aot.TARGETS}
    assert not any(record.note for record in part.records)
    assert (aot.RESULTS / "triton-aot.md").read_text() == aot.page(part)
