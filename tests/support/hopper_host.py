"""The fused linear forward for Hopper on the CPU, compiled with tests/simt/simt_hopper.h, in the place of ``_cuda``."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import simt_host

SOURCE = simt_host.ROOT / "tests" / "simt" / "linear_host.cpp"
ELEMENT_SIZE = 2


class LinearArgs(ctypes.Structure):
    """As in csrc/cuda/linear_sm90.h."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("hidden_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("targets", ctypes.c_void_p),
        ("row_starts", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("mult", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("workspace", ctypes.c_void_p),
        ("workspace_floats", ctypes.c_int64),
        ("stats", simt_host.RowStats),
        ("logps", ctypes.c_void_p),
        ("exponentials", ctypes.c_void_p),
        ("exponentials_stride", ctypes.c_int64),
        ("tile_tops", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
    )


class LinearBackwardArgs(ctypes.Structure):
    _fields_ = (
        ("batch", simt_host.RowBatch),
        ("stats", simt_host.RowStats),
        ("tile_tops", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("logps", ctypes.c_void_p),
        ("coef", ctypes.c_void_p),
    )


class Schedule(ctypes.Structure):
    """As in csrc/cuda/linear_schedule.h."""

    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in ("cluster", "clusters", "row_groups", "splits", "together", "split_tiles", "vocab_tiles")
    )


class Unit(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in ("row_group", "split", "first_tile", "last_tile"))


def build(folder: Path, faults: simt_host.Faults | None = None) -> ctypes.CDLL:
    library = simt_host.build(folder, SOURCE, faults)
    library.simt_set_device.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    library.simt_linear_workspace.argtypes = [*[ctypes.c_int64] * 3, ctypes.POINTER(ctypes.c_int64)]
    library.simt_linear_tiles.argtypes = [ctypes.c_int64]
    library.simt_linear_tiles.restype = ctypes.c_int64
    library.simt_make_schedule.argtypes = [
        *[ctypes.c_int64] * 3,
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.POINTER(Schedule),
    ]
    return library


class HopperModule(simt_host.HostModule):
    """A stand-in for ``cpo_kernels._cuda`` on a Hopper GPU of a few multiprocessors.

    Attributes:
        multiprocessors: blocks that are shared out among; two of them make a cluster.
        capability: of the GPU.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self.multiprocessors = 4
        self.capability = (9, 0)

    def _begin(self) -> None:
        self.library.simt_begin(self.seed)
        self.library.simt_set_device(*self.capability, self.multiprocessors, 50 * 2**20)

    def linear_workspace(self, *, device: int, rows: int, vocab: int, depth: int) -> int:
        self._begin()
        floats = ctypes.c_int64()
        self.finish(self.library.simt_linear_workspace(rows, vocab, depth, ctypes.byref(floats)))
        return floats.value

    def linear_forward(self, **arguments: Any) -> None:
        self._begin()
        rows, stats = arguments["rows"], arguments["stats"]
        for name, count in (("hidden", rows), ("weight", arguments["vocab"])):
            # What lies between the rows is poisoned by the tests.
            elements = (count - 1) * arguments[f"{name}_stride"] + arguments["depth"]
            self.allow(arguments[name], elements * ELEMENT_SIZE)
        self.allow(arguments["targets"], 8 * arguments["tokens"])
        self.allow(arguments["row_starts"], 8 * (rows + 1))
        self.allow(arguments["bias"], 4 * arguments["vocab"])
        self.allow(arguments["workspace"], 4 * arguments["workspace_floats"], write=True)
        self.allow(stats, 8 * rows, write=True)
        self.allow(arguments["logps"], 4 * arguments["tokens"], write=True)
        self._allow_kept(arguments, rows, tokens=arguments["tokens"], write=True)
        names = [name for name, _ in LinearArgs._fields_ if name != "stats"]
        args = LinearArgs(
            stats=simt_host.RowStats(stats, stats + 4 * rows), **{name: arguments[name] for name in names}
        )
        self.finish(self.library.simt_linear_forward(arguments["dtype"], ctypes.byref(args)))

    def _allow_kept(self, arguments: dict[str, Any], rows: int, tokens: int, *, write: bool) -> None:
        """Allow access to whole rows of the exponentials, the columns that pad them included."""
        vocab = arguments["vocab"]
        size = rows * arguments["exponentials_stride"] * ELEMENT_SIZE
        self.allow(arguments["exponentials"], size, write=True)
        self.allow(arguments["tile_tops"], 4 * self.linear_tiles(vocab=vocab) * rows, write=write)
        self.allow(arguments["slopes"], 4 * tokens, write=write)

    def linear_tiles(self, *, vocab: int) -> int:
        return self.library.simt_linear_tiles(vocab)

    def linear_backward(self, **arguments: Any) -> None:
        self._begin()
        rows, stats, tokens = arguments["rows"], arguments["stats"], arguments["tokens"]
        self._allow_kept(arguments, rows, tokens, write=False)
        self.allow(arguments["targets"], 8 * tokens)
        self.allow(arguments["row_starts"], 8 * (rows + 1))
        self.allow(stats, 8 * rows)
        self.allow(arguments["logps"], 4 * tokens)
        self.allow(arguments["coef"], 4 * tokens)
        batch = simt_host.RowBatch(
            logits=arguments["exponentials"],
            row_stride=arguments["exponentials_stride"],
            **{name: arguments[name] for name in ("rows", "vocab", "targets", "row_starts", "slope")},
        )
        names = ("tile_tops", "slopes", "logps", "coef")
        args = LinearBackwardArgs(
            batch, simt_host.RowStats(stats, stats + 4 * rows), *(arguments[name] for name in names)
        )
        self.finish(self.library.simt_linear_backward(arguments["dtype"], ctypes.byref(args)))
