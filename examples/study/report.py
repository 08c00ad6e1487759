"""Write the report of the study: tables, pictures, and every figure as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from analysis import PRIMARY, Comparison, Difference, compare, sample
from matplotlib import pyplot
from protocol import PLAIN, TEMPERATURES, Protocol, Regime

QUALITY = {"walks": "valid", "brackets": "balanced", "text": "judge's nats a token"}
CURVES = ("MLE", "MLE x5", "AN", "MN c=0.25", "BN", "DPO")
BEGIN = "<!-- What follows is written by examples/study/study.py. -->"

Results = Mapping[str, Any]


def write_report(protocol: Protocol, results: Results, path: Path) -> None:
    """Write the report to ``path``, behind whatever stands there before the marker; pictures and JSON lie beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compared = {
        (task, regime): compare(protocol, results["runs"], task, regime.name)
        for task, regimes in protocol.regimes.items()
        for regime in regimes
    }
    stem = path.with_suffix("").name
    pictures = {"differences": _plot_differences(protocol, compared), "curves": _plot_curves(protocol, results)}
    for name, figure in pictures.items():
        figure.savefig(path.with_name(f"{stem}-{name}.png"), dpi=110, bbox_inches="tight")
        pyplot.close(figure)
    path.with_name(f"{stem}.json").write_text(_json(protocol, results, compared), encoding="utf-8")
    before = path.read_text(encoding="utf-8").partition(BEGIN)[0] if path.exists() else "# The study\n\n"
    parts = [_overview(protocol, compared), _links(stem), *_tables(protocol, results, compared), _tried(results)]
    path.write_text(before + BEGIN + "\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


def _signed(difference: Difference, digits: int = 3) -> str:
    low, high = (f"{value:+.{digits}f}" for value in (difference.low, difference.high))
    return f"{difference.mean:+.{digits}f} ({low} to {high})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _overview(protocol: Protocol, compared: Mapping[Any, dict[str, Comparison]]) -> str:
    """Say how many of the primary comparisons differ from 0, in which direction, with and without adjustment."""
    every = [own for arms in compared.values() for own in arms.values()]
    better, worse = (
        [own for own in every if own.q < 0.05 and sign * own.differences[PRIMARY].mean > 0] for sign in (1, -1)
    )
    first = protocol.arms[0].name
    return (
        "## Results\n\n"
        f"{len(protocol.seeds)} seeds, {len(every)} comparisons with {first} at equal entropy. With 5 % false "
        f"discoveries allowed in each regime, {len(better)} are better than {first}, {len(worse)} are worse, and "
        f"{len(every) - len(better) - len(worse)} cannot be told from it."
    )


def _links(stem: str) -> str:
    return (
        f"![Differences from MLE at equal entropy]({stem}-differences.png)\n\n"
        f"![Quality against entropy over temperatures]({stem}-curves.png)\n\n"
        f"Every figure, of every run: [{stem}.json]({stem}.json)."
    )


def _tables(protocol: Protocol, results: Results, compared: Mapping[Any, dict[str, Comparison]]) -> Iterator[str]:
    for task, regimes in protocol.regimes.items():
        for regime in regimes:
            yield _table_of(protocol, results, task, regime, compared[task, regime])


def _table_of(
    protocol: Protocol, results: Results, task: str, regime: Regime, compared: Mapping[str, Comparison]
) -> str:
    first = protocol.arms[0].name
    runs = [results["runs"][task, regime.name, first, seed] for seed in protocol.seeds]
    bases = [results["bases"][task, regime.name, seed] for seed in protocol.seeds]
    mean = statistics.fmean
    base = [mean(sample(own)["quality"] for own in bases), mean(own["nll"] for own in bases)]
    own = [mean(sample(run)["quality"] for run in runs), mean(run["nll"] for run in runs)]
    turned = mean(min(loss for _, loss in one["losses"]) for one in bases)
    last = mean(one["losses"][-1][1] for one in bases)
    header = [QUALITY[task], "at equal entropy", "greedy", "loss", "entropy", "wins", "seconds"]
    rows = [
        [
            name + ("" if arm.q >= 0.05 else " *"),
            f"{arm.quality:.3f}",
            _signed(arm.differences[PRIMARY]),
            _signed(arm.differences["greedy"]),
            _signed(arm.differences["loss"]),
            _signed(arm.differences["entropy"]),
            f"{arm.wins.rate:.3f}",
            "-" if arm.cost is None else f"{arm.cost:.1f}x",
        ]
        for name, arm in compared.items()
    ]
    text = (
        f"### {task.capitalize()}: {regime.text}\n\n"
        f"Base: {QUALITY[task]} {base[0]:.3f}, loss {base[1]:.3f}; its validation loss ended at {last:.3f}, the least "
        f"on the way was {turned:.3f}. {first}: {QUALITY[task]} {own[0]:.3f}, loss {own[1]:.3f} "
        f"nats a token, {regime.steps} steps, {mean(run['seconds'] for run in runs):.1f} s.\n\n"
    )
    table = _table(["arm", *header], rows)
    if task != "text":
        return text + table
    rows = [
        [name, f"{one['length']:.1f}", f"{one['repetition']:.3f}", f"{one['distinct']:.3f}", rate]
        for name, one, rate in (
            (name, arm.samples, f"{arm.wins.rate:.3f} ({arm.wins.low:.3f} to {arm.wins.high:.3f})")
            for name, arm in compared.items()
        )
    ]
    return text + table + "\n\n" + _table(["arm", "length", "repetition", "distinct", f"wins against {first}"], rows)


def _tried(results: Results) -> str:
    """List what the tries have chosen."""
    tasks = list(dict.fromkeys(task for task, _ in results["chosen"]))
    arms = list(dict.fromkeys(arm for _, arm in results["chosen"]))
    rows = [
        [arm, *(", ".join(f"{name} {value:g}" for name, value in results["chosen"][t, arm].items()) for t in tasks)]
        for arm in arms
    ]
    return "### What the tries chose\n\n" + _table(["arm", *tasks], rows)


def _json(protocol: Protocol, results: Results, compared: Mapping[Any, dict[str, Comparison]]) -> str:
    """Return everything but the quality of single samples."""

    def plain(run: Mapping[str, Any]) -> dict[str, Any]:
        samples = {
            temperature: {name: round(value, 5) for name, value in own.items() if name != "each"}
            for temperature, own in run["samples"].items()
        }
        return {**run, "samples": samples}

    def keyed(values: Mapping[Any, Any]) -> dict[str, Any]:
        return {" / ".join(map(str, key)): value for key, value in values.items()}

    content = {
        "protocol": asdict(protocol),
        "judge": results["judge"],
        "chosen": keyed(results["chosen"]),
        "compared": keyed(
            {(*key[:1], key[1].name, arm): asdict(own) for key, arms in compared.items() for arm, own in arms.items()}
        ),
        **{
            part: {name: plain(run) for name, run in keyed(results[part]).items()}
            for part in ("bases", "tries", "runs")
        },
    }
    return json.dumps(content) + "\n"


def _plot_differences(protocol: Protocol, compared: Mapping[Any, dict[str, Comparison]]) -> Any:
    """Plot the primary differences and their intervals, a panel for each regime of each task."""
    names = [arm.name for arm in protocol.arms[1:]]
    figure, axes = pyplot.subplots(
        1, len(compared), figsize=(2.2 * len(compared) + 1.5, 5.2), sharey=True, squeeze=False
    )
    for axis, ((task, regime), arms) in zip(axes[0], compared.items(), strict=True):
        for place, name in enumerate(names):
            own = arms[name].differences[PRIMARY]
            colour = "0.6" if arms[name].q >= 0.05 else "tab:green" if own.mean > 0 else "tab:red"
            axis.errorbar(own.mean, place, xerr=[[own.mean - own.low], [own.high - own.mean]], fmt="o", color=colour)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.locator_params(axis="x", nbins=4)
        axis.set_title(f"{task}: {regime.name}", fontsize=9)
        axis.set_xlabel(QUALITY[task], fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    figure.suptitle(f"Difference from {protocol.arms[0].name} at equal entropy, 95 % intervals; grey: not told from 0")
    return figure


def _plot_curves(protocol: Protocol, results: Results) -> Any:
    """Plot quality against entropy over temperatures for some arms, a panel for each regime of each task."""
    panels = [(task, regime) for task, regimes in protocol.regimes.items() for regime in regimes]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.4 * columns, 2.9 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (task, regime) in zip(axes.flat, panels, strict=False):
        for name in CURVES:
            runs = [results["runs"][task, regime.name, name, seed] for seed in protocol.seeds]
            points = [[sample(run, temperature) for run in runs] for temperature in TEMPERATURES]
            x, y = ([statistics.fmean(own[what] for own in at) for at in points] for what in ("entropy", "quality"))
            (line,) = axis.plot(x, y, marker=".", label=name, linewidth=1)
            plain = TEMPERATURES.index(PLAIN)
            axis.plot(x[plain], y[plain], marker="o", color=line.get_color())
        axis.set_title(f"{task}: {regime.name}", fontsize=9)
        axis.set_xlabel("entropy, nats a token", fontsize=8)
        axis.set_ylabel(QUALITY[task], fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0][0].legend(fontsize=7)
    figure.suptitle("Quality against entropy over temperatures; the dots are temperature 1")
    figure.tight_layout()
    return figure
