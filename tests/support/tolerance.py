"""The one rule of every numerical test: an implementation may err twice as much as eager PyTorch in the same dtype.

err(out, fp64 oracle) <= 2 * err(eager, fp64 oracle) + FLOOR[dtype],    err = ||out - ref|| / ||ref||
"""

from __future__ import annotations

import torch
from torch import Tensor

# Eager's own error is a matter of luck when it comes near zero (a loss may be exact by chance). The floor is 4
# roundings of what accumulates the result; for results stored in half precision, the one rounding of storing them.
# Float64 has no better oracle than itself, so its floor also covers the oracle's own error.
FLOOR = {
    torch.float64: 16 * torch.finfo(torch.float64).eps,
    torch.float32: 4 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2,
    torch.float16: torch.finfo(torch.float16).eps / 2,
}


def relative_error(out: Tensor, ref: Tensor) -> float:
    """Compute ||out - ref|| / ||ref|| in float64; 0 / 0 is 0, and NaN or infinity in ``out`` an infinite error."""
    assert out.shape == ref.shape, f"shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    difference = (out.double() - ref.double()).norm().item()
    if difference == 0:
        return 0.0
    error = difference / ref.double().norm().item() if ref.any() else torch.inf
    return error if error == error else torch.inf


def assert_accurate(out: Tensor, eager: Tensor, oracle: Tensor, name: str) -> None:
    """Check the rule for one tensor: ``eager`` is computed in the inputs' dtype, ``oracle`` in float64 from them."""
    assert oracle.dtype == torch.float64
    assert oracle.isfinite().all(), f"the oracle's {name} is not finite"
    error, allowed = relative_error(out, oracle), 2 * relative_error(eager, oracle) + FLOOR[out.dtype]
    assert error <= allowed, f"{name}: error {error:.3g} exceeds {allowed:.3g} ({out.dtype})"
