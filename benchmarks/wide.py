"""Part `wide`: the heads of the largest models on a CPU, in more rounds than a run of all parts has time for.

A call takes seconds and its gradient a gigabyte of fresh memory, which a virtual machine may or may not have at hand:
two rounds say little. On a GPU these heads are cases of the part `heads`.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import heads, shapes
from benchmarks.ceilings import Ceilings
from benchmarks.measure import free_memory
from benchmarks.records import Record
from benchmarks.setting import Setting


def run(setting: Setting) -> Iterator[Record]:
    """Ceilings and every case; nothing on a GPU."""
    if setting.on_gpu:
        return
    ceilings = Ceilings()
    yield from ceilings.measure(setting)
    for shape in shapes.QUICK_CASES[:1] if setting.quick else shapes.WIDE:
        yield from heads.measure(shape, setting, ceilings)
        free_memory()
