"""What negatives cost: whole training steps of a trainer with and without them, taking turns in one process.

`python -m benchmarks.bench_negatives --out benchmarks/results/negatives-cpu.md`, in under 4 minutes on two idle cores.
A step draws or writes the negatives, packs the batch (both are "making" below), scores it with the reference, and runs
model and loss forward and backward, all by CPOTrainer's own methods; there is no optimizer.

On a machine that others use, `--cpu-time --threads 1` counts this process's time on the processor instead.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.environment import as_markdown, describe, log
from benchmarks.tables import markdown
from benchmarks.timing import Call, Effort, Timing, round_robin
from cpo_kernels import CPOConfig, CPOTrainer
from cpo_kernels.trainer import TokenizedExamples

EOS = 0
POOL = 16  # batch negatives come from so many examples for every one of a step
MLE, BASE = "MLE", "batch 1"
BAR = 1.05
MORE = 3  # times as many rounds where a bar of a few percent is to be told from noise


@dataclass(frozen=True)
class Sizes:
    """Of the models and of a step; the default is a few layers of GPT-2 small, with fewer words."""

    vocabulary: int = 8192
    width: int = 768
    heads: int = 12
    layers: int = 2
    groups: int = 4
    tokens: int = 48  # of a prompt, and of a completion


QUICK = Sizes(vocabulary=64, width=16, heads=2, layers=1, groups=2, tokens=20)


def gpt2(sizes: Sizes) -> PreTrainedModel:
    """A tied head, learned positions; no dropout."""
    shape = {"n_embd": sizes.width, "n_head": sizes.heads, "n_layer": sizes.layers, "n_positions": 2 * sizes.tokens}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {"eos_token_id": EOS, "bos_token_id": EOS, "pad_token_id": EOS}
    return GPT2LMHeadModel(GPT2Config(vocab_size=sizes.vocabulary, **shape, **dropout, **special))


def llama(sizes: Sizes) -> PreTrainedModel:
    """A head of its own, rotary positions, two query heads to a key."""
    shape = {"hidden_size": sizes.width, "intermediate_size": 3 * sizes.width, "num_hidden_layers": sizes.layers}
    heads = {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.heads // 2}
    special = {"eos_token_id": EOS, "bos_token_id": EOS, "pad_token_id": EOS}
    positions = {"max_position_embeddings": 2 * sizes.tokens}
    return LlamaForCausalLM(LlamaConfig(vocab_size=sizes.vocabulary, **shape, **heads, **positions, **special))


MODELS: dict[str, Callable[[Sizes], PreTrainedModel]] = {"gpt2": gpt2, "llama": llama}


def _negatives(sharing: str = "auto", **counts: Any) -> dict[str, Any]:
    kinds = ("batch", "truncation", "mean_field", "autoregressive")
    options = {f"num_{kind}_negatives": counts.pop(kind, 0) for kind in kinds}
    return options | {"prefix_sharing": sharing} | counts


CASES: dict[str, dict[str, Any]] = {
    MLE: {"objective": "mle"},
    BASE: _negatives(batch=1),
    "batch 1, truncation 1": _negatives(batch=1, truncation=1),
    "batch 1, truncation 4": _negatives(batch=1, truncation=4),
    "batch 1, truncation 16": _negatives(batch=1, truncation=16),
    "batch 1, separate rows": _negatives(batch=1, sharing="off"),
    "batch 4": _negatives(batch=4),
    "batch 4, separate rows": _negatives(batch=4, sharing="off"),
    "mean-field 1, by the reference": _negatives(mean_field=1, mean_field_source="reference"),
    "mean-field 1, by the model": _negatives(mean_field=1, mean_field_source="model"),
    "autoregressive 1": _negatives(autoregressive=1),
}


def make_examples(sizes: Sizes) -> TokenizedExamples:
    """Random texts, all of the same length, so that no case has more to do for the texts that it happens to draw."""
    rng = Random(0)

    def text(length: int) -> list[int]:
        return [rng.randrange(1, sizes.vocabulary) for _ in range(length)]

    count = POOL * sizes.groups
    prompts = [text(sizes.tokens) for _ in range(count)]
    return TokenizedExamples(prompts, [[*text(sizes.tokens - 1), EOS] for _ in range(count)])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Only its EOS is of use: the examples are token ids."""
    words = Tokenizer(models.WordLevel({"</s>": EOS}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", bos_token="</s>", pad_token="</s>")


@dataclass
class Step:
    """One training step of a case; a call takes it.

    Attributes:
        trainer: configured for the case.
        indices: the examples of the step, (G,).
        now: the clock, in seconds.
        making: seconds of each call until the batch was there.
        positions: that the body ran on in the last call, padding included.
        tokens: N of the last call.
    """

    trainer: CPOTrainer
    indices: torch.Tensor
    now: Callable[[], float] = time.perf_counter
    making: list[float] = field(default_factory=list)
    positions: int = 0
    tokens: int = 0

    def __call__(self) -> torch.Tensor:
        """The loss, after its gradients."""
        begun = self.now()
        trainer = self.trainer
        trainer.state.global_step += 1  # new negatives
        (inputs,), tokens = trainer.get_batch_samples(iter([{"index": self.indices}]), 1, trainer.args.device)
        self.making.append(self.now() - begun)
        self.positions, self.tokens = inputs["input_ids"].numel(), inputs["targets"].numel()
        trainer.model.zero_grad(set_to_none=True)
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=tokens)
        loss.backward()
        return loss.detach()


def make_steps(name: str, sizes: Sizes, folder: str, now: Callable[[], float] = time.perf_counter) -> dict[str, Step]:
    """The steps of all cases of one model, which share its parameters and those of its reference."""
    torch.manual_seed(0)
    model, reference = MODELS[name](sizes), MODELS[name](sizes)
    reference.load_state_dict(model.state_dict())
    model.train()
    examples, tokenizer = make_examples(sizes), make_tokenizer()
    shared = {"output_dir": folder, "use_cpu": True, "report_to": "none", "max_length": 2 * sizes.tokens, "seed": 0}

    def step(options: Mapping[str, Any]) -> Step:
        config = CPOConfig(**shared, **options)
        frozen = reference if config.contrasts else None
        trainer = CPOTrainer(model, config, train_dataset=examples, processing_class=tokenizer, ref_model=frozen)
        return Step(trainer, torch.arange(sizes.groups), now)

    return {case: step(options) for case, options in CASES.items()}


def measure(steps: Mapping[str, Step], rounds: int, now: Callable[[], float]) -> dict[str, Timing]:
    """Seconds of every step, the first call of each left out."""

    def clock(call: Call) -> tuple[float, object]:
        begun = now()
        result = call()
        return now() - begun, result

    for step in steps.values():
        step()
        step.making.clear()
    effort = Effort(rounds=rounds, seconds=3600.0)
    return round_robin(steps, effort, reference=next(iter(steps)), always=steps, clock=clock)


def all_kinds(steps: Mapping[str, Step], times: Mapping[str, Timing]) -> str:
    """A row a case."""
    header = ["negatives", "positions", "tokens", "best, ms", "median, ms", "making, ms", f"of {MLE}", f"of {BASE}"]
    rows = []
    for name, step in steps.items():
        own = times[name]
        cells = [f"{1e3 * seconds:.1f}" for seconds in (own.best, own.median, statistics.median(step.making))]
        ratios = [f"{own.best / times[other].best:.2f}" for other in (MLE, BASE)]
        rows.append([name, str(step.positions), str(step.tokens), *cells, *ratios])
    return markdown(header, rows)


def truncations(steps: Mapping[str, Step], times: Mapping[str, Timing]) -> str:
    """Each number of truncations against none, by the best times and by the medians."""
    header = ["negatives", "tokens", "best, ms", "median, ms", f"best of {BASE}", f"median of {BASE}", "bar"]
    rows = []
    for name, own in times.items():
        cells = [f"{1e3 * own.best:.1f}", f"{1e3 * own.median:.1f}"]
        cells += [f"{own.best / times[BASE].best:.3f}", f"{own.median / times[BASE].median:.3f}"]
        rows.append([name, str(steps[name].tokens), *cells, "" if name == BASE else f"{BAR}"])
    return markdown(header, rows)


def page(names: Sequence[str], sizes: Sizes, rounds: int, now: Callable[[], float]) -> str:
    """What was measured, and two tables for each model."""
    parts = [
        f"{sizes.groups} examples a step, {sizes.tokens} tokens of each prompt and of each completion, {sizes.layers} "
        f"layers of width {sizes.width}, {sizes.vocabulary} words, float32. positions: what the body runs on; tokens: "
        "what the head scores. making: median time of drawing, writing and packing, a part of the step; for "
        "autoregressive negatives the writing. Every step but MLE's has a frozen reference. Ratios of best times over "
        f"{rounds} rounds; truncations over {MORE * rounds} rounds of their own."
    ]
    for name in names:
        log(f"{name} ...")
        with tempfile.TemporaryDirectory() as folder:
            steps = make_steps(name, sizes, folder, now)
            parts += [f"## {name}", all_kinds(steps, measure(steps, rounds, now))]
            cut = {case: step for case, step in steps.items() if case == BASE or "truncation" in case}
            parts.append(truncations(steps, measure(cut, MORE * rounds, now)))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Prints the tables and writes them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="time of the processor, not of the clock")
    parser.add_argument("--quick", action="store_true", help="tiny models; the times mean nothing")
    parser.add_argument("--out", type=Path, help="Markdown file for the tables")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    described = as_markdown(describe(["bench_negatives", *argv]))
    now = time.process_time if args.cpu_time else time.perf_counter
    report = page(args.models, QUICK if args.quick else Sizes(), args.rounds, now)
    print(report)
    if args.out:
        args.out.write_text(f"# What negatives cost a training step\n\n{report}\n\n{described}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
