"""Draws the pictures of a report: log axes, every line and mark labelled, the floor drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contestants import OURS
from benchmarks.records import Part, Parts, Record

# One colour and one marker a contestant in all pictures; ours stands out, floors are grey.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#8c564b", "#7f5fb0", "#b5bd00", "#17becf", "#555555")
MARKERS = "svD^<>phX"  # one fewer than colours, so that no pair comes twice
OUR_COLOUR, FLOOR_COLOUR = "#d62728", "#999999"
WIDTH = 9.0  # inches


class Style:
    """Holds colours and markers by name of a contestant, the same in every picture."""

    def __init__(self, parts: Parts) -> None:
        everyone = [r.contestant for name in ("heads", "growth") if name in parts for r in parts[name].records]
        self.peers = [name for name in dict.fromkeys(everyone) if not name.startswith(("cpo-kernels", "floor"))]

    def marks(self, name: str) -> dict[str, object]:
        """Return colour and marker of a contestant."""
        if name.startswith("floor"):
            return {"color": FLOOR_COLOUR, "marker": "_"}
        if name.startswith("cpo-kernels"):
            return {"color": OUR_COLOUR, "marker": "o"}
        index = self.peers.index(name) if name in self.peers else len(self.peers)
        return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}

    def line(self, name: str) -> dict[str, object]:
        """Return those and the line of a contestant."""
        ours = "-" if name == OURS else ":"
        dashes = "--" if name.startswith("floor") else ours if name.startswith("cpo-kernels") else "-"
        return self.marks(name) | {"linestyle": dashes, "markersize": 5}


def having(part: Part, value: str) -> list[Record]:
    """Return the records of a part that have a value."""
    return [record for record in part.records if value in record.values]


def cases_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return records by case, in order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.case, []).append(record)
    return found


def heads(part: Part, style: Style) -> Figure:
    """Draw a row a case, a mark a contestant, over the floor."""
    timed = [r for r in having(part, "floor") if not r.contestant.startswith("floor")]
    cases = list(cases_of(timed))
    figure, axes = plt.subplots(figsize=(WIDTH, 1.6 + 0.34 * len(cases)), layout="constrained")
    for name in dict.fromkeys(record.contestant for record in timed):
        own = [(r.values["floor"], cases.index(r.case)) for r in timed if r.contestant == name]
        axes.scatter(*zip(*own, strict=True), s=70 if name == OURS else 40, label=name, **style.marks(name))
    axes.axvline(1.0, color=FLOOR_COLOUR, linestyle="--")
    axes.annotate("floor", (1.0, -0.9), color="#666666", ha="center", va="center", annotation_clip=False)
    axes.set(xscale="log", xlabel="time of loss and gradients / time of the bare products")
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_yticks(range(len(cases)), cases)
    plain_ticks(axes, "x")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def growth(part: Part, style: Style) -> Figure:
    """Draw time and peak memory along N, V and K."""
    cases = {case: found for case, found in cases_of(part.records).items() if case in ("N", "V", "K")}
    labels = {"seconds": "seconds", "peak_mib": "peak MiB beyond inputs and gradients"}
    figure, grid = plt.subplots(2, len(cases), figsize=(WIDTH, 6.4), layout="constrained", squeeze=False)
    for column, (case, records) in enumerate(cases.items()):
        for axes, (value, label) in zip(grid[:, column], labels.items(), strict=True):
            for name in dict.fromkeys(record.contestant for record in records):
                own = [(r.conditions[case], r.values.get(value, 0)) for r in records if r.contestant == name]
                if points := sorted((x, y) for x, y in own if y > 0):
                    axes.plot(*zip(*points, strict=True), label=name, **style.line(name))
            axes.set(xscale="log", yscale="log", xlabel=case, ylabel="" if column else label)
            plain_ticks(axes, "both", sorted({float(r.conditions[case]) for r in records}))
    share_legend(figure, grid)
    return figure


def lengths(part: Part, style: Style) -> Figure:
    """Draw seconds of all batches, a dot a contestant with its number, a panel a case."""
    cases = cases_of(sorted(having(part, "total"), key=lambda record: record.values["total"]))
    height = 1.2 + 0.36 * max(map(len, cases.values()))
    figure, grid = plt.subplots(1, len(cases), figsize=(WIDTH, height), layout="constrained", squeeze=False)
    for axes, (case, records) in zip(grid[0], cases.items(), strict=True):
        for place, record in enumerate(records):
            total, stopped = record.values["total"], " (stopped)" * record.note.startswith("stopped")
            axes.scatter(total, place, s=60, **style.marks(record.contestant))
            axes.annotate(f"  {total:.3g}{stopped}", (total, place), va="center")
        names = [f"{r.contestant}{' (again)' * (r.conditions.get('run') == 'last')}" for r in records]
        axes.set(xscale="log", xlabel="seconds of all batches, first call included", title=case)
        list_names(axes, names)
        plain_ticks(axes, "x")
    return figure


def filters(part: Part, style: Style) -> Figure:
    """Draw the error of a filter against time, a panel a case; the largest eps within the error is filled."""
    cases = cases_of([record for record in having(part, "error_filter") if "floor" in record.values])
    figure, grid = plt.subplots(
        2, -(-len(cases) // 2), figsize=(WIDTH, 5.6), layout="constrained", squeeze=False, sharey=True
    )
    for axes, (case, records) in zip(grid.flat, cases.items(), strict=False):
        for index, kind in enumerate(("candidate_eps", "grad_filter_eps", "both")):
            for chosen in (False, True):
                own = [r for r in records if r.contestant.startswith(kind) and ("at error" in r.contestant) == chosen]
                if points := sorted((record.values["error_filter"], record.values["floor"]) for record in own):
                    look = {"label": kind, "linestyle": "none"} if chosen else {"markerfacecolor": "none"}
                    look |= {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 6}
                    axes.plot(*zip(*points, strict=True), **look)
        exact = [record.values["floor"] for record in records if record.contestant == OURS]
        axes.axhline(exact[-1], color=OUR_COLOUR, linestyle="--", label="exact")
        axes.axhline(0.6, color=FLOOR_COLOUR, linestyle=":")
        axes.axvline(1e-3, color=FLOOR_COLOUR, linestyle=":")
        axes.set(yscale="log", xlim=(-3e-7, 3.0))
        axes.set_xscale("symlog", linthresh=1e-6)  # an error may be 0
        plain_ticks(axes, "y")
        axes.set_xticks([0, 1e-5, 1e-3, 1e-1], ["0", "1e-5", "1e-3", "0.1"], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.set_title(case.replace(" steps", ""), fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("error that the filter adds")
    figure.supylabel("time / floor")
    for axes in grid.flat[len(cases) :]:
        axes.set_visible(False)
    share_legend(figure, grid)
    return figure


def steps(part: Part, style: Style) -> Figure:
    """Draw tokens per second of every trainer, a panel a case."""
    cases = cases_of(sorted(having(part, "tokens_per_second"), key=lambda r: -r.values["tokens_per_second"]))
    figure, grid = plt.subplots(len(cases), 1, figsize=(WIDTH, 2.1 * len(cases)), layout="constrained", squeeze=False)
    for axes, (case, records) in zip(grid[:, 0], cases.items(), strict=True):
        rates = [record.values["tokens_per_second"] for record in records]
        colours = [FLOOR_COLOUR if r.contestant.startswith("TRL") else OUR_COLOUR for r in records]
        peaks = [record.values.get("peak_mib", 0) for record in records]
        labels = [f"{rate:.0f}/s, {peak:.0f} MiB" for rate, peak in zip(rates, peaks, strict=True)]
        axes.bar_label(axes.barh(range(len(records)), rates, color=colours), labels, padding=3)
        list_names(axes, [record.contestant for record in records])
        axes.set(xlabel="tokens of the pairs per second", title=case)
    return figure


def negatives(part: Part, style: Style) -> Figure:
    """Draw the cost of a step as K grows, over an MLE step."""
    figure, axes = plt.subplots(figsize=(WIDTH, 4), layout="constrained")
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in having(part, "of_mle"):
        if record.case.startswith("K,") and record.conditions["K"]:
            label = f"{record.case.removeprefix('K, ')}, prefix sharing {record.conditions.get('sharing')}"
            curves.setdefault(label, []).append((record.conditions["K"], record.values["of_mle"]))
    for index, (label, points) in enumerate(curves.items()):
        look = {"color": COLOURS[index], "marker": MARKERS[index]}
        axes.plot(*zip(*sorted(points), strict=True), label=label, **look)
    axes.axhline(1.0, color=FLOOR_COLOUR, linestyle="--")
    axes.annotate("an MLE step", (1.0, 1.04), color="#666666")
    axes.set(xscale="log", yscale="log", xlabel="K, batch negatives", ylabel="time of a CPO step / of an MLE step")
    plain_ticks(axes, "both", [1, 2, 4, 8, 16])
    axes.legend(frameon=False)
    return figure


def list_names(axes: Axes, names: Sequence[str]) -> None:
    """Put names on the y axis, the first on top, with room for numbers beside the marks."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.3)


