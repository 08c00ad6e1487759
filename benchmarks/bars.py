"""Every bar of the contract against what was measured: value, bar, met or not, and why not.

The suite's parts are held against them here, and by :func:`on_a_gpu` what benchmarks.gpu_bench measures, which takes
its bars from the numbers below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.contestants import OURS, OURS_FP32_LOGITS
from benchmarks.records import Part, Parts, Record, heads, value
from benchmarks.tables import markdown

NOT_MEASURED = "not measured"
GPU = "needs an H200"
NO_PROMPT = 0.0

# Over one product, over the budget, nats, separate rows over shared ones, over an MLE step.
NO_GRAD, PEAK_MEMORY, ACCURACY, SHARING, AUTOREGRESSIVE = 1.03, 1.02, 2e-3, 1.6, 3.0
# On an H200 with H = 4096 in bfloat16: over three products at N = 8192 and at N = 4096, where milliseconds are a bar
# too; GiB beyond inputs and gradients at N = 8192; share of the bandwidth of a copy.
H200_LOSS, H200_SHORT_LOSS, H200_SHORT_MS = 1.05, 1.04, 17.0
H200_TRAINED_GIB, H200_FROZEN_GIB = 2.1, 1.0
H200_ROWS = 0.9


@dataclass(frozen=True)
class Bar:
    """One line.

    Attributes:
        what: the bar's row of the contract, and to what it was applied.
        measured: the value in words.
        bar: the value it is held against.
        met: None where it was not measured.
        why: it was missed or not measured, or by what margin.
    """

    what: str
    measured: str
    bar: str
    met: bool | None
    why: str = ""

    @property
    def verdict(self) -> str:
        """Met, missed or not measured."""
        return NOT_MEASURED if self.met is None else "met" if self.met else "**missed**"


def missing(what: str, bar: str, why: str) -> Bar:
    """A bar without a value."""
    return Bar(what, "", bar, None, why)


def at_most(what: str, found: float, bar: float, unit: str, why: str = "") -> Bar:
    """A bar from below."""
    why = why or WHY["noise"]
    return Bar(what, f"{found:.3g}{unit}", f"<= {bar:g}{unit}", found <= bar, "" if found <= bar else why)


def at_least(what: str, found: float, bar: float, unit: str, why: str = "") -> Bar:
    """A bar from above."""
    return Bar(what, f"{found:.3g}{unit}", f">= {bar:g}{unit}", found >= bar, "" if found >= bar else why)


def on_gpu(part: Part) -> bool:
    """Whether a part was measured on one."""
    return "gpu" in part.environment


def is_peer(record: Record) -> bool:
    """Neither ours nor a floor."""
    return not record.contestant.startswith(("cpo-kernels", "floor"))


def sizes(record: Record) -> str:
    """A record's case, with its head and tokens."""
    given = record.conditions
    return f"{record.case} (V={given['V']}, H={given['H']}, N={given['N']})" if "V" in given else record.case


def exact_loss(parts: Parts) -> Iterator[Bar]:
    """Loss and gradients against three bare products."""
    part = heads(parts)
    what = "exact loss and gradients against three bare products"
    if part is None:
        yield missing(what, "<= 1.05", NOT_MEASURED)
        return
    bar, conditions = 1.05, {"mode": "trained", "work": "cpo", "prompt": NO_PROMPT}
    if on_gpu(part):
        bar, conditions = H200_LOSS, conditions | {"N": 8192, "H": 4096, "dtype": "bfloat16"}
    for record in part.select(OURS, **conditions):
        # A case with a note is about a peer that allows so few tokens only.
        if "floor" in record.values and not record.note:
            yield at_most(f"{what}, {sizes(record)}", record.values["floor"], bar, "x")
    if not on_gpu(part):
        yield missing("the same on an H200, bf16, N=8192, H=4096, V=128256", f"<= {H200_LOSS:g}x", GPU)


def peers(parts: Parts) -> Iterator[Bar]:
    """Faster than each peer on the same work."""
    part = heads(parts)
    what = "faster than every peer"
    if part is None:
        yield missing(what, "> 1", NOT_MEASURED)
        return
    yield from against_all(what, part)
    if not on_gpu(part):
        yield missing("faster than Cut Cross-Entropy's kernels and QuACK", "> 1", "they need a GPU")


def against_all(what: str, part: Part) -> Iterator[Bar]:
    """A line for every case that has peers."""
    for case in part.cases():
        rivals = [r for r in part.select(case=case) if is_peer(r) and "of_ours" in r.values]
        if rivals:
            yield against_fastest(f"{what}, {case} ({named(rivals)})", rivals)


def named(rivals: Sequence[Record]) -> str:
    """Few peers by name, many by number."""
    return f"{len(rivals)} peers" if len(rivals) > 2 else " and ".join(record.contestant for record in rivals)


def against_fastest(what: str, rivals: Sequence[Record]) -> Bar:
    """The peer that comes closest."""
    nearest = min(rivals, key=lambda record: record.values["of_ours"])
    found = nearest.values["of_ours"]
    return Bar(what, f"{nearest.contestant}: {found:.2f}x ours", "> 1", found > 1, "" if found > 1 else WHY["peers"])


