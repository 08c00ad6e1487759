"""Liger's fused linear cross-entropy and Cut Cross-Entropy by our names, against ``F.cross_entropy`` in float64."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pairwise import pairwise
from processes import run_script
from project import SUPPORT
from tolerance import assert_accurate
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from cpo_kernels import linear_cpo_loss
from cpo_kernels.integrations import cross_entropy as core
from cpo_kernels.integrations import cut_cross_entropy as cce
from cpo_kernels.integrations.liger import (
    CrossEntropyOutput,
    LigerFusedLinearCrossEntropyLoss,
    liger_fused_linear_cross_entropy,
)

N, V, H = 24, 23, 6
PAD = V - 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def leaves_of(dtype: torch.dtype, *, bias: bool, rows: tuple[int, ...] = (N,)) -> list[Tensor]:
    """Weight, input and bias, if there is one."""
    tensors = [torch.randn(V, H), torch.randn(*rows, H), *([torch.randn(V)] if bias else [])]
    return [x.to(dtype).requires_grad_() for x in tensors]


def copies(leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in leaves]


def logits_of(leaves: list[Tensor], softcap: float | None) -> Tensor:
    """Stored logits, in float32 or better."""
    logits = F.linear(leaves[1], leaves[0], *leaves[2:])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return softcap * (logits / softcap).tanh() if softcap else logits


def targets_of(*shape: int, ignored: int = PAD) -> Tensor:
    """Targets of which every fourth is ignored, and some words occur several times."""
    targets = torch.randint(5, shape).flatten()
    targets[::4] = ignored
    return targets.view(shape)


def squares(lse: Tensor, present: Tensor, reduction: str) -> Tensor:
    """The z-loss of tokens."""
    each = lse.square() * present
    return each / present.sum() if reduction == "mean" else each


def dense(leaves: list[Tensor], targets: Tensor, o: dict[str, Any]) -> CrossEntropyOutput:
    """What Liger computes, by ``F.cross_entropy`` of stored logits."""
    logits = logits_of(leaves, o["softcap"])
    present, mean = targets != PAD, o["reduction"] == "mean"
    classes = None if o["ce_weight"] is None else o["ce_weight"].to(logits.dtype)
    named = {"weight": classes, "label_smoothing": o["label_smoothing"], "ignore_index": PAD}
    losses = F.cross_entropy(logits, targets, reduction="none", **named)
    weights = torch.ones(V) if classes is None else classes
    losses = losses / weights[targets[present]].sum() if mean else losses
    z = o["lse_square_scale"] * squares(logits.logsumexp(-1), present, o["reduction"])
    losses = losses + z
    if o["use_token_scaling"]:
        scale = logits.detach().softmax(-1).gather(1, targets[:, None]).squeeze(1)
        losses, z = losses * scale, z * scale
    words = logits.argmax(-1).masked_fill(~present, -1)
    right = (words == targets).to(losses.dtype)
    if o["reduction"] != "none":
        losses, z, right = losses.sum(), z.sum(), right.sum() / present.sum()
    return CrossEntropyOutput(losses, z.detach(), right, words)


def values(out: CrossEntropyOutput, leaves: list[Tensor], upstream: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad((out.loss * upstream.to(out.loss.dtype)).sum(), leaves)
    assert not out.z_loss.requires_grad
    return {"loss": out.loss.detach(), "z": out.z_loss} | {f"grad {i}": x for i, x in enumerate(grads)}


AXES = {
    "reduction": ("mean", "sum", "none"),
    "classes": {"all words": False, "weighted": True},
    "smoothing": (0.0, 0.2),
    "z": {"no z": 0.0, "z": 0.05},
    "softcap": (None, 3.0),
    "scaling": {"": False, "scaled": True},
    "bias": {"": False, "bias": True},
    "dtype": DTYPES,
}


def options_of(reduction="mean", classes=False, smoothing=0.0, z=0.0, softcap=None, scaling=False) -> dict[str, Any]:
    return {
        "ce_weight": torch.rand(V) + 0.2 if classes else None,
        "lse_square_scale": z,
        "label_smoothing": smoothing,
        "reduction": reduction,
        "softcap": softcap,
        "use_token_scaling": scaling,
    }


@pairwise(AXES)
def test_ligers_cross_entropy(reduction, classes, smoothing, z, softcap, scaling, bias, dtype, monkeypatch):
    monkeypatch.setattr(core, "LOGITS", 5 * N)  # several parts of the vocabulary
    leaves, targets = leaves_of(dtype, bias=bias), targets_of(N)
    options = options_of(reduction, classes, smoothing, z, softcap, scaling)
    upstream = torch.randn(N) if reduction == "none" else torch.tensor(3.0)
    oracles = copies(leaves, torch.float64)
    oracle, eager = dense(oracles, targets, options), dense(leaves, targets, options)
    asked = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}
    module = LigerFusedLinearCrossEntropyLoss(**options, **asked, ignore_index=PAD)
    out = module(leaves[0], leaves[1], targets.int(), *leaves[2:])
    expected, rounded = values(oracle, oracles, upstream), values(eager, leaves, upstream)
    for name, value in values(out, leaves, upstream).items():
        assert_accurate(value, rounded[name], expected[name], name)
    if dtype == torch.float32:  # in bfloat16 logits may be equal
        assert torch.equal(out.predicted_tokens, oracle.predicted_tokens)
        assert_close(out.token_accuracy, oracle.token_accuracy.float())


def budgeted(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Give calls of the engine room for so many rows of logits."""
    whole = core.head_options

    def with_budget(hidden, *arguments, **exact):
        return whole(hidden, *arguments, **exact) | {"max_logits_bytes": rows * V * hidden.dtype.itemsize}

    for module in (core, cce):
        monkeypatch.setattr(module, "head_options", with_budget)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_chunks(reduction, monkeypatch):
    leaves, targets = leaves_of(torch.float32, bias=True), targets_of(N)
    module = LigerFusedLinearCrossEntropyLoss(**options_of(reduction, True, 0.1, 0.05), ignore_index=PAD)

    def run() -> list[Tensor]:
        loss = module(leaves[0], leaves[1], targets, leaves[2])
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    expected, sizes, whole = run(), [], core.linear_sequence_loss
    monkeypatch.setattr(core, "GROUP", 4)
    budgeted(monkeypatch, 8)

    def counted(hidden, weight, targets, loss_fn, **head):
        return whole(hidden, weight, targets, lambda *given: sizes.append(given[0].numel()) or loss_fn(*given), **head)

    monkeypatch.setattr(core, "linear_sequence_loss", counted)
    for got, value in zip(run(), expected, strict=True):
        assert_close(got, value)
    assert reduction == "none" or len(sizes) > 2


