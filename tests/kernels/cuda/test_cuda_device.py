"""What only a GPU shows: graphs, streams, several devices, no synchronisation, assertions on the device.

The default device stays the CPU here, so that a tensor that the library makes without saying where is noticed.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from devices import DEVICE
from problems import (
    PROBLEMS,
    Problem,
    assert_problem_accurate,
    fused_loss,
    loss_and_grads,
    packed_problem,
    random_problem,
)

from cpo_kernels import linear_cpo_loss, linear_sequence_logps, token_logps
from cpo_kernels.kernels import registry
from cpo_kernels.kernels.cuda import extension as cuda_extension
from cpo_kernels.kernels.cuda import hopper as cuda_hopper
from cpo_kernels.kernels.device import architecture
from cpo_kernels.kernels.selection import OPTIONAL, Choice, overridden
from cpo_kernels.kernels.triton import support as triton_support

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.cpu,
    pytest.mark.skipif(triton_support.unavailable_reason() is not None, reason="needs the Triton backend"),
]
REPEATS = 1000
V, H = 1009, 64
# Backend, and the optional operation that is chosen.
PATHS = {"auto": ("auto", None), "cuda": ("cuda", None), "kept exponentials": ("cuda", "linear_kept")}


@pytest.fixture(params=PATHS)
def path(request):
    """The backend of the loss for one way through the engine, as an option."""
    backend, operation = PATHS[request.param]
    if backend == "cuda" and cuda_extension.unavailable_reason() is not None:
        pytest.skip(str(cuda_extension.unavailable_reason()))
    if operation == "linear_kept" and cuda_extension.capability(DEVICE) != cuda_hopper.CAPABILITY:
        pytest.skip("needs a Hopper GPU")
    chosen = [] if operation is None else [Choice(operation, architecture(DEVICE), backend)]
    assert {choice.operation for choice in chosen} <= set(OPTIONAL)
    with nullcontext() if backend == "auto" else overridden(*chosen):  # auto has the committed choices
        yield {"backend": backend}


def moved(problem: Problem, device: torch.device | str) -> Problem:
    """The same problem on another device; its leaves are made by ``to`` afterwards."""
    tensors = ("hidden", "weight", "targets", "bias", "ref_logps", "ranks")
    there = {name: getattr(problem, name) for name in tensors}
    layout = problem.layout
    if layout is not None and layout.rows is not None:
        layout = replace(layout, rows=layout.rows.to(device))
    there = {name: None if tensor is None else tensor.to(device) for name, tensor in there.items()}
    return replace(problem, layout=layout, **there)


def on_gpu(problem: Problem, dtype: torch.dtype = torch.float32) -> Problem:
    return moved(problem, DEVICE).to(dtype)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Float32 products in float32, whatever a user's environment says."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("name", PROBLEMS)
def test_triton_equals_the_reference(name):
    problem = on_gpu(PROBLEMS[name]())
    expected = loss_and_grads(fused_loss(problem, backend="torch"), problem)
    found = loss_and_grads(fused_loss(problem, backend="triton"), problem)
    for key, value in expected.items():
        assert found[key].device == value.device
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def test_every_output_is_on_the_device():
    for problem in (random_problem(bias=True), packed_problem(bias=True)):
        problem = on_gpu(problem)
        out = linear_cpo_loss(**problem.arguments(), **problem.options)
        assert all(value.device == problem.hidden.device for value in out)


def test_importing_the_package_makes_no_cuda_context():
    """Or processes could not be forked after it."""
    code = "import torch, cpo_kernels; cpo_kernels.backends.available(); assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)


def test_auto_is_a_backend_of_the_gpu():
    assert registry.select("auto", torch.device(DEVICE), torch.bfloat16).name != "cpu"


# CUDA graphs and synchronisation


def padded_step(tensors: dict[str, torch.Tensor], **options):
    """Loss and gradients of the padded form without a look at any value on the host."""
    options = {"mle_weight": 0.2, "beta": 0.3, **options}
    loss = linear_cpo_loss(**tensors, skip_absent_rows=False, **options).loss
    return loss.detach(), *torch.autograd.grad(loss, (tensors["hidden"], tensors["weight"]))


def padded_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    problem = on_gpu(random_problem(G=4, C=3, T=6, H=H, V=V), dtype)
    return {name: getattr(problem, name) for name in ("hidden", "weight", "targets", "ref_logps")}


def fill(tensors: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)


@pytest.mark.parametrize("budget_rows", [None, 20], ids=["one_chunk", "several_chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_graph_replays_on_new_data(path, dtype, budget_rows):
    """Other numbers and other absent tokens in the same memory: what the eager call gives for them."""
    options = path | {"max_logits_bytes": None if budget_rows is None else budget_rows * (V + 47) * dtype.itemsize}
    static = padded_tensors(dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            padded_step(static, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = padded_step(static, **options)
    for seed in range(3):
        torch.manual_seed(seed + 1)
        values = padded_tensors(dtype)
        values["targets"][seed, 1, seed + 1 :] = -100
        expected = padded_step(values, **options)
        fill(static, values)
        for result in captured:
            result.fill_(torch.nan)
        graph.replay()
        for result, wanted in zip(captured, expected, strict=True):
            torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_form_waits_for_nothing(path, dtype):
    tensors = padded_tensors(dtype)
    expected = padded_step(tensors, **path)  # compiles the kernels, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = padded_step(tensors, **path)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result, wanted in zip(found, expected, strict=True):
        assert torch.equal(result, wanted)


def test_the_debug_mode_would_notice_a_wait():
    tensor = torch.ones(3, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            tensor.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_dense_rows_give_the_same_loss_and_gradients(path):
    problem = on_gpu(random_problem(G=4, C=3, T=6, H=H, V=V))
    expected = loss_and_grads(fused_loss(problem, **path), problem)
    found = loss_and_grads(fused_loss(problem, skip_absent_rows=False, **path), problem)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


# Streams and devices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_streams_at_once(path, dtype):
    """Each stream's results are those of its problem alone, bit by bit."""
    problems = [on_gpu(random_problem(G=8, C=3, T=32, H=H, V=50257), dtype) for _ in range(2)]
    expected = [loss_and_grads(fused_loss(p, **path), p) for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    found: list[list[dict[str, torch.Tensor]]] = [[], []]
    for _ in range(10):
        for problem, stream, results in zip(problems, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(loss_and_grads(fused_loss(problem, **path), problem))
    torch.cuda.synchronize()
    for results, wanted in zip(found, expected, strict=True):
        for result in results:
            for name, value in wanted.items():
                assert torch.equal(result[name], value), name


@pytest.mark.skipif(DEVICE.type != "cuda" or torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_device_that_is_not_the_current_one():
    problem = random_problem(bias=True, H=H, V=V)
    first, second = (moved(problem, f"cuda:{index}").to(torch.float32) for index in (0, 1))
    with torch.cuda.device(0):
        expected, found = (loss_and_grads(fused_loss(p), p) for p in (first, second))
        assert torch.cuda.current_device() == 0
    for name, value in expected.items():
        assert found[name].device == torch.device("cuda:1")
        torch.testing.assert_close(found[name].to("cuda:0"), value)


# Accuracy of the ways through the engine, at sizes beyond the emulator's


@pytest.mark.parametrize("rows", [None, 300], ids=["one_chunk", "several_chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients(path, dtype, rows):
    problem = moved(random_problem(G=12, C=3, T=40, H=520, V=5003), DEVICE)
    head = path | {"max_logits_bytes": None if rows is None else rows * 5100 * dtype.itemsize}
    problem = replace(problem, weight=problem.weight / 8)
    assert_problem_accurate(problem, dtype, **head)


# Races would show as other bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_gives_the_same_bits_again_and_again(path, dtype):
    problem = on_gpu(random_problem(G=8, C=4, T=32, H=H, V=5003), dtype)
    expected = loss_and_grads(fused_loss(problem, **path), problem)
    different = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for _ in range(REPEATS // 4):
        again = loss_and_grads(fused_loss(problem, **path), problem)
        for name, value in expected.items():
            different |= (again[name] != value).any()
    assert not different


@pytest.mark.parametrize("shared", [False, True], ids=["own_rows", "shared_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_kernels_give_the_same_bits_a_thousand_times(dtype, shared):
    R, vocab = 96, 50257
    rows = registry.BACKENDS["triton"].rows
    logits = (3 * torch.randn(R, vocab, device=DEVICE)).to(dtype)
    counts = torch.arange(R) % 4 if shared else torch.ones(R, dtype=torch.int64)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(DEVICE) if shared else None
    N = int(counts.sum())
    targets, coef = torch.randint(0, vocab, (N,), device=DEVICE), torch.randn(N, device=DEVICE)
    head = (None, 0.7, 30.0, 1.3)
    stats, logps = rows.forward(logits, targets, starts, *head)
    expected = rows.backward(logits, targets, starts, stats, coef, *head)
    different = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for _ in range(REPEATS):
        again = rows.forward(logits, targets, starts, *head)
        in_place = logits.clone()
        rows.backward_(in_place, targets, starts, stats, coef, *head)
        different |= (again[0] != stats).any() | (again[1] != logps).any() | (in_place != expected).any()
    assert not different


@pytest.mark.parametrize("num_samples", [0, 1, 6], ids=["plain", "sample_and_entropy", "some_of_six_samples"])
def test_fused_linear_gives_the_same_bits_again(num_samples):
    linear_forward = registry.BACKENDS["triton"].linear_statistics
    hidden, weight = (torch.randn(n, 256, device=DEVICE).bfloat16() for n in (300, 50257))
    targets = torch.randint(0, 50257, (300,), device=DEVICE)
    seeds = torch.arange(300 * num_samples, device=DEVICE).view(300, num_samples)
    extras = {"seed": seeds, "wanted": seeds % 3 != 1, "entropy": True} if num_samples else {}
    first = linear_forward(hidden, weight, targets, None, None, 1.0, 0.0, 1.0, **extras)
    different = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for _ in range(100):
        again = linear_forward(hidden, weight, targets, None, None, 1.0, 0.0, 1.0, **extras)
        for a, b in zip(again, first, strict=True):
            if a is not None:
                different |= (a != b).any()
    assert not different


def test_one_call_gives_the_same_bits_again():
    problem = on_gpu(packed_problem(H=H, V=50257), torch.bfloat16)
    expected = loss_and_grads(fused_loss(problem), problem)
    for _ in range(50):
        for name, value in loss_and_grads(fused_loss(problem), problem).items():
            assert torch.equal(value, expected[name]), name


# Errors

BAD_CALLS = {
    "token_logps": "token_logps(torch.randn(6, 31, device='cuda'), targets)",
    "linear_cpo_loss": "linear_cpo_loss(hidden, weight, targets.view(2, 3, 1))",
    "linear_cpo_loss, dense": "linear_cpo_loss(hidden, weight, targets.view(2, 3, 1), skip_absent_rows=False)",
    "linear_token_logps": "linear_token_logps(hidden.view(6, 7), weight, targets)",
}
SCRIPT = """
import torch
from cpo_kernels import linear_cpo_loss, linear_token_logps, token_logps
hidden, weight = torch.randn(2, 3, 1, 7, device="cuda"), torch.randn(31, 7, device="cuda")
targets = torch.tensor([1, 2, {bad}, 4, 5, 6], device="cuda")
{call}
torch.cuda.synchronize()
print("no error")
"""


def run_script(call: str, bad: int) -> subprocess.CompletedProcess[str]:
    """In a process of its own: an assertion on the device ends the CUDA context."""
    code = SCRIPT.format(call=BAD_CALLS[call], bad=bad)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)


@pytest.mark.parametrize("call", BAD_CALLS)
@pytest.mark.parametrize("bad", [31, -1, 2**40])
def test_target_out_of_range_is_an_error(call, bad):
    done = run_script(call, bad)
    assert done.returncode != 0
    assert "no error" not in done.stdout
    assert "target" in done.stderr or "assert" in done.stderr, done.stderr
    if cuda_extension.unavailable_reason() is None or ("dense" not in call and call != "token_logps"):
        said = done.stdout + done.stderr
        assert f"target of token 2 is {bad}, expected [0, 31) or -100" in said, said


@pytest.mark.parametrize("call", BAD_CALLS)
def test_target_in_range_is_none(call):
    """The scripts above fail for their target alone."""
    done = run_script(call, 3)
    assert done.returncode == 0, done.stderr
    assert "no error" in done.stdout


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_sizes_of_zero_never_crash(shape):
    hidden = torch.zeros(*shape, 7, device=DEVICE)
    weight, targets = torch.zeros(31, 7, device=DEVICE), torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    assert linear_sequence_logps(hidden, weight, targets).shape == shape[:2]
    assert token_logps(torch.zeros(*shape, 31, device=DEVICE), targets).shape == shape
    torch.cuda.synchronize()


def test_row_offsets_beyond_32_bits():
    """R * V just above 2^31: the last rows are where 32-bit offsets would wrap around."""
    rows, vocab = 2**31 // 65537 + 2, 65537
    needed = 2 * rows * vocab * 2
    if torch.cuda.mem_get_info()[0] < 3 * needed:
        pytest.skip(f"needs {3 * needed / 2**30:.0f} GiB of free memory")
    logits = torch.randn(rows, vocab, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    triton_rows = registry.BACKENDS["triton"].rows
    head = (None, 1.0, 0.0, 1.0)
    stats, logps = triton_rows.forward(logits, targets, None, *head)
    last = logits[-2:].clone()
    expected = torch.log_softmax(last.double(), -1)
    torch.testing.assert_close(logps[-2:].double(), expected.gather(-1, targets[-2:, None])[:, 0], rtol=1e-5, atol=1e-5)
    triton_rows.backward_(logits, targets, None, stats, torch.ones_like(logps), *head)
    grad = torch.nn.functional.one_hot(targets[-2:], vocab) - expected.exp()
    torch.testing.assert_close(logits[-2:].double(), grad, rtol=1e-2, atol=1e-6)


# Training


def test_training_on_the_gpu_follows_training_on_the_cpu(tmp_path):
    tiny_models = pytest.importorskip("tiny_models")
    from cpo_kernels import CPOConfig, CPOTrainer

    losses = []
    for use_cpu in (True, False):
        config = CPOConfig(
            output_dir=str(tmp_path),
            max_steps=5,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=use_cpu,
            max_length=32,
            num_batch_negatives=2,
            num_truncation_negatives=2,
        )
        data = tiny_models.examples(16)
        run = CPOTrainer(tiny_models.llama(), config, train_dataset=data, processing_class=tiny_models.tokenizer())
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert next(run.model.parameters()).is_cuda
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
