"""Makes a real CPO run of a small model on real text, and keeps what its head is given at some steps of it.

The model is made here: first next-token prediction, whose end is the frozen reference, then CPO by
:class:`cpo_kernels.CPOTrainer` with batch, truncation and mean-field negatives. Nothing in it is timed.
`python -m benchmarks.real_run OUT` saves the :class:`Run`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, TrainerCallback

import cpo_kernels
from benchmarks import texts
from benchmarks.measure import dtype_name
from benchmarks.setting import Setting, add_options
from benchmarks.texts import Corpus, Example
from cpo_kernels import CandidateLayout, CPOConfig, CPOOutput, CPOTrainer
from cpo_kernels.engine.plan import Plan
from cpo_kernels.models import CPORequest
from cpo_kernels.trainer import TokenizedExamples

NEGATIVES = {"num_batch_negatives": 1, "num_truncation_negatives": 1, "num_mean_field_negatives": 1}
K = sum(NEGATIVES.values())
# glibc hands every tensor of a step back to the kernel, which clears it anew: long beside a small step.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


@dataclass(frozen=True)
class Sizes:
    """Holds the sizes of the model, of a step, and of the batch that is looked at.

    Attributes:
        width: H.
        layers, heads: of the body.
        longest: tokens of a prompt and of a completion, at most.
        mle_groups, groups: examples of a step of next-token prediction and of CPO.
        mle_steps: of next-token prediction before the reference is frozen.
        steps: of CPO after which the head is looked at.
        held_out: examples that nothing is trained on, which are looked at, all of them.
    """

    width: int
    layers: int
    heads: int
    longest: int
    mle_groups: int
    groups: int
    mle_steps: int
    steps: tuple[int, ...]
    held_out: int


ON_CPU = Sizes(128, 2, 4, 20, mle_groups=8, groups=1, mle_steps=100, steps=(200, 2000), held_out=16)
ON_GPU = Sizes(2048, 8, 16, 128, mle_groups=32, groups=16, mle_steps=1000, steps=(200, 2000), held_out=32)
QUICK = Sizes(32, 1, 2, 16, mle_groups=4, groups=2, mle_steps=4, steps=(4, 8), held_out=4)


@dataclass(frozen=True)
class Looked:
    """Holds what the head is given for one batch at one step of the run, on the device of the run.

    Attributes:
        step: of CPO.
        hidden: (R, H), rows that predict a token.
        weight: (V, H).
        targets: (N,).
        layout: of the tokens.
        options: of :func:`cpo_kernels.linear_cpo_loss`: reference log-likelihoods, beta, weights of both parts.
    """

    step: int
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    layout: CandidateLayout
    options: dict[str, Any]

    def to(self, dtype: torch.dtype, **options: float) -> Looked:
        """Copy it in a dtype, with hidden states and head that require gradients, and with other options."""
        hidden, weight = (t.detach().to(dtype, copy=True).requires_grad_() for t in (self.hidden, self.weight))
        return replace(self, hidden=hidden, weight=weight, options=self.options | options)

    @property
    def conditions(self) -> dict[str, Any]:
        """Return the sizes, for records; K is that of the first group."""
        vocab, width = self.weight.shape
        sizes = {"V": vocab, "H": width, "N": self.targets.numel(), "rows": self.hidden.shape[0]}
        dtype = {"dtype": dtype_name(self.hidden.dtype), "mle_weight": self.options["mle_weight"]}
        return sizes | {"K": self.layout.cu_groups[1] - 1} | dtype | {"step": self.step}

    @property
    def rows(self) -> Tensor:
        """Return the row (N,) of each token."""
        rows = self.layout.rows
        return torch.arange(self.targets.numel(), device=self.targets.device) if rows is None else rows

    def output(self, **head: Any) -> CPOOutput:
        """Call ours."""
        tensors = (self.hidden, self.weight, self.targets)
        return cpo_kernels.linear_cpo_loss(*tensors, layout=self.layout, **self.options, **head)

    def plan(self) -> Plan:
        """Return what our call will do."""
        return cpo_kernels.plan(self.hidden, self.weight, self.targets, layout=self.layout, **self.options)

    def run(self, **head: Any) -> tuple[Tensor, tuple[Tensor, ...], float]:
        """Call ours: loss, gradients, and the share of the gradient's mass that a filter left out."""
        out = self.output(**head)
        return out.loss, torch.autograd.grad(out.loss, (self.hidden, self.weight)), out.dropped.item()

    def run_by_token_logps(
        self, token_logps: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...], float]:
        """Call a peer that knows log-probabilities (N,) of tokens that each have a row (N, H)."""
        loss = self.loss_of(token_logps(self.hidden[self.rows], self.weight, self.targets).float())
        return loss, torch.autograd.grad(loss, (self.hidden, self.weight)), 0.0

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


