"""Holds what was measured against every bar of the contract: value, bar, met or not, and why not.

Every function of :data:`BARS` is a row of the contract and reads the parts of the suite. Those of :data:`ON_GPU` read
the parts `gpu` and `cuda`, which have the shapes that an H200's bars are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.contestants import FLOOR, OURS, OURS_FP32_LOGITS
from benchmarks.records import Part, Parts, Record, heads, value
from benchmarks.shapes import BAR_4K, BAR_8K, BAR_LOSSES, BAR_NARROW, BAR_PEERS, BAR_QWEN, FROZEN
from benchmarks.tables import markdown

NOT_MEASURED = "not measured"
GPU = "needs an H200"
NO_PROMPT = 0.0
NOTHING = Part("", {})

# Over one product, over the budget, nats, separate rows over shared ones, over an MLE step.
NO_GRAD, PEAK_MEMORY, ACCURACY, SHARING, AUTOREGRESSIVE = 1.03, 1.02, 2e-3, 1.6, 3.0
# On an H200 with H = 4096 in bfloat16: over three products at N = 8192 and at N = 4096, where milliseconds are a bar
# too; GiB beyond inputs and gradients at N = 8192; share of the bandwidth of a copy; the loss of given logits over one.
H200_LOSS, H200_SHORT_LOSS, H200_SHORT_MS = 1.05, 1.04, 17.0
H200_TRAINED_GIB, H200_FROZEN_GIB = 2.1, 1.0
H200_ROWS, H200_LOGITS = 0.9, 1.1

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


@dataclass(frozen=True)
class Bar:
    """Holds one line.

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
        """Return met, missed or not measured."""
        return NOT_MEASURED if self.met is None else "met" if self.met else "**missed**"


def missing(what: str, bar: str, why: str) -> Bar:
    """Return a bar without a value."""
    return Bar(what, "", bar, None, why)


def at_most(what: str, found: float, bar: float, unit: str, why: str = WHY["noise"]) -> Bar:
    """Hold a value against a bar from below."""
    return Bar(what, f"{found:.3g}{unit}", f"<= {bar:g}{unit}", found <= bar, "" if found <= bar else why)


def at_least(what: str, found: float, bar: float, unit: str, why: str = "") -> Bar:
    """Hold a value against a bar from above."""
    return Bar(what, f"{found:.3g}{unit}", f">= {bar:g}{unit}", found >= bar, "" if found >= bar else why)


def on_gpu(part: Part) -> bool:
    """Return whether a part was measured on a GPU."""
    return "gpu" in part.environment


def is_peer(record: Record) -> bool:
    """Return whether a record is neither of ours nor of a floor."""
    return not record.contestant.startswith(("cpo-kernels", "floor"))


def sizes(record: Record) -> str:
    """Return a record's case, with its head and tokens."""
    given = record.conditions
    return f"{record.case} (V={given['V']}, H={given['H']}, N={given['N']})" if "V" in given else record.case


def exact_loss(parts: Parts) -> Iterator[Bar]:
    """Check loss and gradients against three bare products."""
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
    """Check that ours is faster than each peer on the same work."""
    part = heads(parts)
    what = "faster than every peer"
    if part is None:
        yield missing(what, "> 1", NOT_MEASURED)
        return
    yield from against_all(what, part)
    if not on_gpu(part):
        yield missing("faster than Cut Cross-Entropy's kernels and QuACK", "> 1", "they need a GPU")


def against_all(what: str, part: Part) -> Iterator[Bar]:
    """Check every case that has peers."""
    for case in part.cases():
        rivals = [r for r in part.select(case=case) if is_peer(r) and "of_ours" in r.values]
        if rivals:
            yield against_fastest(f"{what}, {case} ({named(rivals)})", rivals)


def named(rivals: Sequence[Record]) -> str:
    """Name few peers, and count many."""
    return f"{len(rivals)} peers" if len(rivals) > 2 else " and ".join(record.contestant for record in rivals)


def against_fastest(what: str, rivals: Sequence[Record]) -> Bar:
    """Check the peer that comes closest."""
    nearest = min(rivals, key=lambda record: record.values["of_ours"])
    found = nearest.values["of_ours"]
    return Bar(what, f"{nearest.contestant}: {found:.2f}x ours", "> 1", found > 1, "" if found > 1 else WHY["peers"])


def row_kernels(parts: Parts) -> Iterator[Bar]:
    """Point to where row kernels are measured: see :func:`gpu_rows`."""
    what = "row kernels against the copy bandwidth of an H200"
    yield missing(what, f">= {H200_ROWS:g}", f"{GPU}: `make gpu-check`")


def peak_memory(parts: Parts) -> Iterator[Bar]:
    """Check peaks beyond inputs and gradients, at few and at many tokens."""
    part = heads(parts)
    records = [r for r in part.select(OURS) if r.case.startswith("peak memory")] if part else []
    if not records:
        yield missing("peak memory beyond inputs and gradients", "the budget + 2 %", NOT_MEASURED)
    for record in records:
        where = f"peak memory beyond inputs and gradients over the budget, {sizes(record)}"
        yield at_most(where, record.values["of_budget"], PEAK_MEMORY, "x")


