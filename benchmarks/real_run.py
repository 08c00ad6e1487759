"""Makes a real CPO run of a small model on real text, and keeps what its head is given at some steps of it.

The model is made here: first next-token prediction, whose end is the frozen reference, then CPO by
:class:`cpo_kernels.CPOTrainer` with batch, truncation and mean-field negatives. Nothing in it is timed.
"""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import cpo_kernels
from benchmarks import texts, training
from benchmarks.measure import dtype_name
from benchmarks.processes import call_alone
from benchmarks.setting import Setting
from cpo_kernels import CandidateLayout, CPOConfig, CPOTrainer
from cpo_kernels.engine.plan import Plan
from cpo_kernels.models import CPORequest
from cpo_kernels.trainer import TokenizedExamples

NEGATIVES = {"num_batch_negatives": 1, "num_truncation_negatives": 1, "num_mean_field_negatives": 1}
# glibc hands every tensor of a step back to the kernel, which clears it anew: long beside a small step.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


@dataclass(frozen=True)
class Sizes:
    """Holds the sizes of the model, of a step, and of the batch that is looked at."""

    width: int  # H
    layers: int  # layers, heads: of the body
    heads: int
    longest: int  # tokens of a prompt and of a completion, at most
    mle_groups: int  # mle_groups, groups: examples of a step of next-token prediction and of CPO
    groups: int
    mle_steps: int  # of next-token prediction before the reference is frozen
    held_out: int  # examples that nothing is trained on: as many for the choice, and as many that are timed
    choosing: tuple[int, ...] = (60, 80, 100)  # steps of CPO by whose heads filters are chosen, for the whole run
    steps: tuple[int, ...] = (200, 2000)  # later ones, at which they are timed, on other texts


ON_CPU = Sizes(128, 2, 4, 20, mle_groups=8, groups=1, mle_steps=100, held_out=16)
ON_GPU = Sizes(2048, 8, 16, 128, mle_groups=32, groups=16, mle_steps=1000, held_out=32)
QUICK = Sizes(32, 1, 2, 16, mle_groups=4, groups=2, mle_steps=4, held_out=4, choosing=(1, 2), steps=(4, 8))


@dataclass(frozen=True)
class Looked:
    """Holds what the head is given for one batch at one step of the run, on the device of the run."""

    step: int  # of CPO
    hidden: Tensor  # (R, H), rows that predict a token
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,)
    layout: CandidateLayout  # of the tokens
    options: dict[str, Any]  # of the loss: reference log-likelihoods, beta, weights of both parts

    def to(self, dtype: torch.dtype, **options: float) -> Looked:
        """Copy it in a dtype, with hidden states and head that require gradients, and with other options."""
        hidden, weight = (t.detach().to(dtype, copy=True).requires_grad_() for t in (self.hidden, self.weight))
        return replace(self, hidden=hidden, weight=weight, options=self.options | options)

    @property
    def conditions(self) -> dict[str, Any]:
        """Returns the sizes, for records; K is that of the first group."""
        vocab, width = self.weight.shape
        sizes = {"V": vocab, "H": width, "N": self.targets.numel(), "rows": self.hidden.shape[0]}
        dtype = {"dtype": dtype_name(self.hidden.dtype), "mle_weight": self.options["mle_weight"]}
        return sizes | {"K": self.layout.cu_groups[1] - 1} | dtype | {"step": self.step}

    def plan(self) -> Plan:
        """Return what our call will do."""
        return cpo_kernels.plan(self.hidden, self.weight, self.targets, layout=self.layout, **self.options)

    def run(self, **head: Any) -> tuple[Tensor, tuple[Tensor, ...], float]:
        """Call ours: loss, gradients, and the share of the gradient's mass that a filter left out."""
        tensors = (self.hidden, self.weight, self.targets)
        out = cpo_kernels.linear_cpo_loss(*tensors, layout=self.layout, **self.options, **head)
        return out.loss, torch.autograd.grad(out.loss, (self.hidden, self.weight)), out.dropped.item()

    def loss_of(self, logps: Tensor) -> Tensor:
        """Take the objective by its definition, of token log-probabilities (N,); each group's first is the truth."""
        options = self.options
        sums = torch.stack([logps[a:b].sum() for a, b in pairwise(self.layout.cu_tokens)])
        scores = options["beta"] * (sums - options["ref_logps"].to(sums))
        bounds = list(pairwise(self.layout.cu_groups))
        contrast = torch.stack([torch.logsumexp(scores[a:b], 0) - scores[a] for a, b in bounds]).mean()
        truths = [a for a, _ in bounds]
        tokens = sum(self.layout.cu_tokens[a + 1] - self.layout.cu_tokens[a] for a in truths)
        return options["contrast_weight"] * contrast - options["mle_weight"] * sums[truths].sum() / tokens


