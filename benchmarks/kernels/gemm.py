"""The engine's three matrix products: the compiled GEMM against what torch ships, in one process, interleaved.

G1: logits = hidden @ weight.T.  G2: grad_hidden = dlogits @ weight.  G3: grad_weight += dlogits.T @ hidden.
For bf16, torch.mm can only write bf16 (G3 without accumulating); ours writes G1 and G2 in bf16 and sums G3 in fp32,
and the rows "fp32 out" give fp32 logits, which torch.mm cannot. A ratio is torch's best time over ours: above 1, ours
is faster.

    python -m benchmarks.kernels.gemm [--rows 128 512] [--shapes 50257x768] [--dtypes float32] [--rounds 5]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks import environment
from benchmarks.timing import Effort, round_robin
from cpo_kernels.kernels.cpu import extension as cpu_extension
from cpo_kernels.kernels.cpu import gemm as cpu_gemm

SHAPES = ((50257, 768), (128256, 1024))  # (V, H): GPT-2; the vocabulary of Llama 3
ROWS = (128, 512, 1024, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEMORY_LIMIT = 14 * 2**30  # bytes of operands; larger cases are left out, and the table says so

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One product: torch's calls by name, ours, and whether it counts in the sum over the three products."""

    name: str
    peers: dict[str, Call]
    ours: Call
    in_sum: bool = True


def onednn_linear(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Call]:
    """``x @ weight.T`` in fp32 by oneDNN, which torch does not choose for torch.mm; nothing where torch lacks it."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return {}
    return {"oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")}


def fp32_cases(hidden, weight, logits, grad_weight) -> Iterator[Case]:
    grad_hidden, out = torch.empty_like(hidden), torch.empty_like(logits)
    yield Case(
        "G1",
        {"torch.mm": lambda: torch.mm(hidden, weight.t(), out=out), **onednn_linear(hidden, weight)},
        lambda: cpu_gemm.gemm(hidden, weight.t(), out),
    )
    yield Case(
        "G2",
        {"torch.mm": lambda: torch.mm(logits, weight, out=grad_hidden)},
        lambda: cpu_gemm.gemm(logits, weight, grad_hidden),
    )
    yield Case(
        "G3",
        {"torch.mm": lambda: grad_weight.addmm_(logits.t(), hidden)},
        lambda: cpu_gemm.gemm(logits.t(), hidden, grad_weight, accumulate=True),
    )


def bf16_cases(hidden, weight, logits, grad_weight) -> Iterator[Case]:
    grad_hidden, out, half_grad = torch.empty_like(hidden), torch.empty_like(logits), torch.empty_like(weight)
    g1 = {"torch.mm": lambda: torch.mm(hidden, weight.t(), out=out)}
    g3 = {"torch.mm": lambda: torch.mm(logits.t(), hidden, out=half_grad)}
    yield Case("G1", g1, lambda: cpu_gemm.gemm(hidden, weight.t(), out))
    yield Case(
        "G2",
        {"torch.mm": lambda: torch.mm(logits, weight, out=grad_hidden)},
        lambda: cpu_gemm.gemm(logits, weight, grad_hidden),
    )
    yield Case("G3", g3, lambda: cpu_gemm.gemm(logits.t(), hidden, grad_weight, accumulate=True))
    yield Case("G3, bf16 out", g3, lambda: cpu_gemm.gemm(logits.t(), hidden, half_grad), in_sum=False)
    wide_logits = torch.empty(logits.shape)
    yield Case("G1, fp32 out", g1, lambda: cpu_gemm.gemm(hidden, weight.t(), wide_logits), in_sum=False)


def operand_bytes(rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> int:
    logits, weight = rows * vocab, vocab * hidden
    return 8 * logits + 8 * weight if dtype == torch.float32 else 8 * logits + 8 * weight + 2 * weight


def measure(rows: int, vocab: int, hidden: int, dtype: torch.dtype, effort: Effort) -> Iterator[str]:
    """Lines of the table for one shape."""
    label = f"{vocab} x {hidden} | {str(dtype).removeprefix('torch.')} | {rows}"
    if operand_bytes(rows, vocab, hidden, dtype) > MEMORY_LIMIT:
        yield f"| {label} | left out: the operands exceed {MEMORY_LIMIT >> 30} GiB | | | |"
        return
    tensors = [torch.randn(shape).to(dtype) for shape in ((rows, hidden), (vocab, hidden), (rows, vocab))]
    cases = fp32_cases if dtype == torch.float32 else bf16_cases
    total = {"torch": 0.0, "ours": 0.0}
    for case in cases(*tensors, torch.zeros(vocab, hidden)):
        calls = {**case.peers, "ours": case.ours}
        times = {name: t.best for name, t in round_robin(calls, effort, reference="ours", always=calls).items()}
        rate = {name: 2e-9 * rows * vocab * hidden / seconds for name, seconds in times.items()}
        other = f"{rate['oneDNN']:.0f}" if "oneDNN" in rate else ""
        ratio = times["torch.mm"] / times["ours"]
        yield f"| {label} | {case.name} | {rate['torch.mm']:.0f} | {other} | {rate['ours']:.0f} | {ratio:.2f} |"
        if case.in_sum:
            total["torch"] += times["torch.mm"]
            total["ours"] += times["ours"]
    yield f"| {label} | **G1 + G2 + G3** | | | | **{total['torch'] / total['ours']:.2f}** |"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", nargs="+", default=[f"{v}x{h}" for v, h in SHAPES], metavar="VxH")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    effort = Effort(rounds=options.rounds, seconds=1e9)
    print(f"{environment.device()}, {options.threads} threads, {cpu_extension.isa()}, commit {environment.commit()}")
    print("GFLOP/s, best of", options.rounds, "\n")
    print("| V x H | dtype | R | product | torch.mm | oneDNN | ours | torch.mm / ours |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in options.shapes:
        vocab, hidden = map(int, shape.split("x"))
        for name in options.dtypes:
            for rows in options.rows:
                for line in measure(rows, vocab, hidden, DTYPES[name], effort):
                    print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
