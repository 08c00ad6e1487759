"""Part `growth`: time and peak memory of the loss and its gradients as N, V and K grow, and what a small call takes.

A curve is one quantity growing, in bfloat16, whose products are fast, so that the rest of the work weighs most. Peers
that compile keep what they compiled along a curve, with the growing dimension dynamic from the beginning; compiling is
not timed (benchmarks.lengths asks what it costs). A peer whose call takes longer than a limit grows no further. Small
calls are float32, many rounds of ours alone: what surrounds the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.contestants import LineUp
from benchmarks.measure import measure, not_here
from benchmarks.peers import VARYING
from benchmarks.problem import Problem, draw
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.shapes import CCE, Shape, fp32

QUICK_PEERS = ("eager", "F.linear_cross_entropy")  # need no seconds to import or compile
PEERS = ("eager", "torch.compile", "F.linear_cross_entropy", "TRL fused head", CCE)
GROWING = {"N": 0, "K": 1}  # the dimension of hidden states, targets and references; V is dimension 0 of the head
SMALL_CALLS = [fp32("small call", head, 4, 4, variants=False, rounds=120) for head in ((8192, 256), (256, 64))]


@dataclass(frozen=True)
class Sizes:
    """Holds the points of all curves."""

    hidden: int  # H
    vocab: int  # V of the curves in N and K
    tokens: tuple[int, ...]  # N of the curve in N, groups of four candidates of `length` tokens
    vocab_tokens: int  # N of the curve in V
    vocabularies: tuple[int, ...]  # V of the curve in V
    negatives: tuple[int, ...]  # K of the curve in K, two groups of candidates of `length` tokens
    length: int  # tokens of a candidate
    rounds: int  # timed calls of each contestant
    limit: float  # seconds of a call beyond which a peer grows no further; two points are a curve at least
    touched: int = 0  # bytes of memory to be used once before anything is timed

    def curves(self) -> dict[str, list[Shape]]:
        """Return the shapes of each curve by the quantity that grows, the smallest first."""
        base = Shape("", self.vocab, self.hidden, 2, self.length, torch.bfloat16, variants=False, rounds=self.rounds)
        wide = base.with_tokens(self.vocab_tokens)
        return {
            "N": [replace(base.with_tokens(n), name="N") for n in self.tokens],
            "V": [replace(wide, vocab=v, name="V") for v in self.vocabularies],
            "K": [replace(base, candidates=k + 1, name="K") for k in self.negatives],
        }


_VOCABULARIES = (8192, 32768, 131072, 262144)
_POWERS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
ON_CPU = Sizes(256, 50257, (256, 512, 1024, 2048, 4096), 512, _VOCABULARIES, (1, 4, 16), 32, 5, 0.4, 2 * 2**30)
ON_GPU = Sizes(4096, 128256, _POWERS, 8192, _VOCABULARIES[1:], (1, 2, 4, 8, 16), 128, 5, 2.0)
QUICK = Sizes(32, 509, (128, 256), 128, (509, 1021), (1, 2), 16, 1, 10.0)


def run(setting: Setting) -> Iterator[Record]:
    """Measure small calls, then the curves in N, V and K."""
    for shape in SMALL_CALLS:
        line_up = LineUp(draw(replace(shape, rounds=setting.rounds(shape.rounds, shape.rounds)), device=setting.device))
        for record in measure(line_up.case(line_up.everyone(()), peaks=False), setting.device):
            yield replace(record, values={**record.values, "milliseconds": 1e3 * record.values["seconds"]})
    sizes = setting.choose(QUICK, ON_CPU, ON_GPU)
    # A virtual machine gets memory from its host at the first touch, which takes longer than the use.
    torch.ones(sizes.touched, dtype=torch.uint8)
    for along, shapes in sizes.curves().items():
        yield from curve(along, shapes, sizes.limit, setting)


def curve(along: str, shapes: list[Shape], limit: float, setting: Setting) -> Iterator[Record]:
    """Measure the points in turn, with the peers that have not been stopped."""
    torch._dynamo.reset()
    out = {name: "not in a quick run" for name in PEERS if setting.quick and name not in QUICK_PEERS}
    for index, shape in enumerate(shapes):
        line_up = LineUp(mark(draw(shape, device=setting.device), along), setting.ceilings)
        running = line_up.everyone([name for name in PEERS if name not in out], VARYING)
        stopped = [not_here(name, why) for name, why in out.items()]
        records = measure(line_up.case([*running, *stopped]), setting.device)
        yield from records
        out |= {record.contestant: record.note for record in records if not record.values}
        for record in records:
            seconds = record.values.get("seconds", 0.0)
            if index and record.contestant in PEERS and seconds > limit:
                out[record.contestant] = f"grew no further: {seconds:.2f} s a call at the last point"


def mark(problem: Problem, along: str) -> Problem:
    """Tell compilers which dimension grows, as they would find out at the second point."""
    mark_dynamic = torch._dynamo.maybe_mark_dynamic
    if along == "V":
        mark_dynamic(problem.weight, 0)
    else:
        for tensor in (problem.hidden, problem.targets, problem.ref_logps):
            mark_dynamic(tensor, GROWING[along])
    return problem
