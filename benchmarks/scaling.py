"""Models the cost of the head and of a whole training step, on one device and on many.

`python -m benchmarks.scaling benchmarks/results/NAME.json` prints what it predicts for the single-device points that
were measured there, and for a model of 70 billion parameters on 8 to 1024 GPUs. Nothing here is measured: products take
their FLOPs at a machine's rate, softmax and gradient the bytes of their passes over the logits, collectives their bytes
over the links. What is not in it: launches, imbalance, attention's own inefficiency, failures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import records
from benchmarks.contestants import OURS
from benchmarks.records import Part, Parts
from benchmarks.tables import markdown

GB, GIB = 1e9, 2**30
STATE_BYTES = 16  # of a trained parameter: bf16 weight and gradient, fp32 weight and two moments of Adam
WEIGHT_BYTES = 2
PRODUCTS = {"trained": 3, "frozen": 2, "no_grad": 1}  # a (R, V) by (V, H) product each
PASSES = {"trained": 3, "frozen": 3, "no_grad": 1}  # over the logits: read; then read and written as a gradient
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Machine:
    """Describes one device and its links, as rates that are reached, not peaks.

    Attributes:
        flops: FLOP/s of large products.
        memory: bytes/s of a copy, read and written.
        capacity: bytes of the device.
        link: bytes/s of a device to the others of its node, one direction.
        network: bytes/s of a device to other nodes, one direction.
        node: devices of a node.
    """

    name: str
    flops: float
    memory: float
    capacity: float = float("inf")
    link: float = float("inf")
    network: float = float("inf")
    node: int = 1


# NVIDIA's data sheets: 989 dense bf16 TFLOP/s, 4.8 TB/s, 141 GB, NVLink 450 GB/s and 400 Gbit/s each way. Products are
# taken at 70 % of the peak, memory and links at 80 %.
H200 = Machine("H200", 0.7 * 989e12, 0.8 * 4.8e12, 141 * GB, 0.8 * 450 * GB, 0.8 * 50 * GB, 8)


@dataclass(frozen=True)
class Model:
    """Describes a transformer: P parameters outside of embedding and head, L layers of width H, V words."""

    name: str
    body: float
    layers: int
    hidden: int
    vocab: int

    @property
    def head(self) -> float:
        """Count the parameters of the head."""
        return float(self.vocab * self.hidden)


LLAMA_70B = Model("Llama-3-70B", 70.55e9 - 2 * 128256 * 8192, 80, 8192, 128256)


@dataclass(frozen=True)
class Step:
    """Says what one device does in a step: groups of a prompt and K + 1 completions, of so many tokens each."""

    groups: int = 1
    prompt: int = 1024
    completion: int = 1024
    negatives: int = 4
    shared: bool = True  # the prompt runs once a group

    @property
    def rows(self) -> int:
        """Return R: positions that predict a token of a completion."""
        return self.groups * (self.negatives + 1) * self.completion

    @property
    def positions(self) -> int:
        """Count the positions that the body runs on."""
        prompts = 1 if self.shared else self.negatives + 1
        return self.groups * prompts * self.prompt + self.rows


def head_seconds(
    machine: Machine, rows: float, vocab: float, hidden: float, itemsize: int, mode: str = "trained"
) -> float:
    """Return the seconds of R rows against a (V, H) head on one device: 2 R V H FLOPs a product, and the passes."""
    products = PRODUCTS[mode] * 2.0 * rows * vocab * hidden / machine.flops
    return products + PASSES[mode] * rows * vocab * itemsize / machine.memory


def all_reduce_seconds(machine: Machine, size: float, devices: int) -> float:
    """Return those of `size` bytes over all devices: within nodes, and the parts reduced between them."""
    inner = min(devices, machine.node)
    nodes = devices / inner
    within = 2 * (inner - 1) / inner * size / machine.link
    return within + 2 * (nodes - 1) / nodes * (size / inner) / machine.network


def all_gather_seconds(machine: Machine, size: float, devices: int) -> float:
    """Return those of `size` bytes in all, each device bringing its share; a reduce-scatter takes as long."""
    return all_reduce_seconds(machine, size, devices) / 2


@dataclass(frozen=True)
class HeadCost:
    """Holds, of one device in a step, seconds of work, seconds of communication, bytes held."""

    layout: str
    work: float
    communication: float
    memory: float


def head_costs(machine: Machine, model: Model, step: Step, devices: int, budget: float = GIB) -> list[HeadCost]:
    """Return the costs of the head held whole, sharded as FSDP does it, and along the vocabulary within a node.

    The engine multiplies by the weight three times while it is there, so a fully sharded head is gathered once.
    """
    weight = WEIGHT_BYTES * model.head
    work = head_seconds(machine, step.rows, model.vocab, model.hidden, WEIGHT_BYTES)
    logits = min(float(budget), step.rows * model.vocab * WEIGHT_BYTES)
    hidden = 2.0 * WEIGHT_BYTES * step.rows * model.hidden  # and its gradient
    whole = HeadCost(
        "data parallel",
        work,
        all_reduce_seconds(machine, weight, devices),
        STATE_BYTES * model.head + logits + hidden,
    )
    sharded = HeadCost(
        "fully sharded",
        work,
        2 * all_gather_seconds(machine, weight, devices),  # the weight, and its gradient reduced and scattered
        STATE_BYTES * model.head / devices + 2 * weight + logits + hidden,
    )
    return [whole, sharded, vocabulary_parallel(machine, model, step, devices, logits)]


def vocabulary_parallel(machine: Machine, model: Model, step: Step, devices: int, logits: float) -> HeadCost:
    """Give every device V / t words and the rows of all t devices of its node: the same FLOPs are to be done."""
    shards = min(machine.node, devices)
    rows = shards * step.rows
    work = head_seconds(machine, rows, model.vocab / shards, model.hidden, WEIGHT_BYTES)
    hidden = all_gather_seconds(machine, WEIGHT_BYTES * rows * model.hidden, shards)
    statistics = all_gather_seconds(machine, shards * 3 * 4.0 * rows, shards)  # maximum, log of sum, log-probability
    grad_hidden = all_reduce_seconds(machine, 4.0 * rows * model.hidden, shards)
    # Replicas of a shard are one to a node, each with its own way out of it.
    across = replace(machine, node=1)
    grad_weight = all_reduce_seconds(across, WEIGHT_BYTES * model.head / shards, max(1, devices // shards))
    held = 2.0 * WEIGHT_BYTES * rows * model.hidden + STATE_BYTES * model.head / shards + logits
    return HeadCost("vocabulary parallel", work, hidden + statistics + grad_hidden + grad_weight, held)


@dataclass(frozen=True)
class StepCost:
    """Holds the cost of a fully sharded body with activations recomputed, and the reference's forward."""

    seconds: float  # compute, or communication where that takes longer
    communication: float
    memory: float