class Spy:
    """Stands for a model in `compute_loss` and keeps what its head is given."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.hidden = self.weight = torch.empty(0)

    def __call__(self, *args: Any, linear_loss: CPORequest, **kwargs: Any) -> Any:
        """Return the answer of the model."""
        self.request = linear_loss
        return self.model(*args, linear_loss=self, **kwargs)

    def compute(self, hidden: Tensor, head: Any, transform: Any) -> Any:
        """Keep what the head is given, in place of the request's own."""
        self.hidden, self.weight = head.features.clone(), head.weight.detach().clone()
        return self.request.compute(hidden, head, transform)


def look(trainer: CPOTrainer, step: int) -> Looked:
    """Return what the head of a trainer's model is given for all its training examples at once."""
    spy = Spy(trainer.model)
    indices = torch.arange(len(trainer.train_dataset))
    (inputs,), tokens = trainer.get_batch_samples(iter([{"index": indices}]), 1, trainer.args.device)
    inputs = {name: v.to(trainer.args.device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
    with torch.no_grad():
        trainer.compute_loss(spy, inputs, num_items_in_batch=tokens)
    request = spy.request
    options = {name: request.options[name] for name in ("ref_logps", "beta", "contrast_weight", "mle_weight")}
    used, rows = torch.unique(request.layout.rows, return_inverse=True)
    layout = replace(request.layout, rows=rows)
    return Looked(step, spy.hidden[used], spy.weight, request.targets, layout, options)


def train(setting: Setting, sizes: Sizes) -> tuple[list[Looked], list[Looked]]:
    """Make the whole run: next-token prediction, then CPO up to the last of `sizes.steps`.

    Returns what the head is given at the steps that choose filters, and at those that are timed, of other texts.
    """
    corpus, held = texts.load(setting, sizes.longest), sizes.held_out
    for_choice, timed, rest = (
        TokenizedExamples([e.prompt for e in own], [e.completion for e in own])
        for own in (corpus.examples[:held], corpus.examples[held : 2 * held], corpus.examples[2 * held :])
    )
    looked: dict[str, list[Looked]] = {"choosing": [], "timed": []}
    sizes_of_model = training.Sizes("", False, len(corpus.tokenizer), sizes.width, sizes.heads, sizes.layers)
    model = training.make_model(sizes_of_model, 2 * sizes.longest, end=corpus.tokenizer.eos_token_id)

    def trainer(examples: TokenizedExamples, groups: int, ref_model: Any = None, **options: Any) -> CPOTrainer:
        quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        course = {"lr_scheduler_type": "linear", "warmup_steps": 20, "seed": 0, "max_length": 2 * sizes.longest}
        given = {"output_dir": folder, "per_device_train_batch_size": groups, "use_cpu": not setting.on_gpu}
        config = CPOConfig(**quiet, **course, **given, **options)
        made = CPOTrainer(model, config, examples, processing_class=corpus.tokenizer, ref_model=ref_model)
        made.remove_callback(transformers.PrinterCallback)
        return made

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for name, steps in (("choosing", sizes.choosing), ("timed", sizes.steps)):
                if state.global_step in steps:
                    looked[name].append(look(probes[name], state.global_step))

    with tempfile.TemporaryDirectory() as folder:
        first = trainer(rest, sizes.mle_groups, objective="mle", max_steps=sizes.mle_steps, learning_rate=2e-3)
        first.train()
        second = trainer(rest, sizes.groups, max_steps=sizes.steps[-1], learning_rate=5e-5, **NEGATIVES)
        held_out = {"choosing": for_choice, "timed": timed}
        probes = {n: trainer(own, held, ref_model=second.ref_model, **NEGATIVES) for n, own in held_out.items()}
        second.add_callback(Look())
        second.train()
    return looked["choosing"], looked["timed"]


def train_in_a_process(setting: Setting) -> tuple[list[Looked], list[Looked]]:
    """Train in a process whose allocator keeps freed memory, which what is measured afterwards must not."""
    return torch.load(io.BytesIO(call_alone(saved, setting, environment=KEEP_MEMORY)), weights_only=False)


def saved(setting: Setting) -> bytes:
    """Train, and returns the run as torch saves it."""
    buffer = io.BytesIO()
    torch.save(train(setting, setting.choose(QUICK, ON_CPU, ON_GPU)), buffer)
    return buffer.getvalue()
