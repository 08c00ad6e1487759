"""``torch.compile(model, fullgraph=True)`` of a body with its loss: the eager numbers, and how often it compiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_models
import torch
from devices import DEVICE
from tolerance import assert_accurate
from torch import Tensor, nn
from torch.testing import assert_close

from cpo_kernels import CandidateLayout, attach_linear_loss
from cpo_kernels.integrations.losses import info_nca
from cpo_kernels.models import CPORequest, LogpsRequest, SequenceLossRequest

B, CANDIDATES, PROMPT = 4, 2, 3
FAMILIES = {
    "gpt2": lambda: tiny_models.gpt2(n_layer=1),
    "llama": lambda: tiny_models.llama(num_hidden_layers=1),
}
Request = CPORequest | SequenceLossRequest | LogpsRequest


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graph of an earlier test."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def make_rows(bucket: int) -> dict[str, Tensor]:
    """Rows of random lengths, padded to the bucket."""
    lengths = torch.randint(PROMPT + 1, bucket + 1, (B, 1))
    positions = torch.arange(bucket)
    ids = torch.randint(3, tiny_models.VOCAB, (B, bucket)).where(positions < lengths, 0)
    return {"input_ids": ids, "attention_mask": (positions < lengths).long()}


def next_tokens(rows: dict[str, Tensor]) -> Tensor:
    """Targets (B, L) of the completions, -100 elsewhere."""
    ids, mask = rows["input_ids"], rows["attention_mask"]
    targets = ids.roll(-1, 1).where(mask.roll(-1, 1) > 0, -100)
    targets[:, : PROMPT - 1] = -100
    targets[:, -1] = -100
    return targets


def padded(targets: Tensor) -> tuple[Tensor, CandidateLayout]:
    """Every position of the bucket is a token, so that boundaries depend on the bucket alone."""
    rows, length = targets.shape
    boundaries = list(range(0, rows * length + 1, length))
    return targets.flatten(), CandidateLayout(boundaries, list(range(0, rows + 1, CANDIDATES)))


def packed(targets: Tensor) -> tuple[Tensor, CandidateLayout]:
    """The tokens that count."""
    present = targets != -100
    boundaries = [0, *present.sum(1).cumsum(0).tolist()]
    groups = list(range(0, len(targets) + 1, CANDIDATES))
    return targets[present], CandidateLayout(boundaries, groups, rows=present.flatten().nonzero().squeeze(1))


def cpo(targets: Tensor, layout: CandidateLayout) -> Request:
    return CPORequest(targets, layout, ref_logps=-20 + torch.randn(B), beta=0.3, mle_weight=0.2)


def any_loss(targets: Tensor, layout: CandidateLayout) -> Request:
    rewards = torch.randn(B // CANDIDATES, CANDIDATES)
    return SequenceLossRequest(targets, layout, info_nca(-20 + torch.randn_like(rewards), rewards))


def log_likelihoods(targets: Tensor, layout: CandidateLayout) -> Request:
    return LogpsRequest(targets, layout)


def step(model: Callable, parameters: list[nn.Parameter], rows: dict[str, Tensor], request: Request) -> list[Tensor]:
    """The loss, or the log-likelihoods, and the gradients of all parameters."""
    out = model(**rows, linear_loss=request)
    value = out.logps.square().mean() if out.loss is None else out.loss
    return [value.detach(), *torch.autograd.grad(value, parameters)]


def graphs() -> int:
    """How many have been compiled since the last time."""
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.utils.counters.clear()
    return count


def assert_compiled_equals_eager(
    model: nn.Module, compiled: Callable, rows: dict[str, Tensor], request: Request
) -> None:
    parameters = list(model.parameters())
    eager, other = (step(call, parameters, rows, request) for call in (model, compiled))
    assert any(grad.any() for grad in eager[1:])
    assert_close(other, eager)


@pytest.mark.parametrize(("family", "request_for"), [("gpt2", cpo), ("llama", any_loss)], ids=["gpt2", "llama"])
def test_lengths_within_a_bucket_compile_nothing_anew(family, request_for):
    """And buckets of other sizes once for all of them."""
    model = attach_linear_loss(FAMILIES[family]())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiles = []
    for bucket in (12, 12, 12, 16, 16, 20, 24):
        rows = make_rows(bucket)
        assert_compiled_equals_eager(model, compiled, rows, request_for(*padded(next_tokens(rows))))
        compiles.append(graphs())
    assert compiles == [1, 0, 0, 1, 0, 0, 0]


def test_no_recompile_is_asked_for():
    """By torch's own switch, which raises at the first one."""
    model = attach_linear_loss(FAMILIES["llama"]())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            rows = make_rows(12)
            assert_compiled_equals_eager(model, compiled, rows, log_likelihoods(*padded(next_tokens(rows))))
        rows = make_rows(16)
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(**rows, linear_loss=log_likelihoods(*padded(next_tokens(rows))))


def test_boundaries_of_packed_tokens_compile_twice():
    """The second time for any boundaries, as symbols."""
    model = attach_linear_loss(FAMILIES["gpt2"]())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiles = []
    for _ in range(5):
        rows = make_rows(16)
        assert_compiled_equals_eager(model, compiled, rows, cpo(*packed(next_tokens(rows))))
        compiles.append(graphs())
    assert compiles == [1, 1, 0, 0, 0]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_with_activation_checkpointing_and_autocast():
    """As close to float64 as eager autocast: torch's own compiled bodies round elsewhere than its eager ones."""
    model = attach_linear_loss(FAMILIES["llama"]()).train()
    exact = attach_linear_loss(FAMILIES["llama"]()).double().train()
    exact.load_state_dict(model.state_dict())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        rows = make_rows(12)
        request = cpo(*padded(next_tokens(rows)))
        oracle = step(exact, list(exact.parameters()), rows, request)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            eager, other = (step(call, list(model.parameters()), rows, request) for call in (model, compiled))
        assert any(grad.any() for grad in eager[1:])
        for index, results in enumerate(zip(other, eager, oracle, strict=True)):
            assert_accurate(*results, name=f"result {index}")
    assert graphs() == 1
