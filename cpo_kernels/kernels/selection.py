"""The choice of a backend by operation and device: the table ``selection.json``, whose entries are measured.

``prefer`` orders the backends for each device type. ``choices`` refines that on a GPU, operation by operation and size
by size; they are searched in order, and the first whose size matches counts, or nothing does where its backend may not
serve the call. A choice has ``operation``, ``arch``, ``dtype`` (or ``"any"``), ``backend``, optionally
``vocab_at_most`` and ``hidden_at_most``, and ``measured``, the figure behind it.

A kernel that every GPU backend has is exchanged where the backend is chosen automatically. The other operations are
optional kernels, which replace several: ``backend`` null means that such a kernel does not pay. Without a choice it is
not used, but for ``unit_gradient`` and ``logits_loss``, which a backend that has them uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources

import torch

AUTO = "auto"
EXCHANGED = ("row_forward", "row_backward", "contrast")
OPTIONAL = ("linear_forward", "linear_kept")
OPERATIONS = (*EXCHANGED, "unit_gradient", "logits_loss", *OPTIONAL)


@dataclass(frozen=True)
class Sizes:
    """The sizes and dtypes on which a choice depends besides the device.

    Attributes:
        vocab: V.
        logits_dtype: of the logits that row operations take.
        hidden_size: H, 0 for logits that exist.
        hidden_dtype: of hidden and weight; None for logits that exist.
    """

    vocab: int
    logits_dtype: torch.dtype
    hidden_size: int = 0
    hidden_dtype: torch.dtype | None = None

    def dtype_of(self, operation: str) -> torch.dtype:
        """Return the dtype that an operation reads."""
        return self.hidden_dtype or self.logits_dtype if operation.startswith("linear_") else self.logits_dtype


@dataclass(frozen=True)
class Choice:
    """One entry of the table; the attributes are described at the top of this module."""

    operation: str
    arch: str
    backend: str | None
    dtype: str = "any"
    vocab_at_most: int | None = None
    hidden_at_most: int | None = None
    measured: str = ""

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"operation {self.operation!r}, expected one of {OPERATIONS}")
        if self.backend is None and self.operation in EXCHANGED:
            raise ValueError(f"operation {self.operation!r} needs a backend")

    def matches(self, arch: str, sizes: Sizes) -> bool:
        """Tell whether the choice was measured for this architecture and these sizes."""
        return (
            self.arch == arch
            and self.dtype in ("any", str(sizes.dtype_of(self.operation)).removeprefix("torch."))
            and (self.vocab_at_most is None or sizes.vocab <= self.vocab_at_most)
            and (self.hidden_at_most is None or sizes.hidden_size <= self.hidden_at_most)
        )


# Read once, at import, and as data: backends are selected in code that torch.compile traces, which cannot open files.
TABLE = json.loads(resources.files(__package__).joinpath("selection.json").read_text())
PREFERRED: dict[str, list[str]] = TABLE["prefer"]
CHOICES: list[Choice] = [Choice(**entry) for entry in TABLE["choices"]]


def choices_for(name: str, arch: str, sizes: Sizes, available: tuple[str, ...]) -> dict[str, str | None]:
    """Return the backend of each operation that the table mentions, among the backends that a call may use.

    Args:
        name: ``"auto"`` or the backend that the call names.
        arch: of the device, as :func:`cpo_kernels.kernels.device.architecture` gives it.
        sizes: of the call.
        available: names of the backends that can be used here.
    """
    allowed = (*available, None) if name == AUTO else (name, None)
    first: dict[str, str | None] = {}
    for choice in CHOICES:
        if choice.operation not in first and choice.matches(arch, sizes):
            first[choice.operation] = choice.backend
    return {operation: backend for operation, backend in first.items() if backend in allowed}


@contextmanager
def overridden(*choices: Choice) -> Iterator[None]:
    """Put these choices in place of the table's within the context, for measurements and tests.

    This is not safe across threads.
    """
    before = list(CHOICES)
    CHOICES[:] = choices
    try:
        yield
    finally:
        CHOICES[:] = before
