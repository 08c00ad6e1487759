"""The cuda backend: what makes it unavailable, what its launchers refuse, the engine with its kernels on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import simt_host
import small_run
import torch
from problems import PROBLEMS
from simt_host import EmulatorError
from tolerance import assert_accurate

from cpo_kernels import cpo_loss, linear_cpo_loss, token_logps
from cpo_kernels.engine.tokens import dense_tokens
from cpo_kernels.kernels import ops, registry, selection
from cpo_kernels.kernels.cuda import extension as cuda_extension
from cpo_kernels.kernels.cuda import rows as cuda_rows
from cpo_kernels.kernels.device import why_too_old

pytestmark = pytest.mark.cpu
LAUNCHES = ("row_forward", "row_backward", "unit_forward", "contrast", "cpo_loss", "scale", "check_targets")


def module(driver: int, runtime: int = 13000) -> SimpleNamespace:
    return SimpleNamespace(driver_version=lambda: driver, runtime_version=lambda: runtime)


@pytest.mark.parametrize(
    ("found", "gpu", "reason"),
    [
        ((None, "nvcc was not there"), None, "nvcc was not there"),
        ((module(0), None), None, "no NVIDIA driver was found"),
        ((module(12080), None), (9, 0), "the driver supports CUDA 12.8, the extension was compiled with CUDA 13.0"),
        ((module(13000), None), None, "torch finds no NVIDIA GPU"),
        ((module(13010), None), (8, 0), None),
        ((module(12020, 12080), None), (10, 0), None),  # within a major version, an older driver will do
    ],
)
def test_what_makes_the_backend_unavailable(monkeypatch, found, gpu, reason):
    monkeypatch.setattr(cuda_extension, "_load", lambda: found)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu is not None))
    monkeypatch.setattr(torch.version, "hip", None)
    given = cuda_extension.unavailable_reason()
    assert given is None if reason is None else given is not None and given.startswith(reason)
    (status,) = (s for s in registry.describe() if s.name == "cuda")
    assert status.available == (reason is None)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_gpu_that_is_too_old_is_refused(monkeypatch, backend):
    """For its own capability, whichever device is the current one."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 1 else (9, 0))
    refusal = why_too_old.__wrapped__
    assert refusal(backend, torch.device("cuda:0")) is None
    assert refusal(backend, torch.device("cpu")) is None
    message = refusal(backend, torch.device("cuda:1"))
    assert message == f"backend '{backend}' needs compute capability 8.0, cuda:1 has 7.5"


def test_auto_chooses_only_what_is_measured():
    assert "cuda" not in selection.PREFERRED["cuda"]
    assert all(choice.measured for choice in selection.CHOICES)


def test_calls_without_the_extension_say_so(monkeypatch):
    monkeypatch.setattr(cuda_extension, "_load", lambda: (None, "it was not built"))
    monkeypatch.setattr(cuda_extension, "queue", lambda device: {})
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: it was not built"):
        cuda_rows.row_forward(torch.randn(2, 5), torch.tensor([1, 2]), None, None, 1.0, 0.0, 1.0)


