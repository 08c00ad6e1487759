"""A training step, forward and backward, of TRL's trainers and of ours on the same preference pairs.

DPO with a reference model that is asked in every step, and the CPO of Xu et al., which has none; half the tokens
prompt, no optimizer, no dropout. All trainers of a case share the parameters of one policy and one reference. Before
they are timed, losses and norms of the gradient are compared with TRL's.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, NamedTuple

import datasets
import torch
import transformers
from torch import Tensor
from torch.nn.utils import get_total_norm

from benchmarks.contestants import OURS
from benchmarks.measure import free_memory, summary
from benchmarks.memory import meter_for
from benchmarks.models import (
    GPT2_SMALL,
    GPT2_TINY,
    LLAMA_1B,
    LLAMA_SMALL,
    LLAMA_TINY,
    Sizes,
    make_model,
    make_tokenizer,
    twin,
)
from benchmarks.own_step import OwnStep
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.timing import Effort, Timing, clock_for, round_robin
from cpo_kernels import CPOConfig, CPOTrainer

STOCK, PATCHED = "TRL", "TRL, patch_fused_head()"
FUSED = {"dpo": "FusedDPOTrainer", "xu_cpo": "FusedCPOTrainer"}
OURS_SEPARATE = "cpo-kernels, sharing off"
BETA = 0.1
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the loss and of the gradient's norm

Step = Callable[[], Tensor]  # forward and backward; the loss, detached


class Result(NamedTuple):
    """What trainers of the same loss agree on."""

    loss: float
    gradient_norm: float

    def close_to(self, other: Result, tolerance: float) -> bool:
        """Whether both are the same up to a share of the other's; NaN is not."""
        return all(abs(own - right) <= tolerance * abs(right) for own, right in zip(self, other, strict=True))


