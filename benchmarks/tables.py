"""Results as text: the one table that is printed, and the page with every number behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from benchmarks.contestants import FLOOR, FLOOR_REUSED, OURS, OURS_FP32_LOGITS, OURS_PAIRS
from benchmarks.measure import CaseResult, Row
from benchmarks.peers import BUILDERS

if TYPE_CHECKING:
    from benchmarks.report import Report

NONE = "-"
QUALITIES = ("error fp32", "error bf16", "log-likelihood", "peak MiB")
LEGEND = """\
Time of loss and all gradients as a multiple of the floor's (fewest seconds of each; the floor's row is in seconds):
the three bare `torch.mm` of the rows that predict a token, with our plan's chunks, in the same process and in turn.
K = 3 negatives with a reference; rows marked K = 1 contrast pairs of the same tokens (Liger's loss has no other form).
error: largest ||out - ref|| / ||ref|| of loss and gradients against fp64 over the shapes. log-likelihood: largest
error of a 1024-token sum of bf16 inputs, in nats. peak: bytes beyond inputs and gradients at {peak_shape}, in MiB."""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads as plain text; the first column is left-aligned."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (table[0], rule, *table[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(report: Report) -> str:
    """The one table: a row for every contestant, a column for every shape."""
    header = ["", *(case.shape.name for case in report.cases), *QUALITIES]
    rows = [summary_row(report, name) for name in contestants(report)]
    peak_shape = peak_case(report).shape.name
    return f"{markdown(header, rows)}\n\n{LEGEND.format(peak_shape=peak_shape)}\n\n{conditions(report)}"


def contestants(report: Report) -> list[str]:
    """Every name: the floors and ours first, then the peers in their order."""
    ran = {row.contestant for case in report.cases for row in case.rows} | {e.contestant for e in report.logps}
    everyone = (FLOOR, FLOOR_REUSED, OURS, OURS_FP32_LOGITS, OURS_PAIRS, *BUILDERS)
    return [name for name in everyone if name in ran]


def summary_row(report: Report, name: str) -> list[str]:
    """Time over floor on every shape, errors, accuracy and peak of one contestant."""
    cells = [time_cell(case, name) for case in report.cases]
    cells += [error_cell(report.cases, name, dtype) for dtype in ("float32", "bfloat16")]
    logp = next((e.largest for e in report.logps if e.contestant == name), None)
    peak = next((row.peak for row in peak_case(report).rows if row.contestant == name), None)
    return [name, *cells, NONE if logp is None else f"{logp:.2g}", mib(peak)]


def peak_case(report: Report) -> CaseResult:
    """The case whose peaks are in the table: among those with most contestants, the one with most logits."""
    return max(report.cases, key=lambda case: (len(case.rows), case.shape.num_tokens * case.shape.vocab))


def mib(count: int | None) -> str:
    """Bytes as MiB."""
    return NONE if count is None else f"{count / 2**20:.0f}"


def time_cell(case: CaseResult, name: str) -> str:
    """Seconds for the floor, a multiple of it for the others."""
    ratio = case.over_floor(name)
    if ratio is None:
        return NONE
    return f"{case.best(name):.3f} s" if name == FLOOR else f"{ratio:.2f}"


def error_cell(cases: Sequence[CaseResult], name: str, dtype: str) -> str:
    """Largest error of a contestant over the shapes of one dtype."""
    errors = [
        row.errors.worst()
        for case in cases
        if case.shape.dtype_name == dtype
        for row in case.rows
        if row.contestant == name and row.errors is not None
    ]
    return f"{max(errors):.0e}" if errors else NONE


def conditions(report: Report) -> str:
    """What the figures depend on."""
    env = report.environment
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items() if number)  # type: ignore[attr-defined]
    backend = env["backends"].get("cpu", "torch backend")  # type: ignore[attr-defined]
    return (
        f"{env['device']}, {env['threads']} threads, load average {env['load_average']:.1f} at the start; {backend}; "
        f"commit {env['commit']}; Python {env['python']}, {versions}; {report.seconds / 60:.1f} minutes; "
        f"`{env['command']}`"
    )


def details(case: CaseResult) -> str:
    """Every number of one shape."""
    header = ["", "min s", "median s", "rounds", "x floor", "median", "x floor, outputs reused", "x ours"]
    header += ["peak MiB", "error loss", "grad_hidden", "grad_weight"]
    return markdown(header, [details_row(case, row) for row in case.rows])


def details_row(case: CaseResult, row: Row) -> list[str]:
    """One contestant on one shape."""
    base, reused = (next(r.timing for r in case.rows if r.contestant == name) for name in (FLOOR, FLOOR_REUSED))
    same_loss = OURS_PAIRS if row.pairs else OURS
    ours = case.best(same_loss)
    time = row.timing
    cells = [f"{time.best:.4f}", f"{time.median:.4f}", str(len(time.seconds))]
    cells += [f"{time.best / base.best:.3f}", f"{time.median / base.median:.3f}", f"{time.best / reused.best:.3f}"]
    cells += [NONE if ours is None else f"{time.best / ours:.2f}", mib(row.peak)]
    if row.errors is None:
        return [row.contestant, *cells, NONE, NONE, NONE]
    errors = (row.errors.loss, row.errors.grad_hidden, row.errors.grad_weight)
    return [row.contestant, *cells, *(f"{e:.1e}" for e in errors)]


def progress(case: CaseResult) -> str:
    """One line for the log: times over the floor."""
    ratios = (f"{row.contestant} {case.over_floor(row.contestant):.2f}" for row in case.rows if row.contestant != FLOOR)
    return f"  floor {case.best(FLOOR):.3f} s; " + ", ".join(ratios)


def peaks_table(report: Report) -> str:
    """Peaks in processes of their own; what the floor takes beyond the plan is the GEMM library's."""
    rows = [
        [
            p.contestant,
            p.shape,
            str(p.num_tokens),
            f"{p.bytes / 2**20:.1f}",
            NONE if p.planned is None else f"{p.planned / 2**20:.1f}",
            NONE if p.planned is None else f"{p.bytes / p.planned:.3f}",
        ]
        for p in report.peaks
    ]
    return markdown(["", "shape", "N", "peak MiB", "planned MiB", "peak / planned"], rows)


def page(report: Report) -> str:
    """The whole result as Markdown."""
    parts = ["# Benchmark of the head", summary(report)]
    parts += ["## Peak memory beyond inputs and gradients", peaks_table(report)]
    for case in report.cases:
        shape, plan = case.shape, case.plan
        parts += [
            f"## {shape.name}",
            f"V={shape.vocab}, H={shape.hidden}, N={shape.num_tokens} (G={shape.groups}, C={shape.candidates}, "
            f"T={shape.tokens}, of which prompt {shape.prompt_tokens}), {shape.dtype_name}. {shape.reason}. "
            f"Our plan: {plan.num_rows} rows in chunks of {[chunk.num_rows for chunk in plan.chunks]}, "
            f"{plan.bytes / 2**20:.1f} MiB, {plan.gemms:g} GEMMs{'; ' + plan.note if plan.note else ''}.",
            details(case),
        ]
    parts += ["## Log-likelihoods of 1024 tokens, bf16 inputs", logps_table(report)]
    return "\n\n".join(parts) + "\n"


def logps_table(report: Report) -> str:
    """Largest and mean error in nats."""
    rows = [[e.contestant, f"{e.largest:.2e}", f"{e.mean:.2e}"] for e in report.logps]
    return markdown(["error in nats", "largest", "mean"], rows)
