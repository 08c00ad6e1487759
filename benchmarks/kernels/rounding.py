"""Prints what rounding costs where gradients are built before their coefficients are known, and where after.

`python -m benchmarks.kernels.rounding` computes with plain PyTorch, once with the coefficients in the gradient of the
logits and once around the products, as a backend with unit gradients does, against float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cpo_kernels import linear_cpo_loss
from cpo_kernels.kernels import plain, registry
from cpo_kernels.kernels.backend import UnitGradient

SIZES = {"G": 16, "C": 4, "T": 16, "H": 256, "V": 8192}
KINDS = {"float32": (torch.float32, None), "bfloat16": (torch.bfloat16, None), "float16": (torch.float16, None)}
KINDS |= {"bfloat16, float32 logits": (torch.bfloat16, torch.float32)}
WAYS = ("in the gradient", "around the products")


def unit_forward_(logits: Tensor, targets: Tensor, starts: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """Write the gradient for coefficients of 1 over logits with one token a row."""
    *head, dtype = rest
    stats, logps = plain.row_forward(logits, targets, starts, *head)
    plain.row_backward_(logits, targets, starts, stats, torch.ones_like(logps), *head, dtype)
    return stats, logps


UNIT = UnitGradient(lambda *_of_call: True, unit_forward_, lambda *given: given[4])


def gradients(hidden: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> list[Tensor]:
    """Return the gradients of hidden and weight."""
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cpo_loss(*leaves, targets, mle_weight=0.5, backend="torch", **head).loss
    return list(torch.autograd.grad(loss, leaves))


def main() -> None:
    """Print a table of relative errors."""
    torch.manual_seed(0)
    G, C, T, H, V = SIZES.values()
    hidden, weight = torch.randn(G, C, T, H), torch.randn(V, H) * 2 / H**0.5
    targets = torch.randint(V, (G, C, T))
    print("coefficients", *(f"{tensor}, {way}" for way in WAYS for tensor in ("hidden", "weight")), sep=" | ")
    plainly = registry.BACKENDS["torch"]
    for name, (dtype, logits_dtype) in KINDS.items():
        rounded, errors = (hidden.to(dtype), weight.to(dtype)), []
        exact = gradients(*(tensor.double() for tensor in rounded), targets)
        for unit in (None, UNIT):
            registry.BACKENDS["torch"] = replace(plainly, unit_gradient=unit)
            found = gradients(*rounded, targets, logits_dtype=logits_dtype)
            errors += [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        registry.BACKENDS["torch"] = plainly
        print(name, *(f"{error:.2e}" for error in errors), sep=" | ")


if __name__ == "__main__":
    main()
