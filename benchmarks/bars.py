"""Holds what was measured against every bar of the contract: value, bar, met or not, and why not.

Every function of :data:`BARS` is a row of the contract and reads the parts of the suite; the part `gpu` has the shapes
that an H200's bars are for. Nothing of a part that is void counts, nor a comparison of unequal numbers of rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks import records
from benchmarks.contestants import OURS, OURS_FP32_LOGITS
from benchmarks.records import NOTHING, Part, Parts, Record
from benchmarks.shapes import BAR_4K, BAR_LOSSES, FROZEN, LOGPS, NO_GRAD
from benchmarks.tables import markdown

NOT_MEASURED = "not measured yet"
GPU = "needs an H200"

# Shares of the peak, at heads of real models and at small sizes; over one product; over the budget; nats; separate
# rows over shared ones; over an MLE step; over ours; TRL's step over ours, and a share of Amdahl's bound.
LOSS, SMALL_LOSS, NO_GRAD_LOSS, PEAK_MEMORY, ACCURACY = 0.92, 0.85, 1.03, 1.02, 2e-3
SHARING, AUTOREGRESSIVE, OF_MULTIPLY_ADDS, FILTERS, TRUNCATION = 1.6, 3.0, 1.3, 0.6, 1.05
STEP, BOUND_FOR_STEP, OF_BOUND = 2.0, 2.2, 0.9
# On an H200 with H = 4096 in bfloat16: over three products at N = 8192 and at 4096, where milliseconds are a bar too;
# GiB beyond inputs and gradients at N = 8192; share of the bandwidth of a copy.
H200_LOSS, H200_SHORT_LOSS, H200_SHORT_MS = 1.05, 1.04, 17.0
H200_TRAINED_GIB, H200_FROZEN_GIB, H200_ROWS = 2.1, 1.0, 0.9
SMALL = ({"V": 8192, "H": 256, "N": 512}, {"V": 50257, "N": 256})  # of the part growth

# Why a bar is missed where it is; shown beside it only then.
WHY = {
    "noise": "see spread and rounds in the tables: on a virtual machine the same call varies by 10 to 20 %, more where "
    "it touches a gigabyte of fresh memory",
    "peak": "what surrounds the products, and their edges",
    "peers": "level within the machine's noise: the products are most of the time, and are alike",
    "filters": "at H = 128 softmax takes as long as a product, and the forward is not shortened by a filter",
    "accuracy": "logits are rounded to bfloat16 by default; `logits_dtype=torch.float32` keeps them",
    "eager": "a model's own eager function computes all scores of a packed row, also those that the mask hides",
    "writing": "the model writes a token at a time",
    "steps": "the products of the head are a part of the step that no kernel makes free",
    "gpu": "",
}
SEPARATE, BOUND = f"{OURS}, sharing off", "bound: the head for nothing"
DROP_IN = "as a drop-in for TRL"
BESIDE_STEPS = {OURS: "prefixes shared", "FusedDPO": DROP_IN, "FusedCPO": DROP_IN, BOUND: "Amdahl's bound"}
OF_PEAK = {"unit": "%", "factor": 100, "at_least": True, "why": "peak"}
AT_PEAK = "of_bound_at_peak"  # of Amdahl's bound, that of a step whose head runs its products at the peak


@dataclass(frozen=True)
class Bar:
    """Holds one line."""

    what: str  # the bar's row of the contract, and to what it was applied
    bar: str = ""  # the value it is held against
    measured: str = ""  # the value in words
    met: bool | None = None  # None where it was not measured
    why: str = ""  # it was missed or not measured

    @property
    def verdict(self) -> str:
        """Returns met, missed or not measured."""
        return NOT_MEASURED if self.met is None else "met" if self.met else "**missed**"


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
        told = f"{own:.4g}{unit}{spread(record)}{bare_products(record) if name == 'of_peak' else ''}"
        yield Bar(what + label(record), limit, told, met, "" if met else WHY[why])
    if not measured:
        yield Bar(what, limit)


def spread(record: Record) -> str:
    """Return how far the middle half of the rounds lies apart."""
    return f" ± {record.values['spread'] / 2:.0%}" if "spread" in record.values else ""


def bare_products(record: Record) -> str:
    """Return the share of the peak that the products of the same call have alone, by our kernels."""
    values = record.values
    return f"; its bare products {values['of_peak'] * values['floor_ours']:.1%}" if "floor_ours" in values else ""


def sizes(record: Record) -> str:
    """Return a record's case, with its head and tokens."""
    given = record.conditions
    return f", {record.case}" + (f" (V={given['V']}, H={given['H']}, N={given['N']})" if "V" in given else "")


