"""The fused linear path of the compiled CUDA backend, for Hopper: logits exist in registers only.

Log-probabilities alone leave nothing in memory. Where a gradient is to follow, the forward keeps 16 bits a logit: its
exponential relative to the row's maximum in its tile. That is as accurate as the gradient made of it, and saves a
second pass over float32 logits.

The path is compiled, and checked on a CPU instruction by instruction, but not measured: a call takes it where
``selection.json`` says so, which is nowhere yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpo_kernels.kernels.checks import BIAS_DTYPES, DTYPE_CODES, check
from cpo_kernels.kernels.transform import fold_transform

from . import extension

CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
BOUNDARY = 16  # bytes: what the copy engine takes rows at multiples of


class Kept(NamedTuple):
    """The tensors that :func:`linear_forward` keeps for :func:`linear_backward_`.

    exponentials (R, V) of the inputs' dtype, in rows padded to 16 bytes; tile_tops (tiles, R) and slopes (N,) float32.
    """

    exponentials: Tensor
    tile_tops: Tensor
    slopes: Tensor


class Room(NamedTuple):
    """Memory for the exponentials and tile tops that blocks of rows keep; each block takes the place of the last."""

    exponentials: Tensor
    tile_tops: Tensor

    def kept(self, rows: int, tokens: int) -> Kept:
        """Return the part of the memory for a block of ``rows`` rows and ``tokens`` tokens."""
        tops = self.tile_tops.view(-1)[: self.tile_tops.shape[0] * rows].view(-1, rows)
        return Kept(self.exponentials[:rows], tops, tops.new_empty(tokens))


def takes(hidden: Tensor, weight: Tensor) -> bool:
    """Tell whether this path takes hidden (R, H) and weight (V, H) by their device, dtype, and where rows begin."""
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype or 0 in (*hidden.shape, *weight.shape):
        return False
    if extension.capability(hidden.device) != CAPABILITY:
        return False
    try:
        _row_stride("hidden", hidden)
        _row_stride("weight", weight)
    except ValueError:
        return False
    return True


def row_elements(vocab: int) -> int:
    """Return how many elements of the inputs' dtype :func:`room` takes for a row."""
    return _row_width(vocab, DTYPES[0].itemsize) + extension.load().linear_tiles(vocab=vocab) * (
        torch.float32.itemsize // DTYPES[0].itemsize
    )


