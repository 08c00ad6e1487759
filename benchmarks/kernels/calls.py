"""What backends compute, kernel by kernel and call by call: tensors, checked calls without arguments, turns in time.

A call is handed out only after its result was held against float64. benchmarks.kernels.cuda_cases makes figures of
them, and benchmarks.kernels.choose choices between backends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants import Contestant
from benchmarks.gpu_cases import HEAD, Setting, compare, triton_kernels
from benchmarks.measure import ContestantError, Inspection, Row, free_memory, named, run_to_the_end
from benchmarks.peers import Peer
from benchmarks.problem import BETA, Problem, contrast
from benchmarks.timing import Call, clock_for, round_robin
from cpo_kernels import CPOOutput, cpo_loss
from cpo_kernels.kernels import reference, registry, selection
from cpo_kernels.kernels.cuda import extension as cuda_extension
from cpo_kernels.kernels.cuda import groups as cuda_groups
from cpo_kernels.kernels.cuda import hopper as cuda_hopper
from cpo_kernels.kernels.cuda import rows as cuda_rows
from cpo_kernels.kernels.selection import Choice
from cpo_kernels.kernels.triton import tuning

TRITON, CUDA = "triton", "cuda"
CANDIDATES = 4
CONTRASTS = ((32, 2), (32, 8), (4, 64))  # (G, C) of a chunk: few candidates, some, and many
CHECKED_ROWS = 64  # at either end of the logits
FORWARD_ERROR = 1e-5
COEFFICIENT_ERROR = 1e-4  # of coefficients, which are made of float32 sums


def arch_of(device: torch.device) -> str:
    """As choices name it."""
    return tuning.architecture(device)


def missing(device: torch.device) -> str:
    """Why the compiled CUDA kernels cannot be used on a device, or nothing."""
    if CUDA in registry.AVAILABLE:
        return registry.BACKENDS[CUDA].refuses(device, torch.float32) or ""
    return next(status.reason for status in registry.describe() if status.name == CUDA)


def missing_hopper(device: torch.device) -> str:
    """Why their fused linear path cannot, or nothing."""
    if reason := missing(device):
        return reason
    found = cuda_extension.capability(device)
    return "" if found == cuda_hopper.CAPABILITY else f"needs compute capability 9.0, {device} has {found}"


def gradient_error(dtype: torch.dtype) -> float:
    """What a gradient written in ``dtype`` may be off, relatively: twice a rounding, and float32 exponentials."""
    return max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float32).eps)


def row_launchers(backend: str) -> ModuleType:
    """The row kernels of a backend, without the dispatcher before them."""
    return cuda_rows if backend == CUDA else triton_kernels("rows")


@dataclass(frozen=True)
class Part:
    """A few rows of their own, their coefficients, and what float64 makes of them."""

    logits: Tensor
    targets: Tensor
    coef: Tensor
    stats: Tensor
    logps: Tensor
    grad: Tensor


class RowProblem:
    """Logits (R, V), a target and a coefficient for each row, and a buffer that gradients overwrite."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.logits = (3 * torch.randn(rows, vocab, device=device)).to(dtype)
        self.targets = torch.randint(vocab, (rows,), device=device)
        self.coef = torch.rand(rows, device=device) + 0.5
        self.stats = row_launchers(TRITON).row_forward(self.logits, self.targets, None, *HEAD)[0]
        # What earlier calls left in the buffer does not matter to the time.
        self.buffer = self.logits.clone()

    def ends(self) -> Iterator[Part]:
        """The first and the last rows."""
        for some in (slice(0, CHECKED_ROWS), slice(-CHECKED_ROWS, None)):
            logits, targets, coef = self.logits[some].clone(), self.targets[some], self.coef[some]
            exact = logits.double()
            stats, logps = reference.row_forward(exact, targets, None, *HEAD)
            grad = reference.row_backward(exact, targets, None, stats, coef.double(), *HEAD)
            yield Part(logits, targets, coef, stats.float(), logps, grad)

    def forward(self, backend: str) -> Call:
        """One read."""
        kernel = row_launchers(backend).row_forward
        for part in self.ends():
            compare(
                f"{backend} row_forward", kernel(part.logits, part.targets, None, *HEAD)[1], part.logps, FORWARD_ERROR
            )
        return partial(kernel, self.logits, self.targets, None, *HEAD)

    def backward_(self, backend: str, grad_dtype: torch.dtype | None = None) -> Call:
        """One read and one write, over the buffer."""
        kernel, dtype = row_launchers(backend).row_backward_, grad_dtype or self.logits.dtype
        for part in self.ends():
            kernel(part.logits, part.targets, None, part.stats, part.coef, *HEAD, grad_dtype)
            grad = reference.narrow_view(part.logits, dtype)
            compare(f"{backend} row_backward_", grad, part.grad, gradient_error(dtype))
        return partial(kernel, self.buffer, self.targets, None, self.stats, self.coef, *HEAD, grad_dtype)

    def gradient_(self, grad_dtype: torch.dtype | None = None) -> Call:
        """Forward and backward in one read and one write, over the buffer: the compiled CUDA kernels alone have it."""
        kernel, dtype = cuda_rows.row_gradient_, grad_dtype or self.logits.dtype
        for part in self.ends():
            logps = kernel(part.logits, part.targets, None, part.coef, *HEAD, grad_dtype)[1]
            compare("row_gradient_, log-probabilities", logps, part.logps, FORWARD_ERROR)
            compare("row_gradient_", reference.narrow_view(part.logits, dtype), part.grad, gradient_error(dtype))
        return partial(kernel, self.buffer, self.targets, None, self.coef, *HEAD, grad_dtype)


