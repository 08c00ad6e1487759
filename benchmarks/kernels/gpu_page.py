"""Makes the tables of docs/gpu.md, which `python -m benchmarks.publish` writes: predictions, and what was measured."""

from __future__ import annotations

import re
import statistics

from benchmarks import records
from benchmarks.contestants import OURS, OURS_FP32_LOGITS
from benchmarks.environment import RESULTS
from benchmarks.kernels.predict import CARDS, HEADS, NARROWEST, card, predict, ratios
from benchmarks.records import Parts
from benchmarks.shapes import CPO, TRAINED
from benchmarks.tables import markdown


def band(parts: Parts, narrowest: str = str(NARROWEST)) -> str:
    """Say how far measured times are from predicted ones."""
    own = ratios(parts, int(narrowest))
    return f"{min(own):.2f} to {max(own):.2f} (median {statistics.median(own):.2f}, {len(own)} calls)"


def predicted(parts: Parts, name: str, mode: str, rows: str = "8192", of_logit: str = "2") -> str:
    """Return a row a head: what a card is predicted to take in bfloat16, and what some result file says it took."""
    own, table = ratios(parts), []
    for title, (vocab, hidden) in HEADS.items():
        found = predict(card(name), int(rows), vocab, hidden, mode, of_logit=int(of_logit))
        times = [f"{1e3 * found.seconds * factor:.1f}" for factor in (1, min(own), max(own))]
        figures = f"{1e3 * found.products:.1f}", times[0], f"{found.seconds / found.products:.3f}"
        ours, sizes = OURS if of_logit == "2" else OURS_FP32_LOGITS, {"V": vocab, "H": hidden, "N": int(rows)}
        measured = measured_on(name, ours, sizes | {"mode": mode})
        table.append([title, *figures, f"{times[1]} to {times[2]}", f"{found.bytes / 2**30:.2f}", measured])
    return markdown(["", "products, ms", "predicted, ms", "of products", "band, ms", "GiB", "measured, ms"], table)


def measured_on(name: str, ours: str, sizes: dict[str, object]) -> str:
    """Return milliseconds of a call on a card, of the first result file that has them; nothing where none has."""
    for part in (part for path in sorted(RESULTS.glob("*.json")) for part in records.load(path).values()):
        if re.search(rf"\b{name}\b", part.environment.get("gpu", {}).get("name", "")):
            for found in part.select(ours, having="seconds", dtype="bfloat16", work=CPO, prompt=0.0, **sizes):
                return f"{1e3 * found.values['seconds']:.1f}"
    return ""


def everywhere(parts: Parts) -> str:
    """Return the rates of every card, and predictions of loss and gradients of every head, with their band."""
    cards, own_band = [card(name) for name in CARDS], ratios(parts)
    table = [["products, TFLOP/s", *(f"{own.rate / 1e12:.0f}" for own in cards)]]
    table += [["bandwidth, TB/s", *(f"{own.bandwidth / 1e12:.2f}" for own in cards)]]
    for title, sizes in HEADS.items():
        found = [1e3 * predict(own, 8192, *sizes, TRAINED).seconds for own in cards]
        low, high = min(own_band), max(own_band)
        table.append([f"{title}, ms", *(f"{ms:.1f} ({ms * low:.1f} to {ms * high:.1f})" for ms in found)])
    return markdown(["", *CARDS], table)
