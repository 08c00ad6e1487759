"""Times row kernels of every instruction set against the bandwidth that torch reaches on the same logits, in turns.

`python -m benchmarks.kernels.rows --rows 256 1024`. Forward counts the bytes read and is compared with
`logits.sum(1)`; backward, in place, counts bytes read and written and is compared with `out.copy_(logits)`.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks.kernels.calls import HEAD
from benchmarks.measure import Case, Contestant, measure, ready
from benchmarks.setting import CPU
from benchmarks.tables import case_table
from benchmarks.timing import Call
from cpo_kernels.kernels.cpu import extension as cpu_extension
from cpo_kernels.kernels.cpu import rows as cpu_rows

VOCABULARIES = (50257, 128256)  # GPT-2, Llama 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
READ, COPY = "logits.sum(1)", "out.copy_(logits)"


def compare(rows: int, vocab: int, dtype: torch.dtype, isas: list[str], rounds: int) -> str:
    """Return the table of one size; `ratio` is the speed over that of torch's read, or of its copy."""
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    targets, coef, out = torch.randint(0, vocab, (rows,)), torch.rand(rows) + 0.5, torch.empty_like(logits)
    stats, _ = cpu_rows.row_forward(logits, targets, None, *HEAD)

    def contestant(name: str, call: Call, passes: int) -> Contestant:
        return ready(name, call, values=lambda seconds: {"gbs": passes * logits.nbytes / seconds / 1e9})

    reads = [contestant(READ, lambda: logits.sum(1), 1)]
    copies = [contestant(COPY, lambda: out.copy_(logits), 2)]
    for isa in isas:
        forward = partial(cpu_rows.row_forward, logits, targets, None, *HEAD, isa=isa)
        # Over a buffer of its own: what earlier calls left in it does not matter to the time.
        backward = partial(cpu_rows.row_backward_, out, targets, None, stats, coef, *HEAD, isa=isa)
        reads.append(contestant(f"forward {isa}", forward, 1))
        copies.append(contestant(f"backward {isa}", backward, 2))
    both = ((READ, reads), (COPY, copies))
    cases = [Case(name, own, speeds={"ratio": name}, rounds=rounds) for name, own in both]
    return "\n\n".join(case_table(measure(case, CPU)) for case in cases)


def main() -> None:
    """Print a table for every size."""
    build = cpu_extension.build_info()
    if build is None:
        raise SystemExit(cpu_extension.unavailable_reason())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--isas", nargs="+", choices=build.supported_isas, default=build.supported_isas)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    for vocab in VOCABULARIES:
        for rows in args.rows:
            for name in args.dtypes:
                print(f"V={vocab} R={rows} {name}\n\n{compare(rows, vocab, DTYPES[name], args.isas, args.rounds)}\n")


if __name__ == "__main__":
    main()
