"""Part `wide`: the heads of the largest models on a CPU, in more rounds than a run of all parts has time for.

A call takes seconds and its gradient a gigabyte of fresh memory, which a virtual machine may or may not have at hand:
few rounds say little. On a GPU these heads are cases of the part `heads`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks import heads, shapes
from benchmarks.measure import each
from benchmarks.records import Record
from benchmarks.setting import Setting


def run(setting: Setting) -> Iterator[Record]:
    """Measure ceilings and every case; nothing on a GPU."""
    if setting.on_gpu:
        return
    found = heads.ceilings(setting)
    yield from found
    chosen, best = setting.choose(shapes.QUICK_CASES[:1], shapes.WIDE, ()), heads.best_of(found)
    yield from each({shape.name: partial(heads.beside_peers, shape, setting, best) for shape in chosen})
