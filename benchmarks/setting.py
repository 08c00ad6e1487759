"""Where a part of the suite runs and how large."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
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

    @property
    def options(self) -> list[str]:
        """As arguments of a command: see :func:`add_options`."""
        options = ["--device", str(self.device), *(["--quick"] if self.quick else [])]
        options += ["--texts", *map(str, self.texts)] if self.texts else []
        return options + (["--tokenizer", str(self.tokenizer)] if self.tokenizer else [])

    def resolved(self) -> Setting:
        """With absolute paths, for a process with another working directory."""
        texts = tuple(path.resolve() for path in self.texts)
        return replace(self, texts=texts, tokenizer=self.tokenizer and self.tokenizer.resolve())

    @classmethod
    def of(cls, args: argparse.Namespace) -> Setting:
        """What was asked for by the options of :func:`add_options`."""
        return cls(args.device, args.quick, tuple(args.texts), args.tokenizer)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a :class:`Setting`."""
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the times mean nothing")
    parser.add_argument("--texts", type=Path, nargs="+", default=[], metavar="FILE", help="plain text to cut up")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="vocab.json and merges.txt of GPT-2")
