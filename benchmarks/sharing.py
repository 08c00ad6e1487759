"""Part `sharing`: transformer bodies on packed rows that share their prompts against one padded row a candidate.

Forward and backward of the body, without a large embedding and without a head; K = 4, the prompt as long as each
candidate. Hidden states and gradients of both are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import torch
import transformers
from torch import Tensor

from benchmarks.measure import Agreement, Case, Contestant, dtype_name, free_memory, measure
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.training import GPT2_SMALL, GPT2_TINY, LLAMA_1B, LLAMA_SMALL, LLAMA_TINY, Given, draw_tokens, gradients
from cpo_kernels.models.prefix.probe import check_prefix_sharing, pack_groups, tree_inputs

SHARED, SEPARATE = "shared", "separate"
VOCABULARY = 1024
CANDIDATES = 5  # K + 1
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def bodies(setting: Setting) -> list[Given]:
    """Return what is run on a device; flex attention only where it is compiled for, on a GPU."""
    models = setting.choose((GPT2_TINY, LLAMA_TINY), (GPT2_SMALL, LLAMA_SMALL), (GPT2_SMALL, LLAMA_1B))
    layers = {} if setting.on_gpu else {"layers": 1}
    attentions = setting.choose(("sdpa", "eager"), ("sdpa", "eager"), ("sdpa", "eager", "flex_attention"))
    sizes = setting.choose((1, 8), (1, 256), (4, 512, torch.bfloat16))
    models = [replace(own, vocabulary=VOCABULARY, **layers) for own in models]
    return [Given(attention, own, *sizes) for own in models for attention in attentions]


def run(setting: Setting) -> Iterator[Record]:
    """Measure both ways of every body."""
    transformers.logging.set_verbosity_error()
    for body in bodies(setting):
        yield from beside_separate(body, setting)
        free_memory()


def beside_separate(body: Given, setting: Setting) -> list[Record]:
    """Measure one body; where its attention does not run here, the records say so."""
    batch = Batch(body, setting.device)
    agree = Agreement(TOLERANCE[body.dtype], lambda result: (result[0], torch.cat([g.flatten() for g in result[1]])))
    ways = [
        Contestant(name, lambda call=call: call, agree, values=lambda _, n=name: {"positions": batch.positions[n]})
        for name, call in ((SEPARATE, batch.separate), (SHARED, batch.share))
    ]
    sizes = body.sizes
    conditions = {"body": "llama" if sizes.llama else "gpt2", "attention": body.kind, "H": sizes.width}
    conditions |= {"layers": sizes.layers, "K": CANDIDATES - 1, "prompt": 0.5, "groups": body.groups}
    conditions |= {"tokens": body.tokens, "dtype": dtype_name(body.dtype)}
    case = Case("body", ways, conditions, speeds={"ratio": SEPARATE}, rounds=setting.rounds(5, 5))
    return measure(case, setting.device)


class Batch:
    """Holds random tokens both ways, the model, and the gradient of the hidden states that predict tokens."""

    def __init__(self, body: Given, device: torch.device) -> None:
        self.body, self.device = body, device
        prompts = draw_tokens(body.sizes.vocabulary, *[body.tokens] * body.groups)
        # The last token is not fed, so one more makes as many positions of prompt and candidate as were asked for.
        lengths = [body.tokens + 1] * CANDIDATES
        completions = [draw_tokens(body.sizes.vocabulary, *lengths, seed=1 + group) for group in range(body.groups)]
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
        """Makes the model, and makes sure that it can share prefixes."""
        model = self.body.model(self.device, attention=self.body.kind)
        check_prefix_sharing(model)
        return model

    @cached_property
    def upstream(self) -> Tensor:
        """Draws the gradient of the hidden states."""
        width, dtype = self.model.config.hidden_size, self.body.dtype
        return torch.randn(len(self.separate_rows), width, device=self.device, dtype=dtype)

    def share(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run forward and backward on shared rows; the masks are made in every call, as in every step of training."""
        inputs = tree_inputs(self.model, self.tree)
        out = self.model.base_model(input_ids=self.shared_ids, use_cache=False, **inputs)
        return self.finish(out.last_hidden_state, self.shared_rows)

    def separate(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run forward and backward on a row a candidate."""
        mask = torch.ones_like(self.separate_ids)
        out = self.model.base_model(input_ids=self.separate_ids, attention_mask=mask, use_cache=False)
        return self.finish(out.last_hidden_state, self.separate_rows)

    def finish(self, hidden: Tensor, rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the backward; returns the hidden states that predict tokens and the gradients."""
        self.model.zero_grad(set_to_none=True)
        picked = hidden.flatten(0, -2)[rows]
        picked.backward(self.upstream)
        return picked.detach(), gradients(self.model)