@dataclass
class Run:
    """Holds what came of it.

    Attributes:
        source: the text.
        looked: in the order of the steps.
        losses: mean losses of each logging window, by name.
    """

    source: str
    looked: list[Looked] = field(default_factory=list)
    losses: list[dict[str, float]] = field(default_factory=list)


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


class Look(TrainerCallback):
    """Looks after some steps."""

    def __init__(self, steps: Sequence[int], at: Callable[[int], None]) -> None:
        self.steps, self.at = steps, at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look where one of the steps is over."""
        if state.global_step in self.steps:
            self.at(state.global_step)


def make_model(corpus: Corpus, sizes: Sizes) -> GPT2LMHeadModel:
    """Make a small GPT-2 with a tied head, random weights and no dropout."""
    shape = {"n_embd": sizes.width, "n_layer": sizes.layers, "n_head": sizes.heads, "n_positions": 2 * sizes.longest}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {"bos_token_id": corpus.eos, "eos_token_id": corpus.eos, "pad_token_id": corpus.eos}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(corpus.tokenizer), **shape, **dropout, **special))


def tokenized(examples: Sequence[Example]) -> TokenizedExamples:
    """Return examples as the trainer takes them."""
    return TokenizedExamples([e.prompt for e in examples], [e.completion for e in examples])


def train(setting: Setting, sizes: Sizes) -> Run:
    """Make the whole run: next-token prediction, then CPO up to the last of `sizes.steps`."""
    corpus = texts.load(setting, sizes.longest)
    held_out, rest = tokenized(corpus.examples[: sizes.held_out]), tokenized(corpus.examples[sizes.held_out :])
    run = Run(corpus.source)
    transformers.set_seed(0)
    model = make_model(corpus, sizes)

    def trainer(examples: TokenizedExamples, groups: int, ref_model: Any = None, **options: Any) -> CPOTrainer:
        config = CPOConfig(
            output_dir=folder,
            per_device_train_batch_size=groups,
            max_length=2 * sizes.longest,
            lr_scheduler_type="linear",
            warmup_steps=20,
            logging_steps=max(1, sizes.steps[0] // 4),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not setting.on_gpu,
            seed=0,
            **options,
        )
        made = CPOTrainer(model, config, examples, processing_class=corpus.tokenizer, ref_model=ref_model)
        made.remove_callback(transformers.PrinterCallback)
        return made

    with tempfile.TemporaryDirectory() as folder:
        first = trainer(rest, sizes.mle_groups, objective="mle", max_steps=sizes.mle_steps, learning_rate=2e-3)
        first.train()
        second = trainer(rest, sizes.groups, max_steps=sizes.steps[-1], learning_rate=5e-5, **NEGATIVES)
        probe = trainer(held_out, sizes.held_out, ref_model=second.ref_model, **NEGATIVES)
        second.add_callback(Look(sizes.steps, lambda step: run.looked.append(look(probe, step))))
        second.train()
    run.losses = first.state.log_history + second.state.log_history
    return run


def train_in_a_process(setting: Setting) -> Run:
    """Train in a process whose allocator keeps freed memory, which what is measured afterwards must not.

    Raises:
        subprocess.CalledProcessError: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.pt"
        command = [sys.executable, "-m", "benchmarks.real_run", str(out), *setting.resolved().options]
        subprocess.run(command, cwd=Path(__file__).parent.parent, env=os.environ | KEEP_MEMORY, check=True)
        saved = torch.load(out, weights_only=False)
    return Run(saved["source"], [Looked(**looked) for looked in saved["looked"]], saved["losses"])


def main(argv: list[str] | None = None) -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    add_options(parser)
    args = parser.parse_args(argv)
    setting = Setting.of(args)
    run = train(setting, setting.choose(QUICK, ON_CPU, ON_GPU))
    looked = [vars(looked) for looked in run.looked]  # by name: a module that is run has classes of its own
    torch.save({"source": run.source, "looked": looked, "losses": run.losses}, args.out)


if __name__ == "__main__":
    main()
