"""Times the engine's three matrix products: the compiled GEMM against what torch ships, in turns.

G1: logits = hidden @ weight.T.  G2: grad_hidden = dlogits @ weight.  G3: grad_weight += dlogits.T @ hidden.
For bf16, torch.mm can only write bf16 (G3 without accumulating); ours writes G1 and G2 in bf16 and sums G3 in fp32,
and the rows "fp32 out" give fp32 logits, which torch.mm cannot. A ratio is a time over ours: above 1, ours is
faster.

    python -m benchmarks.kernels.gemm [--rows 128 512] [--shapes 50257x768] [--dtypes float32] [--rounds 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.measure import Case, measure, ready
from benchmarks.setting import CPU
from benchmarks.tables import case_table
from benchmarks.timing import Call
from cpo_kernels.kernels.cpu import extension as cpu_extension
from cpo_kernels.kernels.cpu import gemm as cpu_gemm

SHAPES = ((50257, 768), (128256, 1024))  # (V, H): GPT-2; the vocabulary of Llama 3
ROWS = (128, 512, 1024, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEMORY_LIMIT = 14 * 2**30  # bytes of operands
TORCH, OURS = "torch.mm", "ours"


def products(hidden: Tensor, weight: Tensor, logits: Tensor) -> Iterator[tuple[str, dict[str, Call]]]:
    """Yield each product with the calls that are compared."""
    gemm, single = cpu_gemm.gemm, hidden.dtype == torch.float32
    grad_hidden, out, narrow = torch.empty_like(hidden), torch.empty_like(logits), torch.empty_like(weight)
    grad_weight = torch.zeros(weight.shape)
    g1: dict[str, Call] = {TORCH: partial(torch.mm, hidden, weight.t(), out=out)}
    if single and hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # which torch does not choose for torch.mm
        g1["oneDNN"] = partial(torch.ops.mkldnn._linear_pointwise, hidden, weight, None, "none", [], "")
    in_place = partial(grad_weight.addmm_, logits.t(), hidden)
    g3: dict[str, Call] = {TORCH: in_place if single else partial(torch.mm, logits.t(), hidden, out=narrow)}
    yield "G1", g1 | {OURS: partial(gemm, hidden, weight.t(), out)}
    g2 = partial(torch.mm, logits, weight, out=grad_hidden)
    yield "G2", {TORCH: g2, OURS: partial(gemm, logits, weight, grad_hidden)}
    yield "G3", g3 | {OURS: partial(gemm, logits.t(), hidden, grad_weight, accumulate=True)}
    if not single:
        yield "G3, bf16 out", g3 | {OURS: partial(gemm, logits.t(), hidden, narrow)}
        yield "G1, fp32 out", g1 | {OURS: partial(gemm, hidden, weight.t(), torch.empty(logits.shape))}


def compare(rows: int, vocab: int, width: int, dtype: torch.dtype, rounds: int) -> str:
    """Return the table of one shape, with torch's sum of the three products over ours."""
    size = 8 * (rows + width) * vocab + 2 * vocab * width
    if size > MEMORY_LIMIT:
        return f"left out: the operands exceed {MEMORY_LIMIT >> 30} GiB"
    hidden, weight, logits = (torch.randn(shape).to(dtype) for shape in ((rows, width), (vocab, width), (rows, vocab)))
    found, total = [], dict.fromkeys((TORCH, OURS), 0.0)
    rate = 2e-12 * rows * vocab * width
    for name, calls in products(hidden, weight, logits):
        tflops = {"values": lambda seconds: {"tflops": rate / seconds}}
        contestants = [ready(who, call, **tflops) for who, call in calls.items()]
        records = measure(Case(name, contestants, {"product": name}, {"ratio": OURS}, rounds=rounds), CPU)
        found += records
        for record in records if name in ("G1", "G2", "G3") else []:
            if record.contestant in total:
                total[record.contestant] += record.values["seconds"]
    return f"{case_table(found)}\n\nG1 + G2 + G3, {TORCH} over {OURS}: {total[TORCH] / total[OURS]:.2f}"


def main() -> None:
    """Print a table for every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", nargs="+", default=[f"{v}x{h}" for v, h in SHAPES], metavar="VxH")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{environment.device()}, {cpu_extension.isa()}, commit {environment.commit()}")
    for shape in options.shapes:
        vocab, width = map(int, shape.split("x"))
        for name in options.dtypes:
            for rows in options.rows:
                print(f"\n{shape}, {name}, R={rows}\n\n{compare(rows, vocab, width, DTYPES[name], options.rounds)}")


if __name__ == "__main__":
    main()
