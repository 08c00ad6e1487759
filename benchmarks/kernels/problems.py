"""Makes checked calls of what backends compute, kernel by kernel and call by call, from tensors of their own.

A call is handed out only after its result was held against float64. benchmarks.kernels.gpu_cases times them, choose
chooses between backends by them, and tune between block sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import AnotherLossError, NotHereError
from benchmarks.meters import Call
from benchmarks.oracle import relative
from benchmarks.peers import Peer
from benchmarks.problem import BETA, contrast
from cpo_kernels import CPOOutput, cpo_loss
from cpo_kernels.kernels import numerics, plain, registry, selection
from cpo_kernels.kernels.cuda import extension as cuda_extension
from cpo_kernels.kernels.cuda import hopper as cuda_hopper
from cpo_kernels.kernels.cuda import rows as cuda_rows
from cpo_kernels.kernels.selection import Choice
from cpo_kernels.kernels.triton import support as triton_support

HEAD = (None, 1.0, 0.0, 1.0)  # no bias, no scale, no softcap, temperature 1
TRITON, CUDA = "triton", "cuda"
LOGITS_BYTES = 2**30
SMALL_VOCABULARY = 257  # a dry run's: every GPU thread is interpreted or emulated
CANDIDATES = 4
CHECKED_ROWS = 64  # at either end of the logits
FORWARD_ERROR = 1e-5
COEFFICIENT_ERROR = 1e-4  # of coefficients, which are made of float32 sums


def triton_kernels(module: str) -> ModuleType:
    """Import a module of the Triton backend; raise NotHereError where nobody would expect it to be usable."""
    reason = triton_support.unavailable_reason()
    if reason is not None and not torch.cuda.is_available():
        raise NotHereError(reason)
    return import_module(f"cpo_kernels.kernels.triton.{module}")


def row_launchers(backend: str, module: str = "rows") -> ModuleType:
    """Return the row kernels of a backend, without the dispatcher before them; Triton's are those of a module."""
    return cuda_rows if backend == CUDA else triton_kernels(module)


def missing(device: torch.device) -> str:
    """Say why the compiled CUDA kernels cannot be used on a device, or nothing."""
    if CUDA in registry.AVAILABLE:
        return registry.BACKENDS[CUDA].refuses(device, torch.float32) or ""
    return next(status.reason for status in registry.describe() if status.name == CUDA)


def missing_hopper(device: torch.device) -> str:
    """Say why their fused linear path cannot, or nothing."""
    if reason := missing(device):
        return reason
    found = cuda_extension.capability(device)
    return "" if found == cuda_hopper.CAPABILITY else f"needs compute capability 9.0, {device} has {found}"


def gradient_error(dtype: torch.dtype) -> float:
    """Return what a gradient in a dtype may be off, relatively: twice a rounding, and float32 exponentials."""
    return max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float32).eps)


def compare(name: str, result: Tensor, expected: Tensor, allowed: float) -> None:
    """Raise :class:`AnotherLossError` unless ||result - expected|| / ||expected|| is within what is allowed."""
    error = relative(result, expected)
    if not error <= allowed:  # not `>`: NaN is wrong too
        raise AnotherLossError(f"{name}: relative error {error:.2g}, allowed {allowed:.2g}")


class RowProblem:
    """Holds logits (R, V), a target and a coefficient for each row, and a buffer that gradients overwrite.

    Calls take `config`, block sizes in place of the table's, where the backend is Triton.
    """

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.logits = (3 * torch.randn(rows, vocab, device=device)).to(dtype)
        self.targets = torch.randint(vocab, (rows,), device=device)
        self.coef = torch.rand(rows, device=device) + 0.5
        self.stats = row_launchers(TRITON).row_forward(self.logits, self.targets, None, *HEAD)[0]
        # What earlier calls left in the buffer does not matter to the time.
        self.buffer = self.logits.clone()

    @cached_property
    def ends(self) -> list[tuple[Tensor, ...]]:
        """Returns logits, targets, coefficients of the first and the last rows, and float64's statistics of them."""
        found = []
        for some in (slice(0, CHECKED_ROWS), slice(-CHECKED_ROWS, None)):
            logits, targets, coef = self.logits[some], self.targets[some], self.coef[some]
            exact = logits.double()
            stats, logps = plain.row_forward(exact, targets, None, *HEAD)
            grad = plain.row_backward(exact, targets, None, stats, coef.double(), *HEAD)
            found.append((logits, targets, coef, stats.float(), logps, grad))
        return found

    def forward(self, backend: str, **config: Any) -> Call:
        """Make the call of one read."""
        kernel = partial(row_launchers(backend).row_forward, **config)
        for logits, targets, _, _, logps, _ in self.ends:
            compare(f"{backend} row_forward", kernel(logits, targets, None, *HEAD)[1], logps, FORWARD_ERROR)
        return partial(kernel, self.logits, self.targets, None, *HEAD)

    def backward_(self, backend: str, grad_dtype: torch.dtype | None = None, **config: Any) -> Call:
        """Make the call of one read and one write, over the buffer."""
        kernel, dtype = partial(row_launchers(backend).row_backward_, **config), grad_dtype or self.logits.dtype
        for logits, targets, coef, stats, _, grad in self.ends:
            over = logits.clone()
            kernel(over, targets, None, stats, coef, *HEAD, grad_dtype)
            compare(f"{backend} row_backward_", numerics.narrow_view(over, dtype), grad, gradient_error(dtype))
        return partial(kernel, self.buffer, self.targets, None, self.stats, self.coef, *HEAD, grad_dtype)

    def unit_forward_(self, backend: str, **config: Any) -> Call:
        """Make that of the forward with unit gradients, one read and one write, over the buffer."""
        kernel = partial(row_launchers(backend, "unit").unit_forward_, **config)
        for logits, targets, coef, _, logps, grad in self.ends:
            over = logits.clone()
            found = kernel(over, targets, None, *HEAD)[1]
            compare(f"{backend} unit_forward_, log-probabilities", found, logps, FORWARD_ERROR)
            expected = grad / coef.double().unsqueeze(1)
            compare(f"{backend} unit_forward_", over, expected, gradient_error(logits.dtype))
        return partial(kernel, self.buffer, self.targets, None, *HEAD)