def call(**changes):
    """A small valid call of row_backward_, with some arguments exchanged."""
    arguments = {
        "logits": torch.randn(2, 5),
        "targets": torch.tensor([1, -100, 2]),
        "row_starts": torch.tensor([0, 2, 3]),
        "stats": torch.zeros(2, 2),
        "coef": torch.ones(3),
        "bias": None,
        "logit_scale": 1.0,
        "softcap": 0.0,
        "temperature": 1.0,
    }
    cuda_rows.row_backward_(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.randn(2, 5).double()}, "logits has dtype torch.float64"),
        ({"logits": torch.randn(2, 0)}, r"logits have shape \(2, 0\)"),
        ({"logits": torch.randn(5, 2).T}, r"logits have strides \(1, 2\)"),
        ({"logits": torch.randn(1, 5).expand(2, 5)}, "rows overlap and cannot be overwritten"),
        ({"targets": torch.tensor([1.0, 2.0, 3.0])}, "targets has dtype torch.float32"),
        ({"row_starts": torch.tensor([0, 3])}, r"row_starts has shape \(2,\)"),
        ({"row_starts": None}, r"targets has shape \(3,\); expected \(2\)"),
        ({"stats": torch.zeros(2, 3)}, r"stats has shape \(2, 3\)"),
        ({"coef": torch.ones(3).double()}, "coef has dtype torch.float64"),
        ({"coef": torch.ones(2)}, r"coef has shape \(2,\)"),
        ({"bias": torch.ones(4)}, r"bias has shape \(4,\)"),
        ({"bias": torch.ones(5, device="meta")}, "bias is on meta"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"grad_dtype": torch.float64}, "grad_dtype is torch.float64"),
    ],
)
def test_arguments_that_do_not_fit(emulator, changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_tensors_of_the_cpu_are_refused():
    pytest.importorskip("cpo_kernels._cuda", reason="no CUDA extension in this build")
    with pytest.raises(ValueError, match="logits are on cpu; expected a CUDA tensor"):
        call()


@pytest.mark.parametrize("shared", [False, True], ids=["one token a row", "shared rows"])
def test_opcheck(emulator, cuda_operators, shared):
    logits, targets = torch.randn(4, 31), torch.randint(0, 31, (6 if shared else 4,))
    starts = torch.tensor([0, 2, 2, 5, 6]) if shared else None
    head = (torch.randn(31), 0.7, 3.0, 1.3)
    stats, logps = cuda_operators.forward(logits, targets, starts, *head)
    namespace = torch.ops.cpo_kernels
    forward = namespace.emulated_cuda_row_forward.default
    torch.library.opcheck(forward, (logits.clone().requires_grad_(), targets, starts, *head))
    backward = (logits, targets, starts, stats, torch.randn_like(logps), *head)
    torch.library.opcheck(namespace.emulated_cuda_row_backward.default, backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["larger_prime_vocab", "whole_head", "ranked", "packed_whole_head", "packed_shared_rows"]
)
def test_the_engine_with_these_kernels(emulated_cuda, dtype, name):
    """Loss and gradients, chunk by chunk, against the reference backend's in float64."""
    torch.manual_seed(1)
    rounded = PROBLEMS[name]().to(dtype)
    results = []
    for kind, to in (("cuda", dtype), ("torch", dtype), ("torch", torch.float64)):
        problem = rounded.to(to)
        out = linear_cpo_loss(**problem.arguments(), **problem.options, backend=kind, max_logits_bytes=8192)
        out.loss.backward()
        results.append((out.loss.detach(), problem.hidden.grad, problem.weight.grad))
    for what, *tensors in zip(("loss", "hidden", "weight"), *results, strict=True):
        assert_accurate(*tensors, what)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, every other test calls the bindings")
def test_the_bindings_take_what_the_launchers_give(emulated_cuda, emulator, monkeypatch):
    """The emulator takes any keyword; the extension takes these, and then finds that there is no GPU."""
    extension = pytest.importorskip("cpo_kernels._cuda", reason="no CUDA extension in this build")
    given = {}
    for name in LAUNCHES:
        launch = getattr(emulator, name)
        monkeypatch.setattr(
            emulator,
            name,
            lambda name=name, launch=launch, **arguments: given.update({name: arguments}) or launch(**arguments),
        )
    monkeypatch.setattr(small_run, "V", 257)
    small_run.linear_form("cuda", torch.device("cpu"), torch.float32)
    small_run.one_launch(torch.device("cpu"), torch.float32)
    small_run.one_read(torch.device("cpu"), torch.float32)
    cuda_rows.check_targets(torch.tensor([0, -100, 4]), 5)
    assert given.keys() == set(LAUNCHES)
    for name, arguments in given.items():
        with pytest.raises(RuntimeError, match="cudaGetDevice: "):
            getattr(extension, name)(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_the_sanitizer_watches_is_every_launch(emulated_cuda, emulator, monkeypatch, dtype):
    """But for the check of targets, which has no counterpart on the CPU."""
    made = simt_host.record(emulator, monkeypatch, LAUNCHES)
    monkeypatch.setattr(small_run, "V", 257)
    small_run.logits_form("cuda", torch.device("cpu"), dtype)
    small_run.linear_form("cuda", torch.device("cpu"), dtype)
    small_run.one_launch(torch.device("cpu"), dtype)
    small_run.one_read(torch.device("cpu"), dtype)
    assert set(made) == set(LAUNCHES) - {"check_targets"}


def test_logits_form(emulated_cuda):
    logits, targets = torch.randn(3, 2, 257, requires_grad=True), torch.randint(0, 257, (3, 2))
    logps = token_logps(logits, targets, backend="cuda")
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    double = logits.detach().double().requires_grad_()
    exact = token_logps(double, targets, backend="torch")
    (exact_grad,) = torch.autograd.grad(exact.sum(), double)
    eager = token_logps(logits, targets, backend="torch")
    (eager_grad,) = torch.autograd.grad(eager.sum(), logits)
    assert_accurate(logps.detach(), eager.detach(), exact.detach(), "logps")
    assert_accurate(grad, eager_grad, exact_grad, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"mle_weight": 0.4, "softcap": 3.0, "temperature": 1.3}], ids=["plain", "all"])