def row_kernels(parts: Parts) -> Iterator[Bar]:
    """Measured by benchmarks.gpu_bench only, into a page of its own."""
    what = "row kernels against the copy bandwidth of an H200"
    yield missing(what, f">= {H200_ROWS:g}", f"{GPU}: `make gpu-check`")


def peak_memory(parts: Parts) -> Iterator[Bar]:
    """Beyond inputs and gradients, at few and at many tokens."""
    part = heads(parts)
    records = [r for r in part.select(OURS) if r.case.startswith("peak memory")] if part else []
    if not records:
        yield missing("peak memory beyond inputs and gradients", "the budget + 2 %", NOT_MEASURED)
    for record in records:
        where = f"peak memory beyond inputs and gradients over the budget, {sizes(record)}"
        yield at_most(where, record.values["of_budget"], PEAK_MEMORY, "x")


def without_gradients(parts: Parts) -> Iterator[Bar]:
    """Log-likelihoods against one product."""
    part = heads(parts)
    records = part.select(OURS, mode="no_grad") if part else []
    if not records:
        yield missing("no_grad sequence log-likelihoods against one product", f"<= {NO_GRAD:g}x", NOT_MEASURED)
    for record in records:
        where = f"no_grad log-likelihoods against one product, {sizes(record)}"
        yield at_most(where, record.values["floor"], NO_GRAD, "x")


def natural_lengths(parts: Parts) -> Iterator[Bar]:
    """Fifty batches, compilation included; a peer that was stopped beyond our time is slower."""
    what = "50 batches of natural lengths, first call included, against every peer"
    part = parts.get("lengths")
    if part is None:
        yield missing(what, "> 1", NOT_MEASURED)
        return
    yield from against_all(what, part)


def filters(parts: Parts) -> Iterator[Bar]:
    """The fastest filter within the error, after 200 steps and later."""
    what = "candidate_eps and grad_filter_eps on a real run, error <= 1e-3"
    part = parts.get("filters")
    if part is None:
        yield missing(what, "<= 0.6x floor", NOT_MEASURED)
        return
    for case in part.cases():
        found = [r for r in part.select(case=case) if "at error" in r.contestant and "floor" in r.values]
        within = [record for record in found if record.values["error_filter"] <= 1e-3]
        if within:
            best = min(within, key=lambda record: record.values["floor"])
            narrow = case.endswith("bfloat16")
            where = f"{what}, {case}{'' if 'NLL' in case else ', contrast alone'} ({best.contestant})"
            yield at_most(where, best.values["floor"], 0.6, "x floor", WHY["filters" if narrow else "noise"])
        elif found:
            yield Bar(f"{what}, {case}", "no filter within the error", "<= 0.6x floor", False, WHY["noise"])


def accuracy(parts: Parts) -> Iterator[Bar]:
    """Of a sum of 1,024 tokens' log-probabilities."""
    what = "sequence log-likelihood against fp64, T = 1024, bf16 inputs, fp32 logits"
    part = heads(parts)
    records = [r for r in part.select(OURS_FP32_LOGITS) if "nats_largest" in r.values] if part else []
    if not records:
        yield missing(what, f"<= {ACCURACY:g} nats", NOT_MEASURED)
    for record in records:
        yield at_most(what, record.values["nats_largest"], ACCURACY, " nats")


def sharing(parts: Parts) -> Iterator[Bar]:
    """The body on shared rows."""
    what = "prefix sharing, K = 4, the body against K + 1 rows"
    part = parts.get("sharing")
    shared = [record for record in part.select("shared") if "ratio" in record.values] if part else []
    records = [record for record in shared if record.conditions["attention"] != "sdpa-dense"]
    if not records:
        yield missing(what, f">= {SHARING:g}x", NOT_MEASURED)
    for record in records:
        where = f"{what}: {record.conditions['body']}, {record.conditions['attention']}"
        why = WHY.get(record.conditions["attention"], WHY["noise"])
        yield at_least(where, record.values["ratio"], SHARING, "x", why)


def steps(parts: Parts) -> Iterator[Bar]:
    """Our best trainer on the very pairs that TRL's gets."""
    what = "a training step against TRL's, K = 1, half the tokens prompt"
    part = parts.get("steps")
    if part is None:
        yield missing(what, ">= 2x, at lower peak memory", NOT_MEASURED)
        return
    for case in part.cases():
        records = part.select(case=case)
        stock = [r for r in records if r.contestant.startswith("TRL") and r.values.get("of_trl") == 1.0]
        ours = [r for r in records if not r.contestant.startswith("TRL") and "of_trl" in r.values]
        if stock and ours:
            yield against_trl(f"{what}: {case}", stock[0], max(ours, key=lambda r: r.values["of_trl"]))


def against_trl(what: str, stock: Record, ours: Record) -> Bar:
    """Time and peak memory of two records."""
    ratio, (theirs, own) = ours.values["of_trl"], value((stock, ours), "peak_mib")
    met = ratio >= 2 and own < theirs
    measured = f"{ours.contestant}: {ratio:.2f}x, {own:.0f} of {theirs:.0f} MiB"
    return Bar(what, measured, ">= 2x, at lower peak memory", met, "" if met else WHY["steps"])


