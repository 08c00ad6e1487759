"""Prefix sharing: transformer bodies on packed rows that share their prompts against one padded row a candidate.

Forward and backward of the body, without a large embedding and without a head; K = 4, the prompt as long as each
candidate. Before they are timed, hidden states and gradients of both are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.measure import free_memory, summary
from benchmarks.models import GPT2_SMALL, GPT2_TINY, LLAMA_1B, LLAMA_SMALL, LLAMA_TINY, Sizes, make_model
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.timing import Effort, clock_for, round_robin
from cpo_kernels.models.prefix.probe import SharedBatch, check_prefix_sharing, pack_groups, tree_inputs

SHARED, SEPARATE = "shared", "separate"
DENSE = "sdpa-dense"  # sdpa with the whole mask, not branch by branch
VOCABULARY = 1024
CANDIDATES = 5  # K + 1
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # ||shared - separate|| / ||separate||

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One body with one attention.

    Attributes:
        body: in the results.
        sizes: of the body.
        attention: an implementation of transformers, or DENSE.
        groups: of a batch.
        tokens: of each prompt, and of each candidate.
        dtype: of the parameters.
    """

    body: str
    sizes: Sizes
    attention: str
    groups: int
    tokens: int
    dtype: torch.dtype = torch.float32

    @property
    def conditions(self) -> dict[str, object]:
        """Of its records."""
        sizes = {"H": self.sizes.width, "layers": self.sizes.layers, "K": CANDIDATES - 1, "prompt": 0.5}
        rest = {"groups": self.groups, "tokens": self.tokens, "dtype": str(self.dtype).removeprefix("torch.")}
        return {"body": self.body, "attention": self.attention} | sizes | rest


def cases(setting: Setting) -> list[Case]:
    """What is run on a device; flex attention only where it is compiled for, on a GPU."""
    attentions = ["sdpa", DENSE, "eager"]
    if setting.quick:
        bodies, rest = {"gpt2": GPT2_TINY, "llama": LLAMA_TINY}, {"groups": 1, "tokens": 8}
    elif setting.on_gpu:
        attentions.append("flex_attention")
        bodies = {"gpt2": replace(GPT2_SMALL, vocabulary=VOCABULARY), "llama": replace(LLAMA_1B, vocabulary=VOCABULARY)}
        rest = {"groups": 4, "tokens": 512, "dtype": torch.bfloat16}
    else:
        one = {"vocabulary": VOCABULARY, "layers": 1}
        bodies = {"gpt2": replace(GPT2_SMALL, **one), "llama": replace(LLAMA_SMALL, **one)}
        rest = {"groups": 1, "tokens": 256}
        attentions.remove(DENSE)  # what branches save is a question of a minute
    return [Case(name, sizes, attention, **rest) for name, sizes in bodies.items() for attention in attentions]


def run(setting: Setting) -> Iterator[Record]:
    """Both ways in every case."""
    transformers.logging.set_verbosity_error()
    effort = Effort(rounds=1 if setting.quick else 3, seconds=60.0)
    for case in cases(setting):
        try:
            records = measure(case, setting.device, effort)
        except Exception as error:  # an attention may not run here
            records = [Record("body", SHARED, conditions=case.conditions, note=summary(error))]
        yield from records
        free_memory()


def measure(case: Case, device: torch.device, effort: Effort) -> list[Record]:
    """Two records of one case."""
    model = make_model(case.sizes, 2 * case.tokens, attention=case.attention.removesuffix("-dense"))
    model.to(device, case.dtype)
    check_prefix_sharing(model)
    problem = make_problem(case)
    calls = make_calls(model, case, problem, device)
    distance = compare(model, calls)
    if not distance <= TOLERANCE[case.dtype]:
        raise RuntimeError(f"hidden states or gradients differ by {distance:.2g} of their norm")
    times = round_robin(calls, effort, reference=SEPARATE, always=calls, clock=clock_for(device))
    positions = {SHARED: problem.shared.input_ids.numel(), SEPARATE: problem.separate_ids.numel()}
    return [
        Record(
            "body",
            name,
            {
                "seconds": own.best,
                "median": own.median,
                "rounds": len(own.seconds),
                "positions": positions[name],
                "ratio": times[SEPARATE].best / own.best,
            },
            case.conditions,
        )
        for name, own in times.items()
    ]


def compare(model: PreTrainedModel, calls: dict[str, Call]) -> float:
    """The larger of the distances of hidden states and of gradients, as shares of their norms."""
    found = {}
    for name, call in calls.items():
        hidden = call()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[name] = hidden.double(), gradient.double()
    both = zip(found[SHARED], found[SEPARATE], strict=True)
    return max(float((own - right).norm() / right.norm()) for own, right in both)


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


def make_problem(case: Case) -> Problem:
    """Random tokens."""
    draw = torch.Generator().manual_seed(0)

    def text(length: int) -> list[int]:
        return torch.randint(case.sizes.vocabulary, (length,), generator=draw).tolist()

    prompts = [text(case.tokens) for _ in range(case.groups)]
    # The last token is not fed, so one more makes the positions of prompt and candidate as many as was asked for.
    completions = [[text(case.tokens + 1) for _ in range(CANDIDATES)] for _ in range(case.groups)]
    sequences = [[*p, *c[:-1]] for p, own in zip(prompts, completions, strict=True) for c in own]
    longest = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    lengths = [len(p) for p, own in zip(prompts, completions, strict=True) for _ in own]
    rows = [
        b * longest + t for b, (s, p) in enumerate(zip(sequences, lengths, strict=True)) for t in range(p - 1, len(s))
    ]
    return Problem(pack_groups(prompts, completions), ids, mask, torch.tensor(rows))


def make_calls(model: PreTrainedModel, case: Case, problem: Problem, device: torch.device) -> dict[str, Call]:
    """Forward and backward on shared and on separate rows; each returns the hidden states that predict tokens."""
    tree, ids = problem.shared.tree.to(device), problem.shared.input_ids.to(device)
    shared_rows, separate_rows = problem.shared_rows.to(device), problem.separate_rows.to(device)
    separate_ids, mask = problem.separate_ids.to(device), problem.separate_mask.to(device)
    upstream = torch.randn(len(separate_rows), model.config.hidden_size, device=device, dtype=model.dtype)

    def finish(hidden: Tensor, rows: Tensor) -> Tensor:
        model.zero_grad(set_to_none=True)
        picked = hidden.flatten(0, -2)[rows]
        picked.backward(upstream)
        return picked.detach()

    def share() -> Tensor:
        # The masks are made in every call, as in every step of training.
        inputs = tree_inputs(model, tree)
        if case.attention == DENSE:
            inputs["attention_mask"] = inputs["attention_mask"].as_subclass(Tensor)
        return finish(model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state, shared_rows)

    def separate() -> Tensor:
        out = model.base_model(input_ids=separate_ids, attention_mask=mask, use_cache=False)
        return finish(out.last_hidden_state, separate_rows)

    return {SEPARATE: separate, SHARED: share}
