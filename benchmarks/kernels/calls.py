"""Makes checked calls of what backends compute, kernel by kernel and call by call, from tensors of their own.

A call is handed out only after its result was held against float64. benchmarks.gpu and benchmarks.kernels.cuda_cases
time them, and benchmarks.kernels.choose chooses between backends by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import AnotherLossError, Case, NotHereError, dtype_name, measure, ready
from benchmarks.peers import Peer
from benchmarks.problem import BETA, contrast
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.shapes import Shape
from benchmarks.timing import Call
from cpo_kernels import CPOOutput, cpo_loss
from cpo_kernels.kernels import numerics, plain, registry, selection
from cpo_kernels.kernels.cuda import extension as cuda_extension
from cpo_kernels.kernels.cuda import groups as cuda_groups
from cpo_kernels.kernels.cuda import hopper as cuda_hopper
from cpo_kernels.kernels.cuda import rows as cuda_rows
from cpo_kernels.kernels.device import architecture
from cpo_kernels.kernels.selection import Choice
from cpo_kernels.kernels.triton import support as triton_support

HEAD = (None, 1.0, 0.0, 1.0)  # no bias, no scale, no softcap, temperature 1
COPY, PRODUCT = "torch copy_", "torch.mm"
VOCABULARIES = (32000, 50257, 65536, 128256, 151936, 262144)
LOGITS_BYTES = 2**30
SMALL_VOCABULARY = 257  # a dry run's: every GPU thread is interpreted or emulated
TRITON, CUDA = "triton", "cuda"
CANDIDATES = 4
CONTRASTS = ((32, 2), (32, 8), (4, 64))  # (G, C) of a chunk: few candidates, some, and many
CHECKED_ROWS = 64  # at either end of the logits
FORWARD_ERROR = 1e-5
COEFFICIENT_ERROR = 1e-4  # of coefficients, which are made of float32 sums


def triton_kernels(module: str) -> ModuleType:
    """Import a module of the Triton backend.

    Raises:
        NotHereError: the backend cannot be used, and there is no GPU that it would be expected of.
    """
    reason = triton_support.unavailable_reason()
    if reason is not None and not torch.cuda.is_available():
        raise NotHereError(reason)
    return import_module(f"cpo_kernels.kernels.triton.{module}")


def arch_of(device: torch.device) -> str:
    """Name a device's architecture as choices do."""
    return architecture(device)


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
    error = ((result.double() - expected).norm() / expected.norm()).item()
    if not error <= allowed:  # not `>`: NaN is wrong too
        raise AnotherLossError(f"{name}: relative error {error:.2g}, allowed {allowed:.2g}")


def row_launchers(backend: str) -> ModuleType:
    """Return the row kernels of a backend, without the dispatcher before them."""
    return cuda_rows if backend == CUDA else triton_kernels("rows")


@dataclass(frozen=True)
class Part:
    """Holds a few rows of their own, their coefficients, and what float64 makes of them."""

    logits: Tensor
    targets: Tensor
    coef: Tensor
    stats: Tensor
    logps: Tensor
    grad: Tensor


