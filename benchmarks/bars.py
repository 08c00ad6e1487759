"""Holds what was measured against every bar of the contract: value, bar, met or not, and why not.

Every function of :data:`BARS` is a row of the contract and reads the parts of the suite; the part `gpu` has the shapes
that an H200's bars are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks import records
from benchmarks.contestants import OURS, OURS_FP32_LOGITS
from benchmarks.records import NOTHING, Part, Parts, Record, heads
from benchmarks.shapes import BAR_4K, BAR_LOSSES, FROZEN, LOGPS
from benchmarks.tables import markdown

NOT_MEASURED = "not measured"
GPU = "needs an H200"

# Over three products; over one; over the budget; nats; separate rows over shared ones; over an MLE step; over ours.
LOSS, NO_GRAD, PEAK_MEMORY, ACCURACY, SHARING, AUTOREGRESSIVE, FILTERS = 1.05, 1.03, 1.02, 2e-3, 1.6, 3.0, 0.6
# On an H200 with H = 4096 in bfloat16: over three products at N = 4096, where milliseconds are a bar too; GiB beyond
# inputs and gradients at N = 8192; share of the bandwidth of a copy.
H200_SHORT_LOSS, H200_SHORT_MS, H200_TRAINED_GIB, H200_FROZEN_GIB, H200_ROWS = 1.04, 17.0, 2.1, 1.0, 0.9

# Why a bar is missed where it is; shown beside it only then.
WHY = {
    "noise": "see spread and rounds in the tables: on a virtual machine the same call varies by 10 to 20 %, more where "
    "it touches a gigabyte of fresh memory",
    "peers": "level within the machine's noise: the products are most of the time, and are alike",
    "filters": "at H = 128 softmax takes as long as a product, and the forward is not shortened by a filter",
    "eager": "a model's own eager function computes all scores of a packed row, also those that the mask hides",
    "writing": "the model writes a token at a time",
    "steps": "where the body is most of the step: its products are torch's in both trainers, 1.33 times ours in TRL",
    "gpu": "",
}


@dataclass(frozen=True)
class Bar:
    """Holds one line."""

    what: str  # the bar's row of the contract, and to what it was applied
    measured: str  # the value in words
    bar: str  # the value it is held against
    met: bool | None  # None where it was not measured
    why: str = ""  # it was missed or not measured

    @property
    def verdict(self) -> str:
        """Returns met, missed or not measured."""
        return NOT_MEASURED if self.met is None else "met" if self.met else "**missed**"


def missing(what: str, bar: str = "", why: str = NOT_MEASURED) -> Bar:
    """Return a bar without a value."""
    return Bar(what, "", bar, None, why)


def held(
    found: Iterable[Record],
    name: str,
    bar: float,
    what: str,
    unit: str = "x",
    *,
    label: Callable[[Record], str] = lambda record: "",
    at_least: bool = False,
    factor: float = 1.0,
    why: str = "noise",
) -> Iterator[Bar]:
    """Yield a verdict on a value, times a factor, of every record that has it; one without a value if none has."""
    sign, compared = (">=", float.__ge__) if at_least else ("<=", float.__le__)
    limit = f"{sign} {bar:g}{unit}"
    measured = [record for record in found if name in record.values]
    for record in measured:
        own = factor * float(record.values[name])
        met = compared(own, bar)
        yield Bar(what + label(record), f"{own:.3g}{unit}", limit, met, "" if met else WHY[why])
    if not measured:
        yield missing(what, limit)


def sizes(record: Record) -> str:
    """Return a record's case, with its head and tokens."""
    given = record.conditions
    return f", {record.case}" + (f" (V={given['V']}, H={given['H']}, N={given['N']})" if "V" in given else "")


def exact_loss(parts: Parts) -> Iterator[Bar]:
    """Check loss and gradients against three bare products; on a GPU milliseconds and memory too."""
    what, part = "exact loss and gradients against three bare products", heads(parts)
    if "gpu" not in part.environment:
        # A case with a note is about a peer that allows so few tokens only.
        found = [r for r in part.select(OURS, mode="trained", work="cpo", prompt=0.0) if not r.note]
        yield from held(found, "floor", LOSS, what, label=sizes)
    if "gpu" not in parts:
        yield missing("the same on an H200, bf16, N=8192, H=4096, V=128256", f"<= {LOSS:g}x", GPU)
        return
    for shape in BAR_LOSSES:
        own, what, short = parts["gpu"].select(OURS, case=shape.name), f"{OURS}, {shape.name}", shape == BAR_4K
        yield from held(own, "floor", H200_SHORT_LOSS if short else LOSS, what, "x floor", why="gpu")
        if short:
            yield from held(own, "seconds", H200_SHORT_MS, what, " ms", factor=1e3, why="gpu")
        else:
            gib = H200_FROZEN_GIB if shape.mode == FROZEN else H200_TRAINED_GIB
            yield from held(own, "peak_mib", gib, what, " GiB beyond gradients", factor=1 / 1024, why="gpu")


