"""The contestants for calls whose shapes vary: nobody is told a shape beforehand.

`peers.BUILDERS` compiles for one shape, which is torch.compile's best where shapes stay. Where they vary it would
compile for every shape until it gives up; here it is free to make dimensions dynamic, as it does by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.peers import BUILDERS, Peer

COMPILED = "torch.compile"
DYNAMIC = "torch.compile, dynamic=True"


def compiled(name: str, dynamic: bool | None) -> Peer:
    """Eager, compiled with every dimension dynamic, or (None) with those that have been seen to change."""
    eager = BUILDERS["eager"]()
    return replace(eager, name=name, loss=torch.compile(eager.loss, dynamic=dynamic), compiles=True)


def builders() -> dict[str, Callable[[], Peer]]:
    """Every peer by name, with torch.compile as it is for shapes that vary."""
    return {
        **BUILDERS,
        COMPILED: partial(compiled, COMPILED, None),
        DYNAMIC: partial(compiled, DYNAMIC, True),
    }
