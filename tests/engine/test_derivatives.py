"""What autograd may ask of the functions: saved tensors, a second order, forward mode; right, or a clear error."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from pair_formulas import SMOOTHED
from problems import BACKENDS, COMPILED_BACKENDS
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from cpo_kernels import (
    CandidateLayout,
    contrastive_loss,
    cpo_loss,
    linear_cpo_loss,
    linear_sequence_logps,
    linear_sequence_loss,
    linear_token_logps,
    linear_token_statistics,
    sequence_logps,
    token_logps,
)
from cpo_kernels.kernels import reference
from cpo_kernels.loss_table import LOSSES

G, C, T, H, V = 2, 3, 4, 5, 13
HEAD = {"softcap": 3.0, "logit_scale": 1.2, "temperature": 0.8}


class Batch:
    """Tensors of a call, the targets and references of which are buffers that a user may fill again."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.hidden = torch.randn(G, C, T, H, dtype=dtype, requires_grad=True)
        self.weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
        self.bias = torch.randn(V, dtype=dtype, requires_grad=True)
        self.logits = torch.randn(G, C, T, V, dtype=dtype, requires_grad=True)
        self.targets = torch.randint(V, (G, C, T))
        self.targets[0, 1, 2:] = -100
        self.ref = torch.randn(G, C, dtype=dtype)
        self.ranks = torch.tensor([[0, 1, 2], [1, 0, 2]])
        self.rows = torch.randperm(G * C * T)
        starts = list(range(0, G * C * T + 1, T)), list(range(0, G * C + 1, C))
        self.layout = CandidateLayout(*starts, rows=self.rows)

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden.reshape(-1, H), self.weight, self.targets.view(-1)


def squares(logps, groups):
    return logps.square().sum() / 50


# Each takes a batch and options of the head, and returns a scalar.
LINEAR: dict[str, Callable[..., Tensor]] = {
    "linear_cpo_loss": lambda b, **o: (
        linear_cpo_loss(
            b.hidden, b.weight, b.targets, ref_logps=b.ref, ranks=b.ranks, bias=b.bias, mle_weight=0.3, **o
        ).loss
    ),
    "packed_cpo_loss": lambda b, **o: (
        linear_cpo_loss(
            *b.packed(), layout=b.layout, ref_logps=b.ref.view(-1), ranks=b.ranks.view(-1), bias=b.bias, **o
        ).loss
    ),
    "dense_cpo_loss": lambda b, **o: (
        linear_cpo_loss(b.hidden, b.weight, b.targets, ref_logps=b.ref, ranks=b.ranks, skip_absent_rows=False, **o).loss
    ),
    "linear_sequence_loss": lambda b, **o: linear_sequence_loss(b.hidden, b.weight, b.targets, squares, **o),
    "linear_token_logps": lambda b, **o: linear_token_logps(b.hidden, b.weight, b.targets, bias=b.bias, **o).sum(),
    "dense_token_logps": lambda b, **o: linear_token_logps(
        b.hidden, b.weight, b.targets, skip_absent_rows=False, **o
    ).sum(),
    "frozen_token_logps": lambda b, **o: linear_token_logps(b.hidden, b.weight.detach(), b.targets, **o).square().sum(),
    "packed_sequence_logps": lambda b, **o: linear_sequence_logps(*b.packed(), layout=b.layout, **o).square().sum(),
    "frozen_packed_logps": lambda b, **o: (
        linear_sequence_logps(b.packed()[0], b.weight.detach(), b.packed()[2], layout=b.layout, **o).square().sum()
    ),
}
DENSE: dict[str, Callable[..., Tensor]] = {
    "token_logps": lambda b, **o: token_logps(b.logits, b.targets, bias=b.bias, **HEAD, **o).square().sum(),
    "sequence_logps": lambda b, **o: sequence_logps(b.logits, b.targets, bias=b.bias, **HEAD, **o).sum(),
    "cpo_loss": lambda b, **o: (
        cpo_loss(b.logits, b.targets, ref_logps=b.ref, ranks=b.ranks, bias=b.bias, mle_weight=0.3, **HEAD, **o).loss
    ),
}
BUFFERS = ["targets", "ref", "ranks", "rows"]


