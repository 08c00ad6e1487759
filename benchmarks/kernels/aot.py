"""Compiles every Triton kernel for seven architectures without a GPU, and says what the compilers made of it.

`python -m benchmarks.kernels.aot` writes `benchmarks/results/triton-aot.{md,json}` and fails on a kernel that does not
compile, on a register spill, on more shared memory than a program can have, and where the machine code lacks an
instruction that a case asks for. `--cases` and `--targets` choose, by a part of a case's name; `--out FOLDER` writes
elsewhere; `--beside FOLDER` names what other versions of Triton left in their folders. benchmarks.kernels.aot_versions
runs it with each version that is supported.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.environment import log
from benchmarks.kernels.aot_cases import CASES, Case
from cpo_kernels.kernels.triton import linear, tuning

RESULTS = Path(__file__).parent.parent / "results"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
REPORT = "triton-aot"
KIB, MIB = 2**10, 2**20


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


@dataclass(frozen=True)
class Kernel:
    """Describes a compiled kernel: ``registers`` per thread (of vectors on AMD), ``spill_bytes`` in local memory.

    ``failure`` says why there is none, and there is nothing else to say then.

    ``scalar_spills``: scalar registers that AMD's compiler keeps in lanes of vector registers. They cost an instruction
    to move and no memory; those for which lanes do not suffice count in ``spill_bytes``.
    """

    case: str
    target: str
    kernel: str
    warps: int = 0
    stages: int = 0
    registers: int = 0
    spill_bytes: int = 0
    scalar_spills: int = 0
    shared_bytes: int = 0
    missing: tuple[str, ...] = ()
    failure: str = ""


def problems(kernel: Kernel) -> list[str]:
    """Name what a kernel must not do, if it does."""
    limit = TARGETS[kernel.target].shared_limit
    found = [f"does not compile: {kernel.failure}"] if kernel.failure else []
    found += [f"no instruction matches {pattern}" for pattern in kernel.missing]
    if kernel.spill_bytes:
        found.append(f"spills {kernel.spill_bytes} bytes a thread")
    if kernel.shared_bytes > limit:
        found.append(f"takes {kernel.shared_bytes} bytes of shared memory, {kernel.target} has {limit}")
    return [f"{kernel.case} for {kernel.target}: {kernel.kernel} {problem}" for problem in found]


def compile_launches(launch: Callable[[], object], target: Target) -> list[Any]:
    """Compile everything that ``launch`` launches; nothing runs."""
    compiled = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **kwargs))

    # Triton asks its driver for the target, and keeps what it compiled by device.
    device = list(TARGETS).index(target.name)
    machine = SimpleNamespace(
        get_current_target=lambda: target.gpu,
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
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
    """Read registers and local memory from ``cuobjdump -res-usage``."""
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(numbers["REG"]),
        "spill_bytes": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "scalar_spills": 0,
    }


def amd_resources(assembly: str) -> dict[str, int]:
    """Read registers and local memory from the metadata at the end of the assembly."""
    names = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    numbers = {name: int(value) for name, value in re.findall(rf"\.({names}):\s+(\d+)", assembly)}
    return {
        "registers": numbers["vgpr_count"],
        "spill_bytes": max(numbers["private_segment_fixed_size"], 4 * numbers["vgpr_spill_count"]),
        "scalar_spills": numbers["sgpr_spill_count"],
    }


def missing_instructions(case: Case, target: str, code: str) -> tuple[str, ...]:
    """Return patterns that a case requires on an architecture and that its machine code does not match."""
    patterns = [p for required in case.required for prefix, p in required.items() if target.startswith(prefix)]
    return tuple(pattern for pattern in patterns if not re.search(pattern, code))


def describe(case: Case, target: Target, compiled: Any) -> Kernel:
    """Return what is reported of a compiled kernel."""
    metadata = compiled.metadata
    if target.gpu.backend == "cuda":
        cubin = compiled.asm["cubin"]
        resources, code = cuda_resources(dump(cubin, "-res-usage")), ""
        if metadata.name == case.kernel and case.required:
            code = dump(cubin, "-sass")
    else:
        code = compiled.asm["amdgcn"]
        resources = amd_resources(code)
    missing = missing_instructions(case, target.name, code) if metadata.name == case.kernel else ()
    return Kernel(
        case=case.name,
        target=target.name,
        kernel=metadata.name,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        shared_bytes=metadata.shared,
        missing=missing,
        **resources,
    )


def compile_case(case: Case, target: Target) -> list[Kernel]:
    """Compile all kernels of a case.

    Raises:
        RuntimeError: the case did not launch the kernel that it is about.
    """
    kernels = [describe(case, target, compiled) for compiled in compile_launches(case.launch, target)]
    if case.kernel not in {kernel.kernel for kernel in kernels}:
        raise RuntimeError(f"{case.name} launched {[k.kernel for k in kernels]}, expected {case.kernel}")
    return kernels


def serve(jobs: Connection, stderr: str) -> None:
    """Compile (case, target) after (case, target) until there are none; what the compilers say goes to a file."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND), 2)
    for case, target in iter(jobs.recv, None):
        try:
            kernels = compile_case(CASES[case], TARGETS[target])
        except Exception as error:  # whatever a compiler raises
            kernels = [Kernel(case, target, CASES[case].kernel, failure=f"{type(error).__name__}: {error}".strip())]
        jobs.send(kernels)