@dataclass
class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator makes."""

    elements: int = field(default=0)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.itemsize for x in made)])
        return out


@pytest.mark.cpu  # on a GPU the engine's kernels have workspaces of a fixed size
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_tensor_holds_all_logits(reduction, monkeypatch):
    rows, vocab = 4096, 2048
    monkeypatch.setattr(core, "LOGITS", rows * vocab // 16)
    whole = core.head_options
    monkeypatch.setattr(core, "head_options", lambda *a, **k: whole(*a, **k) | {"max_logits_bytes": rows * vocab})
    weight, hidden = torch.randn(vocab, 16, requires_grad=True), torch.randn(rows, 16, requires_grad=True)
    targets = torch.randint(vocab, (rows,))
    asked = {"return_predicted_tokens": True, "label_smoothing": 0.1, "lse_square_scale": 0.1, "softcap": 2.0}
    with Largest() as largest:
        module = LigerFusedLinearCrossEntropyLoss(**asked, reduction=reduction, ce_weight=torch.rand(vocab))
        module(weight, hidden, targets).loss.sum().backward()
    assert rows * vocab / 16 <= largest.elements <= rows * vocab / 4


def test_where_all_targets_are_ignored_the_loss_is_0_as_ligers_and_nan_as_cut_cross_entropys():
    leaves, targets = leaves_of(torch.float32, bias=True), torch.full((N,), PAD)
    for reduction in ("mean", "sum", "none"):
        options = options_of(reduction, True, 0.1, 0.05)
        out = LigerFusedLinearCrossEntropyLoss(
            **options, ignore_index=PAD, return_token_accuracy=True, return_predicted_tokens=True
        )(leaves[0], leaves[1], targets, leaves[2])
        assert not out.loss.any() and not any(x.any() for x in torch.autograd.grad(out.loss.sum(), leaves))
        assert bool(out.token_accuracy.isnan().all()) == (reduction != "none")
        assert (out.predicted_tokens == -1).all()
        loss, lse = cce.linear_cross_entropy(
            leaves[1], leaves[0], targets, ignore_index=PAD, reduction=reduction, return_lse=True
        )
        assert not lse.any() and (loss.isnan().all() if reduction == "mean" else not loss.any())
        assert cce.linear_cross_entropy(leaves[1], leaves[0], targets, ignore_index=PAD).isnan()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_ignored_rows_may_hold_anything(reduction):
    leaves, targets = leaves_of(torch.float32, bias=True), targets_of(N)
    module = LigerFusedLinearCrossEntropyLoss(**options_of(reduction, True, 0.1, 0.05), ignore_index=PAD)

    def run() -> list[Tensor]:
        loss = module(leaves[0], leaves[1], targets, leaves[2])
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    expected = run()
    with torch.no_grad():
        leaves[1][targets == PAD] = torch.nan
    for got, value in zip(run(), expected, strict=True):
        assert_close(got, value, rtol=0, atol=0)


def test_autocast():
    leaves, targets = leaves_of(torch.float32, bias=True), targets_of(N)
    options = options_of("mean", False, 0.1, 0.05)
    with torch.autocast(leaves[0].device.type, dtype=torch.bfloat16):
        loss = liger_fused_linear_cross_entropy(leaves[1], leaves[0], targets, leaves[2], **options, ignore_index=PAD)
    rounded = copies(leaves, torch.bfloat16)
    expected = LigerFusedLinearCrossEntropyLoss(**options, ignore_index=PAD)(*rounded[:2], targets, rounded[2])
    assert torch.equal(loss, expected)
    grads = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, rounded), strict=True)
    for got, value in grads:
        assert_close(got, value.float(), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_without_a_break(reduction):
    leaves, targets = leaves_of(torch.float32, bias=True), targets_of(N)
    module = LigerFusedLinearCrossEntropyLoss(
        **options_of(reduction, True, 0.1, 0.05, 3.0), ignore_index=PAD, return_token_accuracy=True
    )
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    outs = [m(leaves[0], leaves[1], targets, leaves[2]) for m in (compiled, module)]
    assert_close(outs[0].loss, outs[1].loss)
    grads = [torch.autograd.grad(out.loss.sum(), leaves) for out in outs]
    for got, value in zip(*grads, strict=True):
        assert_close(got, value)


def test_ligers_own_kernel_computes_the_same():
    """Without the options whose numbers Triton's interpreter cannot take."""
    theirs = pytest.importorskip("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    leaves, targets = leaves_of(torch.float32, bias=True), targets_of(N)
    options = {"lse_square_scale": 0.05, "label_smoothing": 0.1, "use_token_scaling": True, "ignore_index": PAD}
    asked = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}
    outs = [m(**options, **asked)(*leaves[:2], targets, leaves[2]) for m in (LigerFusedLinearCrossEntropyLoss, theirs)]
    for name in ("loss", "z_loss", "token_accuracy", "predicted_tokens"):
        assert_close(getattr(outs[0], name).detach(), getattr(outs[1], name).detach())
    for got, value in zip(*(torch.autograd.grad(3 * out.loss, leaves) for out in outs), strict=True):
        assert_close(got, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"reduction": "avg"}, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
        ({"softcap": 0.0}, "softcap must be above 0 or None, got 0.0"),
        ({"ce_weight": torch.ones(V + 1)}, r"ce_weight must be floating point \(23,\), got torch.float32 \(24,\)"),
        ({"ce_weight": torch.ones(V, dtype=torch.int64)}, "ce_weight must be floating point"),
        ({"ignore_index": 3}, r"target \(0,\) is -100, expected a word or ignore_index=3"),
    ],
)
def test_options_of_ligers_that_do_not_fit(options, message):
    weight, hidden = leaves_of(torch.float32, bias=False)
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearCrossEntropyLoss(**options)(weight, hidden, targets_of(N, ignored=-100))