def without_gradients(parts: Parts) -> Iterator[Bar]:
    """Check log-likelihoods against one product."""
    part = heads(parts)
    records = part.select(OURS, mode="no_grad") if part else []
    if not records:
        yield missing("no_grad sequence log-likelihoods against one product", f"<= {NO_GRAD:g}x", NOT_MEASURED)
    for record in records:
        where = f"no_grad log-likelihoods against one product, {sizes(record)}"
        yield at_most(where, record.values["floor"], NO_GRAD, "x")


def natural_lengths(parts: Parts) -> Iterator[Bar]:
    """Check fifty batches, compilation included; a peer that was stopped beyond our time is slower."""
    what = "50 batches of natural lengths, first call included, against every peer"
    part = parts.get("lengths")
    if part is None:
        yield missing(what, "> 1", NOT_MEASURED)
        return
    yield from against_all(what, part)


def filters(parts: Parts) -> Iterator[Bar]:
    """Check the fastest filter within the error, after 200 steps and later."""
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
    """Check the error of a sum of 1,024 tokens' log-probabilities."""
    what = "sequence log-likelihood against fp64, T = 1024, bf16 inputs, fp32 logits"
    part = heads(parts)
    records = [r for r in part.select(OURS_FP32_LOGITS) if "nats_largest" in r.values] if part else []
    if not records:
        yield missing(what, f"<= {ACCURACY:g} nats", NOT_MEASURED)
    for record in records:
        yield at_most(what, record.values["nats_largest"], ACCURACY, " nats")


def sharing(parts: Parts) -> Iterator[Bar]:
    """Check the body on shared rows."""
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
    """Check our best trainer on the very pairs that TRL's gets."""
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
    """Check time and peak memory of two records."""
    ratio, (theirs, own) = ours.values["of_trl"], value((stock, ours), "peak_mib")
    met = ratio >= 2 and own < theirs
    measured = f"{ours.contestant}: {ratio:.2f}x, {own:.0f} of {theirs:.0f} MiB"
    return Bar(what, measured, ">= 2x, at lower peak memory", met, "" if met else WHY["steps"])


def truncation(parts: Parts) -> Iterator[Bar]:
    """Check a step with truncations against the step without."""
    what = "truncation negatives against the step without them"
    part = parts.get("negatives")
    records = [r for r in part.records if "of_base" in r.values and "truncation" in r.contestant] if part else []
    if not records:
        yield missing(what, "<= 1.05x", NOT_MEASURED)
    for record in records:
        yield at_most(f"{what}: {record.contestant}, {record.case}", record.values["of_base"], 1.05, "x")


def autoregressive(parts: Parts) -> Iterator[Bar]:
    """Check a step with one negative that the model writes against an MLE step."""
    what = "autoregressive negatives, K = 1, against an MLE step"
    part = parts.get("negatives")
    records = [r for r in part.select("autoregressive 1") if "of_mle" in r.values] if part else []
    if not records:
        yield missing(what, f"<= {AUTOREGRESSIVE:g}x", NOT_MEASURED)
    for record in records:
        yield at_most(f"{what}: {record.case}", record.values["of_mle"], AUTOREGRESSIVE, "x", WHY["writing"])