def launch_options(groups: int, candidates: int) -> dict[str, Any]:
    """Unranked CPO as a backend's launch takes it."""
    return {
        "beta": BETA,
        "margin": 0.0,
        "label_smoothing": 0.0,
        "loss_type": "plackett_luce",
        "length_normalized": False,
        "contrast_weight": 1.0,
        "mle_weight": 0.0,
        "num_groups": groups,
        "num_target_tokens": 1.0,
        "gain": 1.0,
        "max_candidates": candidates,
    }


class ContrastProblem:
    """Token log-probabilities (G * C * T,) of a chunk, with references (G * C,)."""

    def __init__(self, groups: int, candidates: int, tokens: int, device: torch.device) -> None:
        self.shape, segments = (groups, candidates, tokens), groups * candidates
        self.logps = -6 * torch.rand(segments * tokens, device=device)
        self.ref = 10 * torch.randn(segments, device=device)
        self.starts = torch.arange(segments + 1, device=device) * tokens
        self.lengths = torch.full((segments,), tokens, device=device)

    def call(self, backend: str) -> Call:
        """The sums of all segments and the coefficients of all tokens, in one launch."""
        launch, (groups, candidates, _) = registry.BACKENDS[backend].contrast, self.shape
        assert launch is not None
        given = (self.logps, self.starts, None, self.lengths, self.ref, None)
        run = partial(launch, *given, **launch_options(groups, candidates))
        exact = self.logps.double().requires_grad_()
        expected = exact.view(self.shape).sum(-1)
        loss = contrast(expected, self.ref.double().view(groups, candidates))
        sums, coef = run()
        compare(f"{backend} contrast, sums", sums, expected.detach().flatten(), FORWARD_ERROR)
        compare(f"{backend} contrast", coef, torch.autograd.grad(loss, exact)[0], COEFFICIENT_ERROR)
        return run


