"""The pictures of a report: log axes, every line and mark labelled, the floor drawn."""

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
    """Colours and markers by name of a contestant, the same in every picture."""

    def __init__(self, parts: Parts) -> None:
        everyone = dict.fromkeys(r.contestant for name in ("heads", "growth") for r in parts.get(name, EMPTY).records)
        self.peers = [name for name in everyone if not name.startswith(("cpo-kernels", "floor"))]

    def of(self, name: str) -> dict[str, object]:
        """Colour, marker and line of a contestant."""
        if name.startswith("floor"):
            return {"color": FLOOR_COLOUR, "marker": "_", "linestyle": "--"}
        if name.startswith("cpo-kernels"):
            return {"color": OUR_COLOUR, "marker": "o", "linestyle": "-" if name == OURS else ":"}
        index = self.peers.index(name) if name in self.peers else len(self.peers)
        return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "linestyle": "-"}


EMPTY = Part("", {})


def heads(part: Part, style: Style) -> Figure:
    """A row a case, a mark a contestant, over the floor."""
    timed = [r for r in part.records if "floor" in r.values and not r.contestant.startswith("floor")]
    cases = list(dict.fromkeys(record.case for record in timed))
    figure, axes = plt.subplots(figsize=(WIDTH, 1.6 + 0.34 * len(cases)), layout="constrained")
    for name in dict.fromkeys(record.contestant for record in timed):
        own = [r for r in timed if r.contestant == name]
        marks = {key: look for key, look in style.of(name).items() if key != "linestyle"}
        size = 70 if name == OURS else 40
        axes.scatter([r.values["floor"] for r in own], [cases.index(r.case) for r in own], s=size, label=name, **marks)
    axes.axvline(1.0, color=FLOOR_COLOUR, linestyle="--")
    axes.annotate("floor", (1.0, -0.9), color="#666666", ha="center", va="center", annotation_clip=False)
    axes.set(
        xscale="log", xlabel="time of loss and gradients / time of the bare products", ylim=(len(cases) - 0.5, -0.5)
    )
    axes.set_yticks(range(len(cases)), cases)
    plain_ticks(axes, "x")
    axes.grid(axis="both", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def growth(part: Part, style: Style) -> Figure:
    """Time and peak memory along N, V and K."""
    cases = [case for case in ("N", "V", "K") if part.select(case=case)]
    figure, grid = plt.subplots(2, len(cases), figsize=(WIDTH, 6.4), layout="constrained", squeeze=False)
    for column, case in enumerate(cases):
        for row, (value, label) in enumerate(
            (("seconds", "seconds"), ("peak_mib", "peak MiB beyond inputs and gradients"))
        ):
            axes = grid[row][column]
            curves(axes, part.select(case=case), case, value, style)
            axes.set(xscale="log", yscale="log", xlabel=case)
            axes.grid(alpha=0.25)
            plain_ticks(axes, "both", sorted({float(r.conditions[case]) for r in part.select(case=case)}))
            if column == 0:
                axes.set_ylabel(label)
    handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def curves(axes: Axes, records: Sequence[Record], along: str, value: str, style: Style) -> None:
    """A line a contestant."""
    for name in dict.fromkeys(record.contestant for record in records):
        own = sorted(
            (r.conditions[along], r.values[value]) for r in records if r.contestant == name and value in r.values
        )
        own = [(x, y) for x, y in own if y > 0]
        if own:
            axes.plot(*zip(*own, strict=True), label=name, markersize=5, **style.of(name))


def lengths(part: Part, style: Style) -> Figure:
    """Seconds of all batches, a dot a contestant, a panel a case."""
    cases = part.cases()
    widest = max(len(part.select(case=case)) for case in cases)
    figure, grid = plt.subplots(
        1, len(cases), figsize=(WIDTH, 1.2 + 0.36 * widest), layout="constrained", squeeze=False
    )
    for axes, case in zip(grid[0], cases, strict=True):
        timed = sorted((r for r in part.select(case=case) if "total" in r.values), key=lambda r: r.values["total"])
        dots(axes, timed, "total", style)
        axes.set(xscale="log", xlabel="seconds of all batches, first call included", title=case)
        plain_ticks(axes, "x")
    return figure


def dots(axes: Axes, records: Sequence[Record], value: str, style: Style) -> None:
    """A dot a record with its number, the first on top; one that was stopped is marked."""
    for place, record in enumerate(records):
        marks = {key: look for key, look in style.of(record.contestant).items() if key != "linestyle"}
        axes.scatter(record.values[value], place, s=60, **marks)
        label = f"  {record.values[value]:.3g}{' (stopped)' * record.note.startswith('stopped')}"
        axes.annotate(label, (record.values[value], place), va="center")
    names = [f"{r.contestant}{' (again)' * (r.conditions.get('run') == 'last')}" for r in records]
    axes.set_yticks(range(len(records)), names)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.grid(alpha=0.25)


def filters(part: Part, style: Style) -> Figure:
    """Error of a filter against time, a panel a case; the largest eps within the error is filled."""
    cases = [case for case in part.cases() if any("error_filter" in r.values for r in part.select(case=case))]
    columns = -(-len(cases) // 2)
    figure, grid = plt.subplots(2, columns, figsize=(WIDTH, 5.6), layout="constrained", squeeze=False, sharey=True)
    for axes, case in zip(grid.flat, cases, strict=False):
        swept = [r for r in part.select(case=case) if "error_filter" in r.values and "floor" in r.values]
        for index, kind in enumerate(("candidate_eps", "grad_filter_eps", "both")):
            filter_curve(axes, [r for r in swept if r.contestant.startswith(kind)], kind, index)
        exact = part.select(OURS, case=case)
        axes.axhline(exact[-1].values["floor"], color=OUR_COLOUR, linestyle="--", label="exact")
        axes.axhline(0.6, color=FLOOR_COLOUR, linestyle=":")
        axes.axvline(1e-3, color=FLOOR_COLOUR, linestyle=":")
        axes.set(yscale="log", xlim=(-3e-7, 3.0))
        axes.set_xscale("symlog", linthresh=1e-6)  # an error may be 0
        axes.set_xticks([0, 1e-5, 1e-3, 1e-1], ["0", "1e-5", "1e-3", "0.1"], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.set_title(case.replace(" steps", ""), fontsize=8)
        axes.grid(alpha=0.25)
        plain_ticks(axes, "y")
    for axes in grid[-1]:
        axes.set_xlabel("error that the filter adds")
    for axes in grid[:, 0]:
        axes.set_ylabel("time / floor")
    for axes in grid.flat[len(cases) :]:
        axes.set_visible(False)
    handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines() if line.get_label()[0] != "_"}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def filter_curve(axes: Axes, records: Sequence[Record], kind: str, index: int) -> None:
    """A line through what was swept, and the eps that keeps within the error."""
    look = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 6}
    for chosen in (False, True):
        own = [r for r in records if ("at error" in r.contestant) == chosen]
        points = sorted((record.values["error_filter"], record.values["floor"]) for record in own)
        if points:
            style = {"label": kind, "linestyle": "none"} if chosen else {"markerfacecolor": "none"}
            axes.plot(*zip(*points, strict=True), **look, **style)


def steps(part: Part, style: Style) -> Figure:
    """Tokens per second of every trainer, a panel a case."""
    cases = [case for case in part.cases() if any("tokens_per_second" in r.values for r in part.select(case=case))]
    figure, grid = plt.subplots(len(cases), 1, figsize=(WIDTH, 2.1 * len(cases)), layout="constrained", squeeze=False)
    for axes, case in zip(grid[:, 0], cases, strict=True):
        timed = [r for r in part.select(case=case) if "tokens_per_second" in r.values]
        timed.sort(key=lambda record: -record.values["tokens_per_second"])
        places = range(len(timed))
        colours = [FLOOR_COLOUR if r.contestant.startswith("TRL") else OUR_COLOUR for r in timed]
        drawn = axes.barh(places, [r.values["tokens_per_second"] for r in timed], color=colours)
        labels = [f"{r.values['tokens_per_second']:.0f}/s, {r.values.get('peak_mib', 0):.0f} MiB" for r in timed]
        axes.bar_label(drawn, labels, padding=3)
        axes.set_yticks(places, [record.contestant for record in timed])
        axes.invert_yaxis()
        axes.margins(x=0.3)
        axes.set(xlabel="tokens of the pairs per second", title=case)
    return figure


def negatives(part: Part, style: Style) -> Figure:
    """Cost of a step as K grows, over an MLE step."""
    figure, axes = plt.subplots(figsize=(WIDTH, 4), layout="constrained")
    index = 0
    for case in (case for case in part.cases() if case.startswith("K,")):
        points = [r for r in part.select(case=case) if "of_mle" in r.values]
        for sharing in dict.fromkeys(r.conditions.get("sharing") for r in points if r.conditions["K"]):
            own = sorted(
                (r.conditions["K"], r.values["of_mle"])
                for r in points
                if r.conditions["K"] and r.conditions.get("sharing") == sharing
            )
            if len(own) > 1:
                label = f"{case.removeprefix('K, ')}, prefix sharing {sharing}"
                axes.plot(*zip(*own, strict=True), label=label, color=COLOURS[index], marker=MARKERS[index])
                index += 1
    axes.axhline(1.0, color=FLOOR_COLOUR, linestyle="--")
    axes.annotate("an MLE step", (1.0, 1.04), color="#666666")
    axes.set(xscale="log", yscale="log", xlabel="K, batch negatives", ylabel="time of a CPO step / of an MLE step")
    plain_ticks(axes, "both", [1, 2, 4, 8, 16])
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def plain_ticks(axes: Axes, which: str, places: Sequence[float] | None = None) -> None:
    """Numbers and not powers of ten; with `places`, just these on the x axis."""
    for axis in (axes.xaxis, axes.yaxis):
        if which == "both" or which == axis.axis_name:
            axis.set_major_formatter(lambda x, _: f"{x:g}")
            axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
            axis.set_tick_params(which="minor", labelsize=8)
    if places:
        axes.set_xticks(places, [short(place) for place in places], rotation=30)
        axes.set_xticks([], minor=True)


def short(number: float) -> str:
    """32k for 32768 and for 32000."""
    kilo = 1024 if number % 1024 == 0 else 1000
    return f"{number / kilo:.0f}k" if number >= 1000 else f"{number:g}"


PICTURES: dict[str, Callable[[Part, Style], Figure]] = {
    "heads": heads,
    "growth": growth,
    "lengths": lengths,
    "filters": filters,
    "steps": steps,
    "negatives": negatives,
}


# What a record needs to be in the picture of its part.
DRAWN = {"filters": "error_filter", "lengths": "total", "steps": "tokens_per_second", "negatives": "of_mle"}


def draw(parts: Parts, folder: Path, name: str) -> dict[str, str]:
    """Write `name`-PART.png for every part that has a picture; returns the file names by part."""
    style, written = Style(parts), {}
    for part, picture in PICTURES.items():
        if part in parts and any(DRAWN.get(part, "seconds") in record.values for record in parts[part].records):
            figure = picture(parts[part], style)
            file = f"{name}-{part}.png"
            figure.savefig(folder / file, dpi=110, metadata={"Software": None})
            plt.close(figure)
            written[part] = file
    return written