def exact_loss(parts: Parts) -> Iterator[Bar]:
    """Check loss and gradients against the peak of the CPU; on a GPU against bare products, milliseconds and memory."""
    what, part = "exact loss and gradients as a share of the peak", parts.get("heads", NOTHING)
    if "gpu" not in part.environment:
        # A case with a note is about a peer that allows so few tokens only.
        own = [r for r in part.select(OURS, work="cpo", prompt=0.0) if not r.note and r.conditions["mode"] != NO_GRAD]
        yield from held(own, "of_peak", 100 * LOSS, what, label=sizes, **OF_PEAK)
    if "gpu" not in parts:
        yield Bar("loss and gradients on an H200, N=8192, H=4096, V=128256", f"<= {H200_LOSS:g}x floor", why=GPU)
        return
    for shape in BAR_LOSSES:
        own, what, short = parts["gpu"].select(OURS, case=shape.name), f"{OURS}, {shape.name}", shape == BAR_4K
        yield from held(own, "floor", H200_SHORT_LOSS if short else H200_LOSS, what, "x floor", why="gpu")
        if short:
            yield from held(own, "seconds", H200_SHORT_MS, what, " ms", factor=1e3, why="gpu")
        else:
            gib = H200_FROZEN_GIB if shape.mode == FROZEN else H200_TRAINED_GIB
            yield from held(own, "peak_mib", gib, what, " GiB beyond gradients", factor=1 / 1024, why="gpu")


def small_sizes(parts: Parts) -> Iterator[Bar]:
    """Check the share of the peak at small sizes, and that no peer is faster anywhere on a curve."""
    what, part = "the same at small sizes", parts.get("growth", NOTHING)
    if "gpu" not in part.environment:
        own = [record for where in SMALL for record in part.select(OURS, **where) if record.case in ("N", "V")]
        yield from held(own, "of_peak", 100 * SMALL_LOSS, what, label=sizes, **OF_PEAK)
    yield from against_all("faster than every peer as N, V and K grow", part)


def peers(parts: Parts) -> Iterator[Bar]:
    """Check that ours is faster than each peer on the same work."""
    what = "faster than every peer"
    measured = [part for name in ("heads", "gpu") if (part := parts.get(name, NOTHING)).records]
    for part in measured or [NOTHING]:
        yield from against_all(what, part)
    if not any("gpu" in part.environment for part in measured):
        yield Bar("faster than Cut Cross-Entropy's kernels and QuACK", "> 1", why="they need a GPU")


def against_all(what: str, part: Part, value: str = "of_ours") -> Iterator[Bar]:
    """Check every case that has peers, and every point of a curve."""
    timed = [record for record in part.select(having=value) if record.is_peer and record.case != LOGPS]
    cases: dict[str, list[Record]] = {}
    for record in timed:
        cases.setdefault(sizes(record) if part.name == "growth" else f", {record.case}", []).append(record)
    for name, rivals in cases.items():
        yield against_fastest(f"{what}{name}", rivals, part, value)
    if not cases:
        yield Bar(what, "> 1")


def against_fastest(what: str, rivals: Sequence[Record], part: Part, value: str) -> Bar:
    """Check the peer that comes closest, of those that were timed as often as ours."""
    fair = [record for record in rivals if record.values.get("rounds") == rounds_of_ours(record, part)]
    left = f" ({len(rivals) - len(fair)} had fewer rounds)" if len(fair) < len(rivals) else ""
    if not fair:
        return Bar(what, "> 1", why=f"of unequal numbers of rounds{left}")
    nearest = min(fair, key=lambda record: record.values[value])
    found, stopped = nearest.values[value], ">= " if nearest.stopped else ""
    done = f", {nearest.values['batches']:.0f} batches done" if nearest.stopped else ""
    named = f"{nearest.contestant}: {stopped}{found:.2f}x ours{spread(nearest)}{done}; {len(fair)} peers{left}"
    return Bar(what, "> 1", named, found > 1, "" if found > 1 else WHY["peers"])


def rounds_of_ours(record: Record, part: Part) -> float | None:
    """Return how often ours was timed beside a peer."""
    sizes = {key: record.conditions.get(key) for key in ("V", "N")}
    own = [r for r in part.select(OURS, case=record.case, having="rounds", **sizes) if r.values.get("rounds")]
    return own[0].values["rounds"] if own else record.values.get("rounds")


