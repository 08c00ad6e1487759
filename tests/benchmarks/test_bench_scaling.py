"""The cost model: terms that are known exactly, and how they grow."""

from __future__ import annotations

import pytest

from benchmarks import scaling
from benchmarks.contestants import OURS
from benchmarks.records import Part, Record
from benchmarks.scaling import H200, LLAMA_70B, Machine, Step

pytestmark = pytest.mark.cpu

# A second for 1e12 FLOPs, for 1e9 bytes of memory, for 1e8 bytes within a node of 4 and for 1e7 bytes out of it.
TOY = Machine("toy", 1e12, 1e9, 1e12, 1e8, 1e7, 4)


def test_a_head_is_three_products_and_three_passes():
    flops, logits = 3 * 2 * 1000 * 500 * 200, 1000 * 500 * 2
    assert scaling.head_seconds(TOY, 1000, 500, 200, 2) == pytest.approx(flops / 1e12 + 3 * logits / 1e9)
    frozen = scaling.head_seconds(TOY, 1000, 500, 200, 2, "frozen")
    assert frozen == pytest.approx(flops / 1e12 * 2 / 3 + 3 * logits / 1e9)
    assert scaling.head_seconds(TOY, 1000, 500, 200, 2, "no_grad") == pytest.approx(flops / 3e12 + logits / 1e9)


def test_collectives_take_the_bytes_of_a_ring():
    assert scaling.all_reduce_seconds(TOY, 1e8, 1) == 0
    assert scaling.all_reduce_seconds(TOY, 1e8, 4) == pytest.approx(2 * 3 / 4)
    # Between 2 nodes, each of the 4 devices reduces its quarter with its peer.
    assert scaling.all_reduce_seconds(TOY, 1e8, 8) == pytest.approx(2 * 3 / 4 + 2 * 1 / 2 * 0.25e8 / 1e7)
    assert scaling.all_gather_seconds(TOY, 1e8, 8) == pytest.approx(scaling.all_reduce_seconds(TOY, 1e8, 8) / 2)


def test_all_layouts_do_the_same_products():
    for devices in scaling.DEVICES:
        whole, sharded, vocabulary = scaling.head_costs(H200, LLAMA_70B, Step(), devices)
        assert whole.work == sharded.work == pytest.approx(vocabulary.work)


def test_states_are_sharded_as_each_layout_says():
    few, many = (scaling.head_costs(H200, LLAMA_70B, Step(), devices) for devices in (8, 1024))
    assert few[0].memory == many[0].memory
    states = scaling.STATE_BYTES * LLAMA_70B.head
    assert few[1].memory - many[1].memory == pytest.approx(states / 8 - states / 1024)
    assert few[2].memory == many[2].memory  # a node holds a head, however many nodes there are


def test_vocabulary_shards_of_a_node_reduce_their_gradients_over_the_network_only():
    one, two = (scaling.head_costs(H200, LLAMA_70B, Step(), devices)[2] for devices in (8, 16))
    shard = scaling.WEIGHT_BYTES * LLAMA_70B.head / 8
    assert two.communication - one.communication == pytest.approx(2 * 1 / 2 * shard / H200.network)


def test_seventy_billion_parameters():
    assert LLAMA_70B.body + 2 * LLAMA_70B.head == pytest.approx(70.55e9)
    eight, sixteen = (scaling.body_cost(H200, LLAMA_70B, Step(), devices) for devices in (8, 16))
    assert eight.memory > H200.capacity > sixteen.memory
    rows = [line for line in scaling.predictions().splitlines() if line.split()[1] == "8"]
    assert len(rows) == 3 and all(row.endswith(" no |") for row in rows)


def heads(*extra: Record) -> Part:
    ceilings = [
        Record("ceilings", "torch.mm float32", {"tflops": 1.0}),
        Record("ceilings", "our product float32", {"tflops": 2.0}),
        Record("ceilings", "copy", {"gbs": 10.0}),
    ]
    return Part("heads", {}, [*ceilings, *extra])


def test_measured_points_are_predicted_from_the_best_ceiling_and_the_rows_that_predict():
    sizes = {"V": 500, "H": 200, "N": 1000, "dtype": "float32", "prompt": 0.5, "mode": "frozen", "work": "cpo"}
    part = heads(Record("a case", OURS, {"seconds": 1.0}, sizes))
    (point,) = scaling.points({"heads": part})
    machine = Machine("", 2e12, 10e9)
    assert point.predicted == pytest.approx(scaling.head_seconds(machine, 500, 500, 200, 4, "frozen"))
    assert point.measured == 1.0 and "a case" in point.case


def test_no_prediction_without_a_ceiling_of_the_dtype_or_for_another_loss():
    sizes = {"V": 500, "H": 200, "N": 1000, "dtype": "bfloat16"}
    other = {**sizes, "dtype": "float32", "work": "dpo"}
    part = heads(Record("bf16", OURS, {"seconds": 1.0}, sizes), Record("dpo", OURS, {"seconds": 1.0}, other))
    assert list(scaling.points({"heads": part})) == []
    assert list(scaling.points({})) == []


def test_a_peak_is_the_logits_or_the_budget():
    sizes = {"V": 1024, "dtype": "bfloat16"}
    curve = [Record("N", OURS, {"peak_mib": 3.0}, sizes | {"N": n}) for n in (1024, 2**20)]
    few, many = scaling.memory_points({"growth": Part("growth", {}, curve)})
    assert (few.predicted, many.predicted, few.measured) == (2.0, 256.0, 3.0)