def peers(parts: Parts) -> Iterator[Bar]:
    """Check that ours is faster than each peer on the same work."""
    what, measured = "faster than every peer", [p for p in (heads(parts), parts.get("gpu", NOTHING)) if p.records]
    for part in measured or [NOTHING]:
        yield from against_all(what, part)
    if not any("gpu" in part.environment for part in measured):
        yield missing("faster than Cut Cross-Entropy's kernels and QuACK", "> 1", "they need a GPU")


def against_all(what: str, part: Part) -> Iterator[Bar]:
    """Check every case that has peers."""
    timed = [record for record in part.select(having="of_ours") if record.is_peer and record.case != LOGPS]
    cases = records.by_case(timed)
    yield from (against_fastest(f"{what}, {name} ({named(rivals)})", rivals) for name, rivals in cases.items())
    if not cases:
        yield missing(what, "> 1")


def named(rivals: Sequence[Record]) -> str:
    """Name few peers, and count many."""
    return f"{len(rivals)} peers" if len(rivals) > 2 else " and ".join(record.contestant for record in rivals)


def against_fastest(what: str, rivals: Sequence[Record]) -> Bar:
    """Check the peer that comes closest."""
    nearest = min(rivals, key=lambda record: record.values["of_ours"])
    found = nearest.values["of_ours"]
    return Bar(what, f"{nearest.contestant}: {found:.2f}x ours", "> 1", found > 1, "" if found > 1 else WHY["peers"])


def row_kernels(parts: Parts) -> Iterator[Bar]:
    """Check row kernels against a copy, and CUDA's that the table picks against Triton's."""
    rows = [r for r in parts.get("gpu", NOTHING).records if r.case.startswith("row kernels") and ", " in r.contestant]
    if not rows:
        what = "row kernels against the copy bandwidth of an H200"
        yield missing(what, f">= {H200_ROWS:g}", f"{GPU}: `make gpu-check`")
    for record in rows:
        what = f"{record.contestant}, {record.case.removeprefix('row kernels, ')}"
        if record.contestant.endswith("cuda") or "picked" not in record.conditions:
            yield from held([record], "of_gbs", H200_ROWS, what, " of copy", at_least=True, why="gpu")
        if record.conditions.get("picked") and "of_triton" in record.values:
            yield from held([record], "of_triton", 1.0, what, "x Triton", at_least=True, why="gpu")


def peak_memory(parts: Parts) -> Iterator[Bar]:
    """Check peaks beyond inputs and gradients, at few and at many tokens."""
    what, found = "peak memory beyond inputs and gradients over the budget", heads(parts).select(OURS)
    yield from held([*found, *parts.get("gpu", NOTHING).select(OURS)], "of_budget", PEAK_MEMORY, what, label=sizes)


def without_gradients(parts: Parts) -> Iterator[Bar]:
    """Check log-likelihoods against one product."""
    what = "no_grad log-likelihoods against one product"
    found = [record for record in heads(parts).select(OURS, mode="no_grad") if record.case != LOGPS]
    yield from held(found, "floor", NO_GRAD, what, label=sizes)
    if "gpu" in parts:
        yield from held(parts["gpu"].select(OURS), "of_product", NO_GRAD, f"on a GPU, {what}", label=sizes, why="gpu")


def natural_lengths(parts: Parts) -> Iterator[Bar]:
    """Check fifty batches, compilation included; a peer that was stopped beyond our time is slower."""
    what = "50 batches of natural lengths, first call included, against every peer"
    yield from against_all(what, parts.get("lengths", NOTHING))


