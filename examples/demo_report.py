"""The demo's tables and its picture."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_scores import KINDS, Scores
from rich import box
from rich.console import Console
from rich.table import Table

from cpo_kernels.trainer.evaluation import GenerationStatistics

BEATEN = {
    "batch": "other\ntexts",
    "truncation": "trunca-\ntions",
    "mean_field": "mean-\nfield",
    "autoregressive": "auto-\nregr.",
}
COLORS = {
    "all kinds": "tab:orange",
    "MLE": "tab:blue",
    "batch": "tab:green",
    "truncation": "tab:red",
    "mean-field": "tab:purple",
    "autoregressive": "tab:brown",
}
LEAST_SPAN = 25.0  # percentage points on an axis, so that chance does not look like a result


@dataclass(frozen=True)
class Row:
    """What is told of a model: seconds of a step, the same over those of MLE, scores, and its generations."""

    seconds: float | None = None
    times_mle: float | None = None
    scores: Scores | None = None
    generated: GenerationStatistics | None = None

    @property
    def cells(self) -> list[str]:
        """One text a column."""
        cells = ["" if self.seconds is None else f"{1e3 * self.seconds:.0f}"]
        cells.append("" if self.times_mle is None else f"{self.times_mle:.2f}")
        cells.append("" if self.scores is None else f"{self.scores.perplexity:.1f}")
        wins = {} if self.scores is None else self.scores.wins
        cells += [f"{wins[kind]:.0%}" if kind in wins else "" for kind in KINDS]
        if self.generated is not None:
            cells += [f"{self.generated.mean_length:.0f}", f"{self.generated.repetition[2]:.1%}"]
        return cells


def print_rows(console: Console, rows: dict[str, Row], title: str, sections: Collection[str]) -> None:
    """A row per model; ``sections`` end with the rows named."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0))
    table.add_column("", no_wrap=True)
    headings = ["ms\na\nstep", "times\nMLE", "held-out\nperplex-\nity", *(f"beats\n{BEATEN[kind]}" for kind in KINDS)]
    for heading in (*headings, "sample\nlength", "sample\nrepeats"):
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for name, row in rows.items():
        table.add_row(name, *row.cells, end_section=name in sections)
    console.print(table)


def print_head(console: Console, head: dict[str, Any]) -> None:
    """A row per implementation of the head."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("time", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, cost in head.items():
        table.add_row(f"head, {name}", f"{1e3 * cost.seconds:.0f} ms", f"{cost.peak_bytes / 2**20:.0f} MiB")
    console.print(table)


def write_curves(path: Path, curves: dict[str, Any], scratch: str, chance: float) -> None:
    """Held-out perplexity of the run from scratch, and all scores of the others, as ``path``.

    Args:
        path: a PNG file.
        curves: by name.
        scratch: the name of the run from scratch.
        chance: of the truth against its negatives.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    first, *panels = axes.flat
    others = {name: curve for name, curve in curves.items() if name != scratch}
    _draw(first, {scratch: curves[scratch]}, None)
    first.set_title("held-out perplexity, MLE from scratch")
    first.set_yscale("log")
    first.yaxis.set_major_formatter("{x:.0f}")
    first.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    for axis, kind in zip(panels, (None, *KINDS), strict=True):
        _draw(axis, others, kind)
        if kind is None:
            axis.set_title("held-out perplexity, continued")
        else:
            axis.set_title(f"truth beats {kind.replace('_', '-')} negatives (%)")
            axis.axhline(100 * chance, color="0.6", linestyle="--", linewidth=1)
            axis.annotate("chance", (1, 100 * chance), xycoords=("axes fraction", "data"), ha="right", va="bottom")
            low, high = axis.get_ylim()
            short = max(0.0, (LEAST_SPAN - (high - low)) / 2)
            axis.set_ylim(low - short, high + short)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(others))
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _draw(axis: Any, curves: dict[str, Any], kind: str | None) -> None:
    """One line a run: its perplexity, or how often the truth beats negatives of a kind."""
    for name, curve in curves.items():
        values = [s.perplexity if kind is None else 100 * s.wins[kind] for s in curve.scores]
        axis.plot(curve.steps, values, label=name, color=COLORS.get(name, "0.35"), marker="o", markersize=3)
    axis.set_xlabel("optimizer step")
    axis.grid(alpha=0.3)
