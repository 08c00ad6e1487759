"""The model behind docs/gpu.md: by hand, by what must be true of any such model, and by the engine's own plans."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import cpo_kernels
from benchmarks import records
from benchmarks.contestants import OURS
from benchmarks.floor import product_rows
from benchmarks.heads import CEILINGS
from benchmarks.kernels import gpu_page
from benchmarks.kernels.predict import (
    CACHE_SHARE,
    CARDS,
    HEADS,
    LAUNCHES,
    NARROWEST,
    Card,
    card,
    plan_of,
    predict,
    ratios,
)
from benchmarks.records import Part, Record
from benchmarks.shapes import FROZEN, NO_GRAD, TRAINED
from cpo_kernels.kernels import device

pytestmark = pytest.mark.cpu
MODES = (TRAINED, FROZEN, NO_GRAD)
CPU = Card(8e11, 4e10)
N, V, H = 8192, 128256, 4096
PRODUCT, LOGITS, HIDDEN = 2 * N * V * H / 788e12, 2 * N * V / 4.3e12, 2 * N * H / 4.3e12  # seconds of an H200


def test_an_h200_by_hand():
    """Seconds of three products, one read and one write of the logits, five passes over hidden states, and launches."""
    trained, frozen, without = (predict(card("H200"), N, V, H, mode) for mode in MODES)
    assert trained.products == pytest.approx(3 * PRODUCT)
    assert trained.seconds == pytest.approx(3 * PRODUCT + 2 * LOGITS + 5 * HIDDEN + LAUNCHES)
    assert frozen.seconds == pytest.approx(2 * PRODUCT + 2 * LOGITS + 3 * HIDDEN + LAUNCHES)
    assert without.seconds == pytest.approx(PRODUCT + LOGITS / 4 + LAUNCHES)  # all but the last 2,048 rows are hidden
    assert trained.bytes == 2 * N * V + 2 * N * H
    assert without.bytes == 2 * 2 * 2048 * V


def test_float32_logits_are_read_and_their_gradient_is_written_narrower():
    """Half as many words fit the cache, so the second pass is counted as well."""
    found = predict(card("H200"), N, V, H, TRAINED, of_logit=4)
    assert found.seconds == pytest.approx(3 * PRODUCT + (4 + 4 + 2) / 2 * LOGITS + 5 * HIDDEN + LAUNCHES)
    small = predict(card("H200"), N, 65536, H, TRAINED, of_logit=4)
    assert small.seconds - small.products == pytest.approx(6 * N * 65536 / 4.3e12 + 5 * HIDDEN + LAUNCHES)


def test_sums_over_chunks_are_passes_over_the_weight():
    many = 8 * N
    chunks = len(product_rows(plan_of(card("H200"), many, V, H, TRAINED, 2, 2)))
    found = predict(card("H200"), many, V, H, TRAINED)
    passes = 2 * 2 * many * V + 5 * 2 * many * H + (8 * (chunks - 1) + 6) * V * H
    assert chunks > 1
    assert found.seconds - found.products == pytest.approx(passes / 4.3e12 + LAUNCHES)


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("head", HEADS)
def test_more_of_anything_is_never_slower(name, head):
    given = card(name)
    for mode in MODES:
        before = predict(given, N, *HEADS[head], mode)
        assert before.products < before.seconds < 2 * before.products
        for more in ("rate", "bandwidth", "cache_bytes"):
            faster = given._replace(**{more: 2 * getattr(given, more)})
            assert predict(faster, N, *HEADS[head], mode).seconds <= before.seconds
        assert predict(given, N // 2, *HEADS[head], mode).seconds < before.seconds


@pytest.mark.parametrize("name", CARDS)
def test_a_frozen_head_has_two_thirds_of_the_products(name):
    trained, frozen, without = (predict(card(name), N, V, H, mode).products for mode in MODES)
    assert (frozen, without) == (pytest.approx(2 / 3 * trained), pytest.approx(trained / 3))


def test_limits():
    """Without end of rate it is the memory that takes time, and of bandwidth too, the launches."""
    given, endless = card("H100"), float("inf")
    assert predict(given._replace(rate=endless, bandwidth=endless), N, V, H, TRAINED).seconds == LAUNCHES
    few = predict(given, 16, V, H, NO_GRAD).products  # of few rows a product takes as long as to read the weight
    assert few == pytest.approx(2 * V * H / given.bandwidth, rel=1e-2)
    assert few < predict(given._replace(bandwidth=given.bandwidth / 2), 16, V, H, NO_GRAD).products


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "rows"), [(2, 2048), (2, 8192), (4, 4096)])
def test_the_plan_is_the_engines(mode, size, rows):
    """On the CPU, whose products are torch's here, so that they need no workspace."""
    dtype, width, vocab = {2: torch.bfloat16, 4: torch.float32}[size], 8, 50257
    hidden = torch.zeros(rows // 512, 4, 128, width, dtype=dtype, requires_grad=mode != NO_GRAD)
    weight = torch.zeros(vocab, width, dtype=dtype, requires_grad=mode == TRAINED)
    targets = torch.zeros(hidden.shape[:3], dtype=torch.int64)
    engines = cpo_kernels.plan(hidden, weight, targets, backend="torch")
    own = plan_of(CPU, rows, vocab, width, mode, size, size)
    assert product_rows(own) == product_rows(engines)
    assert own.bytes == engines.bytes


@pytest.mark.parametrize("name", CARDS)
def test_the_default_budget_is_that_of_the_device(monkeypatch, name):
    given = card(name)
    monkeypatch.setattr(device, "count_gpus", lambda: 1)
    properties = SimpleNamespace(total_memory=given.memory_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    limit, rows = device.default_logits_bytes(torch.device("cuda"), of_weight=False) // (2 * V), 100 * 512
    assert product_rows(plan_of(given, rows, V, 1, FROZEN, 2, 2))[0] == math.ceil(rows / math.ceil(rows / limit))


def test_the_cache_is_that_of_the_kernel():
    unit = pytest.importorskip("cpo_kernels.kernels.triton.unit")
    assert CACHE_SHARE == unit.CACHE_SHARE
    for name, (vocab, _) in ((name, head) for name in CARDS for head in HEADS.values()):
        given = card(name)
        under_way = unit.rows_under_way(2 * vocab, given.multiprocessors, given.cache_bytes)
        fits = under_way * 2 * vocab <= CACHE_SHARE * given.cache_bytes
        found = predict(given, N, vocab, H, FROZEN)
        passes = (found.seconds - found.products - LAUNCHES) * given.bandwidth / (2 * N * vocab)
        assert round(passes) == (2 if fits else 3)


# What was measured


def cpu_results(factor: float) -> records.Parts:
    """A CPU that takes `factor` times what the model predicts, and calls that are not to count."""
    rates = [
        Record(CEILINGS, "our product", {"tflops": 0.8}, {"dtype": "bfloat16"}),
        Record(CEILINGS, "copy", {"gbs": 40}),
    ]
    seconds = factor * predict(CPU, 512, 50257, 768, TRAINED).seconds
    sizes = {"V": 50257, "H": 768, "N": 1024, "dtype": "bfloat16", "prompt": 0.5, "mode": TRAINED}
    calls = [
        Record("half prompt", OURS, {"seconds": seconds}, sizes),
        Record("few tokens", OURS, {"seconds": 9.0}, sizes, "few tokens"),
        Record("narrow", OURS, {"seconds": 9.0}, sizes | {"H": NARROWEST - 1}),
        Record("half prompt", "eager", {"seconds": 9.0}, sizes),
    ]
    return {"heads": Part("heads", {}, [*rates, *calls])}


def test_the_band_is_measured_over_predicted():
    assert ratios(cpu_results(1.25)) == [pytest.approx(1.25)]
    assert len(ratios(cpu_results(1.25), 0)) == 2
    assert gpu_page.band(cpu_results(1.25)) == "1.25 to 1.25 (median 1.25, 1 calls)"


def test_what_a_gpu_has_measured_appears_beside_its_prediction(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_page, "RESULTS", tmp_path)
    sizes = {"V": V, "H": H, "N": N, "dtype": "bfloat16", "prompt": 0.0, "mode": TRAINED, "work": "cpo"}

    def column(gpu: str) -> list[str]:
        part = Part("gpu", {"gpu": {"name": gpu}}, [Record("llama3 8k bf16", OURS, {"seconds": 0.03456}, sizes)])
        records.save({"gpu": part}, tmp_path / "x.json")
        rows = gpu_page.predicted(cpu_results(1.0), "H200", TRAINED).splitlines()[2:]
        return [row.strip("|").split("|")[-1].strip() for row in rows]

    assert column("NVIDIA H200") == ["34.6" if head == "Llama 3 8B" else "" for head in HEADS]
    assert set(column("NVIDIA GH200 480GB")) == {""}
    assert "34.6" not in gpu_page.predicted(cpu_results(1.0), "H200", TRAINED, "8192", "4")
