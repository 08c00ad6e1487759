"""How a command ends its part in a run of several processes."""

from __future__ import annotations

import gc
import sys


def leave_process_group() -> None:
    """Destroy the default process group, if this process is in one; for the end of a script, with no model in use.

    A process that ends inside a gloo group aborts at times (pytorch/pytorch#179291, #190489). Whatever lies in
    reference cycles is freed first: where a DDP wrapper outlives the group, its destructor waits with the GIL held
    for a thread of gloo that may itself be waiting for the GIL.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    gc.collect()
    distributed.destroy_process_group()
