"""Part `sharing`: transformer bodies on packed rows that share their prompts against one padded row a candidate.

Forward and backward of the body, without a large embedding and without a head; K = 4, the prompt as long as each
candidate. Hidden states and gradients of both are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import transformers
from torch import Tensor

from benchmarks.measure import Agreement, Case, Contestant, dtype_name, free_memory, measure
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.timing import Call
from benchmarks.training import (
    GPT2_SMALL,
    GPT2_TINY,
    LLAMA_1B,
    LLAMA_SMALL,
    LLAMA_TINY,
    Sizes,
    gradients,
    make_model,
)
from cpo_kernels.models.prefix.probe import check_prefix_sharing, pack_groups, tree_inputs

SHARED, SEPARATE = "shared", "separate"
DENSE = "sdpa-dense"  # sdpa with the whole mask, not branch by branch
VOCABULARY = 1024
CANDIDATES = 5  # K + 1
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Body:
    """Describes one body with one attention.

    Attributes:
        name: in the results.
        sizes: of the body.
        attention: an implementation of transformers, or DENSE.
        groups: of a batch.
        tokens: of each prompt, and of each candidate.
        dtype: of the parameters.
    """

    name: str
    sizes: Sizes
    attention: str
    groups: int
    tokens: int
    dtype: torch.dtype = torch.float32

    @property
    def conditions(self) -> dict[str, object]:
        """Return those of its records."""
        sizes = {"H": self.sizes.width, "layers": self.sizes.layers, "K": CANDIDATES - 1, "prompt": 0.5}
        rest = {"groups": self.groups, "tokens": self.tokens, "dtype": dtype_name(self.dtype)}
        return {"body": self.name, "attention": self.attention} | sizes | rest


def bodies(setting: Setting) -> list[Body]:
    """Return what is run on a device; flex attention only where it is compiled for, on a GPU."""
    one = {"vocabulary": VOCABULARY, "layers": 1}
    gpt2, llama = setting.choose(
        (GPT2_TINY, LLAMA_TINY),
        (replace(GPT2_SMALL, **one), replace(LLAMA_SMALL, **one)),
        (replace(GPT2_SMALL, vocabulary=VOCABULARY), replace(LLAMA_1B, vocabulary=VOCABULARY)),
    )
    # On a CPU, what branches save is a question of a minute.
    attentions = setting.choose(("sdpa", DENSE, "eager"), ("sdpa", "eager"), ("sdpa", DENSE, "eager", "flex_attention"))
    sizes = setting.choose((1, 8), (1, 256), (4, 512, torch.bfloat16))
    return [Body(name, own, way, *sizes) for name, own in (("gpt2", gpt2), ("llama", llama)) for way in attentions]


def run(setting: Setting) -> Iterator[Record]:
    """Measure both ways of every body."""
    transformers.logging.set_verbosity_error()
    for body in bodies(setting):
        yield from beside_separate(body, setting)
        free_memory()


def beside_separate(body: Body, setting: Setting) -> list[Record]:
    """Measure one body; where its attention does not run here, the records say so."""
    batch = Batch(body, setting.device)
    agree = Agreement(TOLERANCE[body.dtype], lambda result: (result[0], torch.cat([g.flatten() for g in result[1]])))

    def contestant(name: str, build: Callable[[], Call]) -> Contestant:
        return Contestant(name, build, agree, values=lambda seconds: {"positions": batch.positions[name]})

    ways = [contestant(SEPARATE, lambda: batch.separate), contestant(SHARED, lambda: batch.share)]
    speeds, rounds = {"ratio": SEPARATE}, setting.rounds(3, 5)
    return measure(Case("body", ways, body.conditions, speeds=speeds, rounds=rounds), setting.device)


class Batch:
    """Holds random tokens both ways, the model, and the gradient of the hidden states that predict tokens."""

    def __init__(self, body: Body, device: torch.device) -> None:
        self.body, self.device = body, device
        draw = torch.Generator().manual_seed(0)

        def text(length: int) -> list[int]:
            return torch.randint(body.sizes.vocabulary, (length,), generator=draw).tolist()

        prompts = [text(body.tokens) for _ in range(body.groups)]
        # The last token is not fed, so one more makes as many positions of prompt and candidate as were asked for.
        completions = [[text(body.tokens + 1) for _ in range(CANDIDATES)] for _ in range(body.groups)]
        self.packed = pack_groups(prompts, completions)
        self.shared_ids, self.tree = self.packed.input_ids.to(device), self.packed.tree.to(device)
        rows = [row for group in self.packed.rows for candidate in group for row in candidate]
        self.shared_rows = torch.tensor(rows, device=device)
        sequences = [[*p, *c[:-1]] for p, own in zip(prompts, completions, strict=True) for c in own]
        self.separate_ids = torch.tensor(sequences, device=device)  # all as long, so that none is padded
        starts = torch.arange(len(sequences))[:, None] * 2 * body.tokens
        self.separate_rows = (starts + torch.arange(body.tokens - 1, 2 * body.tokens)).flatten().to(device)
        self.positions = {SHARED: self.shared_ids.numel(), SEPARATE: self.separate_ids.numel()}

    @cached_property
    def model(self) -> transformers.PreTrainedModel:
        """Make the model, and make sure that it can share prefixes."""
        attention = self.body.attention.removesuffix("-dense")
        model = make_model(self.body.sizes, 2 * self.body.tokens, attention=attention)
        model.to(self.device, self.body.dtype)
        check_prefix_sharing(model)
        return model

    @cached_property
    def upstream(self) -> Tensor:
        """Draw the gradient of the hidden states."""
        width, dtype = self.model.config.hidden_size, self.body.dtype
        return torch.randn(len(self.separate_rows), width, device=self.device, dtype=dtype)

    def share(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run forward and backward on shared rows; the masks are made in every call, as in every step of training."""
        inputs = tree_inputs(self.model, self.tree)
        if self.body.attention == DENSE:
            inputs["attention_mask"] = inputs["attention_mask"].as_subclass(Tensor)
        out = self.model.base_model(input_ids=self.shared_ids, use_cache=False, **inputs)
        return self.finish(out.last_hidden_state, self.shared_rows)

    def separate(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run forward and backward on a row a candidate."""
        mask = torch.ones_like(self.separate_ids)
        out = self.model.base_model(input_ids=self.separate_ids, attention_mask=mask, use_cache=False)
        return self.finish(out.last_hidden_state, self.separate_rows)

    def finish(self, hidden: Tensor, rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the backward; return the hidden states that predict tokens and the gradients."""
        self.model.zero_grad(set_to_none=True)
        picked = hidden.flatten(0, -2)[rows]
        picked.backward(self.upstream)
        return picked.detach(), gradients(self.model)
