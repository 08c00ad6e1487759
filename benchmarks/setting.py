"""Says where a part of the suite runs and how large."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

CPU = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """Holds what every part takes."""

    device: torch.device = CPU  # the CPU, or a GPU, for which sizes are larger
    quick: bool = False  # tiny sizes, whose times mean nothing; for tests
    texts: tuple[Path, ...] = ()  # files of plain text; without any, the reference text that comes with Python
    tokenizer: Path | None = None  # folder of GPT-2's `vocab.json` and `merges.txt`; None: one trained on the text

    ceilings: Mapping[str, float] = field(default_factory=dict)  # of the machine, as benchmarks.ceilings measured them

    @property
    def on_gpu(self) -> bool:
        """Returns whether the sizes are those of a GPU."""
        return self.device.type == "cuda"

    def choose(self, quick: T, cpu: T, gpu: T) -> T:
        """Return what is for this setting."""
        return quick if self.quick else gpu if self.on_gpu else cpu

    def rounds(self, cpu: int, gpu: int) -> int:
        """Return how often everyone is timed."""
        return self.choose(1, cpu, gpu)

    @property
    def options(self) -> list[str]:
        """Returns the arguments of a command: see :func:`add_options`."""
        options = ["--device", str(self.device), *["--quick"] * self.quick]
        options += ["--texts", *map(str, self.texts)] if self.texts else []
        return options + (["--tokenizer", str(self.tokenizer)] if self.tokenizer else [])

    @classmethod
    def of(cls, args: argparse.Namespace) -> Setting:
        """Return what was asked for by the options of :func:`add_options`."""
        return cls(args.device, args.quick, tuple(args.texts), args.tokenizer)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a :class:`Setting`."""
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the times mean nothing")
    parser.add_argument("--texts", type=Path, nargs="+", default=[], metavar="FILE", help="plain text to cut up")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="vocab.json and merges.txt of GPT-2")