def leaf(batch: Batch, name: str) -> Tensor:
    return batch.logits if name in DENSE else batch.hidden


def spoil(buffer: Tensor) -> None:
    """Fill a buffer with the values of another batch, which are as legal."""
    buffer.copy_(buffer.flip(0).contiguous() if buffer.is_floating_point() or buffer.dim() == 1 else buffer.flip(-1))
    if buffer.is_floating_point():
        buffer.add_(3.0)


@pytest.mark.parametrize("again", [False, True], ids=["first", "retained"])
@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("name", LINEAR | DENSE)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_a_buffer_filled_again_before_backward_is_an_error_or_makes_no_difference(backend, name, buffer, again):
    batch = Batch()
    loss = (LINEAR | DENSE)[name](batch, backend=backend)
    (want,) = torch.autograd.grad(loss, leaf(batch, name), retain_graph=True)
    if not again:
        loss = (LINEAR | DENSE)[name](batch, backend=backend)
    spoil(getattr(batch, buffer))
    try:
        (got,) = torch.autograd.grad(loss, leaf(batch, name))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["frozen_token_logps", "dense_token_logps", "frozen_packed_logps"])
def test_targets_that_backward_reads_are_guarded_by_their_version(name):
    batch = Batch()
    loss = LINEAR[name](batch)
    batch.targets.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rows_that_backward_reads_are_guarded_by_their_version():
    batch = Batch()
    loss = LINEAR["frozen_packed_logps"](batch)
    batch.rows.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", LINEAR)
def test_hooks_of_saved_tensors_and_checkpoints_change_no_gradient(name):
    batch = Batch()
    want = torch.autograd.grad(LINEAR[name](batch), batch.hidden)[0]
    with save_on_cpu():
        loss = LINEAR[name](batch)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(loss, batch.hidden, retain_graph=True)[0], want)

    def run(hidden: Tensor) -> Tensor:
        batch.hidden = torch.tanh(hidden)
        return LINEAR[name](batch)

    hidden = batch.hidden.detach().requires_grad_()
    want = torch.autograd.grad(run(hidden), hidden)[0]
    loss = checkpoint(run, hidden, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], want)