def share_legend(figure: Figure, grid: object) -> None:
    """Put one legend below all panels."""
    lines = [line for axes in grid.flat for line in axes.get_lines()]
    handles = {line.get_label(): line for line in lines if not line.get_label().startswith("_")}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)


def plain_ticks(axes: Axes, which: str, places: Sequence[float] | None = None) -> None:
    """Write numbers and not powers of ten, with a grid; with `places`, just these on the x axis."""
    for axis in (axes.xaxis, axes.yaxis):
        if which in ("both", axis.axis_name):
            axis.set_major_formatter(lambda x, _: f"{x:g}")
            axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
            axis.set_tick_params(which="minor", labelsize=8)
    if places:
        axes.set_xticks(places, [short(place) for place in places], rotation=30)
        axes.set_xticks([], minor=True)
    axes.grid(alpha=0.25)


def short(number: float) -> str:
    """Write 32k for 32768 and for 32000."""
    kilo = 1024 if number % 1024 == 0 else 1000
    return f"{number / kilo:.0f}k" if number >= 1000 else f"{number:g}"


# The picture of a part, and what a record needs to be in it.
PICTURES: dict[str, tuple[Callable[[Part, Style], Figure], str]] = {
    "heads": (heads, "floor"),
    "growth": (growth, "seconds"),
    "lengths": (lengths, "total"),
    "filters": (filters, "error_filter"),
    "steps": (steps, "tokens_per_second"),
    "negatives": (negatives, "of_mle"),
}


def draw(parts: Parts, folder: Path, name: str) -> dict[str, str]:
    """Write `name`-PART.png for every part that has a picture; returns the file names by part."""
    style, written = Style(parts), {}
    for part, (picture, value) in PICTURES.items():
        if part in parts and having(parts[part], value):
            figure = picture(parts[part], style)
            written[part] = f"{name}-{part}.png"
            figure.savefig(folder / written[part], dpi=110, metadata={"Software": None})
            plt.close(figure)
    return written
