"""Draws the pictures of a report: log axes, every line and mark labelled, the floor drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contestants import OURS
from benchmarks.records import Part, Parts, by_case

# One colour and one marker a contestant in all pictures; ours stands out, floors are grey.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#8c564b", "#7f5fb0", "#b5bd00", "#17becf", "#555555")
MARKERS = "svD^<>phX"  # one fewer than colours, so that no pair comes twice
OUR_COLOUR, FLOOR_COLOUR = "#d62728", "#999999"
WIDTH = 9.0  # inches
Point = tuple[float, float]


class Style:
    """Holds colours and markers by name of a contestant, the same in every picture."""

    def __init__(self, parts: Parts) -> None:
        known = [record for name in ("heads", "growth") if name in parts for record in parts[name].records]
        self.peers = list(dict.fromkeys(record.contestant for record in known if record.is_peer))

    def line(self, name: str) -> dict[str, object]:
        """Return colour, marker and line of a contestant."""
        if name.startswith("floor"):
            return {"color": FLOOR_COLOUR, "marker": "_", "linestyle": "--"}
        if name.startswith("cpo-kernels"):
            return {"color": OUR_COLOUR, "marker": "o", "linestyle": "-" if name == OURS else ":"}
        index = [*self.peers, name].index(name)
        return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "linestyle": "-"}


def heads(part: Part, style: Style) -> Figure:
    """Draw a row a case, a mark a contestant, over the floor."""
    timed = [r for r in part.select(having="floor") if not r.is_floor]
    cases = list(by_case(timed))
    figure, axes = plt.subplots(figsize=(WIDTH, 1.6 + 0.34 * len(cases)), layout="constrained")
    for name in dict.fromkeys(record.contestant for record in timed):
        own = [(r.values["floor"], cases.index(r.case)) for r in timed if r.contestant == name]
        look = style.line(name) | {"linestyle": "none", "markersize": 8 if name == OURS else 6}
        axes.plot(*zip(*own, strict=True), label=name, **look)
    axes.axvline(1.0, color=FLOOR_COLOUR, linestyle="--")
    axes.set(xscale="log", xlabel="time of loss and gradients / time of the bare products (dashed)")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    list_names(axes, cases, margin=0.05)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def growth(part: Part, style: Style) -> Figure:
    """Draw time and peak memory along N, V and K."""
    cases = {case: found for case, found in by_case(part.records).items() if case in ("N", "V", "K")}
    labels = {"seconds": "seconds", "peak_mib": "peak MiB beyond inputs and gradients"}
    figure, grid = plt.subplots(2, len(cases), figsize=(WIDTH, 6.4), layout="constrained", squeeze=False)
    for column, (case, records) in enumerate(cases.items()):
        for axes, (value, label) in zip(grid[:, column], labels.items(), strict=True):
            curves: dict[str, list[Point]] = {}
            for record in records:
                if record.values.get(value, 0) > 0:
                    point = record.conditions[case], record.values[value]
                    curves.setdefault(record.contestant, []).append(point)
            for name, points in curves.items():
                axes.plot(*zip(*sorted(points), strict=True), label=name, markersize=5, **style.line(name))
            axes.set(xscale="log", yscale="log", xlabel=case, ylabel="" if column else label)
            plain_ticks(axes, sorted({float(record.conditions[case]) for record in records}))
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def lengths(part: Part, style: Style) -> Figure:
    """Draw seconds of all batches, the fewest on top; a bound from below where someone was stopped."""
    cases = by_case(sorted(part.select(having="total"), key=lambda record: record.values["total"]))
    heights = [0.9 + 0.3 * len(records) for records in cases.values()]
    options = {"layout": "constrained", "squeeze": False, "height_ratios": heights}
    figure, grid = plt.subplots(len(cases), 1, figsize=(WIDTH, sum(heights)), **options)
    for axes, (case, records) in zip(grid[:, 0], cases.items(), strict=True):
        colours = [style.line(record.contestant)["color"] for record in records]
        drawn = axes.barh(range(len(records)), [record.values["total"] for record in records], color=colours)
        told = [f"{'>= ' * r.stopped}{r.values['total']:.3g}{' (stopped)' * r.stopped}" for r in records]
        axes.bar_label(drawn, told, padding=3)
        again = [" (again)" * (record.conditions.get("run") == "last") for record in records]
        list_names(axes, [record.contestant + word for record, word in zip(records, again, strict=True)])
        axes.set(xlabel="seconds of all batches, first call included", title=case)
    return figure


STEPS = {  # ways of ours to run a step, with their contestants
    "CPOTrainer": ("cpo-kernels",),
    "CPOTrainer, prefix sharing off": ("cpo-kernels, sharing off",),
    "FusedDPOTrainer, FusedCPOTrainer": ("FusedDPOTrainer", "FusedCPOTrainer"),
    "TRL with patch_fused_head()": ("TRL, patch_fused_head()",),
}


def steps(part: Part, _style: Style) -> Figure:
    """Draw speed and peak memory of whole steps over TRL's, a group of bars a case."""
    cases = by_case(part.select(having="of_trl"))
    figure, both = plt.subplots(1, 2, figsize=(WIDTH, 1.0 + 0.62 * len(cases)), layout="constrained", sharey=True)
    thick = 0.8 / len(STEPS)
    for index, (label, names) in enumerate(STEPS.items()):
        speed, memory = [], []
        for records in cases.values():
            stock = next(record for record in records if record.contestant == "TRL")
            own = [record for record in records if record.contestant in names]
            speed.append(own[0].values["of_trl"] if own else 0.0)
            memory.append(own[0].values["peak_mib"] / stock.values["peak_mib"] if own else 0.0)
        for axes, values in zip(both, (speed, memory), strict=True):
            places = [row + (index - (len(STEPS) - 1) / 2) * thick for row in range(len(cases))]
            drawn = axes.barh(places, values, thick, label=label, color=(OUR_COLOUR, *COLOURS)[index])
            axes.bar_label(drawn, [f"{value:.2f}" if value else "" for value in values], padding=3, fontsize=7)
    for axes, xlabel in zip(both, ("times as fast as TRL", "peak memory over TRL's"), strict=True):
        list_names(axes, [case.replace(", float32", "") for case in cases], margin=0.12)
        axes.axvline(1.0, color=FLOOR_COLOUR, linestyle="--")
        axes.set(xlabel=xlabel)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def negatives(part: Part, _style: Style) -> Figure:
    """Draw the cost of a step as K grows, over an MLE step."""
    figure, axes = plt.subplots(figsize=(WIDTH, 4), layout="constrained")
    curves: dict[str, list[Point]] = {}
    for record in part.select(having="of_mle"):
        if record.case.startswith("K,") and record.conditions["K"]:
            label = f"{record.case.removeprefix('K, ')}, prefix sharing {record.conditions.get('sharing')}"
            curves.setdefault(label, []).append((record.conditions["K"], record.values["of_mle"]))
    for index, (label, points) in enumerate(curves.items()):
        axes.plot(*zip(*sorted(points), strict=True), label=label, color=COLOURS[index], marker=MARKERS[index])
    axes.axhline(1.0, color=FLOOR_COLOUR, linestyle="--", label="an MLE step")
    axes.set(xscale="log", yscale="log", xlabel="K, batch negatives", ylabel="time of a CPO step / of an MLE step")
    plain_ticks(axes, [1, 2, 4, 8, 16])
    axes.legend(frameon=False)
    return figure


