"""The row kernels of Triton and of CUDA behind one face: launchers, heads, tokens, and the rule of tolerance.

Blocks are so small that a short row has several. What CUDA compiles runs thread by thread on the CPU: an order of the
threads drawn from a seed, and every access outside of the arguments, misaligned vector and barrier that not all threads
reach is an error (tests/simt/simt_host.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from tolerance import assert_accurate
from torch import Tensor

from cpo_kernels.kernels import plain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NARROW = DTYPES[1:]
PLAIN = (None, 1.0, 0.0, 1.0)
HEADS = {  # bias, logit_scale, softcap and temperature for V words
    "plain": lambda V: PLAIN,
    "scaled": lambda V: (None, 1.7, 0.0, 0.6),
    "negative scale": lambda V: (None, -0.8, 0.0, 1.0),  # the largest y is at the smallest x
    "zero scale": lambda V: (None, 0.0, 0.0, 1.0),
    "bias": lambda V: (torch.randn(V), 1.0, 0.0, 1.0),
    "softcap": lambda V: (None, 1.0, 3.0, 1.0),
    "all": lambda V: (torch.randn(V).bfloat16(), 1.3, 30.0, 0.7),
}
SHARED = {"one token a row": False, "shared rows": True}


class Tokens(NamedTuple):
    """Targets, row_starts and coefs."""

    targets: Tensor
    row_starts: Tensor | None
    coef: Tensor


def one_token_a_row(V: int, R: int) -> Tokens:
    """Make one token a row, of which the second is absent, with a coef of NaN."""
    targets, coef = torch.randint(0, V, (R,)), torch.randn(R)
    targets[1], coef[1] = -100, torch.nan
    return Tokens(targets, None, coef)


def shared_rows(V: int, counts: list[int]) -> Tokens:
    """Make rows with these numbers of tokens; every fourth token is absent, with a coef of NaN."""
    row_starts = torch.tensor([0, *torch.tensor(counts, device="cpu").cumsum(0).tolist()])
    targets, coef = torch.randint(0, V, (sum(counts),)), torch.randn(sum(counts))
    targets[3::4], coef[3::4] = -100, torch.nan
    return Tokens(targets, row_starts, coef)


def some_tokens(V: int, shared: bool) -> Tokens:
    """Make the tokens of three rows."""
    return shared_rows(V, [2, 0, 5]) if shared else one_token_a_row(V, 3)


@dataclass(frozen=True)
class RowKernels:
    """The launchers of a backend.

    Attributes:
        module: where they are.
        small: options of a launch with blocks so small that a short row has several.
        wide: options with warps that may overtake each other.
        own: options that leave the blocks to the backend.
        block_bytes: of a row that a small block takes at a time; None: 64 columns of any dtype.
    """

    module: ModuleType
    small: dict[str, Any]
    wide: dict[str, Any]
    own: dict[str, Any]
    block_bytes: int | None

    def block(self, dtype: torch.dtype = torch.float32) -> int:
        """Return how many columns a small block takes at a time."""
        return 64 if self.block_bytes is None else self.block_bytes // dtype.itemsize

    def forward(self, logits: Tensor, tokens: Tokens, head=PLAIN, **launch: Any) -> tuple[Tensor, Tensor]:
        return self.module.row_forward(logits, *tokens[:2], *head, **(launch or self.small))

    def backward(self, logits: Tensor, tokens: Tokens, stats: Tensor, head=PLAIN, **launch: Any) -> Tensor:
        return self.module.row_backward(logits, *tokens[:2], stats, tokens.coef, *head, **(launch or self.small))

    def backward_(
        self, logits: Tensor, tokens: Tokens, stats: Tensor, head=PLAIN, grad_dtype=None, **launch: Any
    ) -> None:
        arguments = logits, *tokens[:2], stats, tokens.coef, *head, grad_dtype
        self.module.row_backward_(*arguments, **(launch or self.small))

    def backward_into(self, out: Tensor, logits: Tensor, tokens: Tokens, stats: Tensor, **launch: Any) -> None:
        """Write the gradient of the plain head to rows of any layout and dtype."""
        launch = launch or self.small
        if hasattr(self.module, "row_backward_into"):
            self.module.row_backward_into(out, logits, *tokens[:2], stats, tokens.coef, *PLAIN, **launch)
        else:
            rows = self.module.Rows(logits, *tokens[:2], *PLAIN)
            self.module._backward_into(out, logits, rows, stats, tokens.coef, **launch)

    def check(self, logits: Tensor, tokens: Tokens, head=PLAIN, **launch: Any) -> None:
        """Check forward and backward by the rule; the reference computes in float32 and rounds the gradient once."""
        targets, row_starts, coef = tokens
        bias, *numbers = head
        double = (None if bias is None else bias.double(), *numbers)
        stats, logps = self.forward(logits, tokens, head, **launch)
        eager_stats, eager_logps = plain.row_forward(logits, targets, row_starts, *head)
        oracle_stats, oracle_logps = plain.row_forward(logits.double(), targets, row_starts, *double)
        present = torch.unique(plain.token_rows(targets, row_starts)[targets != -100])
        for part, name in ((lambda stats: stats[0], "max"), (lambda stats: stats.sum(0), "log-sum-exp")):
            assert_accurate(*(part(s[:, present]) for s in (stats, eager_stats, oracle_stats)), name)
        assert_accurate(logps, eager_logps, oracle_logps, "logps")

        grad = self.backward(logits, tokens, stats, head, **launch)
        eager = plain.row_backward(logits, targets, row_starts, eager_stats, coef, *head)
        oracle = plain.row_backward(logits.double(), targets, row_starts, oracle_stats, coef.double(), *double)
        assert_accurate(grad, eager, oracle, "gradient")


def triton_rows() -> RowKernels:
    """Return Triton's launchers."""
    small, wide = (
        {"config": {"BLOCK": block, "TOKENS": 4, "num_warps": warps, "num_stages": 1}}
        for block, warps in ((64, 1), (512, 4))
    )
    return RowKernels(import_module("cpo_kernels.kernels.triton.rows"), small, wide, {"config": None}, None)


def cuda_rows() -> RowKernels:
    """Return CUDA's launchers, for blocks of one warp with four vectors of 16 bytes a thread."""
    module = import_module("cpo_kernels.kernels.cuda.rows")
    return RowKernels(module, {"threads": 32}, {"threads": 128}, {"threads": 0}, 4 * 32 * 16)
