"""Part `steps`: a training step, forward and backward, of TRL's trainers and of ours on the same preference pairs.

Ours as a trainer of its own, with prefixes shared and not, and as a drop-in for TRL's. Beside them stands Amdahl's
bound: our step with separate rows when the head costs nothing.

DPO with a reference model that is asked in every step, and the CPO of Xu et al., which has none; half the tokens
prompt, no optimizer, no dropout. All trainers of a case share the parameters of one policy and one reference. Losses
and norms of the gradient are compared with those of the first trainer, TRL's where there is one.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import datasets
import torch
import transformers
from torch import Tensor
from torch.nn.utils import get_total_norm

from benchmarks import training
from benchmarks.bars import AT_PEAK, BOUND, SEPARATE
from benchmarks.contestants import OURS
from benchmarks.measure import Agreement, Case, Contestant, dtype_name, each, measure
from benchmarks.meters import Call
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.training import Given, OwnStep
from cpo_kernels import CandidateLayout, CPOConfig, CPOOutput, CPOTrainer
from cpo_kernels.models import requests

STOCK, PATCHED = "TRL", "TRL, patch_fused_head()"
FUSED = {"dpo": "FusedDPOTrainer", "xu_cpo": "FusedCPOTrainer"}
OBJECTIVES = {"dpo": "DPO", "xu_cpo": "CPO of Xu et al."}
BETA = 0.1
PRODUCTS = {"dpo": 4, "xu_cpo": 3}  # of the head: forward, two of gradients, and the reference's forward
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the loss and of the gradient's norm


def name_of(pairs: Given) -> str:
    """Return the name of a case in the results."""
    return f"{OBJECTIVES[pairs.kind]}, {pairs.sizes.name}, {dtype_name(pairs.dtype)}, {pairs.tokens} tokens"


def fed(pairs: Given) -> int:
    """Count the tokens that TRL feeds: prompt and completion of both sequences of every pair."""
    return pairs.groups * 2 * 2 * pairs.tokens


def cases(setting: Setting) -> list[Given]:
    """Return what is run on a device."""
    gpt2, large = training.GPT2_SMALL, ((training.GPT2_SMALL, 16), (training.LLAMA_1B, 8))
    on_gpu = [Given(work, model, groups, 512, torch.bfloat16) for model, groups in large for work in OBJECTIVES]
    on_cpu = [Given(work, gpt2, 2, tokens) for work in OBJECTIVES for tokens in (40, 64)]
    on_cpu.append(Given("dpo", training.LLAMA_SMALL, 2, 32))
    quick = [Given("dpo", training.GPT2_TINY, 2, 8), Given("xu_cpo", training.LLAMA_TINY, 2, 8)]
    return setting.choose(quick, on_cpu, on_gpu)


def run(setting: Setting) -> Iterator[Record]:
    """Measure every trainer in every case."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    yield from each({name_of(pairs): partial(beside_trl, pairs, setting) for pairs in cases(setting)})


