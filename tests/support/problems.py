"""Small problems of every shape the losses take, with their answer by the reference, dense and in any dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from devices import DEVICE
from tolerance import assert_accurate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cpo_kernels import CandidateLayout, linear_cpo_loss
from cpo_kernels.kernels import reference, registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backends_on(device: torch.device) -> list[str]:
    """Return the backends that take tensors of ``device``."""
    return [name for name in registry.available() if not registry.BACKENDS[name].refuses(device, torch.float32)]


BACKENDS = backends_on(DEVICE)
# For problems of thousands of rows or hundreds of chunks, which would take the interpreter a minute each.
COMPILED_BACKENDS = [name for name in BACKENDS if name != "triton" or DEVICE.type != "cpu"]


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """Return the dtypes of the shared grids for a backend; only the reference backend takes float64.

    Triton's interpreter takes 10 ms a row, and the dtypes differ in loads and stores only, all of which
    test_triton_*.py cover: so it takes only the dtype whose gradients are narrower than the sums.
    """
    if backend == "triton" and DEVICE.type == "cpu":
        return (torch.bfloat16,)
    return (*DTYPES, torch.float64) if backend == "torch" else DTYPES


BACKEND_DTYPES = [(name, dtype) for name in BACKENDS for dtype in dtypes_of(name)]
BACKEND_DTYPE_IDS = [f"{name}-{str(dtype)[6:]}" for name, dtype in BACKEND_DTYPES]


@dataclass
class Problem:
    """Arguments of ``linear_cpo_loss``; hidden, weight and bias in float64 until ``to`` rounds them."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    layout: CandidateLayout | None = None
    ref_logps: Tensor | None = None
    ranks: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the problem with fresh leaves of ``dtype`` that require gradients."""
        leaves = [None if t is None else t.detach().to(dtype).clone().requires_grad_() for t in self.tensors]
        return replace(self, hidden=leaves[0], weight=leaves[1], bias=leaves[2])

    def with_options(self, **options: Any) -> Problem:
        return replace(self, options=self.options | options)

    def keywords(self) -> dict[str, Any]:
        return {"layout": self.layout, "ref_logps": self.ref_logps, "ranks": self.ranks, "bias": self.bias}

    def arguments(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "weight": self.weight, "targets": self.targets, **self.keywords()}


def random_problem(
    G: int = 3, C: int = 3, T: int = 4, H: int = 7, V: int = 31, *, bias: bool = False, ref: bool = True, **options: Any
) -> Problem:
    """Make a padded problem: with an absent candidate, a short one and, if it fits, an ignored token in the middle."""
    targets = torch.randint(0, V, (G, C, T))
    if C > 2:
        targets[0, 1] = -100
    if T > 1:
        targets[-1, -1, T // 2 :] = -100
        targets[0, 0, 0] = -100
    return Problem(
        hidden=torch.randn(G, C, T, H, dtype=torch.float64),
        weight=torch.randn(V, H, dtype=torch.float64),
        targets=targets,
        bias=torch.randn(V, dtype=torch.float64) if bias else None,
        ref_logps=-3.5 * T + torch.randn(G, C, dtype=torch.float64) if ref else None,
        options=options,
    )


def packed_problem(H: int = 7, V: int = 31, *, bias: bool = False, **options: Any) -> Problem:
    """Make a packed problem: ragged groups, rows shared in and across groups, an absent segment, a spare row."""
    cu_groups = [0, 2, 5, 9]
    cu_tokens = [0, 3, 4, 8, 8, 10, 12, 13, 17, 20]
    rows = torch.tensor([0, 1, 2, 0, 4, 5, 6, 7, 4, 9, 2, 10, 2, 12, 11, 13, 14, 2, 15, 16])
    ranks = [0, 1, 0, 1, 2, 0, 0, 1, 3]
    targets = torch.randint(0, V, (cu_tokens[-1],))
    targets[[5, 14]] = -100
    return Problem(
        hidden=torch.randn(18, H, dtype=torch.float64),
        weight=torch.randn(V, H, dtype=torch.float64),
        targets=targets,
        bias=torch.randn(V, dtype=torch.float64) if bias else None,
        layout=CandidateLayout(cu_tokens, cu_groups, rows=rows, ranks=ranks),
        ref_logps=-8 + torch.randn(len(ranks), dtype=torch.float64),
        options=options,
    )


def huge_logits() -> Problem:
    """Make logits of about +-1e4: a softmax that is not relative to its maximum overflows in every dtype."""
    problem = random_problem(beta=1e-3)
    return replace(problem, hidden=problem.hidden * 60, weight=problem.weight * 60)


def ranked() -> Problem:
    problem = random_problem(G=2, C=4, beta=0.7)
    return replace(problem, ranks=torch.tensor([[2, 1, 0, 3], [3, 2, 1, 0]]))


def several_positives() -> Problem:
    problem = random_problem(G=3, C=4, beta=0.5, mle_weight=0.3)
    return replace(problem, ranks=torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 5]]))


# Every size is small; what each is for is in its name.
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "prime_vocab_mixed_with_mle": lambda: random_problem(mle_weight=0.5),
    "larger_prime_vocab": lambda: random_problem(G=4, C=3, T=5, H=16, V=1009),
    "one_word": lambda: random_problem(V=1),
    "two_words": lambda: random_problem(V=2),
    "one_token_segments": lambda: random_problem(T=1, C=2),
    "one_row_in_all": lambda: random_problem(G=1, C=1, T=1, contrast_weight=0.0, mle_weight=1.0),
    "huge_logits": huge_logits,
    "whole_head": lambda: random_problem(bias=True, logit_scale=0.7, softcap=3.0, temperature=1.3, beta=0.4),
    "bias_alone": lambda: random_problem(bias=True),
    "length_normalized_with_margin": lambda: random_problem(C=2, beta=2.0, margin=1.4, length_normalized=True),
    "ranked": ranked,
    "several_positives": several_positives,
    "mle_alone": lambda: random_problem(contrast_weight=0.0, mle_weight=1.0),
    "packed_shared_rows": lambda: packed_problem(mle_weight=0.2),
    "packed_whole_head": lambda: packed_problem(
        bias=True, logit_scale=1.5, softcap=5.0, temperature=0.8, length_normalized=True, beta=1.5
    ),
}


def as_padded(problem: Problem, values: Tensor, fill: float) -> Tensor:
    """Turn packed (N, ...) tokens into (G, C, T, ...), differentiably; return padded ones unchanged."""
    layout = problem.layout
    if layout is None:
        return values
    segments = [values[a:b] for a, b in pairwise(layout.cu_tokens)]
    width = max(len(s) for s in segments)
    blank = torch.full((width, *values.shape[1:]), fill, dtype=values.dtype)
    padded = [torch.cat([s, blank[len(s) :]]) for s in segments]
    candidates = max(b - a for a, b in pairwise(layout.cu_groups))
    groups = [padded[a:b] + [blank] * (candidates - (b - a)) for a, b in pairwise(layout.cu_groups)]
    return torch.stack([torch.stack(group) for group in groups])


def segments_as_padded(problem: Problem, values: Tensor | None, fill: float) -> Tensor | None:
    """Turn values (S,) into (G, C)."""
    if values is None or problem.layout is None:
        return values
    groups = [values[a:b] for a, b in pairwise(problem.layout.cu_groups)]
    return torch.nn.utils.rnn.pad_sequence(groups, batch_first=True, padding_value=fill)


def dense(problem: Problem) -> tuple[Tensor, Tensor]:
    """Compute logits (G, C, T, V) before bias and transform, and targets (G, C, T)."""
    hidden = problem.hidden if problem.layout is None else problem.hidden[token_rows(problem)]
    return as_padded(problem, hidden, 0.0) @ problem.weight.T, as_padded(problem, problem.targets, -100)


def token_rows(problem: Problem) -> Tensor:
    """Return the row of each token (N,) of a packed problem."""
    rows = problem.layout.rows
    return torch.arange(problem.layout.num_tokens) if rows is None else rows


def eager_loss(problem: Problem) -> Tensor:
    """Compute the loss by the reference, from dense logits in the dtype of the problem."""
    return eager_loss_of(problem, *dense(problem), problem.bias)


def eager_loss_of(problem: Problem, logits: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the loss by the reference from logits (G, C, T, V) and targets (G, C, T)."""
    ranks = problem.ranks
    if problem.layout is not None and problem.layout.ranks is not None:
        ranks = segments_as_padded(problem, torch.as_tensor(problem.layout.ranks), 9)
    ref = segments_as_padded(problem, problem.ref_logps, 0.0)
    return reference.cpo_loss(logits, targets, ref_logps=ref, ranks=ranks, bias=bias, **problem.options)