def test_the_loss_of_given_logits_is_one_launch(emulated_cuda, emulator, monkeypatch, dtype, options):
    """Loss and gradients of logits and bias under an upstream gradient of 3, and again from a retained graph."""
    launches = []
    launch = emulator.cpo_loss
    monkeypatch.setattr(emulator, "cpo_loss", lambda **arguments: launches.append(1) or launch(**arguments))
    source, bias, ref = torch.randn(3, 3, 4, 129), torch.randn(129), torch.randn(3, 3) - 20
    targets = torch.randint(0, 129, (3, 3, 4))
    targets[0, 1], targets[1, 2, 2:] = -100, -100
    results = []
    for kind, to in (("cuda", dtype), ("torch", dtype), ("torch", torch.float64)):
        leaves = [t.to(dtype).to(to).requires_grad_() for t in (source, bias)]
        out = cpo_loss(leaves[0], targets, ref_logps=ref, bias=leaves[1], backend=kind, **options)
        grads = torch.autograd.grad(3 * out.loss, leaves, retain_graph=True)
        again = torch.autograd.grad(3 * out.loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
        results.append((out.loss.detach(), out.logps, *grads))
    for what, *tensors in zip(("loss", "logps", "logits", "bias"), *results, strict=True):
        assert_accurate(*tensors, what)
    assert len(launches) == 2  # the second for the retained graph


def test_the_loss_of_given_logits_has_a_second_derivative(emulated_cuda):
    values, targets = torch.randn(2, 3, 4, 33), torch.randint(0, 33, (2, 3, 4))
    results = []
    for kind, dtype in (("cuda", torch.float32), ("torch", torch.float64)):
        logits, bias = values.to(dtype, copy=True).requires_grad_(), torch.linspace(-1, 1, 33, dtype=dtype)
        leaves = logits, bias.requires_grad_()
        loss = cpo_loss(logits, targets, bias=bias, mle_weight=0.3, backend=kind).loss.square()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        results.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("buffer", [0, 1, 2])
def test_the_loss_of_given_logits_is_not_of_buffers_filled_again(emulated_cuda, buffer):
    logits, targets = torch.randn(2, 3, 4, 33, requires_grad=True), torch.randint(0, 33, (2, 3, 4))
    buffers = targets, torch.randn(2, 3), torch.tensor([[0, 1, 2], [1, 0, 2]])
    loss = cpo_loss(logits, targets, ref_logps=buffers[1], ranks=buffers[2], backend="cuda").loss
    torch.autograd.grad(loss, logits, retain_graph=True)
    buffers[buffer].copy_(buffers[buffer].flip(-1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


def test_the_loss_of_given_logits_without_gradients(emulated_cuda):
    logits, targets = torch.randn(2, 3, 4, 65), torch.randint(0, 65, (2, 3, 4))
    found, expected = (cpo_loss(logits, targets, backend=kind) for kind in ("cuda", "torch"))
    assert not found.loss.requires_grad
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 4096, 20 * 1024 + 5])
def test_a_gradient_times_an_upstream_one(emulator, dtype, size):
    """Rounded once; by 1 nothing is written, so that a NaN pattern keeps its bits."""
    tensor, factor = torch.randn(size).to(dtype), torch.tensor(-0.37)
    expected = (tensor.float() * factor).to(dtype)
    cuda_rows.scale_(tensor, factor)
    assert torch.equal(tensor, expected)
    cuda_rows.scale_(tensor, torch.ones((), dtype=torch.float64))
    assert torch.equal(tensor, expected)


def test_gradients_that_no_vector_fits_are_scaled_by_torch(emulator, monkeypatch):
    monkeypatch.setattr(emulator, "scale", None)
    whole = torch.randn(5, 9)
    for tensor in (whole[:, :4], whole.view(-1)[1:]):
        expected = tensor * 2
        cuda_rows.scale_(tensor, torch.tensor(2.0))
        assert torch.equal(tensor, expected)


def test_backward_scales_by_the_kernel(emulated_cuda, emulator, monkeypatch):
    launches = []
    launch = emulator.scale
    monkeypatch.setattr(
        emulator, "scale", lambda **arguments: launches.append(arguments["count"]) or launch(**arguments)
    )
    problem = PROBLEMS["larger_prime_vocab"]().to(torch.float32)
    loss = linear_cpo_loss(**problem.arguments(), backend="cuda").loss
    (-2 * loss).backward()
    assert launches == [problem.hidden.numel(), problem.weight.numel()]


@pytest.mark.parametrize("count", [1, 33, 256, 70_000])
@pytest.mark.parametrize("bad", [-1, 50, 2**40, -(2**40)])
def test_a_target_that_no_word_has_is_named(emulator, count, bad):
    targets = torch.randint(0, 50, (count,))
    targets[count // 3] = -100
    cuda_rows.check_targets(targets, 50)
    targets[count // 2] = bad
    with pytest.raises(EmulatorError, match=rf"^target of token {count // 2} is {bad}, expected \[0, 50\) or -100$"):
        cuda_rows.check_targets(targets, 50)


def test_the_first_of_a_warp_is_named(emulator):
    targets = torch.full((32,), 50)
    targets[:7] = 3
    with pytest.raises(EmulatorError, match="target of token 7 is 50"):
        cuda_rows.check_targets(targets, 50)


@pytest.mark.parametrize("serves", [True, False])
def test_calls_ask_the_check_of_their_device(monkeypatch, serves):
    """And fall back to PyTorch's assertion where it cannot serve; the meta device stands for a GPU.

    They ask once the device is busy.
    """
    asked, asserted = [], []
    checks = {"meta": lambda targets, vocab: asked.append((targets.shape, vocab)) or serves}
    monkeypatch.setattr(ops, "TARGET_CHECKS", checks)
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: asserted.append(message))
    tokens = dense_tokens(torch.empty(12, dtype=torch.int64, device="meta"), 31, [0, 3, 6, 9, 12], [0, 2, 4])
    assert asked == []
    tokens.check()
    assert asked == [((12,), 31)]
    assert asserted == ([] if serves else ["a target is out of range, expected [0, 31) or -100"])


def test_a_gpu_that_is_too_old_gets_no_kernel(emulator, monkeypatch):
    targets = torch.tensor([1, 2])
    assert registry.named_check(targets, 5)
    monkeypatch.setattr(registry, "why_too_old", lambda backend, device: "too old")
    monkeypatch.setattr(emulator, "check_targets", None)
    assert not registry.named_check(targets, 5)
