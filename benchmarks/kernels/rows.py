"""Row kernels of every instruction set against the bandwidth that torch reaches on the same logits, all taking turns.

`python -m benchmarks.kernels.rows --rows 256 1024 --threads 2`. Forward counts the bytes read and is compared with
`logits.sum(1)`; backward, in place, counts bytes read and written and is compared with `out.copy_(logits)`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.timing import Effort, round_robin
from cpo_kernels.kernels.cpu import extension as cpu_extension
from cpo_kernels.kernels.cpu import rows as cpu_rows

VOCABULARIES = (50257, 128256)  # GPT-2, Llama 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD = (None, 1.0, 0.0, 1.0)  # no bias, no scale, no softcap, temperature 1
READ, COPY = "logits.sum(1)", "out.copy_(logits)"


def calls(logits: torch.Tensor, isas: list[str]) -> dict[str, Callable[[], object]]:
    """The two bandwidth measurements, and per instruction set forward and backward."""
    rows, vocab = logits.shape
    targets, coef, out = torch.randint(0, vocab, (rows,)), torch.rand(rows) + 0.5, torch.empty_like(logits)
    stats, _ = cpu_rows.row_forward(logits, targets, None, *HEAD)
    made: dict[str, Callable[[], object]] = {READ: lambda: logits.sum(1), COPY: lambda: out.copy_(logits)}
    for isa in isas:
        made[f"forward {isa}"] = partial(cpu_rows.row_forward, logits, targets, None, *HEAD, isa=isa)
        # Over a buffer of its own: what earlier calls left in it does not matter to the time.
        made[f"backward {isa}"] = partial(cpu_rows.row_backward_, out, targets, None, stats, coef, *HEAD, isa=isa)
    return made


def measure(
    rows: int, vocab: int, dtype: torch.dtype, isas: list[str], effort: Effort
) -> dict[str, tuple[float, float]]:
    """Per call GB/s of its best round, and the ratio to the bandwidth it is compared with."""
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    contestants = calls(logits, isas)
    timings = round_robin(contestants, effort, reference=COPY, always=contestants)
    touched = {name: logits.nbytes * (1 if name == READ or name.startswith("forward") else 2) for name in timings}
    speed = {name: touched[name] / timing.best / 1e9 for name, timing in timings.items()}
    return {name: (s, s / speed[READ if name.startswith("forward") else COPY]) for name, s in speed.items()}


def main() -> None:
    """Prints one table."""
    build = cpu_extension.build_info()
    if build is None:
        raise SystemExit(cpu_extension.unavailable_reason())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--isas", nargs="+", choices=build.supported_isas, default=build.supported_isas)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads; GB/s (ratio: forward to {READ}, backward to {COPY}); best of {args.rounds} rounds")
    for vocab in VOCABULARIES:
        for rows in args.rows:
            for name in args.dtypes:
                effort = Effort(rounds=args.rounds)
                results = measure(rows, vocab, DTYPES[name], args.isas, effort)
                print(f"V={vocab} R={rows} {name}: sum {results[READ][0]:.1f}, copy {results[COPY][0]:.1f}")
                for isa in args.isas:
                    cells = (results[f"{kind} {isa}"] for kind in ("forward", "backward"))
                    forward, backward = (f"{s:6.1f} ({r:.2f})" for s, r in cells)
                    print(f"  {isa:<10}  forward {forward}   backward {backward}", flush=True)


if __name__ == "__main__":
    main()