class LogitsProblem:
    """Logits (G, C, T, V) that exist, with references (G, C), of as many groups as some bytes hold, one at least."""

    def __init__(self, size: int, tokens: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        groups = max(1, size // (CANDIDATES * tokens * vocab * dtype.itemsize))
        dims = (groups, CANDIDATES, tokens)
        self.logits = (3 * torch.randn(*dims, vocab, device=device)).to(dtype).requires_grad_()
        self.targets = torch.randint(vocab, dims, device=device)
        self.ref = 10 * torch.randn(dims[:2], device=device)

    @property
    def groups(self) -> int:
        """G."""
        return len(self.targets)

    def step(self, backend: str, *choices: Choice) -> Call:
        """Loss and gradient as users call them, with these choices in place of the table's."""

        def run() -> tuple[CPOOutput, Tensor]:
            with selection.overridden(*choices):
                out = cpo_loss(self.logits, self.targets, ref_logps=self.ref, beta=BETA, backend=backend)
            return out, torch.autograd.grad(out.loss, self.logits)[0]

        out, grad = run()
        self.check(f"cpo_loss, {backend}", out.logps, grad)
        exact = contrast(out.logps.double(), self.ref.double())
        compare(f"cpo_loss, {backend}, loss", out.loss, exact, COEFFICIENT_ERROR)
        return run

    def launch(self) -> Call:
        """The one launch of the compiled CUDA kernels, into a buffer."""
        segments, tokens = self.groups * CANDIDATES, self.targets.shape[-1]
        logits, targets = self.logits.detach().flatten(0, 2), self.targets.flatten()
        grad, lengths = torch.empty_like(logits), torch.full((segments,), tokens, device=logits.device)
        starts = torch.arange(segments + 1, device=logits.device) * tokens
        given = (logits, targets, grad, starts, None, lengths, self.ref.flatten(), None, *HEAD)
        run = partial(cuda_groups.cpo_loss, *given, **launch_options(self.groups, CANDIDATES))
        sums, _ = run()
        self.check("cpo_loss, one launch", sums.view(self.ref.shape), grad.view(self.logits.shape))
        return run

    def check(self, name: str, logps: Tensor, grad: Tensor) -> None:
        """Hold log-likelihoods (G, C) and gradient of the first and the last group against float64."""
        allowed = max(COEFFICIENT_ERROR, gradient_error(grad.dtype))
        for group in {0, self.groups - 1}:
            some = slice(group, group + 1)
            exact = self.logits.detach()[some].double().requires_grad_()
            targets = self.targets[some].unsqueeze(-1)
            expected = torch.log_softmax(exact, -1).gather(-1, targets).squeeze(-1).sum(-1)
            (wanted,) = torch.autograd.grad(contrast(expected, self.ref[some].double()) / self.groups, exact)
            compare(f"{name}, log-likelihoods", logps[some], expected.detach(), FORWARD_ERROR)
            compare(name, grad[some], wanted, allowed)


def under_choices(peer: Peer, *choices: Choice) -> Peer:
    """A peer of ours with these choices in place of the table's; its gradients are those of the forward pass."""

    def under(call: Any) -> Any:
        def run(*tensors: Any) -> Any:
            with selection.overridden(*choices):
                return call(*tensors)

        return run

    return replace(peer, loss=under(peer.loss), sequence_logps=under(peer.sequence_logps), nll=under(peer.nll))


def time_entries(
    setting: Setting, problem: Problem, entries: Sequence[Contestant], reference_name: str
) -> tuple[list[Row], list[ContestantError]]:
    """Rows of those that run and compute the right thing, and the errors of the others, in which no tensor is held.

    Raises:
        ContestantError: from the one that the others are compared with.
    """
    left, errors = {entry.name: entry for entry in entries}, []
    while True:
        inspection = Inspection(problem, left)
        try:
            for name, entry in left.items():
                named(name, partial(run_to_the_end, entry.call))()
            timings = round_robin(
                {name: named(name, entry.call) for name, entry in left.items()},
                setting.effort(),
                reference=reference_name,
                always=left,
                observer=inspection,
                clock=clock_for(setting.device),
            )
        except ContestantError as error:
            if error.contestant == reference_name:
                raise
            del left[error.contestant]
            errors.append(type(error)(error.contestant, error.reason))
        else:
            return [
                Row(name, entry.work, timings[name], inspection.errors.get(name), inspection.peaks.get(name))
                for name, entry in left.items()
            ], errors
        free_memory()  # after the handler: until there the error holds the tensors of the call