def test_shapes_that_do_not_fit_ligers():
    weight, hidden = leaves_of(torch.float32, bias=False)
    with pytest.raises(ValueError, match=r"target \(N,\), got \(24, 6\) and \(23,\)"):
        LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets_of(N - 1))


# Cut Cross-Entropy


def dense_cce(leaves: list[Tensor], targets: Tensor, softcap: float | None, reduction: str, shift: int) -> tuple:
    """Loss and log-sum-exps, by ``F.cross_entropy`` of stored logits."""
    inputs = leaves[1][:, : -shift or None]
    logits, targets = logits_of([leaves[0], inputs, *leaves[2:]], softcap), targets[:, shift:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction=reduction)
    lse = logits.logsumexp(-1).masked_fill(targets == PAD, 0.0)
    return (loss.view(targets.shape) if reduction == "none" else loss), lse


def cce_values(loss: Tensor, lse: Tensor | None, leaves: list[Tensor]) -> dict[str, Tensor]:
    """With a z-loss of the log-sum-exps, if they are there."""
    weights = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
    total = (loss * weights).sum() + (0.0 if lse is None else 0.05 * lse.square().mean())
    named = {"loss": loss.detach(), **({} if lse is None else {"lse": lse.detach()})}
    return named | {f"grad {i}": x for i, x in enumerate(torch.autograd.grad(total, leaves))}


