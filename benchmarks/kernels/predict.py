"""Predicts time and memory of a loss on a GPU from its sizes and the card's figures; docs/gpu.md shows what comes out.

Time is that of the products, none of them faster than the memory, then of the passes over logits, hidden states and
sums of the weight's gradient at the bandwidth, and of launches. The same function at a CPU's measured rates, held
against its measured times, says how far off that is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks import records
from benchmarks.contestants import OURS, OURS_FP32_LOGITS
from benchmarks.floor import PRODUCTS, product_rows
from benchmarks.heads import CEILINGS, best_of
from benchmarks.records import Parts
from benchmarks.shapes import NO_GRAD, TRAINED
from cpo_kernels.engine.plan import Plan, make_plan
from cpo_kernels.engine.tokens import find_tokens
from cpo_kernels.engine.ways import BesideTheNextProduct, LinearHead, UnitGradients
from cpo_kernels.kernels.device import DEFAULT_LOGITS_BYTES, gpu_logits_bytes, row_width

# What an H200 reaches of its 989.4 TFLOP/s and 4.8 TB/s; every card is taken to reach the same shares of its own.
RATE_SHARE, BANDWIDTH_SHARE = 788 / 989.4, 4.3 / 4.8
CACHE_SHARE = 0.7  # of the L2 cache, for rows between their two passes: that of the Triton kernel
LAUNCHES = 5 * 10e-6 + 30 * 2.5e-6  # seconds: five operators that the device waits for, thirty behind a product
GROUP, NARROWEST = 512, 768  # rows of a group; the least H that is predicted, and whose calls make up the band
# By data sheet: TFLOP/s of dense bfloat16 products with float32 sums, TB/s, multiprocessors, MiB of L2, GB of memory.
CARDS = {
    "A100": (312, 2.039, 108, 40, 80),
    "L40S": (362, 0.864, 142, 96, 48),
    "RTX 4090": (165.2, 1.008, 128, 72, 24),
    "H100": (989.4, 3.35, 132, 50, 80),
    "H200": (989.4, 4.8, 132, 60, 141),
    "B200": (2250, 8.0, 148, 126, 180),
    "MI300X": (1307.4, 5.3, 304, 4, 192),
}
HEADS = {  # V, H
    **{"GPT-2": (50257, 768), "Llama 3 8B": (128256, 4096), "Llama 3 70B": (128256, 8192), "Phi-4": (100352, 5120)},
    **{"Qwen3 8B": (151936, 4096), "Gemma 3 12B": (262208, 3840), "Mistral 7B": (32768, 4096)},
    "DeepSeek V3": (129280, 7168),
}


class Card(NamedTuple):
    """Operations of products and bytes a second, and what else of a device matters; the defaults are a CPU's."""

    rate: float
    bandwidth: float
    multiprocessors: int = 1
    cache_bytes: int = 0
    memory_bytes: int = 0
    launches: float = 0.0
    sum_bytes: int = 2  # of an element, beside a half-precision gradient that is summed over chunks


def card(name: str) -> Card:
    """Return a GPU by its data sheet."""
    tflops, tbs, multiprocessors, cache_mib, memory_gb = CARDS[name]
    rates, sizes = (1e12 * tflops * RATE_SHARE, 1e12 * tbs * BANDWIDTH_SHARE), (cache_mib * 2**20, memory_gb * 10**9)
    return Card(*rates, multiprocessors, *sizes, LAUNCHES, 2 if name.startswith("MI") else 4)


class Prediction(NamedTuple):
    """Seconds of a call, seconds of its bare products, and bytes beyond inputs and gradients."""

    seconds: float
    products: float
    bytes: int


def predict(on: Card, rows: int, vocab: int, hidden: int, mode: str, size: int = 2, of_logit: int = 0) -> Prediction:
    """Predict a call of rows of one token each; ``of_logit`` are bytes of a logit, 0: as many as of a hidden unit."""
    of_logit = of_logit or size
    plan, products, count = plan_of(on, rows, vocab, hidden, mode, size, of_logit), 0.0, PRODUCTS[mode]
    blocks = product_rows(plan)
    for n in blocks:
        moved = size * hidden * (n + vocab) + of_logit * n * vocab
        products += count * max(2 * n * vocab * hidden / on.rate, moved / on.bandwidth)
    if mode == NO_GRAD:  # one read, of all but the last block beside the next product
        moved = (blocks[-1] if plan.buffers > 1 else rows) * vocab * of_logit
    else:  # one read, or two where the cache is too small, and one write
        cached = on.multiprocessors * vocab * of_logit <= CACHE_SHARE * on.cache_bytes
        moved = rows * vocab * (of_logit * (1 if cached else 2) + size)
    # grad_hidden is zeroed and scaled (3 passes), and a scaled copy of hidden enters the third product (2 more).
    moved += rows * hidden * size * (0, 3, 5)[count - 1]
    if mode == TRAINED and size < 4:  # sums over chunks in float32, rounded at the end
        moved += vocab * hidden * (8 * (len(blocks) - 1) + 6 * (len(blocks) > 1))
    return Prediction(products + moved / on.bandwidth + on.launches, products, plan.bytes)


def plan_of(on: Card, rows: int, vocab: int, hidden: int, mode: str, size: int, of_logit: int) -> Plan:
    """Return the plan that the engine makes on a device with the default budget."""
    ends, trained, gpu = [*range(0, rows, GROUP), rows], mode == TRAINED, on.memory_bytes > 0
    way = (BesideTheNextProduct if mode == NO_GRAD else UnitGradients) if gpu else LinearHead
    return make_plan(
        find_tokens(torch.zeros(rows, dtype=torch.int64), rows, vocab, None, ends, range(len(ends))),
        row_bytes=of_logit * row_width(vocab, torch.device("cuda" if gpu else "cpu")),
        needs=(mode != NO_GRAD, trained, False),
        max_logits_bytes=None,
        default_bytes=gpu_logits_bytes(on.memory_bytes, of_weight=trained) if gpu else DEFAULT_LOGITS_BYTES,
        accumulator_bytes=vocab * hidden * on.sum_bytes if size < 4 else 0,
        gathered_row_bytes=hidden * size if way.scales_hidden and trained else 0,
        waits=trained,
        buffers=way.buffers,
        block_rows=way.block_rows,
    )


def ratios(parts: Parts, narrowest: int = NARROWEST) -> list[float]:
    """Return measured over predicted time of the calls of ours on a CPU, at the rates of the same run."""
    found, rates = list[float](), parts["heads"].select(case=CEILINGS)
    for part in (parts[name] for name in ("heads", "growth") if name in parts):
        own = part.select(case=CEILINGS) or rates
        (bandwidth,) = records.value(own, "gbs")
        for r in part.select(having="seconds"):
            given, ours = r.conditions, r.contestant in (OURS, OURS_FP32_LOGITS)
            if not ours or r.note or given["H"] < narrowest:  # a note: few tokens, for a peer's sake
                continue
            size, rows = 4 if given["dtype"] == "float32" else 2, round(given["N"] * (1 - given.get("prompt", 0)))
            on, of_logit = Card(1e12 * best_of(own)[given["dtype"]], 1e9 * bandwidth), 4 if r.contestant != OURS else 0
            expected = predict(on, rows, given["V"], given["H"], given.get("mode", TRAINED), size, of_logit).seconds
            found.append(r.values["seconds"] / expected)
    return found