def _row_width(vocab: int, element_size: int) -> int:
    unit = BOUNDARY // element_size
    return -(-vocab // unit) * unit


def room(rows: int, hidden: Tensor, vocab: int) -> Room:
    """Allocate memory for blocks of up to ``rows`` rows of ``hidden``: 2 bytes a logit and little else."""
    width = _row_width(vocab, hidden.element_size())
    tiles = extension.load().linear_tiles(vocab=vocab)
    return Room(hidden.new_empty((rows, width))[:, :vocab], hidden.new_empty((tiles, rows), dtype=torch.float32))


def new_kept(hidden: Tensor, weight: Tensor, targets: Tensor) -> Kept:
    """Allocate memory for one block: the rows of ``hidden`` and the tokens of ``targets``."""
    rows = hidden.shape[0]
    return room(rows, hidden, weight.shape[0]).kept(rows, targets.shape[0])


def forward(
    space: Room | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Kept | None]:
    """Run :func:`linear_forward` on a block and keep in ``space`` what its gradient needs; nothing if it is None."""
    kept = None if space is None else space.kept(hidden.shape[0], targets.shape[0])
    head = (bias, logit_scale, softcap, temperature)
    return *linear_forward(hidden, weight, targets, row_starts, *head, kept), kept


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what ``row_forward`` does of ``hidden @ weight.T``, with float32 logits that exist in registers only.

    Nothing waits for the device, and the results are bitwise repeatable. NaN or infinity in a row's logits makes its
    log-probabilities NaN.

    Args:
        hidden: (R, H) bfloat16 or float16 on a Hopper GPU, of unit column stride, with rows at multiples of 16 bytes.
        weight: (V, H) likewise.
        targets: (N,) int64; one outside [0, V) other than -100 has log-probability NaN.
        row_starts: (R + 1,) int64 prefix count of the tokens of each row, or None for one token a row.
        bias: (V,) floating-point, or None.
        logit_scale: factor of the logits and the bias.
        softcap: bound of the scaled logits, 0.0 for none.
        temperature: divisor of the capped logits.
        kept: of :func:`new_kept`, filled for :func:`linear_backward_`; None where no gradient follows.

    Returns:
        stats (2, R) float32, maximum and log-sum-exp minus maximum; logps (N,) float32.

    Raises:
        ValueError: a tensor or number that does not fit this description; the message has the offending value.
        RuntimeError: a GPU that is not of compute capability 9.0, or what CUDA says where a launch fails.
    """
    device = hidden.device
    check("hidden", hidden, (None, None), DTYPES, device)
    (R, H), V = hidden.shape, weight.shape[0]
    check("weight", weight, (None, H), (hidden.dtype,), device)
    if V == 0 or H == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected at least one row and one column")
    check("targets", targets, (R if row_starts is None else None,), (torch.int64,), device)
    targets = targets.contiguous()
    if row_starts is not None:
        check("row_starts", row_starts, (R + 1,), (torch.int64,), device)
        row_starts = row_starts.contiguous()
    if bias is not None:
        check("bias", bias, (V,), BIAS_DTYPES, device)
        bias = bias.detach().to(torch.float32).contiguous()
    mult, cap, _ = fold_transform(logit_scale, softcap, temperature)
    queue, module = extension.queue(device), extension.load()
    strides = {"hidden_stride": _row_stride("hidden", hidden), "weight_stride": _row_stride("weight", weight)}
    floats = module.linear_workspace(device=queue["device"], rows=R, vocab=V, depth=H) if R else 0
    workspace = torch.empty(floats, dtype=torch.float32, device=device)
    stats = torch.empty((2, R), dtype=torch.float32, device=device)
    logps = torch.empty(targets.shape, dtype=torch.float32, device=device)
    module.linear_forward(
        **queue,
        **strides,
        dtype=DTYPE_CODES[hidden.dtype],
        hidden=hidden.data_ptr(),
        weight=weight.data_ptr(),
        rows=R,
        vocab=V,
        depth=H,
        targets=targets.data_ptr(),
        row_starts=0 if row_starts is None else row_starts.data_ptr(),
        tokens=targets.shape[0],
        bias=0 if bias is None else bias.data_ptr(),
        mult=mult,
        cap=cap,
        workspace=workspace.data_ptr(),
        workspace_floats=floats,
        stats=stats.data_ptr(),
        logps=logps.data_ptr(),
        exponentials=0 if kept is None else kept.exponentials.data_ptr(),
        exponentials_stride=0 if kept is None else kept.exponentials.stride(0),
        tile_tops=0 if kept is None else kept.tile_tops.data_ptr(),
        slopes=0 if kept is None else kept.slopes.data_ptr(),
    )
    return stats, logps


def linear_backward_(
    kept: Kept,
    targets: Tensor,
    row_starts: Tensor | None,
    stats: Tensor,
    logps: Tensor,
    coef: Tensor,
    logit_scale: float,
    softcap: float,
    temperature: float,
) -> Tensor:
    """Write the gradient (R, V) of ``sum_n coef_n * logp_n`` by the raw logits over the memory of ``kept``.

    It is that of :class:`cpo_kernels.kernels.ops.RowKernels`, at one multiplication a logit. ``kept`` is used up.

    Args:
        kept: filled by :func:`linear_forward`.
        targets: as given to :func:`linear_forward`, like row_starts, logit_scale, softcap and temperature.
        stats: as returned by :func:`linear_forward`, like logps.
        coef: (N,) float32, the derivative of the loss with respect to each log-probability.

    Raises:
        ValueError: a tensor or number that does not fit this description; the message has the offending value.
        RuntimeError: what CUDA says where a launch fails.
    """
    exponentials, device = kept.exponentials, kept.exponentials.device
    check("exponentials", exponentials, (None, None), DTYPES, device)
    (R, V), N = exponentials.shape, targets.shape[0]
    check("targets", targets, (R if row_starts is None else None,), (torch.int64,), device)
    check("stats", stats, (2, R), (torch.float32,), device)
    for name, tensor in (("slopes", kept.slopes), ("logps", logps), ("coef", coef)):
        check(name, tensor, (N,), (torch.float32,), device)
    if row_starts is not None:
        check("row_starts", row_starts, (R + 1,), (torch.int64,), device)
        row_starts = row_starts.contiguous()
    module, slope = extension.load(), fold_transform(logit_scale, softcap, temperature)[2]
    check("tile_tops", kept.tile_tops, (module.linear_tiles(vocab=V), R), (torch.float32,), device)
    targets, stats, logps, coef = targets.contiguous(), stats.contiguous(), logps.contiguous(), coef.contiguous()
    module.linear_backward(
        **extension.queue(device),
        dtype=DTYPE_CODES[exponentials.dtype],
        exponentials=exponentials.data_ptr(),
        exponentials_stride=_row_stride("exponentials", exponentials),
        rows=R,
        vocab=V,
        targets=targets.data_ptr(),
        row_starts=0 if row_starts is None else row_starts.data_ptr(),
        tokens=N,
        tile_tops=kept.tile_tops.data_ptr(),
        slopes=kept.slopes.data_ptr(),
        slope=slope,
        stats=stats.data_ptr(),
        logps=logps.data_ptr(),
        coef=coef.data_ptr(),
    )
    return exponentials


def _row_stride(name: str, matrix: Tensor) -> int:
    """Return the elements from row to row; raise ``ValueError`` where the copy engine cannot address the matrix."""
    rows, columns = matrix.shape
    if columns > 1 and matrix.stride(1) != 1:
        raise ValueError(f"{name} has strides {matrix.stride()}; expected a column stride of 1")
    unit, offset = BOUNDARY // matrix.element_size(), matrix.data_ptr() % BOUNDARY
    stride = matrix.stride(0) if rows > 1 else -(-columns // unit) * unit  # the stride of a single row means nothing
    if stride < columns or stride % unit or offset:
        raise ValueError(
            f"{name} has row stride {matrix.stride(0)} and begins {offset} bytes after a multiple of {BOUNDARY}; "
            f"expected rows at multiples of {BOUNDARY} bytes that do not overlap"
        )
    return stride