@pairwise(
    {
        "reduction": ("mean", "sum", "none"),
        "lse": {"": False, "lse": True},
        "shift": (0, 1, 2),
        "softcap": (None, 3.0),
        "bias": {"": False, "bias": True},
        "dtype": DTYPES,
    }
)
def test_cut_cross_entropy(reduction, lse, shift, softcap, bias, dtype):
    leaves, targets = leaves_of(dtype, bias=bias, rows=(3, 8)), targets_of(3, 8)
    oracles = copies(leaves, torch.float64)
    expected, rounded = (
        cce_values(loss, stored if lse else None, tensors)
        for tensors in (oracles, leaves)
        for loss, stored in [dense_cce(tensors, targets, softcap, reduction, shift)]
    )
    given = {"ignore_index": PAD, "softcap": softcap, "reduction": reduction, "shift": bool(shift) if shift < 2 else 2}
    module = cce.LinearCrossEntropy(**given, return_lse=lse)
    out = module(leaves[1], leaves[0], targets.int(), *leaves[2:])
    got = cce_values(*(out if lse else (out, None)), leaves)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert_accurate(value, rounded[name], expected[name], name)


def test_the_filter_of_a_number_is_the_engines_in_units_of_probabilities():
    """The engine's other loss of tokens says what leaving out columns gives; None and "auto" are exact."""
    torch.manual_seed(0)
    rows, words = 64, 640
    weight, targets = torch.randn(words, 32), torch.randint(40, (rows,))
    leaves = [weight.requires_grad_(), (0.6 * weight[targets].detach() + 0.1 * torch.randn(rows, 32)).requires_grad_()]

    def grads(**options: Any) -> list[Tensor]:
        loss = cce.linear_cross_entropy(leaves[1], leaves[0], targets, **options)
        return list(torch.autograd.grad(loss, leaves))

    for reduction, tokens in (("mean", None), ("sum", 1.0)):
        exact = grads(reduction=reduction, filter_eps=None)
        for same in ({"filter_eps": "auto"}, {"filter_eps": 0.1, "impl": "cce_exact"}, {"filter_e_grad": False}):
            assert all(map(torch.equal, grads(reduction=reduction, **same), exact))
        likelihood = {"contrast_weight": 0.0, "mle_weight": 1.0, "num_target_tokens": tokens, "grad_filter_eps": 1e-3}
        out = linear_cpo_loss(leaves[1][None, None], leaves[0], targets[None, None], **likelihood)
        expected = torch.autograd.grad(out.loss, leaves)
        for got, value, whole in zip(grads(reduction=reduction, filter_eps=1e-3), expected, exact, strict=True):
            assert_close(got, value)
            assert (got - whole).norm() > 1e-4 * whole.norm()


def test_constructors_and_calls_take_what_cut_cross_entropy_takes():
    """Of the release that is installed, by name: 25.1 lacks what later ones have."""
    theirs = pytest.importorskip("cut_cross_entropy")
    for name in ("linear_cross_entropy", "LinearCrossEntropy"):
        mine = inspect.signature(getattr(cce, name)).parameters
        assert set(inspect.signature(getattr(theirs, name)).parameters) <= set(mine)
    for impl in theirs.LinearCrossEntropyImpl:
        assert cce.named(impl) == cce.named(impl.name.lower())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": 7}, "bias must be a tensor or None, got 7: ignore_index is the argument after it"),
        ({"reduction": "avg"}, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
        ({"shift": 24}, r"shift must be in \[0, 24\), got 24"),
        ({"filter_eps": "low"}, "filter_eps must be a number, 'auto' or None, got 'low'"),
        ({"impl": "triton"}, "impl must be one of .*'torch_compile'.* got 'triton'"),
        ({"ignore_index": 3}, r"target \(0,\) is -100, expected a word or ignore_index=3"),
        ({"vocab_parallel_options": cce.VocabParallelOptions(0, 9)}, r"c must have the 9 rows 0 to 9 of"),
    ],
)
def test_options_of_cut_cross_entropys_that_do_not_fit(options, message):
    weight, hidden = leaves_of(torch.float32, bias=False)
    with pytest.raises(ValueError, match=message):
        cce.linear_cross_entropy(hidden, weight, targets_of(N, ignored=-100), **options)
    with pytest.raises(ValueError, match=r"targets \(..., T\), got \(24, 6\) and \(23,\)"):
        cce.linear_cross_entropy(hidden, weight, targets_of(N - 1))


@pytest.mark.cpu
def test_a_head_that_is_split_over_processes(tmp_path):
    """Two processes, with log-sum-exps and without; both forms of the gradient of the hidden states."""
    run_script(SUPPORT / "cut_cross_entropy_worker.py", str(tmp_path), processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    for name, (oracle, eager) in first["expected"].items():
        for key, value in oracle.items():
            mine = [part[name][key] for part in (first, second)]
            if key in ("weight", "bias"):
                got = torch.cat(mine)
            else:
                assert torch.equal(*mine) != ("share" in name and key == "hidden")
                got = sum(mine) if "share" in name and key == "hidden" else mine[0]
            assert_accurate(got, eager[key], value, f"{name}: {key}")