@dataclass(frozen=True)
class Case:
    """One objective and model.

    Attributes:
        work: "dpo" or "xu_cpo".
        sizes: of policy and reference.
        pairs: of a step.
        tokens: of a prompt, and of each of its two completions, EOS included.
        dtype: of the parameters.
        every: whether our other ways run too: TRL's trainers with our head.
    """

    work: str
    sizes: Sizes
    pairs: int
    tokens: int
    dtype: torch.dtype = torch.float32
    every: bool = True

    @property
    def name(self) -> str:
        """Of the case in the results."""
        objective = {"dpo": "DPO", "xu_cpo": "CPO of Xu et al."}[self.work]
        return f"{objective}, {self.sizes.name}, {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        """Of the parameters."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def fed(self) -> int:
        """Tokens that TRL feeds: prompt and completion of both sequences of every pair."""
        return self.pairs * 2 * 2 * self.tokens

    @property
    def conditions(self) -> dict[str, object]:
        """Of its records."""
        rest = {"N": self.fed // 2, "K": 1, "dtype": self.dtype_name, "prompt": 0.5, "work": self.work}
        return self.sizes.conditions | rest | {"pairs": self.pairs, "tokens": self.fed}


def cases(setting: Setting) -> list[Case]:
    """What is run on a device."""
    if setting.quick:
        return [Case("dpo", GPT2_TINY, 2, 8), Case("xu_cpo", LLAMA_TINY, 2, 8)]
    if setting.on_gpu:
        sizes = [(GPT2_SMALL, 16, 512), (LLAMA_1B, 8, 512)]
        return [Case(work, *own, dtype=torch.bfloat16) for own in sizes for work in ("dpo", "xu_cpo")]
    few = partial(Case, every=False)
    # Without a reference a step is short: with 64 tokens its products outweigh what any step costs.
    return [Case("dpo", GPT2_SMALL, 2, 40), few("xu_cpo", GPT2_SMALL, 2, 64), few("dpo", LLAMA_SMALL, 2, 32)]


def run(setting: Setting) -> Iterator[Record]:
    """Every trainer in every case."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    rounds = 1 if setting.quick else 3 if setting.on_gpu else 2
    effort = Effort(rounds=rounds, seconds=60.0, far=1.2, very_far=1.2)
    for case in cases(setting):
        yield from measure(case, setting.device, effort)
        free_memory()


def measure(case: Case, device: torch.device, effort: Effort) -> Iterator[Record]:
    """The records of one case."""
    bench = Bench(case, device)
    with tempfile.TemporaryDirectory() as folder:
        steps, failed = bench.make_steps(folder)
    found = bench.first_calls(steps)
    failed |= disagreeing(found, case.dtype)
    timings = bench.time({name: step for name, step in steps.items() if name not in failed}, effort)
    for name in bench.contestants:
        if name in failed:
            yield Record(case.name, name, conditions=case.conditions, note=failed[name])
        else:
            yield Record(case.name, name, bench.values(name, timings, found[name].loss), case.conditions)


def disagreeing(found: Mapping[str, Result | Exception], dtype: torch.dtype) -> dict[str, str]:
    """Why contestants are not timed: they failed, or disagree with the first one that did not."""
    expected = next((own for own in found.values() if not isinstance(own, Exception)), None)
    failed = {}
    for name, own in found.items():
        if isinstance(own, Exception):
            failed[name] = summary(own)
        elif not own.close_to(expected, TOLERANCE[dtype]):
            failed[name] = f"another loss: found {own}, expected {expected}"
    return failed


class Bench:
    """The trainers of one case around one policy and one reference."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.policy, self.reference = (
            make_model(case.sizes, 2 * case.tokens, seed).to(device, case.dtype) for seed in (0, 1)
        )
        self.tokenizer = make_tokenizer(case.sizes.vocabulary)
        self.pairs = make_pairs(case)
        self.meter = meter_for(device)
        self.peaks: dict[str, int] = {}

    @property
    def contestants(self) -> dict[str, Callable[[str], Step]]:
        """How to make the step of each, given a folder; TRL first."""
        trl = {STOCK: partial(self.trl_step, "stock")}
        if self.case.every:
            trl |= {FUSED[self.case.work]: partial(self.trl_step, "fused")}
        if self.case.every and self.case.work == "dpo":  # TRL has no fused head for its CPOTrainer
            trl |= {PATCHED: partial(self.trl_step, "patched")}
        return trl | {OURS: partial(self.our_step, "required"), OURS_SEPARATE: partial(self.our_step, "off")}

    def make_steps(self, folder: str) -> tuple[dict[str, Step], dict[str, str]]:
        """The step of every contestant, or why there is none."""
        steps, failed = {}, {}
        for name, make in self.contestants.items():
            try:
                steps[name] = make(folder)
            except Exception as error:  # a trainer may not be installed, or refuse the model in its own way
                failed[name] = summary(error)
        return steps, failed

    def trl_step(self, kind: str, folder: str) -> Step:
        """TRL's trainer as it is, our subclass of it, or with our head patched in."""
        trainer_class, config_class, context = trl_classes(self.case.work, kind)
        args = config_class(
            per_device_train_batch_size=self.case.pairs, gradient_checkpointing=False, **self.arguments(folder)
        )
        trainer = trainer_class(**self.models(), args=args, train_dataset=datasets.Dataset.from_list(self.pairs))
        batch = next(iter(trainer.get_train_dataloader()))

        def step() -> Tensor:
            with context():
                loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            return loss.detach()

        trainer.model.train()
        return step

    def our_step(self, sharing: str, folder: str) -> Step:
        """CPOTrainer; it packs the batch in every step."""
        args = CPOConfig(objective=self.case.work, prefix_sharing=sharing, **self.arguments(folder))
        trainer = CPOTrainer(**self.models(), args=args, train_dataset=self.pairs)
        trainer.model.train()
        return OwnStep(trainer, self.case.pairs)

    def arguments(self, folder: str) -> dict[str, Any]:
        """Of every trainer."""
        return {
            "output_dir": folder,
            "beta": BETA,
            "max_length": 2 * self.case.tokens,
            "use_cpu": self.device.type == "cpu",
            "bf16": False,
            "report_to": "none",
            "dataloader_pin_memory": False,
        }

    def models(self) -> dict[str, Any]:
        """The models of every trainer, and its tokenizer."""
        models = {"model": twin(self.policy), "processing_class": self.tokenizer}
        return models | ({"ref_model": twin(self.reference)} if self.case.work == "dpo" else {})

    def first_calls(self, steps: Mapping[str, Step]) -> dict[str, Result | Exception]:
        """What a first call of every step finds or raises; they are warm afterwards."""
        found: dict[str, Result | Exception] = {}
        for name, step in steps.items():
            try:
                found[name] = self.result(step)
            except Exception as error:  # a contestant may fail in any way of its own
                found[name] = error
        return found

    def result(self, step: Step) -> Result:
        """Of one call."""
        self.policy.zero_grad(set_to_none=True)
        loss = float(step())
        return Result(loss, float(get_total_norm(self.gradients())))

    def gradients(self) -> list[Tensor]:
        """Of the policy."""
        return [p.grad for p in self.policy.parameters() if p.grad is not None]

    def time(self, steps: Mapping[str, Step], effort: Effort) -> dict[str, Timing]:
        """Of all steps in turns, each leaving new gradients behind."""
        reference = next(name for name in (OURS, *steps) if name in steps)
        always = [name for name in (STOCK, OURS_SEPARATE) if name in steps]
        clock = clock_for(self.device)
        return round_robin(steps, effort, reference=reference, always=always, observer=self, clock=clock)

    def before(self, name: str) -> None:
        """Drop the gradients, and start the meter for a first timed call."""
        self.policy.zero_grad(set_to_none=True)
        if name not in self.peaks:
            self.meter.start()

    def after(self, name: str, result: object) -> None:
        """Take the peak of a first timed call."""
        if name not in self.peaks:
            self.peaks[name] = self.meter.growth() - sum(gradient.nbytes for gradient in self.gradients())

    def values(self, name: str, timings: Mapping[str, Timing], loss: float) -> dict[str, float]:
        """Of the record of a contestant that was timed."""
        own = timings[name]
        values = {
            "seconds": own.best,
            "median": own.median,
            "rounds": len(own.seconds),
            "tokens_per_second": self.case.fed / own.best,
            "peak_mib": self.peaks[name] / 2**20,
            "loss": loss,
        }
        return values | ({"of_trl": timings[STOCK].best / own.best} if STOCK in timings else {})


def trl_classes(work: str, kind: str) -> tuple[Any, Any, Callable[[], AbstractContextManager]]:
    """Trainer, configuration and the context of its steps; TRL is only needed here."""
    import trl
    from trl.experimental import cpo

    from cpo_kernels.integrations.trl import FusedCPOTrainer, FusedDPOTrainer, fused_head

    stock, fused, config = {
        "dpo": (trl.DPOTrainer, FusedDPOTrainer, trl.DPOConfig),
        "xu_cpo": (cpo.CPOTrainer, FusedCPOTrainer, cpo.CPOConfig),
    }[work]
    return fused if kind == "fused" else stock, config, fused_head if kind == "patched" else nullcontext


def make_pairs(case: Case) -> list[dict[str, str]]:
    """Random words, as {"prompt", "chosen", "rejected"}; EOS is the last of a completion's tokens."""
    draw = Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(case.sizes.vocabulary - 1)}" for _ in range(length))

    lengths = {"prompt": case.tokens, "chosen": case.tokens - 1, "rejected": case.tokens - 1}
    pairs = [{name: text(length) for name, length in lengths.items()} for _ in range(case.pairs)]
    return [pair | {"prompt": pair["prompt"] + " "} for pair in pairs]
