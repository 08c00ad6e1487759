"""Where a part of the suite runs and how large."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """What every part takes.

    Attributes:
        device: the CPU, or a GPU, for which sizes are larger.
        quick: tiny sizes, whose times mean nothing; for tests.
        texts: files of plain text; without any, the reference text that comes with Python.
        tokenizer: folder with GPT-2's `vocab.json` and `merges.txt`; without one, a tokenizer is trained on the text.
    """

    device: torch.device = CPU
    quick: bool = False
    texts: tuple[Path, ...] = ()
    tokenizer: Path | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the sizes are those of a GPU."""
        return self.device.type == "cuda"
