"""The end of a command in a run of several processes."""

from __future__ import annotations

import gc
import sys


def leave_process_group() -> None:
    """Destroy the default process group of this process, if it has one, at the end of a script.

    No model may be in use any more. A process that ends inside a gloo group aborts at times (pytorch/pytorch#179291,
    #190489). Reference cycles are freed first: if a DDP wrapper outlives the group, its destructor holds the GIL while
    it waits for a thread of gloo, which may itself wait for the GIL.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    gc.collect()
    distributed.destroy_process_group()
