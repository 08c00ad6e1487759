"""Compiles every Triton kernel for seven architectures without a GPU, and says what the compilers made of it.

`python -m benchmarks.kernels.aot` writes `benchmarks/results/triton-aot.{md,json}` and fails on a kernel that does not
compile, on a register spill, on more shared memory than a program can have, and where the machine code lacks an
instruction that a case asks for. `--cases` and `--targets` choose, by a part of a case's name; `--out FOLDER` writes
elsewhere; `--beside FOLDER` names what other versions of Triton left in their folders. `--versions` does it with each
version that is supported, or that is named, which pip installs into build/triton; this is `make check-triton`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import records
from benchmarks.environment import RESULTS, ROOT, log
from benchmarks.kernels.aot_cases import CASES, Case
from benchmarks.processes import ProcessError, call_alone
from benchmarks.records import Part, Record
from benchmarks.tables import part_tables
from cpo_kernels.kernels.triton import linear, tuning

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
REPORT, FOLDER = "triton-aot", ROOT / "build" / "triton"
# That of torch 2.11, that of the torch which development pins, and the newest, in this order.
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")
KIB, MIB = 2**10, 2**20
INTRODUCTION = """\
# Triton kernels compiled ahead of time

Made by `python -m benchmarks.kernels.aot` with triton {versions}, the figures by the first of them; without a GPU, with
the block sizes of `tuning.json`. Registers are per thread (vector registers on AMD), spills bytes of local memory per
thread, shared memory bytes per program. A note is a problem."""


@dataclass(frozen=True)
class Target:
    """Describes an architecture: bytes of shared memory of a program at most, and what launchers ask of the device."""

    name: str
    gpu: GPUTarget
    shared_limit: int
    multiprocessors: int
    cache_bytes: int


# What each card has, by its vendor's figures: the largest block of shared memory, multiprocessors, L2 cache.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 163 * KIB, 108, 40 * MIB),  # A100
        Target("sm_86", GPUTarget("cuda", 86, 32), 99 * KIB, 82, 6 * MIB),  # GeForce RTX 3090
        Target("sm_89", GPUTarget("cuda", 89, 32), 99 * KIB, 128, 72 * MIB),  # GeForce RTX 4090
        Target("sm_90", GPUTarget("cuda", 90, 32), 227 * KIB, 132, 50 * MIB),  # H100 SXM
        Target("sm_100", GPUTarget("cuda", 100, 32), 227 * KIB, 148, 126 * MIB),  # B200
        Target("sm_120", GPUTarget("cuda", 120, 32), 99 * KIB, 170, 96 * MIB),  # GeForce RTX 5090
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * KIB, 304, 4 * MIB),  # MI300X
    )
}


def problems(target: Target, values: Mapping[str, float], missing: Sequence[str]) -> str:
    """Name what a kernel must not do, if it does."""
    found = [f"no instruction matches {pattern}" for pattern in missing]
    if values["spill_bytes"]:
        found.append(f"spills {values['spill_bytes']} bytes a thread")
    if values["shared_bytes"] > target.shared_limit:
        found.append(f"takes {values['shared_bytes']} bytes of shared memory, {target.name} has {target.shared_limit}")
    return "; ".join(found)


def compile_launches(launch: Callable[[], object], target: Target) -> list[Any]:
    """Compile everything that ``launch`` launches; nothing runs."""
    compiled = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **kwargs))

    # Triton asks its driver for the target, and keeps what it compiled by device.
    device = list(TARGETS).index(target.name)
    machine = SimpleNamespace(
        get_current_target=lambda: target.gpu, get_current_device=lambda: device, get_current_stream=lambda device: 0
    )
    facts = (target.multiprocessors, target.cache_bytes)
    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", compile_only))
        stack.enter_context(patch.object(tuning, "architecture", lambda device: target.name))
        stack.enter_context(patch.object(linear, "multiprocessors_and_cache", lambda device: facts))
        # Tensors without memory, whose addresses are multiples of 16 as the allocator's are on a GPU.
        stack.enter_context(torch.device("meta"))
        driver.set_active(machine)  # for good: without a GPU there is none to go back to
        launch()
    return compiled


def dump(cubin: bytes, *options: str) -> str:
    """Return what cuobjdump says about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, *options, file.name], check=True, capture_output=True, text=True).stdout


def cuda_resources(usage: str) -> dict[str, int]:
    """Read registers per thread and local memory from ``cuobjdump -res-usage``."""
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": numbers["REG"], "spill_bytes": numbers["STACK"] + numbers["LOCAL"]}


def amd_resources(assembly: str) -> dict[str, int]:
    """Read vector registers and local memory from the metadata at the end of the assembly.

    Scalar registers that are kept in lanes of vector registers (moved scalars) cost an instruction and no memory; those
    for which lanes do not suffice count as spills.
    """
    names = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    numbers = {name: int(value) for name, value in re.findall(rf"\.({names}):\s+(\d+)", assembly)}
    spills = max(numbers["private_segment_fixed_size"], 4 * numbers["vgpr_spill_count"])
    counts = {"registers": numbers["vgpr_count"], "moved_scalars": numbers["sgpr_spill_count"]}
    return counts | {"spill_bytes": spills}


def missing_instructions(case: Case, target: str, code: str) -> tuple[str, ...]:
    """Return patterns that a case requires on an architecture and that its machine code does not match."""
    patterns = [p for required in case.required for prefix, p in required.items() if target.startswith(prefix)]
    return tuple(pattern for pattern in patterns if not re.search(pattern, code))