def list_names(axes: Axes, names: Sequence[str], margin: float = 0.3) -> None:
    """Put names on the y axis, the first on top, with room for numbers beside the marks."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=margin)
    axes.grid(alpha=0.25)


def plain_ticks(axes: Axes, places: Iterable[float]) -> None:
    """Write numbers and not powers of ten, just these on the x axis, with a grid."""
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "25" else "")
    shown = {place: f"{place / (1024 if place % 1024 == 0 else 1000):.0f}k" for place in places if place >= 1000}
    axes.set_xticks(list(places), [shown.get(place, f"{place:g}") for place in places], rotation=30)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.25)


# The picture of a part, and what a record needs to be in it.
PICTURES: dict[str, tuple[Callable[[Part, Style], Figure], str]] = {
    "heads": (heads, "floor"),
    "growth": (growth, "seconds"),
    "lengths": (lengths, "total"),
    "steps": (steps, "of_trl"),
    "negatives": (negatives, "of_mle"),
}


def draw(parts: Parts, folder: Path, name: str) -> dict[str, str]:
    """Write `name`-PART.png for every part that has a picture; returns the file names by part."""
    style, written = Style(parts), {}
    for part, (picture, value) in PICTURES.items():
        if part in parts and parts[part].select(having=value):
            figure = picture(parts[part], style)
            written[part] = f"{name}-{part}.png"
            figure.savefig(folder / written[part], dpi=110, metadata={"Software": None})
            plt.close(figure)
    return written