class RowProblem:
    """Holds logits (R, V), a target and a coefficient for each row, and a buffer that gradients overwrite."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.logits = (3 * torch.randn(rows, vocab, device=device)).to(dtype)
        self.targets = torch.randint(vocab, (rows,), device=device)
        self.coef = torch.rand(rows, device=device) + 0.5
        self.stats = row_launchers(TRITON).row_forward(self.logits, self.targets, None, *HEAD)[0]
        # What earlier calls left in the buffer does not matter to the time.
        self.buffer = self.logits.clone()

    def ends(self) -> Iterator[Part]:
        """Yield the first and the last rows."""
        for some in (slice(0, CHECKED_ROWS), slice(-CHECKED_ROWS, None)):
            logits, targets, coef = self.logits[some].clone(), self.targets[some], self.coef[some]
            exact = logits.double()
            stats, logps = plain.row_forward(exact, targets, None, *HEAD)
            grad = plain.row_backward(exact, targets, None, stats, coef.double(), *HEAD)
            yield Part(logits, targets, coef, stats.float(), logps, grad)

    def forward(self, backend: str) -> Call:
        """Make the call of one read."""
        kernel = row_launchers(backend).row_forward
        for part in self.ends():
            compare(
                f"{backend} row_forward", kernel(part.logits, part.targets, None, *HEAD)[1], part.logps, FORWARD_ERROR
            )
        return partial(kernel, self.logits, self.targets, None, *HEAD)

    def backward_(self, backend: str, grad_dtype: torch.dtype | None = None) -> Call:
        """Make the call of one read and one write, over the buffer."""
        kernel, dtype = row_launchers(backend).row_backward_, grad_dtype or self.logits.dtype
        for part in self.ends():
            kernel(part.logits, part.targets, None, part.stats, part.coef, *HEAD, grad_dtype)
            grad = numerics.narrow_view(part.logits, dtype)
            compare(f"{backend} row_backward_", grad, part.grad, gradient_error(dtype))
        return partial(kernel, self.buffer, self.targets, None, self.stats, self.coef, *HEAD, grad_dtype)

    def gradient_(self, grad_dtype: torch.dtype | None = None) -> Call:
        """Make that of both in one read and one write, which the compiled CUDA kernels alone have."""
        kernel, dtype = cuda_rows.row_gradient_, grad_dtype or self.logits.dtype
        for part in self.ends():
            logps = kernel(part.logits, part.targets, None, part.coef, *HEAD, grad_dtype)[1]
            compare("row_gradient_, log-probabilities", logps, part.logps, FORWARD_ERROR)
            compare("row_gradient_", numerics.narrow_view(part.logits, dtype), part.grad, gradient_error(dtype))
        return partial(kernel, self.buffer, self.targets, None, self.coef, *HEAD, grad_dtype)


def launch_options(groups: int, candidates: int) -> dict[str, Any]:
    """Return unranked CPO as a backend's launch takes it."""
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
    """Holds token log-probabilities (G * C * T,) of a chunk, with references (G * C,)."""

    def __init__(self, groups: int, candidates: int, tokens: int, device: torch.device) -> None:
        self.shape, segments = (groups, candidates, tokens), groups * candidates
        self.logps = -6 * torch.rand(segments * tokens, device=device)
        self.ref = 10 * torch.randn(segments, device=device)
        self.starts = torch.arange(segments + 1, device=device) * tokens
        self.lengths = torch.full((segments,), tokens, device=device)

    def call(self, backend: str) -> Call:
        """Make the launch of the sums of all segments and the coefficients of all tokens."""
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
    """Holds logits (G, C, T, V) that exist, with references (G, C); of groups in some bytes, one at least."""

    def __init__(self, size: int, tokens: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        groups = max(1, size // (CANDIDATES * tokens * vocab * dtype.itemsize))
        dims = (groups, CANDIDATES, tokens)
        self.logits = (3 * torch.randn(*dims, vocab, device=device)).to(dtype).requires_grad_()
        self.targets = torch.randint(vocab, dims, device=device)
        self.ref = 10 * torch.randn(dims[:2], device=device)

    @property
    def groups(self) -> int:
        """Return G."""
        return len(self.targets)

    def step(self, backend: str, *choices: Choice) -> Call:
        """Make loss and gradient as users call them, with these choices in place of the table's."""

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
        """Make the one launch of the compiled CUDA kernels, into a buffer."""
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
    """Return a peer of ours with choices in place of the table's; its gradients are those of the forward pass."""

    def under(call: Any) -> Any:
        def run(*tensors: Any) -> Any:
            with selection.overridden(*choices):
                return call(*tensors)

        return run

    return replace(peer, loss=under(peer.loss), sequence_logps=under(peer.sequence_logps), nll=under(peer.nll))


def row_kernels(dtype: torch.dtype, backends: Sequence[str], setting: Setting) -> Iterator[Record]:
    """Time row kernels against a copy of the same logits: a share of its bandwidth, and the speed over Triton's."""
    for vocab in (SMALL_VOCABULARY,) if setting.quick else VOCABULARIES:
        rows = 8 if setting.quick else LOGITS_BYTES // (vocab * dtype.itemsize) // 8 * 8
        yield from row_kernels_of(RowProblem(rows, vocab, dtype, setting.device), backends, setting)


def row_kernels_of(problem: RowProblem, backends: Sequence[str], setting: Setting) -> Iterator[Record]:
    """Time forward; backward in place; bf16 gradients over fp32 logits; both in one read and write where they fit."""
    logits = problem.logits
    touched = {COPY: 2 * logits.nbytes, "forward": logits.nbytes, "backward in place": 2 * logits.nbytes}
    make: dict[str, Callable[[str], Call]] = {"forward": problem.forward, "backward in place": problem.backward_}
    if logits.dtype == torch.float32:
        touched["backward, bf16 over fp32"] = logits.nbytes * 3 // 2
        make["backward, bf16 over fp32"] = partial(problem.backward_, grad_dtype=torch.bfloat16)
    calls: dict[str, Call] = {COPY: lambda: problem.buffer.copy_(logits)}
    calls |= {f"{kernel}, {backend}": build(backend) for kernel, build in make.items() for backend in backends}
    if CUDA in backends and cuda_rows.row_gradient_takes(logits):
        touched["row_gradient_"] = 2 * logits.nbytes
        calls[f"row_gradient_, {CUDA}"] = problem.gradient_()
    rows, vocab = logits.shape
    name = f"row kernels, {dtype_name(logits.dtype)}, V={vocab}"
    conditions = {"V": vocab, "rows": rows, "dtype": dtype_name(logits.dtype)}
    case = Case(name, [ready(who, call) for who, call in calls.items()], conditions, rounds=setting.rounds(20, 20))
    seconds = {record.contestant: record for record in measure(case, setting.device)}
    copy = touched[COPY] / seconds[COPY].values["seconds"]
    for who, record in seconds.items():
        kernel, _, backend = who.rpartition(", ")
        own = record.values["seconds"]
        speed = touched[kernel or who] / own
        values = {**record.values, "gbs": speed / 1e9, "of_gbs": speed / copy}
        if backend == CUDA and (triton := seconds.get(f"{kernel}, {TRITON}")):
            values["of_triton"] = triton.values["seconds"] / own
            picked = {"picked": is_picked(kernel, vocab, logits.dtype, setting.device)}
            record = replace(record, conditions={**conditions, **picked})
        yield replace(record, values=values)


def is_picked(kernel: str, vocab: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the table picks the CUDA kernel."""
    operation = "row_forward" if kernel == "forward" else "row_backward"
    choices = selection.choices_for(selection.AUTO, arch_of(device), selection.Sizes(vocab, dtype), registry.AVAILABLE)
    return choices.get(operation) == CUDA


class ProductCase:
    """Times ways to token log-probabilities (R,) of hidden states (R, H) and a head (V, H) against one product."""

    def __init__(self, shape: Shape, hidden: Tensor, weight: Tensor, targets: Tensor, setting: Setting) -> None:
        self.shape, self.hidden, self.weight, self.targets, self.setting = shape, hidden, weight, targets, setting
        self.buffer = hidden.new_empty(len(hidden), len(weight))
        self.some = min(256, len(hidden))
        logits = hidden[: self.some].double() @ weight.double().T
        index = targets[: self.some].unsqueeze(-1)
        self.expected = torch.log_softmax(logits, -1).gather(-1, index).squeeze(-1)

    def product(self) -> Tensor:
        """Multiply once."""
        return torch.mm(self.hidden, self.weight.T, out=self.buffer)

    def check(self, name: str, logps: Tensor) -> None:
        """Hold the first log-probabilities against float64; a product alone leaves logits in the dtype of hidden."""
        allowed = torch.finfo(self.hidden.dtype).eps if name.startswith(PRODUCT) else 10 * FORWARD_ERROR
        compare(name, logps[: self.some], self.expected, allowed)

    def records(self, calls: dict[str, Call]) -> list[Record]:
        """Time ways beside the product."""
        contestants = [ready(name, call) for name, call in ({PRODUCT: self.product} | calls).items()]
        conditions, rounds = self.shape.conditions | {"mode": "no_grad"}, self.setting.rounds(20, 20)
        case = Case(f"no_grad, {self.shape.name}", contestants, conditions, {"of_product": PRODUCT}, rounds=rounds)
        return measure(case, self.setting.device)
