"""Transformer bodies on packed rows that share their prompts against one right-padded row a candidate, taking turns.

`python -m benchmarks.bench_sharing --tokens 256 --candidates 5 --threads 2`. Forward and backward of the body, without
embeddings of a large vocabulary and without a head; the time is the best of the rounds. On a machine that others use,
`--threads 1 --processor-time` counts the seconds of the processor instead of the clock's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.environment import as_markdown, describe, log
from benchmarks.timing import Call, Clock, Effort, clock_for, round_robin
from cpo_kernels.models.sharing import SharedBatch, check_prefix_sharing, pack_groups, tree_inputs

DENSE = "sdpa-dense"  # sdpa with the whole mask, not branch by branch
VOCABULARY = 1024
BAR = 1.5
ATTENTION = ("sdpa", DENSE, "eager", "flex_attention")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def gpt2(implementation: str, layers: int, positions: int) -> PreTrainedModel:
    """The width of GPT-2 small, and some of its 12 layers."""
    sizes = {"vocab_size": VOCABULARY, "n_positions": positions, "n_embd": 768, "n_head": 12, "n_layer": layers}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel._from_config(GPT2Config(**sizes, **dropout), attn_implementation=implementation)


def llama(implementation: str, layers: int, positions: int) -> PreTrainedModel:
    """A Llama of the width of GPT-2 medium, with four heads a key."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": positions, "num_hidden_layers": layers}
    width = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
    return LlamaForCausalLM._from_config(LlamaConfig(**sizes, **width), attn_implementation=implementation)


BODIES: dict[str, Callable[[str, int, int], PreTrainedModel]] = {"gpt2": gpt2, "llama": llama}


@dataclass
class Problem:
    """One batch both ways, with the gradient of the hidden states that predict tokens."""

    shared: SharedBatch
    separate_ids: Tensor
    separate_mask: Tensor
    separate_rows: Tensor

    @property
    def shared_rows(self) -> Tensor:
        """Positions that predict the tokens of all candidates."""
        return torch.tensor([row for group in self.shared.rows for candidate in group for row in candidate])


def make_problem(groups: int, candidates: int, prompt: int, completion: int, ragged: bool) -> Problem:
    """Random tokens; with `ragged`, lengths between half of and the whole of what is asked for."""
    draw = torch.Generator().manual_seed(0)

    def text(length: int) -> list[int]:
        size = int(torch.randint(length // 2, length + 1, (), generator=draw)) if ragged else length
        return torch.randint(VOCABULARY, (size,), generator=draw).tolist()

    prompts = [text(prompt) for _ in range(groups)]
    # The last token is not fed, so one more makes the positions of prompt and candidate as many as was asked for.
    completions = [[text(completion + 1) for _ in range(candidates)] for _ in range(groups)]
    sequences = [[*p, *c[:-1]] for p, own in zip(prompts, completions, strict=True) for c in own]
    longest = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    lengths = [len(p) for p, own in zip(prompts, completions, strict=True) for _ in own]
    rows = [
        b * longest + t for b, (s, p) in enumerate(zip(sequences, lengths, strict=True)) for t in range(p - 1, len(s))
    ]
    return Problem(pack_groups(prompts, completions), ids, mask, torch.tensor(rows))


def calls(model: PreTrainedModel, problem: Problem, device: torch.device, name: str) -> dict[str, Call]:
    """Forward and backward on shared and on separate rows."""
    tree, ids = problem.shared.tree.to(device), problem.shared.input_ids.to(device)
    shared_rows, separate_rows = problem.shared_rows.to(device), problem.separate_rows.to(device)
    separate_ids, mask = problem.separate_ids.to(device), problem.separate_mask.to(device)
    upstream = torch.randn(len(separate_rows), model.config.hidden_size, device=device, dtype=model.dtype)

    def backward(hidden: Tensor, rows: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        hidden.flatten(0, -2)[rows].backward(upstream)

    def share() -> None:
        # The masks are made in every call, as in every step of training.
        inputs = tree_inputs(model, tree)
        if name == DENSE:
            inputs["attention_mask"] = inputs["attention_mask"].as_subclass(Tensor)
        backward(model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state, shared_rows)

    def separate() -> None:
        out = model.base_model(input_ids=separate_ids, attention_mask=mask, use_cache=False)
        backward(out.last_hidden_state, separate_rows)

    return {f"{name} shared": share, f"{name} separate": separate}


def processor_clock(call: Call) -> tuple[float, object]:
    """Seconds of this process on the processor."""
    begin = time.process_time()
    result = call()
    return time.process_time() - begin, result


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", nargs="+", choices=BODIES, default=list(BODIES))
    parser.add_argument("--attention", nargs="+", choices=ATTENTION, default=ATTENTION[:3])
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--candidates", type=int, default=5, help="candidates of a group, K + 1")
    parser.add_argument("--tokens", type=int, default=256, help="of the prompt and of each candidate")
    parser.add_argument("--ragged", action="store_true", help="lengths between half of and the whole of --tokens")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processor-time", action="store_true", help="not the clock's; CPU only, for one thread")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    return parser.parse_args()


def measure(body: str, attention: str, problem: Problem, args: argparse.Namespace) -> str:
    """The line of one body with one attention."""
    log(f"{body} {attention} ...")
    torch.manual_seed(0)
    model = BODIES[body](attention.removesuffix("-dense"), args.layers, 2 * args.tokens)
    model.to(args.device, DTYPES[args.dtype])
    check_prefix_sharing(model)
    contestants = calls(model, problem, args.device, attention)
    share, separate = contestants
    clock: Clock = processor_clock if args.processor_time else clock_for(args.device)
    effort = Effort(rounds=args.rounds, seconds=60.0)
    times = round_robin(contestants, effort, reference=separate, always=contestants, clock=clock)
    ratio = times[separate].best / times[share].best
    return f"| {body} | {attention} | {times[separate].best:.4f} | {times[share].best:.4f} | {ratio:.2f} |"


def main() -> None:
    """Prints one table."""
    args = parse()
    torch.set_num_threads(args.threads)
    problem = make_problem(args.groups, args.candidates, args.tokens, args.tokens, args.ragged)
    shared, separate = problem.shared.input_ids.numel(), problem.separate_ids.numel()
    report = [
        f"{args.groups} group(s) of {args.candidates} candidates, {args.tokens} tokens of prompt and of each candidate"
        f"{', ragged' if args.ragged else ''}, {args.layers} layer(s), {args.dtype}: {shared} positions shared, "
        f"{separate} separate (ratio {separate / shared:.2f}); "
        f"{'seconds of the processor' if args.processor_time else 'seconds'}, best of {args.rounds} rounds.",
        "",
        f"| body | attention | separate, s | shared, s | ratio (bar {BAR}) |",
        "| --- | --- | ---: | ---: | ---: |",
        *(measure(body, attention, problem, args) for body in args.bodies for attention in args.attention),
    ]
    print("\n".join(report))
    if args.out:
        header = "# Prefix sharing: the transformer body, forward and backward"
        described = as_markdown(describe(["bench_sharing", *sys.argv[1:]], args.device.type))
        args.out.write_text("\n".join([header, "", *report, "", described, ""]))


if __name__ == "__main__":
    main()