@pytest.mark.parametrize("compiler", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("name", LINEAR)
def test_a_second_derivative_of_a_fused_head_is_refused_when_it_is_taken(name, compiler):
    """Not before, and although nothing above the loss needs a gradient."""
    batch = Batch()

    def function(hidden: Tensor) -> Tensor:
        batch.hidden = hidden
        return LINEAR[name](batch)

    hidden = batch.hidden
    want = torch.autograd.grad(function(hidden), hidden)[0]
    torch.compiler.reset()
    run = function if compiler is None else torch.compile(function, fullgraph=True, backend=compiler)
    (grad,) = torch.autograd.grad(run(hidden), hidden, create_graph=True)
    torch.testing.assert_close(grad, want)
    if compiler == "aot_eager" and name.startswith(("packed", "frozen_packed")):
        return  # torch's refusal is tied to what it saved, here a view of hidden
    with pytest.raises(
        RuntimeError, match=r"cannot be differentiated again|does not currently support double backward"
    ):
        torch.autograd.grad(grad.square().sum() + hidden.sum(), hidden)


def test_a_second_derivative_by_the_upstream_gradient_is_refused_too():
    batch, upstream = Batch(), torch.ones((), requires_grad=True)
    grads = torch.autograd.grad(LINEAR["linear_cpo_loss"](batch), batch.weight, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grads[0].sum().backward()


def reference_of(name: str, batch: Batch) -> Tensor:
    """The same in float64 and plain PyTorch."""
    if name == "cpo_loss":
        options = {"ref_logps": batch.ref, "ranks": batch.ranks, "mle_weight": 0.3}
        return reference.cpo_loss(batch.logits, batch.targets, bias=batch.bias, **HEAD, **options)
    logps = reference.token_logps(batch.logits, batch.targets, bias=batch.bias, **HEAD)
    return logps.square().sum() if name == "token_logps" else logps.sum()


def doubled(batch: Batch) -> Batch:
    """The same numbers in float64, as leaves."""
    double = Batch(torch.float64)
    for name in ("logits", "bias", "ref"):
        value = getattr(batch, name)
        setattr(double, name, value.detach().double().requires_grad_(value.requires_grad))
    double.targets, double.ranks = batch.targets, batch.ranks
    return double


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_of_logits_are_those_of_plain_pytorch(backend, name):
    batch = Batch()
    results = []
    for mine, loss in ((batch, DENSE[name](batch, backend=backend)), (d := doubled(batch), reference_of(name, d))):
        leaves = mine.logits, mine.bias
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, create_graph=True)
        third = torch.autograd.grad(second[0].square().sum(), leaves)
        results.append((*first, *second, *third))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", LOSSES)
def test_contrasts_have_all_derivatives_in_both_modes(name):
    """Against numerical differentiation of the loss, then of its gradient."""
    options = {"loss_type": name, "label_smoothing": SMOOTHED.get(name, 0.0), "beta": 0.5, "reduction": "none"}
    shape = (3, 4) if LOSSES[name].of_groups and not options["label_smoothing"] else (3, 2)
    logps, ref = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape, dtype=torch.float64)

    def loss(logps: Tensor) -> Tensor:
        return contrastive_loss(logps, ref_logps=ref, **options)

    assert torch.autograd.gradcheck(loss, logps, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, logps)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_of_logits_is_that_of_plain_pytorch(backend, name):
    batch = Batch()
    direction = torch.randn_like(batch.logits)
    double = doubled(batch)
    gradient = torch.autograd.grad(reference_of(name, double), double.logits)[0]
    want = (gradient * direction).sum()

    def function(logits: Tensor) -> Tensor:
        before, batch.logits = batch.logits, logits
        result = DENSE[name](batch, backend=backend)
        batch.logits = before  # the compiler would hand the traced tensor over
        return result

    torch.compiler.reset()
    logits = batch.logits.detach()
    got = [torch.func.jvp(function, (logits,), (direction,))[1]]
    with forward_ad.dual_level():
        got.append(forward_ad.unpack_dual(function(forward_ad.make_dual(logits, direction))).tangent)
    compiled = torch.compile(lambda x, v: torch.func.jvp(function, (x,), (v,))[1], backend="aot_eager", fullgraph=True)
    got.append(compiled(logits, direction))
    for tangent in got:
        torch.testing.assert_close(tangent.double(), want.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_forward_mode_of_a_fused_head_is_refused(name):
    batch = Batch()

    def function(hidden: Tensor) -> Tensor:
        batch.hidden = hidden
        return LINEAR[name](batch)

    hidden = batch.hidden.detach()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(function, (hidden,), (torch.ones_like(hidden),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        function(forward_ad.make_dual(hidden, torch.ones_like(hidden)))


def test_forward_mode_of_statistics_is_refused():
    batch = Batch()

    def function(hidden: Tensor) -> Tensor:
        return linear_token_statistics(hidden, batch.weight, batch.targets, entropy=True).entropy

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(function, (batch.hidden,), (torch.ones_like(batch.hidden),))


@pytest.mark.parametrize("name", ["logits", "linear"])
def test_a_loss_that_nobody_uses_frees_its_gradients_at_once(name, emulated_cuda):
    """Without a backward pass either, and without a collection of garbage."""
    targets, weight = torch.randint(0, 5, (2, 2, 3)), torch.randn(5, 4, requires_grad=True)
    hidden = torch.randn(2, 2, 3, 4, requires_grad=True)
    gc.disable()
    try:
        if name == "linear":
            loss = linear_cpo_loss(hidden, weight, targets, backend="torch").loss
        else:
            loss = cpo_loss(hidden @ weight.T, targets, backend="cuda").loss
        gradient = weakref.ref(next(grad for grad in loss.grad_fn.result.grads if grad is not None))
        assert gradient() is not None
        del loss
        assert gradient() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.vmap])
@pytest.mark.parametrize("name", LINEAR)
def test_transforms_of_torch_func_are_refused_in_a_sentence(name, transform):
    batch = Batch()

    def function(hidden: Tensor) -> Tensor:
        batch.hidden = hidden
        return LINEAR[name](batch)

    with pytest.raises(NotImplementedError, match=r"transforms of torch\.func do not reach inside a fused head"):
        transform(function)(batch.hidden.detach())