def body_cost(machine: Machine, model: Model, step: Step, devices: int, *, reference: bool = True) -> StepCost:
    """Return forward, recomputed forward and backward, and a reference's forward; weights are gathered for each."""
    per_position = 2.0 * model.body + 4.0 * model.layers * model.hidden * (step.prompt + step.completion) / 2
    forwards = 4.0 + (1.0 if reference else 0.0)  # a backward is two forwards
    compute = forwards * per_position * step.positions / machine.flops
    gathered = all_gather_seconds(machine, WEIGHT_BYTES * model.body, devices)
    communication = gathered * (3 + (1 if reference else 0))  # forward, backward, gradients scattered; reference
    states = (STATE_BYTES + (WEIGHT_BYTES if reference else 0)) * model.body / devices
    layers = 2.0 * WEIGHT_BYTES * model.body / model.layers  # one in use, one on its way
    activations = WEIGHT_BYTES * step.positions * model.hidden * (model.layers + 34)  # inputs of all, one layer whole
    return StepCost(max(compute, communication), communication, states + layers + activations)


def eager_logits(model: Model, step: Step) -> float:
    """Count what a head without fusion holds: bf16 logits, their fp32 copy, its log-softmax and gradient."""
    rows = replace(step, shared=False).positions
    return rows * model.vocab * (WEIGHT_BYTES + 3.0 * 4)


DEVICES = (8, 16, 64, 256, 1024)


