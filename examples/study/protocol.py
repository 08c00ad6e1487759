"""What the study runs and tests, fixed before its first full run: tasks, regimes, arms, tries and seeds.

A *regime* says on what a base model was trained and on what all arms continue. An *arm* is one way to continue. Each
arm of a task has six tries, three learning rates times two settings of its own, on a seed and on prompts that nothing
else uses, in the first regime of the task; the try whose samples are furthest above the base's curve of quality against
entropy goes into the runs that count, with eight fresh seeds. The primary test is the difference in quality from the
first arm at equal entropy, paired by seed; a result is named where it stands with 5 % false discoveries among the arms
of a regime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

NEGATIVES = 4
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
# Samples are drawn at each of these; 0.01 stands for greedy decoding.
GREEDY, PLAIN = 0.01, 1.0
TEMPERATURES = (GREEDY, 0.7, 0.85, PLAIN, 1.15)

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Regime:
    """Where a base model comes from and what follows.

    Attributes:
        name: of the regime.
        text: what it stands for, for the report.
        base_data, data: the parts of a task's data that the base, and then every arm, is trained on.
        base_steps, steps: optimizer steps of the base and of an arm.
    """

    name: str
    text: str
    base_data: str
    data: str
    base_steps: int
    steps: int


@dataclass(frozen=True)
class Arm:
    """One way to continue a base model.

    Attributes:
        name: of the arm.
        text: what it is, for the report.
        options: fields of :class:`cpo_kernels.CPOConfig`.
        settings: two sets of fields to choose from, besides the learning rate.
        times: optimizer steps, as a multiple of those of the other arms.
        per_text: the likelihood is summed over each text and averaged over texts.
        average_of: the two arms whose weights are averaged; such an arm is not trained.
    """

    name: str
    text: str
    options: Options = field(default_factory=dict)
    settings: tuple[Options, ...] = ({},)
    times: int = 1
    per_text: bool = False
    average_of: tuple[str, str] | None = None


def _counts(**given: int) -> Options:
    kinds = ("batch", "truncation", "mean_field", "autoregressive")
    return {f"num_{kind}_negatives": given.get(kind, 0) for kind in kinds}


MLE_SETTINGS = ({"weight_decay": 0.0}, {"weight_decay": 0.1})
CPO_SETTINGS = ({"beta": 0.1, "alpha": 0.5}, {"beta": 1.0, "alpha": 0.9})


def _mle(name: str, text: str, **more: Any) -> Arm:
    return Arm(name, text, {"objective": "mle", **_counts()}, MLE_SETTINGS, **more)


def _cpo(name: str, text: str, options: Options | None = None, **counts: int) -> Arm:
    return Arm(name, text, {"objective": "cpo", **_counts(**counts), **(options or {})}, CPO_SETTINGS)


def _mean_field(fraction: float) -> Arm:
    text = f"{NEGATIVES} mean-field negatives, {fraction:.0%} of the tokens replaced"
    return _cpo(f"MN c={fraction:g}", text, {"mean_field_fraction": fraction}, mean_field=NEGATIVES)


NO_REFERENCE = {"reference": "none"}
ARMS = (
    _mle("MLE", "next-token likelihood, averaged over tokens"),
    _mle("MLE x5", "the same with five times the steps: as many tokens through the body as CPO", times=NEGATIVES + 1),
    # The contrast is replaced by the likelihood; a truncation, which costs nothing, stands for the negative.
    Arm(
        "MLE per text",
        "likelihood summed over each text and averaged over texts",
        {"objective": "cpo", "reference": "none", "alpha": 1.0, "mle_weight": 0.0, **_counts(truncation=1)},
        MLE_SETTINGS,
        per_text=True,
    ),
    _cpo("AN", f"{NEGATIVES} autoregressive negatives", autoregressive=NEGATIVES),
    _cpo("AN no ref", "the same without a reference", NO_REFERENCE, autoregressive=NEGATIVES),
    _cpo("ANR", "the same, ranked by similarity", {"ranking": "similarity"}, autoregressive=NEGATIVES),
    *map(_mean_field, (0.1, 0.25, 0.5, 1.0)),
    _cpo(
        "MN no ref",
        f"{NEGATIVES} mean-field negatives, 25% of the tokens replaced, without a reference",
        {"mean_field_fraction": 0.25, **NO_REFERENCE},
        mean_field=NEGATIVES,
    ),
    _cpo("BN", f"{NEGATIVES} batch negatives", batch=NEGATIVES),
    _cpo("TN", f"{NEGATIVES} truncation negatives", truncation=NEGATIVES),
    _cpo("AN + MN", "2 autoregressive and 2 mean-field negatives, c=0.25", autoregressive=2, mean_field=2),
    _cpo("all kinds", "one negative of each kind", autoregressive=1, mean_field=1, batch=1, truncation=1),
    Arm(
        "DPO",
        "one autoregressive negative and no likelihood",
        {"objective": "dpo", **_counts(autoregressive=1)},
        ({"beta": 0.1}, {"beta": 1.0}),
    ),
    Arm(
        "scheduled sampling",
        "likelihood behind text that the model wrote a part of, in parallel",
        {"objective": "scheduled_sampling", **_counts()},
        tuple({"scheduled_sampling_probability": share} for share in (0.1, 0.5)),
    ),
    Arm("ensemble", "the mean of the weights of AN and MLE", average_of=("AN", "MLE")),
)

IMPROVING, CONVERGED, FEW, OTHER = (
    "the base is still improving",
    "the base has converged",
    "few examples seen many times; the base's validation loss has turned",
    "the base was trained on another distribution",
)


@dataclass(frozen=True)
class Protocol:
    """All that is run.

    Attributes:
        regimes: by task; the tries of a task are in its first regime.
        seeds: of the runs that count.
        tuning_seed: of the tries.
        learning_rates, arms: what is tried, and what is compared; the first arm is what the others are compared with.
        batch_size, base_batch_size: examples of an optimizer step, of an arm and of a base.
        prompts: held-out prompts that are continued, for the tries and for the runs that count.
        judge_steps: optimizer steps of the judge of the text.
    """

    regimes: Mapping[str, tuple[Regime, ...]]
    seeds: tuple[int, ...] = tuple(range(1, 9))
    tuning_seed: int = 0
    learning_rates: tuple[float, ...] = LEARNING_RATES
    arms: tuple[Arm, ...] = ARMS
    batch_size: int = 32
    base_batch_size: int = 128
    prompts: tuple[int, int] = (256, 1024)
    judge_steps: int = 300

    def tries(self, arm: Arm) -> list[Options]:
        """Return what is tried of an arm: each learning rate with each of its settings."""
        pairs = product(self.learning_rates, arm.settings)
        return [] if arm.average_of else [{"learning_rate": rate, **setting} for rate, setting in pairs]


FULL = Protocol(
    regimes={
        "walks": (
            Regime("improving", IMPROVING, "train", "train", 500, 60),
            Regime("converged", CONVERGED, "train", "train", 1500, 60),
            Regime("few", FEW, "few", "few", 300, 60),
            Regime("other", OTHER, "other", "train", 500, 60),
        ),
        "brackets": (Regime("improving", IMPROVING, "train", "train", 200, 60),),
        "text": (Regime("other", OTHER, "other", "train", 160, 30),),
    }
)


def quick(protocol: Protocol = FULL) -> Protocol:
    """Cut a protocol down to minutes: two seeds, one try of an arm, the first regime of each task and fewer steps."""
    regimes = {
        task: (replace(own[0], base_steps=max(4, own[0].base_steps // 10), steps=max(2, own[0].steps // 10)),)
        for task, own in protocol.regimes.items()
    }
    arms = tuple(replace(arm, settings=arm.settings[:1]) for arm in protocol.arms)
    return replace(
        protocol,
        regimes=regimes,
        arms=arms,
        seeds=protocol.seeds[:2],
        learning_rates=(1e-3,),
        prompts=(64, 128),
        judge_steps=60,
    )