def fused_loss(problem: Problem, **head: Any) -> Tensor:
    return linear_cpo_loss(**problem.arguments(), **problem.options, **head).loss


def loss_and_grads(loss: Tensor, problem: Problem, upstream: float = 1.0) -> dict[str, Tensor]:
    """Return the loss and the gradients of hidden, weight and bias that require one, by name."""
    wanted = {n: t for n, t in zip(("hidden", "weight", "bias"), problem.tensors, strict=True) if t is not None}
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
    grads = torch.autograd.grad(loss * upstream, list(wanted.values()))
    return {"loss": loss.detach(), **dict(zip(wanted, grads, strict=True))}


def budget_of(problem: Problem, rows: int) -> int:
    """Return the bytes of ``rows`` rows of logits in the dtype of the problem."""
    return rows * problem.weight.shape[0] * problem.weight.dtype.itemsize


class GemmCounter(TorchDispatchMode):
    """A mode that records (m, n, k) of every matrix product."""

    # Position of the left and the right factor among the arguments.
    FACTORS: ClassVar = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __enter__(self):
        self.before = dict(registry.BACKENDS)
        for name, backend in self.before.items():
            products = {"gemm_": self.counted(backend.gemm_), "gemm_pair_": self.counted(backend.gemm_pair_)}
            within, softmax = backend.gemms_within, backend.linear_softmax
            if within is not None:
                products["gemms_within"] = lambda size, within=within: tuple(map(self.counted, within(size)))
            if softmax is not None:
                products["linear_softmax"] = softmax._replace(forward=self.softmax_of_product)
                self.softmax = softmax.forward
            registry.BACKENDS[name] = replace(backend, **products)
        return super().__enter__()

    def __exit__(self, *raised):
        registry.BACKENDS.update(self.before)
        return super().__exit__(*raised)

    def counted(self, product: Callable[..., None]) -> Callable[..., None]:
        """Wrap a backend's product, which may be no operator of torch."""

        def count(left: Tensor, right: Tensor, *rest: Any) -> None:
            self.count(left, right)
            with _disable_current_modes():
                product(left, right, *rest)

        return count

    def count(self, left: Tensor, right: Tensor) -> None:
        """Record one product."""
        self.read(left, right)
        if right.shape[1] > 2:  # the gradient of a bias is no product of the head, though it may be written as one
            self.shapes.append((left.shape[0], right.shape[1], left.shape[1]))

    def softmax_of_product(self, hidden, weight, *rest, **options):
        """Count the product inside the softmax, which is no operator."""
        self.shapes.append((hidden.shape[0], weight.shape[0], hidden.shape[1]))
        self.read(hidden, weight)
        return self.softmax(hidden, weight, *rest, **options)

    def read(self, *operands: Tensor) -> None:
        """Take note of what a product reads, in subclasses."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in self.FACTORS:
            self.count(*(args[i] for i in self.FACTORS[name]))
        else:
            assert not any(word in name for word in ("mm", "matmul", "linear", "einsum")), f"{name} is not counted"
        return func(*args, **(kwargs or {}))

    def products(self, rows: int, weight: Tensor) -> float:
        """Return the work of all products in units of one product of (rows, V, H)."""
        return sum(m * n * k for m, n, k in self.shapes) / (rows * weight.numel())

    def largest_row_count(self, weight: Tensor) -> int:
        """Return the largest size of a product other than V and H, which must differ from each other and from it."""
        return max(size for shape in self.shapes for size in shape if size not in weight.shape)


# Rows that the budget holds: all; about one group of the problems; less than a group, so that logits are recomputed.
BUDGETS = {"one_chunk": None, "several_chunks": 13, "recomputed": 3}


def assert_problem_accurate(problem, dtype, upstream=1.0, **head):
    """Check that loss and every gradient obey the rule of tolerance.py."""
    exact, rounded = problem.to(dtype).to(torch.float64), problem.to(dtype)
    oracle = loss_and_grads(eager_loss(exact), exact, upstream)
    eager = loss_and_grads(eager_loss(rounded), rounded, upstream)
    fused = loss_and_grads(fused_loss(rounded, **head), rounded, upstream)
    for name, wanted in oracle.items():
        assert fused[name].dtype == eager[name].dtype
        assert_accurate(fused[name], eager[name], wanted, name)