def row_kernels(parts: Parts) -> Iterator[Bar]:
    """Check row kernels against a copy, and CUDA's that the table picks against Triton's."""
    rows = [r for r in parts.get("gpu", NOTHING).records if r.case.startswith("row kernels") and ", " in r.contestant]
    if not rows:
        what = "row kernels against the copy bandwidth of an H200"
        yield Bar(what, f">= {H200_ROWS:g}", why=f"{GPU}: `make gpu-check`")
    for record in rows:
        what = f"{record.contestant}, {record.case.removeprefix('row kernels, ')}"
        if record.contestant.endswith("cuda") or "picked" not in record.conditions:
            yield from held([record], "of_gbs", H200_ROWS, what, " of copy", at_least=True, why="gpu")
        if record.conditions.get("picked") and "of_triton" in record.values:
            yield from held([record], "of_triton", 1.0, what, "x Triton", at_least=True, why="gpu")


def peak_memory(parts: Parts) -> Iterator[Bar]:
    """Check all that a call takes beyond inputs and gradients against its budget, at few and at many tokens."""
    what, found = "peak memory over the budget, default and explicit", parts.get("heads", NOTHING).select(OURS)
    yield from held([*found, *parts.get("gpu", NOTHING).select(OURS)], "of_budget", PEAK_MEMORY, what, label=sizes)


def without_gradients(parts: Parts) -> Iterator[Bar]:
    """Check log-likelihoods against one product, the faster one."""
    what = "no_grad log-likelihoods over one product"
    found = [record for record in parts.get("heads", NOTHING).select(OURS, mode=NO_GRAD) if record.case != LOGPS]
    floor = "floor_ours" if any("floor_ours" in record.values for record in found) else "floor"
    yield from held(found, floor, NO_GRAD_LOSS, what, label=sizes)
    if "gpu" in parts:
        found, what = parts["gpu"].select(OURS), f"on a GPU, {what}"
        yield from held(found, "of_product", NO_GRAD_LOSS, what, label=sizes, why="gpu")


def natural_lengths(parts: Parts) -> Iterator[Bar]:
    """Check fifty batches, compilation included, and what a call takes after ten of them."""
    part = parts.get("lengths", NOTHING)
    yield from against_all("50 batches of natural lengths, first call included", part)
    yield from against_all("a call after the first ten batches", part, "steady_of_ours")


def filters(parts: Parts) -> Iterator[Bar]:
    """Check the fastest filter within the error against our exact call, at steps after the one that chose its eps."""
    what = "filters on a real run, gradient error <= 1e-3, over our exact call"
    found = parts.get("filters", NOTHING).select(having="error_filter")
    filtered = [record for record in found if "at error" in record.contestant and "of_ours" in record.values]
    for name, own in records.by_case(filtered).items():
        within = [record for record in own if record.values["error_filter"] <= 1e-3]
        if not within:
            yield Bar(f"{what}, {name}", f"<= {FILTERS:g}x", "no filter within the error", False, WHY["noise"])
            continue
        best = min(within, key=lambda record: record.values["of_ours"])
        where = f"{what}, {name}{'' if 'NLL' in name else ', contrast alone'} ({best.contestant})"
        yield from held([best], "of_ours", FILTERS, where, why="filters")
    if not filtered:
        yield Bar(what, f"<= {FILTERS:g}x")


def accuracy(parts: Parts) -> Iterator[Bar]:
    """Check the error of a sum of 1,024 tokens' log-probabilities: by default, on a GPU with float32 logits."""
    what = "sequence log-likelihood against float64, T = 1024, bfloat16 inputs"
    part = parts.get("heads", NOTHING)
    found = [] if "gpu" in part.environment else part.select(OURS, case=LOGPS)
    found += parts.get("gpu", NOTHING).select(OURS_FP32_LOGITS, case=LOGPS)
    yield from held(found, "nats_largest", ACCURACY, what, " nats", why="accuracy")


def sharing(parts: Parts) -> Iterator[Bar]:
    """Check the body on shared rows."""
    what = "prefix sharing, K = 4, the body against K + 1 rows"
    found = parts.get("sharing", NOTHING).select("shared", having="ratio")
    if not found:
        yield Bar(what, f">= {SHARING:g}x")
    for record in found:
        attention = record.conditions["attention"]
        where, why = f"{what}: {record.conditions['body']}, {attention}", "eager" if attention == "eager" else "noise"
        yield from held([record], "ratio", SHARING, where, at_least=True, why=why)


