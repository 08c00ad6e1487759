"""The CUDA kernels on the CPU: compiled by g++ with tests/simt/simt_host.h and called in the place of ``_cuda``."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from project import ROOT

SOURCE = ROOT / "tests" / "simt" / "kernels.cpp"
# As setup.py compiles the CPU extension: no contraction, and 16-bit gradients over float32 logits.
FLAGS = ["-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra"]
ELEMENT_SIZE = (4, 2, 2)  # by the code of a dtype


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


# By what is wrong: the file in csrc/cuda, a text that it has once, and that text with FAULT where the fault decides.
Faults = Mapping[str, tuple[str, str, str]]


def build(folder: Path, source: Path = SOURCE, faults: Faults | None = None, optimize: str = "-O1") -> ctypes.CDLL:
    """Compile the kernels, in seconds, unless another worker of the tests has done so in the same folder.

    With faults, all of them are in the library, and :func:`in_effect` says which one it has.
    """
    library = folder / f"lib{source.stem}{'_faults' if faults else ''}.so"
    simt = ROOT / "tests" / "simt"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            include = with_faults(faults, folder / f"{source.stem}_faults") if faults else ROOT / "csrc"
            command = [compiler() or "g++", optimize, *FLAGS, f"-I{include}", f"-I{simt}"]
            command += [*(["-include", str(simt / "fault.h")] if faults else []), str(source), "-o", str(library)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.simt_error.restype = ctypes.c_char_p
    loaded.simt_begin.argtypes = [ctypes.c_uint64]
    loaded.simt_region.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return loaded


def with_faults(faults: Faults, folder: Path) -> Path:
    """Copy the sources into ``folder`` and put every fault into them, the first of which is FAULT(0)."""
    shutil.copytree(ROOT / "csrc", folder)
    for index, (name, right, faulty) in enumerate(faults.values()):
        file = folder / "cuda" / name
        text = file.read_text()
        assert text.count(right) == 1, right
        file.write_text(text.replace(right, faulty.replace("FAULT", f"FAULT({index})")))
    return folder


@contextmanager
def in_effect(library: ctypes.CDLL, faults: Faults, name: str) -> Iterator[None]:
    """Give a library that was built with ``faults`` the one of this name; it has none before and after."""
    current = ctypes.c_int.in_dll(library, "fault_in_effect")
    before = current.value
    current.value = list(faults).index(name)
    try:
        yield
    finally:
        current.value = before


class RowBatch(ctypes.Structure):
    """As in csrc/cuda/launch.h, like the structures after it."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int),
        ("row_stride", ctypes.c_int64),
        ("targets", ctypes.c_void_p),
        ("row_starts", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("mult", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("slope", ctypes.c_float),
    )


class RowStats(ctypes.Structure):
    _fields_ = (("max", ctypes.c_void_p), ("log_sum", ctypes.c_void_p))


class ForwardArgs(ctypes.Structure):
    _fields_ = (("batch", RowBatch), ("stats", RowStats), ("logps", ctypes.c_void_p))


class BackwardArgs(ctypes.Structure):
    _fields_ = (
        ("batch", RowBatch),
        ("stats", RowStats),
        ("coef", ctypes.c_void_p),
        ("token_grad", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
    )


class UnitArgs(ctypes.Structure):
    _fields_ = (
        ("forward", ForwardArgs),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("slice_bytes", ctypes.c_int64),
    )


class ContrastArgs(ctypes.Structure):
    _fields_ = (
        ("logps", ctypes.c_void_p),
        ("token_starts", ctypes.c_void_p),
        ("segment_starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("ref_logps", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("num_target_tokens", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("coef", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("max_candidates", ctypes.c_int),
        ("length_normalized", ctypes.c_bool),
        ("loss", ctypes.c_int),
        ("beta", ctypes.c_double),
        ("label_smoothing", ctypes.c_double),
        ("margin", ctypes.c_double),
        ("contrast_scale", ctypes.c_double),
        ("mle_scale", ctypes.c_double),
    )


class LossArgs(ctypes.Structure):
    _fields_ = (
        ("forward", ForwardArgs),
        ("contrast", ContrastArgs),
        ("grad", ctypes.c_void_p),
        ("grad_stride", ctypes.c_int64),
    )


class TargetArgs(ctypes.Structure):
    _fields_ = (("targets", ctypes.c_void_p), ("count", ctypes.c_int64), ("vocab", ctypes.c_int64))


class ScaleArgs(ctypes.Structure):
    _fields_ = (("numbers", ctypes.c_void_p), ("count", ctypes.c_int64), ("factor", ctypes.c_void_p))


class EmulatorError(AssertionError):
    """What the emulator found: an access outside of the arguments, a barrier that not all threads reach."""


def record(module: HostModule, monkeypatch: Any, names: Sequence[str]) -> list[str]:
    """Record the names of the launches that a test makes from now on, in order."""
    made: list[str] = []
    for name in names:
        launch = getattr(module, name)

        def recorded(name: str = name, launch: Any = launch, **arguments: Any) -> None:
            made.append(name)
            launch(**arguments)

        monkeypatch.setattr(module, name, recorded)
    return made


class HostModule:
    """A stand-in for ``cpo_kernels._cuda``, which may read only what arguments cover, and write only results.

    Attributes:
        seed: of the order in which the threads of a block run.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.seed = 0

    def allow(self, address: int, size: int, *, write: bool = False) -> None:
        if address and size:
            self.library.simt_region(address, size, write)

    def finish(self, status: int) -> None:
        if status:
            raise EmulatorError(self.library.simt_error().decode())

    def _batch(self, arguments: dict[str, Any]) -> tuple[RowBatch, RowStats]:
        self.library.simt_begin(self.seed)
        names = [name for name, _ in RowBatch._fields_]
        batch = RowBatch(**{name: arguments[name] for name in names})
        size, rows, tokens = ELEMENT_SIZE[arguments["dtype"]], arguments["rows"], arguments["tokens"]
        for row in range(rows):  # what lies between the rows is none of a kernel's business
            self.allow(batch.logits + row * batch.row_stride * size, batch.vocab * size)
        self.allow(arguments["targets"], 8 * tokens)
        self.allow(arguments["row_starts"], 8 * (rows + 1))
        self.allow(arguments["bias"], 4 * batch.vocab)
        return batch, RowStats(arguments["stats"], arguments["stats"] + 4 * rows)

    def _groups(self, arguments: dict[str, Any]) -> ContrastArgs:
        segments, slots = arguments["segments"], arguments["slots"]
        sizes = {
            "token_starts": 8 * (segments + 1),
            "segment_starts": 8 * (arguments["groups"] + 1),
            "lengths": 8 * segments,
            "ref_logps": 4 * segments,
            "ranks": 8 * segments,
            "num_target_tokens": 8,
        }
        for name, size in sizes.items():
            self.allow(arguments[name], size)
        self.allow(arguments["sums"], 4 * segments, write=True)
        self.allow(arguments["coef"], 4 * slots, write=True)
        return ContrastArgs(**{name: arguments[name] for name, _ in ContrastArgs._fields_})

    def contrast(self, **arguments: Any) -> None:
        self.library.simt_begin(self.seed)
        self.allow(arguments["logps"], 4 * arguments["slots"])
        args = self._groups(arguments)
        self.finish(self.library.simt_contrast(ctypes.byref(args), arguments["threads"]))

    def cpo_loss(self, **arguments: Any) -> None:
        batch, stats = self._batch(arguments)
        self.allow(stats.max, 8 * batch.rows, write=True)
        self.allow(arguments["logps"], 4 * arguments["tokens"], write=True)
        self._allow_rows(arguments["grad"], batch, arguments["grad_stride"], ELEMENT_SIZE[arguments["dtype"]])
        forward = ForwardArgs(batch, stats, arguments["logps"])
        args = LossArgs(forward, self._groups(arguments), arguments["grad"], arguments["grad_stride"])
        self.finish(self.library.simt_cpo_loss(arguments["dtype"], ctypes.byref(args), arguments["threads"]))

    def _allow_rows(self, address: int, batch: RowBatch, stride: int, size: int) -> None:
        for row in range(batch.rows if address else 0):
            self.allow(address + row * stride * size, batch.vocab * size, write=True)

    def row_forward(self, **arguments: Any) -> None:
        batch, stats = self._batch(arguments)
        self.allow(stats.max, 8 * batch.rows, write=True)
        self.allow(arguments["logps"], 4 * arguments["tokens"], write=True)
        args = ForwardArgs(batch, stats, arguments["logps"])
        self.finish(self.library.simt_row_forward(arguments["dtype"], ctypes.byref(args), arguments["threads"]))

    def row_backward(self, **arguments: Any) -> None:
        batch, stats = self._batch(arguments)
        self.allow(stats.max, 8 * batch.rows)
        self.allow(arguments["coef"], 4 * arguments["tokens"])
        self.allow(arguments["token_grad"], 4 * arguments["tokens"], write=True)
        self._allow_rows(arguments["out"], batch, arguments["out_stride"], ELEMENT_SIZE[arguments["out_dtype"]])
        self.allow(arguments["scale"], 4 * batch.rows, write=True)
        names = ("coef", "token_grad", "out", "out_stride", "scale")
        args = BackwardArgs(batch, stats, *(arguments[name] for name in names))
        dtypes = arguments["dtype"], arguments["out_dtype"]
        self.finish(self.library.simt_row_backward(*dtypes, ctypes.byref(args), arguments["threads"]))

    def check_targets(self, **arguments: Any) -> None:
        self.library.simt_begin(self.seed)
        self.allow(arguments["targets"], 8 * arguments["count"])
        args = TargetArgs(*(arguments[name] for name, _ in TargetArgs._fields_))
        self.finish(self.library.simt_check_targets(ctypes.byref(args)))

    def scale(self, **arguments: Any) -> None:
        self.library.simt_begin(self.seed)
        self.allow(arguments["numbers"], arguments["count"] * ELEMENT_SIZE[arguments["dtype"]], write=True)
        self.allow(arguments["factor"], 4)
        args = ScaleArgs(*(arguments[name] for name, _ in ScaleArgs._fields_))
        self.finish(self.library.simt_scale(arguments["dtype"], ctypes.byref(args)))

    def unit_forward_bytes(self, *, device: int) -> int:
        count = self.library.simt_unit_forward_bytes
        count.restype = ctypes.c_int64
        return count()

    def unit_forward(self, **arguments: Any) -> None:
        batch, stats = self._batch(arguments)
        self.allow(stats.max, 8 * batch.rows, write=True)
        self.allow(arguments["logps"], 4 * arguments["tokens"], write=True)
        self._allow_rows(arguments["out"], batch, arguments["out_stride"], ELEMENT_SIZE[arguments["out_dtype"]])
        names = ("out", "out_stride", "slice_bytes")
        forward = ForwardArgs(batch, stats, arguments["logps"])
        args = UnitArgs(forward, *(arguments[name] for name in names))
        dtypes = arguments["dtype"], arguments["out_dtype"]
        self.finish(self.library.simt_unit_forward(*dtypes, ctypes.byref(args), arguments["threads"]))
