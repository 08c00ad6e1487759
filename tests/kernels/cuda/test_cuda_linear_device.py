"""The fused linear path on a Hopper GPU: accuracy at sizes beyond the emulator's, repeats, streams, graphs."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICE
from linear_cases import case, check_gradient, coefs
from row_kernels import HEADS
from row_kernels import NARROW as DTYPES

from cpo_kernels.kernels.cuda import extension as cuda_extension
from cpo_kernels.kernels.cuda.hopper import CAPABILITY


def available() -> bool:
    found = DEVICE.type == "cuda" and cuda_extension.unavailable_reason() is None
    return found and torch.cuda.get_device_capability(DEVICE) == CAPABILITY


pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not available(), reason="needs a Hopper GPU and the CUDA extension"),
]
REPEATS = 1000


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(dtype, head):
    V = 5003
    check_gradient(case(dtype, R=700, V=V, H=1032, head=head(V)))
    check_gradient(case(dtype, V=V, H=72, counts=[1, 3, 0, 70, 2] * 30, head=head(V)))


def test_a_vocabulary_of_many_tiles_and_a_batch_of_many_rows():
    check_gradient(case(R=3, V=128256, H=256))
    check_gradient(case(R=20000, V=257, H=64))


def test_repeats_are_bitwise_equal():
    c = case(R=300, V=5003, H=520)
    coef = coefs(c)
    stats, logps = c.run()
    grad = c.gradient(coef).clone()
    for _ in range(REPEATS):
        again = *c.run(), c.gradient(coef)
        assert all(torch.equal(a, b) for a, b in zip(again, (stats, logps, grad), strict=True))


def test_two_streams_at_once():
    cases = [case(R=300, V=5003, H=520), case(R=65, V=70001, H=64)]
    expected = [c.run() for c in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    found = []
    for _ in range(20):
        for c, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(c.run())
    torch.cuda.synchronize()
    for i, results in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(results, expected[i % 2], strict=True))


def test_a_graph_replays_on_new_numbers():
    c = case(R=300, V=5003, H=520)
    c.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = c.run()
    c.hidden.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, c.run(), strict=True))