def beside_trl(pairs: Given, setting: Setting) -> Iterator[Record]:
    """Measure one case."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = Trainers(pairs, setting.device, folder)
        agree = Agreement(TOLERANCE[pairs.dtype], lambda result: (result[0], get_total_norm(result[1])))

        def check(result: tuple[Tensor, tuple[Tensor, ...]]) -> dict[str, float]:
            return agree(result) | {"loss": float(result[0])}

        rate = {"values": lambda seconds: {"tokens_per_second": fed(pairs) / seconds}}
        sizes = {"N": fed(pairs) // 2, "K": 1, "work": pairs.kind, "pairs": pairs.groups, "tokens": fed(pairs)}
        contestants = [Contestant(name, build, check, **rate) for name, build in trainers.steps().items()]

        def head_at_peak(seconds: float) -> dict[str, float]:
            flops = PRODUCTS[pairs.kind] * 2 * sizes["N"] * pairs.sizes.vocabulary * pairs.sizes.width
            peak = setting.ceilings.get(dtype_name(pairs.dtype))
            return {AT_PEAK: seconds / (seconds + flops / (1e12 * peak))} if peak else {}

        bound = Contestant(BOUND, partial(trainers.our_step, "off", free=True), values=head_at_peak)
        case = Case(
            name_of(pairs),
            [*contestants, bound],
            pairs.conditions | sizes,
            speeds={"of_trl": STOCK},
            rounds=setting.rounds(5, 5),
            before=lambda: trainers.policy.zero_grad(set_to_none=True),
            peaks=True,
        )
        yield from measure(case, setting.device)


class Trainers:
    """Makes the trainers of one case around one policy and one reference."""

    def __init__(self, pairs: Given, device: torch.device, folder: str) -> None:
        self.pairs, self.device, self.folder = pairs, device, folder
        self.policy, self.reference = (pairs.model(device, seed) for seed in (0, 1))
        self.tokenizer = training.make_tokenizer(pairs.sizes.vocabulary)
        self.texts = make_texts(pairs)

    def steps(self) -> dict[str, Callable[[], Call]]:
        """Return how to make the step of each; TRL first, which has no fused head for its CPOTrainer."""
        found: dict[str, Callable[[], Call]] = {STOCK: partial(self.trl_step, "stock")}
        found[FUSED[self.pairs.kind]] = partial(self.trl_step, "fused")
        if self.pairs.kind == "dpo":
            found[PATCHED] = partial(self.trl_step, "patched")
        return found | {OURS: partial(self.our_step, "required"), SEPARATE: partial(self.our_step, "off")}

    def trl_step(self, kind: str) -> Call:
        """Make that of TRL's trainer as it is, our subclass of it, or with our head patched in."""
        trainer_class, config_class, context = trl_classes(self.pairs.kind, kind)
        options = {"per_device_train_batch_size": self.pairs.groups, "gradient_checkpointing": False}
        data = datasets.Dataset.from_list(self.texts)
        trainer = trainer_class(**self.models(), args=config_class(**options, **self.arguments()), train_dataset=data)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()

        def step() -> tuple[Tensor, tuple[Tensor, ...]]:
            with context():
                loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            return loss.detach(), training.gradients(self.policy)

        return step

    def our_step(self, sharing: str, *, free: bool = False) -> Call:
        """Make that of CPOTrainer, which packs the batch in every step; `free` says that the head costs nothing."""
        args = CPOConfig(objective=self.pairs.kind, prefix_sharing=sharing, **self.arguments())
        trainer = CPOTrainer(**self.models(), args=args, train_dataset=self.texts)
        trainer.model.train()
        step = OwnStep(trainer, self.pairs.groups)

        def without_head() -> Any:
            with patch.multiple(requests, linear_cpo_loss=free_loss, linear_sequence_logps=free_logps):
                return step()

        return without_head if free else step

    def arguments(self) -> dict[str, Any]:
        """Return what every trainer is told."""
        common = {"output_dir": self.folder, "report_to": "none", "dataloader_pin_memory": False, "bf16": False}
        return common | {"beta": BETA, "max_length": 2 * self.pairs.tokens, "use_cpu": self.device.type == "cpu"}

    def models(self) -> dict[str, Any]:
        """Return the models of every trainer, and its tokenizer."""
        models = {"model": training.twin(self.policy), "processing_class": self.tokenizer}
        return models | ({"ref_model": training.twin(self.reference)} if self.pairs.kind == "dpo" else {})


def free_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *, layout: CandidateLayout, **_: Any) -> Tensor:
    """Return (S,) zeros in place of log-likelihoods."""
    return hidden.new_zeros(layout.num_segments, dtype=torch.float32)


def free_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, layout: CandidateLayout, **_: Any) -> CPOOutput:
    """Return a loss of hidden states alone, with a gradient for each of them."""
    zero, of_segments = hidden.new_zeros(()), free_logps(hidden, weight, targets, layout=layout)
    names = ("contrastive_loss", "nll_loss", "accuracy", "margin", "dropped")
    return CPOOutput(loss=hidden.sum(), logps=of_segments, rewards=of_segments, **dict.fromkeys(names, zero))


def trl_classes(work: str, kind: str) -> tuple[Any, Any, Callable[[], AbstractContextManager]]:
    """Return trainer, configuration and the context of its steps; TRL is only needed here."""
    import trl
    from trl.experimental import cpo

    from cpo_kernels.integrations.trl import FusedCPOTrainer, FusedDPOTrainer, fused_head

    of_dpo = (trl.DPOTrainer, FusedDPOTrainer, trl.DPOConfig)
    stock, fused, config = of_dpo if work == "dpo" else (cpo.CPOTrainer, FusedCPOTrainer, cpo.CPOConfig)
    return fused if kind == "fused" else stock, config, fused_head if kind == "patched" else nullcontext


def make_texts(pairs: Given) -> list[dict[str, str]]:
    """Draw random words, as {"prompt", "chosen", "rejected"}; EOS is the last of a completion's tokens."""
    lengths = (pairs.tokens, pairs.tokens - 1, pairs.tokens - 1)
    drawn = training.draw_tokens(pairs.sizes.vocabulary, *lengths * pairs.groups)
    texts = [" ".join(f"w{token}" for token in tokens) for tokens in drawn]
    three = zip(texts[::3], texts[1::3], texts[2::3], strict=True)
    return [{"prompt": prompt + " ", "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in three]