def filters(parts: Parts) -> Iterator[Bar]:
    """Check the fastest filter within the error against our exact call, after 200 steps and later."""
    what = "candidate_eps and grad_filter_eps on a real run, error <= 1e-3, against our exact call"
    found = parts.get("filters", NOTHING).select(having="error_filter")
    filtered = [record for record in found if "at error" in record.contestant and "of_ours" in record.values]
    for name, own in records.by_case(filtered).items():
        within = [record for record in own if record.values["error_filter"] <= 1e-3]
        if not within:
            yield Bar(f"{what}, {name}", "no filter within the error", f"<= {FILTERS:g}x", False, WHY["noise"])
            continue
        best = min(within, key=lambda record: record.values["of_ours"])
        where = f"{what}, {name}{'' if 'NLL' in name else ', contrast alone'} ({best.contestant})"
        yield from held([best], "of_ours", FILTERS, where, why="filters")
    if not filtered:
        yield missing(what, f"<= {FILTERS:g}x")


def accuracy(parts: Parts) -> Iterator[Bar]:
    """Check the error of a sum of 1,024 tokens' log-probabilities."""
    what = "sequence log-likelihood against fp64, T = 1024, bf16 inputs, fp32 logits"
    found = [*heads(parts).select(OURS_FP32_LOGITS), *parts.get("gpu", NOTHING).select(OURS_FP32_LOGITS)]
    yield from held([r for r in found if r.case == LOGPS], "nats_largest", ACCURACY, what, " nats")


def sharing(parts: Parts) -> Iterator[Bar]:
    """Check the body on shared rows."""
    what = "prefix sharing, K = 4, the body against K + 1 rows"
    shared = parts.get("sharing", NOTHING).select("shared", having="ratio")
    found = [record for record in shared if record.conditions["attention"] != "sdpa-dense"]
    if not found:
        yield missing(what, f">= {SHARING:g}x")
    for record in found:
        attention = record.conditions["attention"]
        where = f"{what}: {record.conditions['body']}, {attention}"
        yield from held(
            [record], "ratio", SHARING, where, at_least=True, why="eager" if attention == "eager" else "noise"
        )


def steps(parts: Parts) -> Iterator[Bar]:
    """Check time and peak memory of our best trainer on the very pairs that TRL's gets."""
    what, limit = "a training step against TRL's, K = 1, half the tokens prompt", ">= 2x, at lower peak memory"
    cases = records.by_case(parts.get("steps", NOTHING).select(having="of_trl"))
    for name, found in cases.items():
        stock = [r for r in found if r.contestant.startswith("TRL") and r.values["of_trl"] == 1.0]
        ours = [r for r in found if not r.contestant.startswith("TRL")]
        if stock and ours:
            best = max(ours, key=lambda r: r.values["of_trl"])
            ratio, (theirs, own) = best.values["of_trl"], records.value((stock[0], best), "peak_mib")
            met = ratio >= 2 and own < theirs
            measured = f"{best.contestant}: {ratio:.2f}x, {own:.0f} of {theirs:.0f} MiB"
            yield Bar(f"{what}: {name}", measured, limit, met, "" if met else WHY["steps"])
    if not cases:
        yield missing(what, limit)


def truncation(parts: Parts) -> Iterator[Bar]:
    """Check a step with truncations against the step without."""
    found = [r for r in parts.get("negatives", NOTHING).records if "truncation" in r.contestant]
    what = "truncation negatives against the step without them"
    yield from held(found, "of_base", 1.05, what, label=lambda r: f": {r.contestant}, {r.case}")


def autoregressive(parts: Parts) -> Iterator[Bar]:
    """Check a step with one negative that the model writes against an MLE step."""
    found = parts.get("negatives", NOTHING).select("autoregressive 1")
    what = "autoregressive negatives, K = 1, against an MLE step"
    yield from held(found, "of_mle", AUTOREGRESSIVE, what, label=lambda r: f": {r.case}", why="writing")


Row = Callable[[Parts], Iterable[Bar]]
BARS: tuple[Row, ...] = (
    *(exact_loss, peers, row_kernels, peak_memory, without_gradients, natural_lengths, filters, accuracy, sharing),
    *(steps, truncation, autoregressive),
)


def lines(row: Row, parts: Parts) -> list[Bar]:
    """Return the lines of a row of the contract; one that says what it is about where it has none."""
    return list(row(parts)) or [missing(str(row.__doc__).splitlines()[0])]


def verdicts(parts: Parts) -> list[Bar]:
    """Return every bar in the order of the contract."""
    return [bar for row in BARS for bar in lines(row, parts)]


def table(bars: Iterable[Bar]) -> str:
    """Return a table with a row a bar."""
    rows = [[bar.what, bar.measured, bar.bar, bar.verdict, bar.why] for bar in bars]
    return markdown(["what", "measured", "bar", "", "why"], rows, left=range(5))