class LogitsProblem:
    """Holds logits (G, C, T, V) that exist, with references (G, C); of groups in some bytes, one at least."""

    def __init__(self, size: int, tokens: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        groups = max(1, size // (CANDIDATES * tokens * vocab * dtype.itemsize))
        dims = (groups, CANDIDATES, tokens)
        self.logits = (3 * torch.randn(*dims, vocab, device=device)).to(dtype).requires_grad_()
        self.targets = torch.randint(vocab, dims, device=device)
        self.ref = 10 * torch.randn(dims[:2], device=device)

    def step(self, backend: str, *choices: Choice) -> Call:
        """Make loss and gradient as users call them, with these choices in place of the table's."""

        def run() -> tuple[CPOOutput, Tensor]:
            with selection.overridden(*choices):
                out = cpo_loss(self.logits, self.targets, ref_logps=self.ref, beta=BETA, backend=backend)
            return out, torch.autograd.grad(out.loss, self.logits)[0]

        out, grad = run()
        exact = contrast(out.logps.double(), self.ref.double())
        compare(f"cpo_loss, {backend}, loss", out.loss, exact, COEFFICIENT_ERROR)
        for group in {0, len(self.targets) - 1}:
            self.check(f"cpo_loss, {backend}", slice(group, group + 1), out.logps, grad)
        return run

    def check(self, name: str, some: slice, logps: Tensor, grad: Tensor) -> None:
        """Hold log-likelihoods (G, C) and gradient of a group against float64."""
        exact = self.logits.detach()[some].double().requires_grad_()
        token_logps = torch.log_softmax(exact, -1).gather(-1, self.targets[some].unsqueeze(-1)).squeeze(-1)
        expected = token_logps.sum(-1)
        loss = contrast(expected, self.ref[some].double()) / len(self.targets)
        (wanted,) = torch.autograd.grad(loss, exact)
        compare(f"{name}, log-likelihoods", logps[some], expected.detach(), FORWARD_ERROR)
        compare(name, grad[some], wanted, max(COEFFICIENT_ERROR, gradient_error(grad.dtype)))


class LinearProblem:
    """Holds hidden states (R, H) and a head (V, H), for ways to token log-probabilities (R,) without gradients."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        self.hidden, self.weight, self.targets = hidden, weight, targets
        self.buffer = hidden.new_empty(len(hidden), len(weight))
        some = slice(0, CHECKED_ROWS)
        logits = hidden[some].double() @ weight.double().T
        self.expected = plain.row_forward(logits, targets[some], None, *HEAD)[1]

    def product(self) -> Tensor:
        """Multiply once."""
        return torch.mm(self.hidden, self.weight.T, out=self.buffer)

    def two(self, backend: str) -> Call:
        """Make product and row kernel; the logits of a product are in the dtype of the hidden states."""
        kernel, allowed = row_launchers(backend).row_forward, torch.finfo(self.hidden.dtype).eps
        return self.checked(lambda: kernel(self.product(), self.targets, None, *HEAD)[1], allowed)

    def fused(self, **options: Any) -> Call:
        """Make Triton's product without logits in memory, with options of its launcher."""
        kernel = triton_kernels("linear").linear_forward
        return self.checked(lambda: kernel(self.hidden, self.weight, self.targets, None, *HEAD, **options).logps)

    def hopper(self) -> Call:
        """Make Hopper's, of the compiled CUDA kernels."""
        given = (self.hidden, self.weight, self.targets, None, *HEAD)
        return self.checked(lambda: cuda_hopper.linear_forward(*given)[1])

    def checked(self, call: Callable[[], Tensor], allowed: float = 10 * FORWARD_ERROR) -> Call:
        """Hold the first log-probabilities of a call against float64."""
        compare("log-probabilities", call()[:CHECKED_ROWS], self.expected, allowed)
        return call


def under_choices(peer: Peer, *choices: Choice) -> Peer:
    """Return a peer of ours with choices in place of the table's; its gradients are those of the forward pass."""

    def under(call: Any) -> Any:
        def run(*tensors: Any) -> Any:
            with selection.overridden(*choices):
                return call(*tensors)

        return run

    return replace(peer, loss=under(peer.loss), sequence_logps=under(peer.sequence_logps), nll=under(peer.nll))