def predictions(machine: Machine = H200, model: Model = LLAMA_70B, step: Step | None = None) -> str:
    """Return a row for every number of devices and layout of the head."""
    step = step or Step()
    header = ["GPUs", "head", "head's work, ms", "its communication, ms", "step, s", "head's share"]
    header += ["head, GiB a GPU", "all, GiB a GPU", "fits"]
    rows = []
    reference = head_seconds(machine, step.rows, model.vocab, model.hidden, WEIGHT_BYTES, "no_grad")
    for devices in DEVICES:
        body = body_cost(machine, model, step, devices)
        # The embedding, and embedding and head of the reference.
        rest = (STATE_BYTES + 2 * WEIGHT_BYTES) * model.head / devices
        for head in head_costs(machine, model, step, devices):
            head = replace(head, work=head.work + reference)
            seconds = body.seconds + head.work + head.communication
            held = body.memory + rest + head.memory
            cells = [f"{1e3 * head.work:.0f}", f"{1e3 * head.communication:.0f}", f"{seconds:.2f}"]
            cells += [f"{(head.work + head.communication) / seconds:.1%}", f"{head.memory / GIB:.1f}"]
            cells += [f"{held / GIB:.0f}", "yes" if held <= machine.capacity else "no"]
            rows.append([str(devices), head.layout, *cells])
    return markdown(header, rows, left=(1,))


@dataclass(frozen=True)
class Point:
    """Holds the seconds of one case, predicted from the machine's ceilings and measured."""

    case: str
    predicted: float
    measured: float


def measured_machine(part: Part, dtype: str) -> Machine | None:
    """Return this machine's ceilings, None where the part has none of that dtype."""
    ceilings = part.select(case="ceilings")
    products = records.value((r for r in ceilings if r.contestant.endswith(dtype)), "tflops")
    copies = records.value((r for r in ceilings if r.contestant == "copy"), "gbs")
    return Machine("measured", 1e12 * max(products), 1e9 * max(copies)) if products and copies else None


def points(parts: Parts) -> Iterator[Point]:
    """Yield what the model says of our calls in the parts `heads` and `growth`."""
    if "heads" not in parts:
        return
    machines = {dtype: measured_machine(parts["heads"], dtype) for dtype in ITEMSIZE}
    for record in [*records.heads(parts).select(OURS), *parts.get("growth", Part("growth", {})).select(OURS)]:
        sizes = record.conditions
        machine = machines.get(sizes.get("dtype", ""))
        if machine is None or "seconds" not in record.values or sizes.get("work", "cpo") != "cpo" or "V" not in sizes:
            continue
        rows = sizes["N"] * (1 - sizes.get("prompt", 0.0))
        mode = sizes.get("mode", "trained")
        predicted = head_seconds(machine, rows, sizes["V"], sizes["H"], ITEMSIZE[sizes["dtype"]], mode)
        name = f"{record.case}, N={sizes['N']}, V={sizes['V']}, H={sizes['H']}, {sizes['dtype']}, {mode}"
        yield Point(name, predicted, record.values["seconds"])


def memory_points(parts: Parts, budget: float = 256 * 2**20) -> Iterator[Point]:
    """Yield peaks along N in the part `growth`, in MiB: the logits, or the default budget where that is less."""
    for record in parts.get("growth", Part("growth", {})).select(OURS, case="N"):
        if "peak_mib" in record.values:
            sizes = record.conditions
            predicted = min(budget, float(sizes["N"]) * sizes["V"] * ITEMSIZE[sizes["dtype"]]) / 2**20
            yield Point(f"peak, N={sizes['N']}, V={sizes['V']}", predicted, record.values["peak_mib"])


def check(found: Sequence[Point], unit: str = "s") -> str:
    """Return predictions beside measurements."""
    rows = [[p.case, f"{p.predicted:.3g}", f"{p.measured:.3g}", f"{p.measured / p.predicted:.2f}"] for p in found]
    return markdown(["case", f"predicted, {unit}", f"measured, {unit}", "measured / predicted"], rows)


def main(argv: list[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON of benchmarks.report")
    args = parser.parse_args(argv)
    parts = records.load(args.results)
    print(check(list(points(parts))), check(list(memory_points(parts)), "MiB"), predictions(), sep="\n\n")


if __name__ == "__main__":
    main()
