"""Liger's paired losses against ours of the same names and signatures, taking turns.

`python -m benchmarks.bench_liger --pairs 4 --tokens 128 --threads 2`. Loss, other outputs and all gradients; the time
is the best of the rounds, the memory the peak of a call beyond its inputs, gradients among it. On a machine that others
use, `--threads 1 --processor-time` counts the seconds of the processor instead of the clock's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.environment import as_markdown, describe, log
from benchmarks.memory import PeakMeter
from benchmarks.timing import Call, Clock, Effort, host_clock, processor_clock, round_robin
from cpo_kernels.integrations import liger

LOSSES = {name: f"LigerFusedLinear{name}Loss" for name in ("CPO", "SimPO", "DPO")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS, EAGER, COMPILED = "ours", "Liger, compiled=False", "Liger"


def make_inputs(args: argparse.Namespace, dtype: torch.dtype, reference: bool) -> list[Tensor | None]:
    """lin_weight, _input, target, bias and, for a reference, ref_input and ref_weight; half the tokens are prompt."""
    torch.manual_seed(0)
    rows = (2 * args.pairs, args.tokens)
    target = torch.randint(args.vocabulary, rows)
    target[:, : args.tokens // 2] = -100
    weight = (torch.randn(args.vocabulary, args.hidden) / args.hidden**0.5).to(dtype).requires_grad_()
    inputs = [weight, torch.randn(*rows, args.hidden).to(dtype).requires_grad_(), target, None]
    return [*inputs, torch.randn(*rows, args.hidden).to(dtype), weight.detach()] if reference else inputs


def contestants(name: str, inputs: list[Tensor | None], compiled: bool) -> dict[str, Call]:
    """Calls that return the loss and the gradients of weight and input."""
    from liger_kernel import chunked_loss

    modules = {OURS: getattr(liger, LOSSES[name])(), EAGER: getattr(chunked_loss, LOSSES[name])(compiled=False)}
    if compiled:
        modules[COMPILED] = getattr(chunked_loss, LOSSES[name])()

    def call(module: torch.nn.Module) -> Call:
        def step() -> tuple[Tensor, ...]:
            loss = module(*inputs)[0]
            return (loss.detach(), *torch.autograd.grad(loss, inputs[:2]))

        return step

    return {title: call(module) for title, module in modules.items()}


def measure(name: str, dtype: str, args: argparse.Namespace) -> list[str]:
    """The lines of one loss in one dtype."""
    log(f"{name} {dtype} ...")
    calls = contestants(name, make_inputs(args, DTYPES[dtype], reference=name == "DPO"), args.compiled)
    meter, peaks, results = PeakMeter(), {}, {}
    for title, call in calls.items():
        call()  # compiles, and lets allocators and libraries take what they keep
        meter.start()
        results[title] = call()
        peaks[title] = meter.growth()
    for title, result in results.items():
        for got, wanted in zip(result, results[EAGER], strict=True):
            if (got - wanted).norm() > 0.02 * wanted.norm():
                raise RuntimeError(f"{title} and {EAGER} do not compute the same {name} loss")
    results.clear()
    clock: Clock = processor_clock if args.processor_time else host_clock
    times = round_robin(calls, Effort(rounds=args.rounds, seconds=60.0), reference=OURS, always=calls, clock=clock)
    return [
        f"| {name}, {dtype} | {title} | {times[title].best:.3f} | {times[title].best / times[OURS].best:.2f} "
        f"| {peaks[title] / 2**20:.0f} |"
        for title in calls
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of a sequence; half of them are prompt")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--compiled", action="store_true", help="also Liger's default, which compiles for a minute")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="not the clock's; for one thread")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    return parser.parse_args()


def main() -> None:
    """Prints one table."""
    args = parse()
    torch.set_num_threads(args.threads)
    report = [
        f"{args.pairs} pairs of {args.tokens} tokens, half of them prompt; H = {args.hidden}, V = {args.vocabulary}; "
        f"{'seconds of the processor' if args.processor_time else 'seconds'}, best of {args.rounds} "
        "rounds; MiB at the peak of a call beyond its inputs, gradients among it.",
        "",
        "| loss | | s | of ours | MiB |",
        "| --- | --- | ---: | ---: | ---: |",
        *(line for dtype in args.dtypes for name in args.losses for line in measure(name, dtype, args)),
    ]
    print("\n".join(report))
    if args.out:
        described = as_markdown(describe(["bench_liger", *sys.argv[1:]], "cpu"))
        args.out.write_text(
            "\n".join(["# Liger's paired losses against ours of the same names", "", *report, "", described, ""])
        )


if __name__ == "__main__":
    main()
