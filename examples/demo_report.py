"""The demo's one table and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(console: Console, models: dict[str, Any], head: dict[str, Any], title: str) -> None:
    """One table: a row per model, then a row per head."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("held-out\nperplexity", "truth beats\nother texts", "truth beats\ntruncations"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("head\ntime", "head\nmemory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, s in models.items():
        table.add_row(name, f"{s.perplexity:.2f}", f"{s.batch_wins:.1%}", f"{s.truncation_wins:.1%}", "", "")
    table.add_section()
    for name, cost in head.items():
        cells = [f"{1e3 * cost.seconds:.0f} ms", f"{cost.peak_bytes / 2**20:.0f} MiB"]
        table.add_row(f"head, {name}", "", "", "", *cells)
    console.print(table)


def write_curves(path: Path, pretraining: Any, branches: dict[str, Any], chance: float) -> None:
    """Held-out perplexity and ranking against training steps, as ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    panels = (
        ("perplexity", "held-out perplexity", 1.0),
        ("batch_wins", "truth beats other texts (%)", 100.0),
        ("truncation_wins", "truth beats truncations (%)", 100.0),
    )
    colors = {"MLE": "tab:blue", "CPO": "tab:orange"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    switch = pretraining.steps[-1]
    for axis, (name, label, factor) in zip(axes, panels, strict=True):
        values = [factor * getattr(s, name) for s in pretraining.scores]
        axis.plot(pretraining.steps, values, color="0.35", marker="o", markersize=3, label="MLE from scratch")
        for title, curve in branches.items():
            values = [factor * getattr(s, name) for s in curve.scores]
            steps = [switch + step for step in curve.steps]
            axis.plot(steps, values, color=colors[title], marker="o", markersize=3, label=f"continued with {title}")
        axis.axvline(switch, color="0.7", linestyle=":", linewidth=1)
        axis.set_xlabel("optimizer step")
        axis.set_title(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:.0f}")
    axes[0].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    for axis in axes[1:]:
        axis.axhline(100 * chance, color="0.6", linestyle="--", linewidth=1, label="chance")
        axis.set_ylim(0, 100)
    axes[0].legend()
    axes[1].legend()
    figure.savefig(path, dpi=140)
    plt.close(figure)
