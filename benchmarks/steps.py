"""Part `steps`: a training step, forward and backward, of TRL's trainers and of ours on the same preference pairs.

DPO with a reference model that is asked in every step, and the CPO of Xu et al., which has none; half the tokens
prompt, no optimizer, no dropout. All trainers of a case share the parameters of one policy and one reference. Losses
and norms of the gradient are compared with those of the first trainer, TRL's where there is one.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor
from torch.nn.utils import get_total_norm

from benchmarks.contestants import OURS
from benchmarks.measure import Agreement, Case, Contestant, dtype_name, each, measure
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.timing import Call
from benchmarks.training import (
    GPT2_SMALL,
    GPT2_TINY,
    LLAMA_1B,
    LLAMA_SMALL,
    LLAMA_TINY,
    OwnStep,
    Sizes,
    gradients,
    make_model,
    make_tokenizer,
    twin,
)
from cpo_kernels import CPOConfig, CPOTrainer

STOCK, PATCHED = "TRL", "TRL, patch_fused_head()"
FUSED = {"dpo": "FusedDPOTrainer", "xu_cpo": "FusedCPOTrainer"}
OURS_SEPARATE = "cpo-kernels, sharing off"
OBJECTIVES = {"dpo": "DPO", "xu_cpo": "CPO of Xu et al."}
BETA = 0.1
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the loss and of the gradient's norm


@dataclass(frozen=True)
class Pairs:
    """Describes what the trainers of a case are given.

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
        """Return that of the case in the results."""
        return f"{OBJECTIVES[self.work]}, {self.sizes.name}, {dtype_name(self.dtype)}"

    @property
    def fed(self) -> int:
        """Count the tokens that TRL feeds: prompt and completion of both sequences of every pair."""
        return self.pairs * 2 * 2 * self.tokens

    @property
    def conditions(self) -> dict[str, object]:
        """Return those of the case's records."""
        rest = {"N": self.fed // 2, "K": 1, "dtype": dtype_name(self.dtype), "prompt": 0.5, "work": self.work}
        return self.sizes.conditions | rest | {"pairs": self.pairs, "tokens": self.fed}


def cases(setting: Setting) -> list[Pairs]:
    """Return what is run on a device."""
    few = partial(Pairs, every=False)
    on_gpu = [
        Pairs(work, *own, dtype=torch.bfloat16)
        for own in ((GPT2_SMALL, 16, 512), (LLAMA_1B, 8, 512))
        for work in ("dpo", "xu_cpo")
    ]
    # Without a reference a step is short: with 64 tokens its products outweigh what any step costs.
    on_cpu = [Pairs("dpo", GPT2_SMALL, 2, 40), few("xu_cpo", GPT2_SMALL, 2, 64), few("dpo", LLAMA_SMALL, 2, 32)]
    return setting.choose([Pairs("dpo", GPT2_TINY, 2, 8), Pairs("xu_cpo", LLAMA_TINY, 2, 8)], on_cpu, on_gpu)


def run(setting: Setting) -> Iterator[Record]:
    """Measure every trainer in every case."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    yield from each({pairs.name: partial(beside_trl, pairs, setting) for pairs in cases(setting)})


def beside_trl(pairs: Pairs, setting: Setting) -> Iterator[Record]:
    """Measure one case."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = Trainers(pairs, setting.device, folder)
        agree = Agreement(TOLERANCE[pairs.dtype], lambda result: (result[0], get_total_norm(result[1])))

        def contestant(name: str, build: Callable[[], Call]) -> Contestant:
            def check(result: tuple[Tensor, tuple[Tensor, ...]]) -> dict[str, float]:
                return agree(result) | {"loss": float(result[0])}

            return Contestant(name, build, check, values=lambda s: {"tokens_per_second": pairs.fed / s})

        case = Case(
            pairs.name,
            [contestant(name, build) for name, build in trainers.steps().items()],
            pairs.conditions,
            speeds={"of_trl": STOCK},
            rounds=setting.rounds(3, 5),
            before=lambda: trainers.policy.zero_grad(set_to_none=True),
            peaks=True,
        )
        yield from measure(case, setting.device)


class Trainers:
    """Makes the trainers of one case around one policy and one reference."""

    def __init__(self, pairs: Pairs, device: torch.device, folder: str) -> None:
        self.pairs, self.device, self.folder = pairs, device, folder
        self.policy, self.reference = (
            make_model(pairs.sizes, 2 * pairs.tokens, seed).to(device, pairs.dtype) for seed in (0, 1)
        )
        self.tokenizer = make_tokenizer(pairs.sizes.vocabulary)
        self.texts = make_texts(pairs)

    def steps(self) -> dict[str, Callable[[], Call]]:
        """Return how to make the step of each; TRL first."""
        found = {STOCK: partial(self.trl_step, "stock")}
        if self.pairs.every:
            found[FUSED[self.pairs.work]] = partial(self.trl_step, "fused")
        if self.pairs.every and self.pairs.work == "dpo":  # TRL has no fused head for its CPOTrainer
            found[PATCHED] = partial(self.trl_step, "patched")
        return found | {OURS: partial(self.our_step, "required"), OURS_SEPARATE: partial(self.our_step, "off")}

    def trl_step(self, kind: str) -> Call:
        """Make that of TRL's trainer as it is, our subclass of it, or with our head patched in."""
        trainer_class, config_class, context = trl_classes(self.pairs.work, kind)
        options = {"per_device_train_batch_size": self.pairs.pairs, "gradient_checkpointing": False}
        data = datasets.Dataset.from_list(self.texts)
        trainer = trainer_class(**self.models(), args=config_class(**options, **self.arguments()), train_dataset=data)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()

        def step() -> tuple[Tensor, tuple[Tensor, ...]]:
            with context():
                loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            return loss.detach(), gradients(self.policy)

        return step

    def our_step(self, sharing: str) -> OwnStep:
        """Make that of CPOTrainer, which packs the batch in every step."""
        args = CPOConfig(objective=self.pairs.work, prefix_sharing=sharing, **self.arguments())
        trainer = CPOTrainer(**self.models(), args=args, train_dataset=self.texts)
        trainer.model.train()
        return OwnStep(trainer, self.pairs.pairs)

    def arguments(self) -> dict[str, Any]:
        """Return what every trainer is told."""
        return {
            "output_dir": self.folder,
            "beta": BETA,
            "max_length": 2 * self.pairs.tokens,
            "use_cpu": self.device.type == "cpu",
            "bf16": False,
            "report_to": "none",
            "dataloader_pin_memory": False,
        }

    def models(self) -> dict[str, Any]:
        """Return the models of every trainer, and its tokenizer."""
        models = {"model": twin(self.policy), "processing_class": self.tokenizer}
        return models | ({"ref_model": twin(self.reference)} if self.pairs.work == "dpo" else {})


def trl_classes(work: str, kind: str) -> tuple[Any, Any, Callable[[], AbstractContextManager]]:
    """Return trainer, configuration and the context of its steps; TRL is only needed here."""
    import trl
    from trl.experimental import cpo

    from cpo_kernels.integrations.trl import FusedCPOTrainer, FusedDPOTrainer, fused_head

    stock, fused, config = {
        "dpo": (trl.DPOTrainer, FusedDPOTrainer, trl.DPOConfig),
        "xu_cpo": (cpo.CPOTrainer, FusedCPOTrainer, cpo.CPOConfig),
    }[work]
    return fused if kind == "fused" else stock, config, fused_head if kind == "patched" else nullcontext


def make_texts(pairs: Pairs) -> list[dict[str, str]]:
    """Draw random words, as {"prompt", "chosen", "rejected"}; EOS is the last of a completion's tokens."""
    draw = Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(pairs.sizes.vocabulary - 1)}" for _ in range(length))

    lengths = {"prompt": pairs.tokens, "chosen": pairs.tokens - 1, "rejected": pairs.tokens - 1}
    drawn = [{name: text(length) for name, length in lengths.items()} for _ in range(pairs.pairs)]
    return [pair | {"prompt": pair["prompt"] + " "} for pair in drawn]
