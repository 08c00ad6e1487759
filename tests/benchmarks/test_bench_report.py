"""The report: bars that can be missed, tables of records, parts in processes of their own, figures of the documents."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import bars, environment, page, plots, publish, records, report, suite, tables
from benchmarks.contestants import OURS
from benchmarks.records import Part, Parts, Record
from benchmarks.setting import Setting
from benchmarks.shapes import BAR_4K, BAR_LOSSES, BAR_PEERS, FROZEN, LOGPS

pytestmark = pytest.mark.cpu

ENVIRONMENT = environment.describe(["suite", "heads"])
SIZES = {"V": 50257, "H": 768, "N": 1024, "dtype": "float32", "prompt": 0.0, "mode": "trained", "work": "cpo"}


def parts(name: str, *found: Record) -> Parts:
    return {name: Part(name, ENVIRONMENT, list(found), 1.0)}


def verdict(of, measured: Parts) -> list[bool | None]:
    return [bar.met for bar in of(measured) if bar.met is not None]


def step_records(ratio: float, bound: float | None, peak_mib: float = 8.0) -> list[Record]:
    """TRL's step, ours that is so many times as fast, and Amdahl's bound."""
    own = Record("c", f"{OURS}, sharing off", {"of_trl": ratio, "peak_mib": peak_mib})
    free = [] if bound is None else [Record("c", "bound: the head for nothing", {"of_trl": bound})]
    shared = Record("c", OURS, {"of_trl": 9.0, "peak_mib": 1.0})  # with prefixes shared, which decides nothing
    return [Record("c", "TRL", {"of_trl": 1.0, "peak_mib": 9.0}), shared, own, *free]


# A bar, the part it reads, and records that meet and that miss it.
MET_AND_MISSED = {
    "peak": (
        bars.exact_loss,
        "heads",
        [Record("c", OURS, {"of_peak": 0.92}, SIZES)],
        [Record("c", OURS, {"of_peak": 0.91}, SIZES)],
    ),
    "small": (
        bars.small_sizes,
        "growth",
        [Record("V", OURS, {"of_peak": 0.85}, SIZES | {"V": 8192, "H": 256, "N": 512})],
        [Record("N", OURS, {"of_peak": 0.84}, SIZES | {"N": 256})],
    ),
    "growth": (
        bars.small_sizes,
        "growth",
        [Record("N", OURS, {"of_ours": 1.0}, SIZES), Record("N", "a", {"of_ours": 1.1}, SIZES)],
        [Record("N", OURS, {"of_ours": 1.0}, SIZES), Record("N", "a", {"of_ours": 0.92}, SIZES)],
    ),
    "peers": (
        bars.peers,
        "heads",
        [Record("c", OURS, {"of_ours": 1.0}), Record("c", "a", {"of_ours": 1.2}), Record("c", "b", {"of_ours": 3.0})],
        [Record("c", OURS, {"of_ours": 1.0}), Record("c", "a", {"of_ours": 0.99}), Record("c", "b", {"of_ours": 3.0})],
    ),
    "memory": (
        bars.peak_memory,
        "heads",
        [Record("peak memory, fp32", OURS, {"of_budget": 1.02}, SIZES)],
        [Record("peak memory, fp32", OURS, {"of_budget": 1.03}, SIZES)],
    ),
    "no_grad": (
        bars.without_gradients,
        "heads",
        [Record("c", OURS, {"floor": 1.03}, SIZES | {"mode": "no_grad"})],
        [Record("c", OURS, {"floor": 1.04}, SIZES | {"mode": "no_grad"})],
    ),
    "lengths": (
        bars.natural_lengths,
        "lengths",
        [Record("c", "a", {"of_ours": 1.5})],
        [Record("c", "a", {"of_ours": 0.5}), Record("c", "b", {"of_ours": 1.5})],
    ),
    "filters": (
        bars.filters,
        "filters",
        [
            Record("c", "x at error 1e-3", {"of_ours": 0.9, "error_filter": 1e-3}),
            Record("c", "y at error 1e-3", {"of_ours": 0.6, "error_filter": 1e-3}),
        ],
        [
            Record("c", "x at error 1e-3", {"of_ours": 0.61, "error_filter": 1e-4}),
            Record("c", "y at error 1e-3", {"of_ours": 0.4, "error_filter": 2e-3}),
            Record("c", "z 0.1", {"of_ours": 0.4, "error_filter": 1e-4}),
        ],
    ),
    "accuracy": (
        bars.accuracy,
        "heads",
        [Record(LOGPS, OURS, {"nats_largest": 2e-3})],
        [Record(LOGPS, OURS, {"nats_largest": 2.1e-3})],
    ),
    "sharing": (
        bars.sharing,
        "sharing",
        [Record("body", "shared", {"ratio": 1.6}, {"body": "gpt2", "attention": "sdpa"})],
        [Record("body", "shared", {"ratio": 1.5}, {"body": "gpt2", "attention": "eager"})],
    ),
    "steps": (
        bars.steps,
        "steps",
        step_records(2.0, bound=2.2, peak_mib=8.0),
        step_records(3.0, bound=2.2, peak_mib=10.0),
    ),
    "autoregressive": (
        bars.autoregressive,
        "negatives",
        [Record("c", "autoregressive 1", {"of_mle": 3.0})],
        [Record("c", "autoregressive 1", {"of_mle": 3.1})],
    ),
    "truncation": (
        bars.truncation,
        "negatives",
        [Record("c", "batch 1, truncation 4", {"of_base": 1.05})],
        [Record("c", "batch 1, truncation 4", {"of_base": 1.06})],
    ),
}


@pytest.mark.parametrize("name", MET_AND_MISSED)
def test_a_bar_is_met_or_missed_by_what_was_measured(name):
    of, part, met, missed = MET_AND_MISSED[name]
    assert verdict(of, parts(part, *met)) == [True]
    assert verdict(of, parts(part, *missed)) == [False]


def test_every_row_of_the_contract_has_a_line_even_when_nothing_was_measured():
    found = bars.verdicts({})
    assert len(found) >= len(bars.BARS) == 13
    assert all(bar.met is None and bar.what for bar in found)


def test_a_row_without_a_line_is_missing_and_not_gone():
    """A part that died early, or found no peer, must not make a bar vanish."""
    empty = {name: Part(name, ENVIRONMENT) for name in suite.PARTS}
    found = bars.verdicts(empty)
    assert len(found) >= len(bars.BARS)
    assert all(bar.met is None for bar in found)


def on_an_h200(factor: float) -> list[Record]:
    """Records of ours at so many times the bars of loss and memory."""
    found = [Record(BAR_4K.name, OURS, {"seconds": 0.017 * factor, "floor": 1.04 * factor})]
    for shape in BAR_LOSSES[1:]:
        gib = 1.0 if shape.mode == FROZEN else 2.1
        found.append(Record(shape.name, OURS, {"floor": 1.05 * factor, "peak_mib": 1024 * gib * factor}))
    return found


ROWS = "row kernels, bfloat16, V=32000"
# Of each row that a GPU has shapes of its own for: records that meet its bars and that miss them, and how many bars.
ON_GPU = {
    "losses": (bars.exact_loss, on_an_h200(0.999), on_an_h200(1.001), 10),
    "peers": (
        bars.peers,
        [Record(shape.name, "eager", {"of_ours": 1.01}) for shape in BAR_PEERS],
        [Record(shape.name, "eager", {"of_ours": 0.99}) for shape in BAR_PEERS],
        2,
    ),
    "rows": (
        bars.row_kernels,
        [Record(ROWS, "forward, triton", {"of_gbs": 0.9})],
        [Record(ROWS, "forward, triton", {"of_gbs": 0.89})],
        1,
    ),
    "rows by CUDA": (
        bars.row_kernels,
        [Record(ROWS, "forward, cuda", {"of_gbs": 0.9, "of_triton": 1.0}, {"picked": True})],
        [Record(ROWS, "forward, cuda", {"of_gbs": 0.8, "of_triton": 0.9}, {"picked": True})],
        2,
    ),
    "no_grad": (
        bars.without_gradients,
        [Record("no_grad, x", OURS, {"of_product": 1.03})],
        [Record("no_grad, x", OURS, {"of_product": 1.04})],
        1,
    ),
}


@pytest.mark.parametrize("name", ON_GPU)
def test_a_bar_of_a_gpu_is_met_or_missed_by_what_was_measured(name):
    of, met, missed, count = ON_GPU[name]
    assert verdict(of, parts("gpu", *met)) == [True] * count
    assert verdict(of, parts("gpu", *missed)) == [False] * count


def test_a_gpu_that_was_asked_for_some_bars_lacks_the_others():
    told = Counter(bar.met for bar in bars.exact_loss(parts("gpu", *on_an_h200(0.5)[:1])))
    assert told == {True: 2, None: 9}


def test_a_missed_step_says_how_near_the_bound_a_head_at_the_peak_comes():
    trl, shared, own, bound = step_records(1.5, 1.8)
    bound.values[bars.AT_PEAK] = 0.87
    (bar,) = bars.steps(parts("steps", trl, shared, own, bound))
    assert bar.why.endswith("at the machine's peak they would leave 87% of the bound")


def test_a_share_of_the_peak_stands_beside_that_of_the_bare_products():
    own = Record("c", OURS, {"of_peak": 0.8, "floor_ours": 1.1}, SIZES)
    bar = next(iter(bars.exact_loss(parts("heads", own))))
    assert bar.measured == "80%; its bare products 88.0%"


@pytest.mark.parametrize(
    ("ratio", "bound", "met"),
    [(1.7, 1.8, [True]), (1.6, 1.8, [False]), (1.99, 2.2, [False]), (2.1, 2.4, [False]), (2.0, None, [])],
)
def test_a_step_is_held_against_amdahls_bound(ratio, bound, met):
    """90 % of it, and 2x where it is at least 2.2; without it there is no verdict, whatever the ratio."""
    assert verdict(bars.steps, parts("steps", *step_records(ratio, bound))) == met


def test_who_was_timed_less_often_decides_nothing():
    """The nearest peer had one round against eight."""
    own, far = Record("c", OURS, {"of_ours": 1.0, "rounds": 8.0}), Record("c", "b", {"of_ours": 1.5, "rounds": 8.0})
    near = Record("c", "a", {"of_ours": 0.9, "rounds": 1.0})
    (bar, *_) = bars.peers(parts("heads", own, near, far))
    assert bar.met and "b: 1.50x ours" in bar.measured and "(1 had fewer rounds)" in bar.measured
    assert verdict(bars.peers, parts("heads", own, near)) == []


def test_who_was_stopped_is_a_lower_bound():
    stopped = Record("c", "a", {"of_ours": 2.7, "batches": 25.0}, note="stopped after 25 batches: >= 6.0 s")
    (bar, after_ten) = bars.natural_lengths(parts("lengths", stopped))
    assert bar.met and bar.measured.startswith("a: >= 2.70x ours, 25 batches done") and after_ten.met is None
    life = Record("c", "a", {"of_ours": 2.7, "steady_of_ours": 0.9})
    assert verdict(bars.natural_lengths, parts("lengths", life)) == [True, False]


def test_a_part_in_which_something_passed_the_peak_is_void(tmp_path, monkeypatch):
    measured = [Record("c", OURS, {"of_peak": 0.9}, SIZES)]
    monkeypatch.setattr(suite, "part_function", lambda name: lambda setting: iter(measured))
    for share, void in ((1.0, False), (1.01, True)):
        measured[1:] = [Record("c", "a", {"of_peak": share}, SIZES)]
        part = suite.measure("heads", Setting(quick=True), tmp_path, ["heads"])
        assert part.void == void and (not void or "a, c, at 101% of the measured peak" in part.error)
        assert verdict(bars.exact_loss, {"heads": part}) == [False]
        found = [bar.met for bar in bars.lines(bars.exact_loss, records.load(tmp_path / "heads.json"))]
        assert found == ([None, None] if void else [False, None])


def test_the_summary_has_a_row_a_bar_and_shows_what_was_missed():
    missed = [Record("c", OURS, {"of_peak": share, "spread": 0.1}, SIZES) for share in (0.95, 0.5)]
    rows = bars.summary(parts("heads", *missed)).splitlines()[2:]
    assert len(rows) == len(bars.BARS) and "50% ± 5%" in rows[0] and "| 1 of 2 " in rows[0]
    assert all(bars.NOT_MEASURED in row for row in rows[1:] if "of 1" not in row)


def test_every_missed_bar_has_a_reason():
    for of, part, _, missed in MET_AND_MISSED.values():
        assert all(bar.why for bar in of(parts(part, *missed)) if bar.met is False)


def test_log_likelihoods_of_one_round_decide_no_bar_of_speed():
    found = [Record(LOGPS, OURS, {"floor": 9.0}, SIZES | {"mode": "no_grad"}), Record(LOGPS, "a", {"of_ours": 0.5})]
    assert verdict(bars.peers, parts("heads", *found)) == verdict(bars.without_gradients, parts("heads", *found)) == []


def test_the_reason_stands_beside_a_missed_bar_only():
    measured = [
        Record("body", "shared", {"ratio": ratio}, {"body": "gpt2", "attention": "eager"}) for ratio in (1.1, 1.6)
    ]
    missed, met = bars.sharing(parts("sharing", *measured))
    assert (missed.why, met.why) == (bars.WHY["eager"], "")


def test_a_table_shows_conditions_that_differ_and_values_in_their_units():
    rows = [
        Record("c", "a", {"seconds": 0.12345, "floor": 1.0}, {"N": 8, "dtype": "float32"}),
        Record("c", "b", {"peak_mib": 3.25}, {"N": 16, "dtype": "float32"}, "slow"),
    ]
    table = tables.case_table(rows).splitlines()
    header, _, first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert header == ["", "N", "s", "x floor", "peak MiB", "note"]
    assert first == ["a", "8", "0.1235", "1.000", "", ""]
    assert second == ["b", "16", "", "", "3.2", "slow"]
    assert tables.common_conditions(rows) == {"dtype": "float32"}


def test_records_survive_their_json(tmp_path):
    measured = parts("heads", Record("c", "a", {"seconds": 1.5, "floor": float("nan")}, {"N": 8}, "a note"))
    records.save(measured, tmp_path / "x.json")
    (record,) = records.load(tmp_path / "x.json")["heads"].records
    assert record == Record("c", "a", {"seconds": 1.5}, {"N": 8}, "a note")
    assert records.load(tmp_path / "nothing.json") == {}


def test_select_takes_contestant_case_and_conditions():
    part = Part(
        "p", {}, [Record("c", "a", {}, {"N": 1}), Record("c", "b", {}, {"N": 2}), Record("d", "a", {}, {"N": 2})]
    )
    assert part.select("a", case="c") == part.records[:1]
    assert part.select(N=2) == part.records[1:] and part.select(having="seconds") == []
    assert {case: len(own) for case, own in records.by_case(part.records).items()} == {"c": 2, "d": 1}


class EndedError(BaseException):
    """What no part may catch: the time-out of a part comes in the midst of a case."""


@pytest.mark.parametrize(("error", "why"), [(ValueError("no"), "ValueError: no"), (EndedError(), "ended from outside")])
def test_a_part_that_breaks_keeps_its_records_and_says_why(tmp_path, monkeypatch, error, why):
    def run(setting):
        yield Record("c", "a", {"seconds": 1.0})
        raise error

    monkeypatch.setattr(suite, "part_function", lambda name: run)
    try:
        suite.measure("heads", Setting(quick=True), tmp_path, ["heads"])
    except EndedError:
        assert isinstance(error, EndedError)
    part = records.load(tmp_path / "heads.json")["heads"]
    assert part.error == why and [record.contestant for record in part.records] == ["a"]


def test_a_part_whose_package_is_not_installed_says_so(tmp_path, monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {absent!r}", name=absent)

    monkeypatch.setattr(suite, "import_module", missing)
    absent = "trl"
    assert suite.main(["steps", "--out", str(tmp_path)]) == environment.NOTHING_TO_DO
    assert capsys.readouterr().err.splitlines()[-1] == "steps needs trl, which is not installed"
    absent = "benchmarks.gone"
    with pytest.raises(ModuleNotFoundError):
        suite.main(["steps", "--out", str(tmp_path)])


@pytest.mark.parametrize("name", suite.PARTS)
def test_every_part_is_there(name):
    if name in ("steps", "liger", "adapters"):
        pytest.importorskip({"steps": "trl", "liger": "liger_kernel", "adapters": "peft"}[name])
    pytest.importorskip("triton")
    assert callable(suite.part_function(name))


def test_a_run_replaces_its_parts_and_keeps_the_others(tmp_path, monkeypatch, capsys):
    records.save(parts("sharing", Record("old", "a")) | parts("heads", Record("old", "a")), tmp_path / "x.json")
    new = Part("heads", ENVIRONMENT, [Record("new", "a")], error="broke")
    monkeypatch.setattr(report, "run_part", lambda name, setting: new)
    assert report.main(["--parts", "heads", "--output", str(tmp_path), "--name", "x"]) == 1
    found = records.load(tmp_path / "x.json")
    assert {name: list(records.by_case(part.records)) for name, part in found.items()} == {
        "sharing": ["old"],
        "heads": ["new"],
    }
    assert "heads did not finish: broke" in capsys.readouterr().out


def test_parts_of_another_machine_are_merged(tmp_path):
    records.save(parts("heads", Record("c", "a", {"floor": 1.0}, SIZES)), tmp_path / "there" / "heads.json")
    arguments = ["--merge", str(tmp_path / "there"), "--output", str(tmp_path), "--name", "gpu"]
    assert report.main(arguments) == 0
    assert list(records.by_case(records.load(tmp_path / "gpu.json")["heads"].records)) == ["c"]
    assert "## heads" in (tmp_path / "gpu.md").read_text()


def test_the_page_has_every_bar_and_every_record():
    measured = {}
    for _, part, met, _ in MET_AND_MISSED.values():
        measured.setdefault(part, Part(part, ENVIRONMENT)).records.extend(met)
    text = page.render(measured, "x", {"heads": "x-heads.png"})
    assert "![" in text and "x-heads.png" in text
    for bar in bars.verdicts(measured):
        assert bar.what in text
    for part in measured.values():
        assert f"## {part.name}" in text and all(f"### {case}" in text for case in records.by_case(part.records))


def test_pictures_are_written_for_parts_that_have_values(tmp_path):
    curve = [Record("N", OURS, {"seconds": 1.0 * n, "peak_mib": 1.0}, {"N": n, "dtype": "float32"}) for n in (8, 16)]
    measured = parts("growth", *curve) | parts("steps", Record("c", "TRL", note="not installed"))
    assert plots.draw(measured, tmp_path, "x") == {"growth": "x-growth.png"}
    assert (tmp_path / "x-growth.png").read_bytes()[:4] == b"\x89PNG"


# Figures of the documents


def test_a_document_gets_the_figures_of_a_file(tmp_path):
    records.save(parts("heads", Record("c", OURS, {"floor": 0.5}, SIZES)), tmp_path / "x.json")
    text = f"It takes <!-- from x: value: heads | c | {OURS} | floor -->9.999<!-- end --> of it."
    assert publish.rendered(text, tmp_path) == text.replace("9.999", "0.500")
    block = "<!-- from x: matrix: c -->\nold\n<!-- end -->"
    assert re.search(r"cpo-kernels +\| \*\*0\.50\*\* \|", publish.rendered(block, tmp_path))
    with pytest.raises(FileNotFoundError):
        publish.rendered(text.replace("from x", "from y"), tmp_path)


def test_the_documents_say_what_the_result_files_say():
    documents = [publish.ROOT / name for name in publish.DOCUMENTS]
    assert publish.outdated(documents) == [], "run `make bench-docs`"


def test_a_changed_figure_in_a_document_is_noticed(tmp_path):
    changed = []
    for name in publish.DOCUMENTS:
        text = (publish.ROOT / name).read_text(encoding="utf-8")
        for match in publish.BLOCK.finditer(text):
            inner = match.group(3)
            other = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), inner, count=1)
            path = tmp_path / Path(name).name
            path.write_text(text[: match.start(3)] + other + text[match.end(3) :], encoding="utf-8")
            changed.append(publish.outdated([path]) == [path])
    assert changed and all(changed)