Row = Callable[[Parts], Iterable[Bar]]
BARS: tuple[Row, ...] = (
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
    """Return every bar in the order of the contract."""
    return [bar for of in BARS for bar in list(of(parts)) or [missing(summary_of(of), "", "no result: see its part")]]


# Of the loss on a GPU: case, value, its factor, unit and bar.
LOSS_BARS = (
    (BAR_4K.name, "seconds", 1e3, "ms", H200_SHORT_MS),
    (BAR_4K.name, "floor", 1.0, "x floor", H200_SHORT_LOSS),
    *((shape.name, "floor", 1.0, "x floor", H200_LOSS) for shape in BAR_LOSSES[1:]),
    *(
        (
            shape.name,
            "peak_mib",
            1 / 1024,
            "GiB beyond gradients",
            H200_FROZEN_GIB if shape.mode == FROZEN else H200_TRAINED_GIB,
        )
        for shape in BAR_LOSSES[1:]
    ),
)


def gpu_losses(parts: Parts) -> Iterator[Bar]:
    """Check loss and gradients on a GPU: time, milliseconds and memory; and the ways of the CUDA kernels."""
    gpu, cuda = parts.get("gpu", NOTHING), parts.get("cuda", NOTHING)
    for case, name, factor, unit, bar in LOSS_BARS:
        found = value(gpu.select(OURS, case=case), name)
        what = f"{OURS}, {case}"
        yield at_most(what, factor * found[0], bar, f" {unit}", "") if found else lacking(what, bar, unit)
    for case in [case for case in cuda.cases() if case.endswith(", kept")]:
        ways = [r for r in cuda.select(case=case) if "floor" in r.values and r.contestant != FLOOR]
        if ways:
            best = min(ways, key=lambda record: record.values["floor"])
            what = f"the fastest by the CUDA kernels, {case} ({best.contestant})"
            yield at_most(what, best.values["floor"], H200_LOSS, "x floor", "")
    for record in cuda.select("cpo-kernels cuda"):
        if record.case.startswith("loss of logits") and not record.case.endswith("in L2"):
            yield at_most(f"cpo_loss, {record.case}", record.values["of_copy"], H200_LOGITS, "x copy", "")


def gpu_peers(parts: Parts) -> Iterator[Bar]:
    """Check that ours is faster than every peer that is installed, without a prompt and with half of it."""
    for shape in BAR_PEERS:
        rivals = [r for r in parts.get("gpu", NOTHING).select(case=shape.name) if is_peer(r) and "of_ours" in r.values]
        what = f"faster than every peer, {shape.name}"
        yield against_fastest(what, rivals) if rivals else missing(what, "> 1", NOT_MEASURED)


def gpu_rows(parts: Parts) -> Iterator[Bar]:
    """Check row kernels against a copy, and CUDA's that the table picks against Triton's."""
    found = [r for name in ("gpu", "cuda") for r in parts.get(name, NOTHING).records]
    rows = [r for r in found if r.case.startswith("row kernels") and ", " in r.contestant]
    if not rows:
        yield missing("row kernels against a copy of the logits", f">= {H200_ROWS:g}", NOT_MEASURED)
    for record in rows:
        what = f"{record.contestant}, {record.case.removeprefix('row kernels, ')}"
        if record.contestant.endswith("cuda") or "picked" not in record.conditions:
            yield at_least(what, record.values["of_gbs"], H200_ROWS, " of copy", "")
        if record.conditions.get("picked") and "of_triton" in record.values:
            yield at_least(what, record.values["of_triton"], 1.0, "x Triton", "")


def gpu_peaks(parts: Parts) -> Iterator[Bar]:
    """Check peaks beyond inputs and gradients against the plan and the budget."""
    records = [r for r in parts.get("gpu", NOTHING).select(OURS) if "of_plan" in r.values]
    if not records:
        yield missing("peak memory on a GPU, of the plan and of the budget", f"<= {PEAK_MEMORY:g}", NOT_MEASURED)
    for record in records:
        yield at_most(record.case, record.values["of_plan"], PEAK_MEMORY, " of the plan", "")
        yield at_most(record.case, record.values["of_budget"], PEAK_MEMORY, " of the budget", "")


def gpu_no_grad(parts: Parts) -> Iterator[Bar]:
    """Check log-likelihoods against one product: ours as users call it, and Hopper's fused linear path."""
    for shape in (BAR_8K, BAR_QWEN, BAR_NARROW):
        found = value(parts.get("gpu", NOTHING).select(OURS, case=f"no_grad, {shape.name}"), "of_product")
        what, unit = f"no_grad, {OURS}, {shape.name}", "x one product"
        yield at_most(what, found[0], NO_GRAD, f" {unit}", "") if found else lacking(what, NO_GRAD, unit)
    for record in parts.get("cuda", NOTHING).select("fused linear, cuda"):
        if "of_product" in record.values:
            what = f"{record.case}, {record.contestant}"
            yield at_most(what, record.values["of_product"], NO_GRAD, " x one product", "")


def gpu_accuracy(parts: Parts) -> Iterator[Bar]:
    """Check sequence log-likelihoods of 1,024 bf16 tokens with fp32 logits on a GPU."""
    found = value(parts.get("gpu", NOTHING).select(OURS_FP32_LOGITS), "nats_largest")
    what = f"{OURS_FP32_LOGITS}, log-likelihood"
    yield at_most(what, found[0], ACCURACY, " nats", "") if found else lacking(what, ACCURACY, "nats")


def lacking(what: str, bar: float, unit: str) -> Bar:
    """Return a bar from below that was not measured."""
    return missing(f"{what}, {unit}", f"<= {bar:g} {unit}", NOT_MEASURED)


ON_GPU: dict[Row, Row] = {
    exact_loss: gpu_losses,
    peers: gpu_peers,
    row_kernels: gpu_rows,
    peak_memory: gpu_peaks,
    without_gradients: gpu_no_grad,
    accuracy: gpu_accuracy,
}


def on_a_gpu(parts: Parts) -> list[Bar]:
    """Return every bar that a GPU decides, in the order of the contract: met, missed or not measured."""
    found = []
    for row in BARS:
        told = list(row(parts)) or [missing(summary_of(row), "", NOT_MEASURED)]
        measured = [bar for bar in told if bar.met is not None]
        found += list(ON_GPU[row](parts)) + measured if row in ON_GPU else measured or told
    return found


def summary_of(of: Row) -> str:
    """Say what a row of the contract is about, for one that has no line."""
    return str(of.__doc__).splitlines()[0]


def table(bars: Iterable[Bar]) -> str:
    """Return a table with a row a bar."""
    rows = [[bar.what, bar.measured, bar.bar, bar.verdict, bar.why] for bar in bars]
    return markdown(["what", "measured", "bar", "", "why"], rows, left=range(5))