def describe(case: Case, target: Target, compiled: Any) -> Record:
    """Return what is reported of a compiled kernel, with its problems as a note."""
    metadata, required = compiled.metadata, compiled.metadata.name == case.kernel and case.required
    if target.gpu.backend == "cuda":
        cubin = compiled.asm["cubin"]
        resources, code = cuda_resources(dump(cubin, "-res-usage")), dump(cubin, "-sass") if required else ""
    else:
        code = compiled.asm["amdgcn"]
        resources = amd_resources(code)
    missing = missing_instructions(case, target.name, code) if required else ()
    values = {"warps": metadata.num_warps, "stages": metadata.num_stages, "shared_bytes": metadata.shared, **resources}
    return Record(target.name, case.name, values, {"kernel": metadata.name}, problems(target, values, missing))


def compile_case(case: Case, target: Target) -> list[Record]:
    """Compile all kernels of a case; raise RuntimeError if it did not launch the kernel that it is about."""
    kernels = [describe(case, target, compiled) for compiled in compile_launches(case.launch, target)]
    launched = [kernel.conditions["kernel"] for kernel in kernels]
    if case.kernel not in launched:
        raise RuntimeError(f"{case.name} launched {launched}, expected {case.kernel}")
    return kernels


def compile_in_a_process(case: str, target: str) -> list[Record]:
    """Compile a case in a process of its own: compilers stop at what they find impossible.

    Returns its kernels, or one that says why there are none, with the compilers' own words, which exceptions lack.
    """
    with tempfile.NamedTemporaryFile("r", errors="replace") as stderr:
        try:
            found = call_alone(compile_named, case, target, stderr.name, preload=["benchmarks.kernels.aot_cases"])
        except ProcessError as error:
            said = re.search(r"error: (.+)", stderr.read())
            note = f"does not compile: {error}" + (f" ({said.group(1)})" if said else "")
            found = [Record(target, case, {}, {"kernel": CASES[case].kernel}, note)]
    for kernel in found:
        if kernel.note:
            log(f"{case} for {target}: {kernel.conditions['kernel']} {kernel.note}")
    return found


def compile_named(case: str, target: str, stderr: str) -> list[Record]:
    """Compile a case by its name for a target by its name; what the compilers say goes to a file."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND), 2)
    return compile_case(CASES[case], TARGETS[target])


def compile_all(cases: Iterable[str], targets: Iterable[str]) -> list[Record]:
    """Compile every case for every target, as many at a time as there are cores; problems are told as they come."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = pool.map(compile_in_a_process, *zip(*itertools.product(cases, targets), strict=True))
        return [kernel for kernels in jobs for kernel in kernels]


def load(folder: Path) -> Part:
    """Read the report in a folder."""
    return records.load(folder / f"{REPORT}.json")[REPORT]


def write(part: Part, folder: Path) -> None:
    """Write the report: JSON and a page with one table an architecture."""
    folder.mkdir(parents=True, exist_ok=True)
    records.save({REPORT: part}, folder / f"{REPORT}.json")
    (folder / f"{REPORT}.md").write_text(page(part))


def page(part: Part) -> str:
    """Return one table an architecture, and the problems that other versions had."""
    return "\n\n".join([INTRODUCTION.format(versions=", ".join(part.environment["triton"])), *part_tables(part)]) + "\n"


def with_versions(versions: Sequence[str], chosen: list[str], out: Path) -> int:
    """Compile with each version of Triton, installed into a folder of its own; the newest reports."""
    folders, statuses = [FOLDER / "reports" / version for version in versions], []
    for version, folder in zip(versions, [*folders[:-1], out], strict=True):
        log(f"triton {version} ...")
        place = FOLDER / version
        if not (place / f"triton-{version}.dist-info").exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
            subprocess.run([*pip, f"triton=={version}"], check=True)
        paths = os.pathsep.join(filter(None, (str(place), str(ROOT), os.environ.get("PYTHONPATH"))))
        given = {"TRITON_CACHE_DIR": str(FOLDER / "cache")} | os.environ | {"PYTHONPATH": paths}
        given.pop("TRITON_INTERPRET", None)
        beside = ["--beside", *map(str, folders[:-1])] if folder == out else []
        command = [sys.executable, "-m", "benchmarks.kernels.aot", *chosen, "--out", str(folder), *beside]
        statuses.append(subprocess.run(command, env=given, cwd=ROOT).returncode)
    return 1 if any(statuses) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and report; exit status 1 if any kernel has a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[""], help="parts of the names of cases; default: all")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--versions", nargs="*", help=f"of Triton, the newest last; without a name {VERSIONS}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="folders of other versions' reports")
    options = parser.parse_args(argv)
    if options.versions is not None:
        chosen = ["--cases", *options.cases, "--targets", *options.targets]
        return with_versions(options.versions or VERSIONS, chosen, options.out)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    cases = [name for name in CASES if any(part in name for part in options.cases)]
    part = Part(REPORT, {"triton": [triton.__version__]}, compile_all(cases, options.targets))
    for other in map(load, options.beside):
        (version,) = other.environment["triton"]
        part.environment["triton"].append(version)
        part.records += [replace(r, case=f"{r.case}, triton {version}") for r in other.records if r.note]
    write(part, options.out)
    found = [record for record in part.records if record.note]
    log(f"{len(part.records)} kernels of {len(cases)} cases, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