def steps(parts: Parts) -> Iterator[Bar]:
    """Check time and peak memory of a step without prefix sharing on the very pairs that TRL's trainer gets."""
    what = "a training step against TRL's, K = 1, half the tokens prompt, without prefix sharing"
    limit = f">= {OF_BOUND:.0%} of Amdahl's bound, {STEP:g}x where that is >= {BOUND_FOR_STEP:g}; less memory"
    cases = records.by_case(parts.get("steps", NOTHING).select(having="of_trl"))
    for name, found in cases.items():
        by_name = {record.contestant.split("Trainer")[0]: record for record in found}
        own, ratios = by_name.get(SEPARATE), {who: record.values["of_trl"] for who, record in by_name.items()}
        if own is None or "TRL" not in by_name:
            continue
        more = [f"{ratios[who]:.2f}x {word}" for who, word in BESIDE_STEPS.items() if who in ratios]
        (theirs, ours), ratio = records.value((by_name["TRL"], own), "peak_mib"), ratios[SEPARATE]
        measured = f"{ratio:.2f}x{spread(own)} ({', '.join(more)}), {ours:.0f} of {theirs:.0f} MiB"
        if BOUND not in ratios:
            yield Bar(f"{what}: {name}", limit, measured, why="Amdahl's bound was not measured")
            continue
        least = max(OF_BOUND * ratios[BOUND], STEP if ratios[BOUND] >= BOUND_FOR_STEP else 0.0)
        met, why = ratio >= least and ours < theirs, WHY["steps"]
        if AT_PEAK in by_name[BOUND].values:
            why += f"; at the machine's peak they would leave {by_name[BOUND].values[AT_PEAK]:.0%} of the bound"
        yield Bar(f"{what}: {name}", limit, measured, met, "" if met else why)
    if not cases:
        yield Bar(what, limit)


def truncation(parts: Parts) -> Iterator[Bar]:
    """Check a step with truncations against the step without."""
    found = [r for r in parts.get("negatives", NOTHING).records if "truncation" in r.contestant]
    what = "truncation negatives over the step without them"
    yield from held(found, "of_base", TRUNCATION, what, label=lambda r: f": {r.contestant}, {r.case}")


def autoregressive(parts: Parts) -> Iterator[Bar]:
    """Check a step with one negative that the model writes against an MLE step; with two, by their multiply-adds."""
    part, what = parts.get("negatives", NOTHING), "autoregressive negatives, K = {}, over an MLE step"
    found = part.select("autoregressive 1")
    yield from held(found, "of_mle", AUTOREGRESSIVE, what.format(1), label=lambda r: f": {r.case}", why="writing")
    for record in part.select("autoregressive 2", having="multiply_adds"):
        bound = record.values["multiply_adds"]
        where = f"{what.format(2)}: {record.case}; its multiply-adds are {bound:.2f}x an MLE step's"
        yield from held([record], "of_mle", OF_MULTIPLY_ADDS * bound, where, why="writing")


Row = Callable[[Parts], Iterable[Bar]]
BARS: tuple[Row, ...] = (
    *(exact_loss, small_sizes, peers, row_kernels, peak_memory, without_gradients, natural_lengths, filters, accuracy),
    *(sharing, steps, truncation, autoregressive),
)


def lines(row: Row, parts: Parts) -> list[Bar]:
    """Return the lines of a row of the contract; one that says what it is about where it has none."""
    counted = {name: part for name, part in parts.items() if not part.void}
    return list(row(counted)) or [Bar(str(row.__doc__).splitlines()[0])]


def verdicts(parts: Parts) -> list[Bar]:
    """Return every bar in the order of the contract."""
    return [bar for row in BARS for bar in lines(row, parts)]


def table(bars: Iterable[Bar]) -> str:
    """Return a table with a row a bar."""
    rows = [[bar.what, bar.measured, bar.bar, bar.verdict, bar.why] for bar in bars]
    return markdown(["what", "measured", "bar", "", "why"], rows, left=range(5))


def summary(parts: Parts) -> str:
    """Return a row for every row of the contract: how many of its cases met their bar, and the first that did not."""
    rows = []
    for row in BARS:
        found = lines(row, parts)
        told = sorted(found, key=lambda bar: (bar.met is None, bar.met is True))
        met, missed = ([bar for bar in found if bar.met is state] for state in (True, False))
        counts = f"{len(met)} of {len(met) + len(missed)}" if met or missed else NOT_MEASURED
        rows.append([told[0].what, told[0].measured, told[0].bar, counts, told[0].why])
    header = ["the first case that missed, or was measured", "measured", "bar", "met", "why"]
    return markdown(header, rows, left=range(5))