class Compiler:
    """Holds a process that compiles, and the next one where it ends: compilers stop at what they find impossible."""

    def __init__(self) -> None:
        self.stderr = tempfile.NamedTemporaryFile("r", errors="replace")  # noqa: SIM115 - closed by end()
        self.start()

    def start(self) -> None:
        """Start the process."""
        context = multiprocessing.get_context("spawn")
        self.jobs, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.stderr.name))
        self.process.start()
        theirs.close()

    def run(self, case: str, target: str) -> list[Kernel]:
        """Compile a case; return its kernels, or one that says why there are none."""
        self.stderr.seek(0, os.SEEK_END)
        try:
            self.jobs.send((case, target))
            kernels: list[Kernel] = self.jobs.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            status = self.process.exitcode or 0
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            kernels = [Kernel(case, target, CASES[case].kernel, failure=f"the compiler ended with {how}")]
            self.start()
        said = re.search(r"error: (.+)", self.stderr.read())
        # The compilers' own words, which exceptions do not carry.
        return [replace(k, failure=f"{k.failure} ({said.group(1)})") if k.failure and said else k for k in kernels]

    def end(self) -> None:
        """Let the process end."""
        with suppress(ConnectionError):
            self.jobs.send(None)
        self.process.join()
        self.stderr.close()


def compile_all(cases: Iterable[str], targets: Iterable[str]) -> list[Kernel]:
    """Compile every case for every target, as many at a time as there are cores; problems are told as they come."""
    jobs = list(itertools.product(cases, targets))
    free: queue.SimpleQueue[Compiler] = queue.SimpleQueue()

    def run(job: tuple[str, str]) -> list[Kernel]:
        compiler = free.get()
        try:
            kernels = compiler.run(*job)
        finally:
            free.put(compiler)
        for problem in itertools.chain.from_iterable(map(problems, kernels)):
            log(problem)
        return kernels

    compilers = [Compiler() for _ in range(min(len(os.sched_getaffinity(0)), len(jobs)))]
    for compiler in compilers:
        free.put(compiler)
    try:
        with ThreadPoolExecutor(len(compilers)) as pool:
            return [kernel for kernels in pool.map(run, jobs) for kernel in kernels]
    finally:
        for compiler in compilers:
            compiler.end()


@dataclass(frozen=True)
class Report:
    """Holds what one version of Triton made of the kernels, and what other versions (``beside``) had as problems."""

    triton: str
    kernels: list[Kernel]
    beside: dict[str, list[str]] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """Return those of all kernels, and of the other versions."""
        own = [problem for kernel in self.kernels for problem in problems(kernel)]
        return own + [f"triton {version}: {problem}" for version, found in self.beside.items() for problem in found]

    @staticmethod
    def load(folder: Path) -> Report:
        """Read the report in a folder."""
        content = json.loads((folder / f"{REPORT}.json").read_text())
        kernels = [Kernel(**kernel | {"missing": tuple(kernel["missing"])}) for kernel in content["kernels"]]
        return Report(content["triton"], kernels, content["beside"])

    def write(self, folder: Path) -> None:
        """Write both files."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{REPORT}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        (folder / f"{REPORT}.md").write_text(markdown(self))


def markdown(report: Report) -> str:
    """Return one table an architecture."""
    checked = f", and checked with {' and '.join(report.beside)} too" if report.beside else ""
    lines = [
        "# Triton kernels compiled ahead of time",
        "",
        f"Made by `python -m benchmarks.kernels.aot` with triton {report.triton}{checked}; without a GPU, with",
        "the block sizes of `tuning.json`. Registers are per thread (vector registers on AMD), spills bytes of local",
        "memory per thread, shared memory bytes per program. Moved scalars, on AMD: scalar registers kept in lanes of",
        "vector registers, which costs an instruction and no memory.",
    ]
    for target in TARGETS.values():
        rows = [kernel for kernel in report.kernels if kernel.target == target.name]
        if rows:
            lines += ["", f"## {target.name} ({target.shared_limit // KIB} KiB of shared memory)", ""]
            lines += [
                "| case | kernel | warps | stages | registers | spills | shared | moved scalars |",
                "| --- | --- " + "| ---: " * 6 + "|",
            ]
            lines += [
                f"| {k.case} | {k.kernel} | {k.warps} | {k.stages} | {k.registers} | {k.spill_bytes} "
                f"| {k.shared_bytes} | {k.scalar_spills} |"
                for k in rows
            ]
    lines += ["", "## Problems", "", *([f"- {problem}" for problem in report.problems()] or ["None."])]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and report; exit status 1 if any kernel has a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[""], help="parts of the names of cases; default: all")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="folders of other versions' reports")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    started = time.perf_counter()
    cases = [name for name in CASES if any(part in name for part in options.cases)]
    others = [Report.load(folder) for folder in options.beside]
    beside = {other.triton: other.problems() for other in others}
    report = Report(triton.__version__, compile_all(cases, options.targets), beside)
    report.write(options.out)
    found, seconds = report.problems(), time.perf_counter() - started
    log(f"{len(report.kernels)} kernels of {len(cases)} cases in {seconds:.0f} s, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