def truncation(parts: Parts) -> Iterator[Bar]:
    """A step with truncations against the step without."""
    what = "truncation negatives against the step without them"
    part = parts.get("negatives")
    records = [r for r in part.records if "of_base" in r.values and "truncation" in r.contestant] if part else []
    if not records:
        yield missing(what, "<= 1.05x", NOT_MEASURED)
    for record in records:
        yield at_most(f"{what}: {record.contestant}, {record.case}", record.values["of_base"], 1.05, "x")


def autoregressive(parts: Parts) -> Iterator[Bar]:
    """A step with one negative that the model writes against an MLE step."""
    what = "autoregressive negatives, K = 1, against an MLE step"
    part = parts.get("negatives")
    records = [r for r in part.select("autoregressive 1") if "of_mle" in r.values] if part else []
    if not records:
        yield missing(what, f"<= {AUTOREGRESSIVE:g}x", NOT_MEASURED)
    for record in records:
        yield at_most(f"{what}: {record.case}", record.values["of_mle"], AUTOREGRESSIVE, "x", WHY["writing"])


# Why a bar is missed where it is; shown beside it only then.
WHY = {
    "noise": "see median and rounds in the tables: on a virtual machine the same call varies by 10 to 20 %, more where "
    "it touches a gigabyte of fresh memory",
    "peers": "level within the machine's noise: the products are most of the time, and are alike",
    "filters": "at H = 128 softmax takes as long as a product, and the forward is not shortened by a filter; the same "
    "logits from H = 768 (wide) meet the bar",
    "eager": "a model's own eager function computes all scores of a packed row, also those that the mask hides",
    "writing": "the model writes a token at a time",
    "steps": "where the body is most of the step: its products are torch's in both trainers, 1.33 times ours in TRL",
}
BARS: tuple[Callable[[Parts], Iterable[Bar]], ...] = (
    exact_loss,
    peers,
    row_kernels,
    peak_memory,
    without_gradients,
    natural_lengths,
    filters,
    accuracy,
    sharing,
    steps,
    truncation,
    autoregressive,
)


def verdicts(parts: Parts) -> list[Bar]:
    """Every bar in the order of the contract."""
    return [bar for of in BARS for bar in list(of(parts)) or [missing(summary_of(of), "", "no result: see its part")]]


class Measured(Protocol):
    """A figure of benchmarks.gpu_cases."""

    name: str
    value: float
    unit: str
    bar: float | None
    at_least: bool
    verdict: str
    detail: str


# Which cases of benchmarks.gpu_cases decide a bar.
CASES_OF: dict[Callable[[Parts], Iterable[Bar]], tuple[str, ...]] = {
    exact_loss: ("loss",),
    peers: ("loss beside peers",),
    row_kernels: ("row kernels bf16", "row kernels fp32"),
    peak_memory: ("peak memory",),
    without_gradients: ("no_grad",),
    accuracy: ("accuracy",),
}


def on_a_gpu(
    figures: Mapping[str, Sequence[Measured]],
    expected: Mapping[str, Mapping[tuple[str, str], float]],
    parts: Parts,
) -> list[Bar]:
    """Every bar that a GPU decides, in the order of the contract: met, missed or not measured.

    Args:
        figures: of benchmarks.gpu_cases, by case.
        expected: bars by name and unit of the figures that a case must have.
        parts: of the suite, measured on the same device.
    """
    found = []
    for of in BARS:
        cases, told = CASES_OF.get(of, ()), list(of(parts))
        measured = [figure for case in cases for figure in figures.get(case, ()) if figure.bar is not None]
        found += [as_bar(figure) for figure in measured] + [bar for bar in told if bar.met is not None]
        named = {(figure.name, figure.unit) for figure in measured}
        lacking = [
            missing(f"{name}, {unit}", f"<= {bar:g} {unit}", NOT_MEASURED)
            for case in cases
            for (name, unit), bar in expected.get(case, {}).items()
            if (name, unit) not in named
        ]
        if not measured and not lacking and all(bar.met is None for bar in told):
            lacking = told or [missing(summary_of(of), "", NOT_MEASURED)]
        found += lacking
    return found


def as_bar(figure: Measured) -> Bar:
    """A figure that has a bar."""
    sign = ">=" if figure.at_least else "<="
    unit = f" {figure.unit}".rstrip()
    measured = f"{figure.value:.3g}{unit}"
    return Bar(figure.name, measured, f"{sign} {figure.bar:g}{unit}", figure.verdict == "met", figure.detail)


def summary_of(of: Callable[[Parts], Iterable[Bar]]) -> str:
    """What a row of the contract is about, for one that has no line."""
    return str(of.__doc__).splitlines()[0]


def table(bars: Iterable[Bar]) -> str:
    """A row a bar."""
    rows = [[bar.what, bar.measured, bar.bar, bar.verdict, bar.why] for bar in bars]
    return markdown(["what", "measured", "bar", "", "why"], rows, left=range(5))
