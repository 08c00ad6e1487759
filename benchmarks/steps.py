"""A training step of TRL's DPOTrainer or CPOTrainer, forward and backward, against ours on the same pairs, in turns.

`python -m benchmarks.bench_trl --threads 2 [--trainer cpo]`. Contestants: TRL as it is, FusedDPOTrainer or
FusedCPOTrainer and, for DPO, TRL with `patch_fused_head()`. One negative, half the tokens prompt, GPT-2's vocabulary
and width, a few layers; for DPO, a reference model that is asked in every step. Their losses are compared first. The
time is the best of the rounds; the peak of memory is that of a step in a process of its own, gradients included,
weights not. On a machine that others use, `--threads 1 --processor-time` counts the seconds of the processor instead
of the clock's.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from trl.experimental.cpo import CPOConfig, CPOTrainer

from benchmarks.bench_sharing import processor_clock
from benchmarks.environment import as_markdown, describe, log
from benchmarks.memory import PeakMeter
from benchmarks.timing import Call, Effort, host_clock, round_robin
from cpo_kernels.integrations.trl import FusedCPOTrainer, FusedDPOTrainer, fused_head

STOCK = "TRL"
CONTESTANTS: dict[str, dict[str, tuple[Any, Any]]] = {
    "dpo": {
        STOCK: (trl.DPOTrainer, nullcontext),
        "TRL, patch_fused_head()": (trl.DPOTrainer, fused_head),
        "FusedDPOTrainer": (FusedDPOTrainer, nullcontext),
    },
    "cpo": {STOCK: (CPOTrainer, nullcontext), "FusedCPOTrainer": (FusedCPOTrainer, nullcontext)},
}
VOCABULARY, WIDTH, HEADS = 50257, 768, 12
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
BAR = 1.0


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word, as many words as GPT-2 has tokens."""
    vocabulary = {f"w{index}": index for index in range(VOCABULARY - 1)} | {"</s>": VOCABULARY - 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


def make_data(pairs: int, tokens: int) -> datasets.Dataset:
    """Random words; the end of text is the last of a completion's `tokens`."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(VOCABULARY - 1)}" for _ in range(length))

    rows = [
        {"prompt": text(tokens) + " ", "chosen": text(tokens - 1), "rejected": text(tokens - 1)} for _ in range(pairs)
    ]
    return datasets.Dataset.from_list(rows)


def make_model(seed: int, args: argparse.Namespace) -> transformers.PreTrainedModel:
    """GPT-2 small with fewer layers."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_head": HEADS, "n_layer": args.layers}
    config = transformers.GPT2Config(**sizes, n_positions=2 * args.tokens, bos_token_id=None, eos_token_id=None)
    return transformers.GPT2LMHeadModel(config).to(DTYPES[args.dtype])


def make_step(name: str, args: argparse.Namespace, directory: str) -> Callable[[], Tensor]:
    """One step of a contestant: its loss, detached; the gradients are left behind."""
    trainer_class, context = CONTESTANTS[args.trainer][name]
    config = (trl.DPOConfig if args.trainer == "dpo" else CPOConfig)(
        output_dir=directory,
        per_device_train_batch_size=args.pairs,
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        max_length=2 * args.tokens,
        dataloader_pin_memory=False,
    )
    reference = {"ref_model": make_model(1, args)} if args.trainer == "dpo" else {}
    trainer = trainer_class(
        model=make_model(0, args),
        args=config,
        train_dataset=make_data(args.pairs, args.tokens),
        processing_class=make_tokenizer(),
        **reference,
    )
    batch: dict[str, Any] = next(iter(trainer.get_train_dataloader()))

    def step() -> Tensor:
        trainer.model.train()
        trainer.model.zero_grad(set_to_none=True)
        with context():
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss.detach()

    return step


def peak_of(name: str, args: argparse.Namespace) -> int:
    """Bytes by which a step grows a process of its own at its peak."""
    options = ["--pairs", args.pairs, "--tokens", args.tokens, "--layers", args.layers, "--dtype", args.dtype]
    options += ["--trainer", args.trainer]
    command = [sys.executable, "-m", "benchmarks.bench_trl", *map(str, options), "--threads", str(args.threads)]
    done = subprocess.run([*command, "--peak-of", name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(step: Call) -> int:
    """The same in this process, which should have done nothing else."""
    step()
    meter = PeakMeter()
    meter.start()  # the gradients of the first step are there, and are freed by the second
    step()
    return meter.growth()


def compare(steps: dict[str, Callable[[], Tensor]], dtype: str) -> str:
    """The losses in words; the first calls also warm up.

    Raises:
        RuntimeError: they differ.
    """
    losses = {name: float(step()) for name, step in steps.items()}
    for name, loss in losses.items():
        if abs(loss - losses[STOCK]) > TOLERANCE[dtype] * abs(losses[STOCK]):
            raise RuntimeError(f"{name} has a loss of {loss}, expected TRL's, {losses[STOCK]}")
    return ", ".join(f"{loss:.6f}" for loss in losses.values())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=CONTESTANTS, default="dpo")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96, help="of a prompt and of a completion")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true", help="not the clock's; for one thread")
    parser.add_argument("--no-peaks", action="store_true", help="leave the memory out")
    parser.add_argument("--peak-of", help="print the bytes of one contestant and nothing else")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    return parser.parse_args()


def main() -> None:
    """Prints one table."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    args = parse()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        if args.peak_of:
            print(json.dumps(measure_peak(make_step(args.peak_of, args, directory))))
            return
        peaks = {} if args.no_peaks else {name: peak_of(name, args) / 2**20 for name in CONTESTANTS[args.trainer]}
        log("models ...")
        steps = {name: make_step(name, args, directory) for name in CONTESTANTS[args.trainer]}
        losses = compare(steps, args.dtype)
        log("rounds ...")
        effort = Effort(rounds=args.rounds, seconds=60.0)
        clock = processor_clock if args.processor_time else host_clock
        times = round_robin(steps, effort, reference=STOCK, always=steps, clock=clock)
    lines = [
        f"{args.pairs} pairs of a prompt and two completions of {args.tokens} tokens each, {args.layers} layers of "
        f"width {WIDTH}, {VOCABULARY} tokens of vocabulary, {args.dtype}; "
        f"{'seconds of the processor' if args.processor_time else 'seconds'}, best of {args.rounds} rounds. "
        f"Losses: {losses}.",
        "",
        f"| trainer | step, s | TRL's time over it (bar {BAR:.0f}) | peak of memory, MiB |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | {times[name].best:.3f} | {times[STOCK].best / times[name].best:.2f} | "
            f"{f'{peaks[name]:.0f}' if peaks else ''} |"
            for name in CONTESTANTS[args.trainer]
        ),
    ]
    print("\n".join(lines))
    if args.out:
        header = f"# A training step of {args.trainer.upper()}: TRL's trainer and ours"
        described = as_markdown(describe(["bench_trl", *sys.argv[1:]]))
        args.out.write_text("\n".join([header, "", *lines, "", described, ""]))


if __name__ == "__main__":
    main()
