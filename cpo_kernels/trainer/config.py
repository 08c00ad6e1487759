"""The configuration: objective, negatives and memory, on top of the arguments of ``transformers.Trainer``."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from cpo_kernels.loss_table import LOSS_TYPES, TRL_LOGISTIC, trl_options
from cpo_kernels.models.head import positions_of
from cpo_kernels.negatives import KINDS
from cpo_kernels.negatives.kinds import counted_kinds
from cpo_kernels.negatives.mean_field import DEFAULT_FRACTION, check_fraction
from cpo_kernels.negatives.redaction import is_secret, without_secrets
from cpo_kernels.options import Objective, suggests_arguments

REFERENCES = ("frozen", "precomputed", "none")
DEFAULT_LENGTH = 1024  # most tokens of an example where nobody says how many
SAMPLERS = ("reference", "model")
RANKINGS = ("none", "similarity")
PREFIX_SHARING = ("auto", "required", "off")


def sections() -> dict[str, list[str]]:
    """Return the names of the fields that ``CPOConfig`` adds or gives another default, by the title of their section.

    Those of the last section are fields of ``TrainingArguments`` with other defaults.
    """
    names: list[str] = []
    found: dict[str, list[str]] = {}
    for name in inspect.get_annotations(CPOConfig):
        if name in SECTIONS:
            names = found.setdefault(SECTIONS[name], [])
        names.append(name)
    return found


@dataclass(frozen=True)
class Preset:
    """Defaults of the fields of the same names of :class:`~cpo_kernels.trainer.CPOConfig`.

    Attributes:
        mle_weight: None for ``1 - alpha``.
        negatives: the numbers of negatives by kind, used if none are configured and the data brings none.
    """

    alpha: float = 1.0
    mle_weight: float | None = None
    beta: float = 0.1
    margin: float = 0.0
    length_normalized: bool = False
    reference: str = "none"
    negatives: Mapping[str, int] = field(default_factory=lambda: {"batch": 1})

    def fields(self) -> dict[str, Any]:
        """Return the fields of the configuration that a preset fills in."""
        values = asdict(self)
        del values["negatives"]
        return values


PRESETS = {
    "cpo": Preset(alpha=0.5, reference="frozen", negatives={"batch": 1, "truncation": 1}),
    "dpo": Preset(reference="frozen"),
    "xu_cpo": Preset(mle_weight=1.0),
    # These are beta and gamma of the published SimPO recipes, where gamma / beta = 0.5.
    "simpo": Preset(beta=2.0, margin=1.0, length_normalized=True),
    "mle": Preset(alpha=0.0, negatives={}),
    "scheduled_sampling": Preset(alpha=0.0, negatives={}),
}


def default_length(positions: int | None) -> int:
    """Return the most tokens of an example for a model of so many positions, or of any number."""
    return min(DEFAULT_LENGTH, positions or DEFAULT_LENGTH)


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _count(kind: str) -> Any:
    own = KINDS[kind]
    text = f"Negatives of this kind for an example: {own.text}. One costs {own.cost}."
    by_model = " or ".join(name for name, other in counted_kinds().items() if other.by_model)
    by_objective = " and ".join(name for name, other in counted_kinds().items() if other.default is None)
    if own.default is None:
        defaults = ", ".join(f"{preset.negatives.get(kind, 0)} for {name}" for name, preset in PRESETS.items())
        text += f" None: by the objective {defaults}; but 0 where the data brings negatives or {by_model} is above 0."
    elif own.by_model:
        text += f" Above 0, those of {by_objective} that are not given are 0, whatever the objective."
    return _option(own.default, text)


def _weight(kind: str) -> Any:
    return _option(1.0, f"A negative of the kind {kind} counts in the contrast as much as this many of it.")


# Titles of the sections of the fields below, by the first field of each.
SECTIONS = {
    "objective": "Objective and reference",
    "num_batch_negatives": "Negatives",
    "max_length": "Lengths, memory and kernels",
    "allow_partial_resume": "Resuming",
    "learning_rate": "Training",
}


@suggests_arguments
@dataclass(repr=False)
class CPOConfig(TrainingArguments):
    """Arguments of :class:`~cpo_kernels.trainer.CPOTrainer`: ``L = alpha * contrast + mle_weight * MLE``.

    ``objective`` chooses the defaults of ``alpha, mle_weight, beta, margin, length_normalized, reference`` and of the
    numbers of negatives; whatever is given overrides them. Fields that are None take these defaults:

    - ``cpo``: arXiv 2502.16433, the ground truth against synthetic negatives as log-likelihood ratios to a frozen
      reference; 0.5 contrast + 0.5 MLE.
    - ``dpo``: arXiv 2305.18290, one negative and a reference.
    - ``xu_cpo``: arXiv 2401.08417, one negative, no reference, contrast + MLE.
    - ``simpo``: arXiv 2405.14734, one negative, no reference, mean log-probabilities and a margin.
    - ``mle``: next-token prediction; ``scheduled_sampling``: the same, conditioned on text of which the model has
      written a part (arXiv 1906.04331).

    Raises:
        ValueError: a value outside its range, or values that contradict each other; the message names both.
    """

    objective: str = _option("cpo", f"One of {', '.join(PRESETS)}: the defaults of the fields below that say None.")
    alpha: float | None = _option(None, "Weight of the contrast, in [0, 1].")
    mle_weight: float | None = _option(None, "Weight of the MLE part, per token. None: 1 - alpha; for xu_cpo, 1.")
    beta: float | None = _option(None, "Factor of the log-likelihood ratios in the contrast.")
    margin: float | None = _option(None, "Added to the score of every negative.")
    label_smoothing: float = _option(0.0, "Probability of a flipped pair; one negative only.")
    loss_type: str = _option(
        "plackett_luce",
        f"One of {', '.join(LOSS_TYPES)}; or sigmoid, TRL's name of the first; or sigmoid_norm, the same with "
        "length_normalized. All but these take one negative only.",
    )
    length_normalized: bool | None = _option(
        None, "Contrast the mean instead of the sum of the token log-probabilities."
    )
    reference: str | None = _option(
        None,
        "frozen: the model as it was at the start (for adapters, the model without them); precomputed: the same, "
        "with scores that are computed once before training and kept on disk; none: no reference.",
    )
    reference_cache: str | None = _option(None, "Directory of precomputed scores. None: a folder in output_dir.")
    disable_dropout: bool | None = _option(
        None,
        "Train without dropout. None: where there is a reference, which has none: with it, policy and reference differ "
        "before anything is learned.",
    )
    scheduled_sampling_probability: float = _option(0.5, "Probability that a token conditioned on is the model's own.")
    scheduled_sampling_passes: int = _option(1, "Sampling passes before the one that is trained.")

    num_batch_negatives: int | None = _count("batch")
    num_truncation_negatives: int | None = _count("truncation")
    num_mean_field_negatives: int = _count("mean_field")
    num_autoregressive_negatives: int = _count("autoregressive")
    batch_weight: float = _weight("batch")
    truncation_weight: float = _weight("truncation")
    mean_field_weight: float = _weight("mean_field")
    autoregressive_weight: float = _weight("autoregressive")
    given_weight: float = _weight("given")
    resample_negatives: bool = _option(True, "Draw new negatives every time an example is seen, not once for all.")
    mean_field_source: str | None = _option(
        None,
        "Who draws mean-field negatives: reference, or model, the trained one. None: reference where it is frozen.",
    )
    mean_field_fraction: float = _option(
        DEFAULT_FRACTION,
        "The share of the ground truth's tokens, in (0, 1], that a mean-field negative replaces: at least one, and "
        "never the token that ends it. 1: every token, that end too.",
    )
    autoregressive_every: int | None = _option(
        None,
        "Write autoregressive negatives for so many steps at once, by the model as it is at the first of them. None: "
        "as many as autoregressive_batch_size holds, since a token of few texts takes as long as one of many.",
    )
    autoregressive_temperature: float = _option(1.0, "Temperature of autoregressive negatives.")
    autoregressive_top_p: float = _option(1.0, "Nucleus (top-p) that autoregressive negatives are sampled from.")
    autoregressive_max_new_tokens: int | None = _option(
        None, "Tokens of an autoregressive negative, at most. None: those of the longest ground truth beside it."
    )
    autoregressive_batch_size: int = _option(32, "Autoregressive negatives written at a time.")
    autoregressive_url: str | None = _option(
        None, "An OpenAI-compatible completions endpoint that writes them in place of the model, .../v1."
    )
    autoregressive_model: str | None = _option(None, "The model's name at that endpoint.")
    ranking: str = _option(
        "none", "similarity ranks negatives by cosine similarity to the ground truth; none does not."
    )
    embedding_model: str | None = _option(
        None, "A sentence-transformers model for the ranking. None: mean hidden states of the reference."
    )

    max_length: int | None = _option(
        None, "Tokens of prompt and completion together, at most. None: the model's positions, but at most 1024."
    )
    max_prompt_length: int | None = _option(
        None, "Tokens of the prompt, at most; its end is kept. None: half of max_length."
    )
    prefix_sharing: str = _option(
        "auto",
        "Run a prompt and its candidates as one row. auto: where the model can and it saves enough; required: raise "
        "where the model cannot; off: never.",
    )
    max_logits_bytes: int | None = _option(None, "Budget of all that the loss holds at once. None: the backend's.")
    candidate_eps: float | None = _option(
        None, "Leave candidates that the contrast has settled out of the gradient: see cpo_kernels.options."
    )
    grad_filter_eps: float | None = _option(
        None, "Leave vocabulary columns without a gradient above this out of it: see cpo_kernels.options."
    )
    logits_dtype: str | None = _option(
        None, "float32: log-likelihoods of half-precision models without the rounding of their logits; or None."
    )
    backend: str = _option("auto", "Backend of the kernels; see cpo_kernels.backends.")

    allow_partial_resume: bool = _option(
        False, "Go on from a checkpoint that lacks optimizer, schedule or generators: not bit for bit the same run."
    )
    allow_changed_resume: bool = _option(
        False, "Go on from a checkpoint of a run with other settings, data or models, which are listed."
    )

    learning_rate: float = _option(1e-5, "The initial learning rate.")
    logging_steps: float = _option(10, "Log every so many steps.")
    # A non-finite loss must show in the logs, not be replaced by an average.
    logging_nan_inf_filter: bool = _option(False, "Leave NaN and Inf out of the logged loss.")
    # Trainer would remove the text and indices of examples, which no model's forward takes.
    remove_unused_columns: bool = _option(False, "Must be False.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is none to copy to, of which torch would warn
        self._fill_in()
        self._check_objective()
        self._check_negatives()
        self._check_lengths()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: examples are text, which no model's forward takes")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for reports, without tokens, keys and credentials."""
        return {name: without_secrets(value) for name, value in super().to_dict().items()}

    def __str__(self) -> str:
        lines = [f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items())]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    __repr__ = __str__

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without secrets: Trainer saves it with every model as ``training_args.bin``."""
        return {name: None if is_secret(name) else without_secrets(value) for name, value in self.__dict__.items()}

    def __copy__(self) -> CPOConfig:
        return self._with_state(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> CPOConfig:
        return self._with_state(copy.deepcopy(self.__dict__, memo))

    def _with_state(self, state: dict[str, Any]) -> CPOConfig:
        """Make a copy with a state, which unlike a pickle keeps the secrets."""
        other = object.__new__(type(self))
        other.__dict__.update(state)
        return other

    def _fill_in(self) -> None:
        """Set the fields that are None to the preset's values, and translate TRL's names of losses."""
        if self.loss_type in TRL_LOGISTIC:
            own = trl_options(self.loss_type)
            if own["length_normalized"]:
                if self.length_normalized is False:
                    raise ValueError(f"loss_type={self.loss_type!r} is of means, but length_normalized is False")
                self.length_normalized = True
            self.loss_type = own["loss_type"]
        if self.objective not in PRESETS:
            raise ValueError(f"objective must be one of {', '.join(PRESETS)}, got {self.objective!r}")
        for name, value in PRESETS[self.objective].fields().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.mle_weight is None:
            self.mle_weight = 1 - self.alpha  # type: ignore[operator]
        if self.disable_dropout is None:
            self.disable_dropout = self.contrasts and self.reference != "none"
        if self.mean_field_source is None:
            self.mean_field_source = "reference" if self.reference == "frozen" and self.contrasts else "model"

    @property
    def preset(self) -> Preset:
        """The defaults of the objective."""
        return PRESETS[self.objective]

    def fitted_to(self, model_config: Any) -> CPOConfig:
        """Return the configuration with a ``max_length``: itself, or a copy that has the one of a model.

        Args:
            model_config: the model's configuration; None where it is not known.

        Raises:
            ValueError: a ``max_length`` beyond the model's positions, or no longer than ``max_prompt_length``.
        """
        positions = None if model_config is None else positions_of(model_config)
        if self.max_length is None:
            fitted = copy.copy(self)
            fitted.max_length = default_length(positions)
            fitted._check_lengths()
            return fitted
        if positions is not None and self.max_length > positions:
            raise ValueError(
                f"max_length={self.max_length} exceeds the {positions} positions of a {model_config.model_type} model"
            )
        return self

    @property
    def length_budget(self) -> int:
        """How many tokens prompt and completion may have together."""
        if self.max_length is None:
            raise ValueError("max_length is None, the model's own: give it, or ask config.fitted_to(model.config)")
        return self.max_length

    @property
    def prompt_budget(self) -> int:
        """How many tokens a prompt may have."""
        return self.length_budget // 2 if self.max_prompt_length is None else self.max_prompt_length

    @property
    def hides_progress(self) -> bool:
        """Whether this process shows no progress bars."""
        return bool(self.disable_tqdm) or self.local_process_index != 0

    @property
    def contrasts(self) -> bool:
        """Whether the loss has a contrastive part."""
        return self.alpha > 0  # type: ignore[operator]

    @property
    def objective_options(self) -> dict[str, Any]:
        """The objective's keywords of :func:`cpo_kernels.linear_cpo_loss`."""
        return {
            "beta": self.beta,
            "margin": self.margin,
            "label_smoothing": self.label_smoothing,
            "loss_type": self.loss_type,
            "length_normalized": self.length_normalized,
            "contrast_weight": self.alpha,
            "mle_weight": self.mle_weight,
        }

    @property
    def head_options(self) -> dict[str, Any]:
        """The head's keywords of :func:`cpo_kernels.linear_cpo_loss`, besides the filters of gradients."""
        dtype = None if self.logits_dtype is None else torch.float32
        return {"backend": self.backend, "max_logits_bytes": self.max_logits_bytes, "logits_dtype": dtype}

    def negative_counts(self, data_brings_negatives: bool) -> dict[str, int]:
        """Return the most negatives of each kind that are drawn for an example, besides those of the data itself.

        Args:
            data_brings_negatives: whether the examples have negatives of their own.

        Raises:
            ValueError: a contrast without any negatives, more than one for a loss of pairs, or negatives that change
                from step to step with a precomputed reference.
        """
        given = {kind.name: getattr(self, name) for name, kind in counted_kinds().items()}
        drawn_anyway = data_brings_negatives or any(given[name] for name in given if KINDS[name].by_model)
        default = {} if drawn_anyway else self.preset.negatives
        counts = {name: default.get(name, 0) if count is None else count for name, count in given.items()}
        if self.contrasts and not data_brings_negatives and not any(counts.values()):
            raise ValueError(
                f"alpha={self.alpha} contrasts the ground truth with negatives, but there are none: the data brings "
                "none and the numbers of all kinds are 0; set one of them, or objective='mle'"
            )
        self._check_pairs(counts, data_brings_negatives)
        if self.reference == "precomputed" and self.resample_negatives and any(counts.values()):
            raise ValueError(
                "reference='precomputed' scores every candidate once, but resample_negatives=True draws new ones along "
                "the way; use resample_negatives=False, negatives of the data alone, or reference='frozen'"
            )
        return counts

    def _check_pairs(self, counts: dict[str, int], data_brings_negatives: bool = False) -> None:
        pairs_only = Objective(**self.objective_options).pairs_only
        if pairs_only is None:
            return
        named = [f"num_{kind}_negatives={count}" for kind, count in counts.items() if count]
        named += ["those of the data"] * data_brings_negatives
        if sum(counts.values()) + data_brings_negatives > 1:
            raise ValueError(f"{pairs_only} is defined for one negative, got {' and '.join(named)}")
        for kind, weight in self.negative_weights.items():
            if weight != 1:
                raise ValueError(f"{pairs_only} compares two log-likelihoods; {kind}_weight={weight} has no meaning")

    @property
    def negative_weights(self) -> dict[str, float]:
        """Weight of each kind of negative in the contrast."""
        return {kind.name: getattr(self, kind.weight_field) for kind in KINDS.values()}

    def _check_objective(self) -> None:
        if not 0 <= self.alpha <= 1:  # type: ignore[operator]
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        Objective(**self.objective_options)  # This raises for wrong values of the other options.
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} smooths cross entropy, which this trainer does "
                "not compute from logits; label_smoothing is that of the contrast"
            )
        for name, known in (
            ("reference", REFERENCES),
            ("mean_field_source", SAMPLERS),
            ("ranking", RANKINGS),
            ("prefix_sharing", PREFIX_SHARING),
            ("logits_dtype", (None, "float32")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if not 0 <= self.scheduled_sampling_probability <= 1:
            raise ValueError(
                f"scheduled_sampling_probability must be in [0, 1], got {self.scheduled_sampling_probability}"
            )
        if self.scheduled_sampling_passes < 1:
            raise ValueError(f"scheduled_sampling_passes must be at least 1, got {self.scheduled_sampling_passes}")
        if self.objective == "scheduled_sampling" and self.contrasts:
            raise ValueError(f"objective='scheduled_sampling' has no contrast; expected alpha=0, got {self.alpha}")

    def _check_negatives(self) -> None:
        counts = {name: getattr(self, name) for name in counted_kinds()}
        for name, count in counts.items():
            if count is not None and count < 0:
                raise ValueError(f"{name} must not be negative, got {count}")
        for kind, weight in self.negative_weights.items():
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"{kind}_weight must be a positive number, got {weight}")
        check_fraction(self.mean_field_fraction)
        self._check_pairs({kind.name: counts[name] or 0 for name, kind in counted_kinds().items()})
        self._check_autoregressive()
        self._check_reference()

    def _check_autoregressive(self) -> None:
        for name in ("autoregressive_every", "autoregressive_batch_size", "autoregressive_max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.autoregressive_temperature > 0:
            raise ValueError(f"autoregressive_temperature must be positive, got {self.autoregressive_temperature}")
        if not 0 < self.autoregressive_top_p <= 1:
            raise ValueError(f"autoregressive_top_p must be in (0, 1], got {self.autoregressive_top_p}")
        if self.autoregressive_url is not None and self.autoregressive_model is None:
            raise ValueError("autoregressive_url needs autoregressive_model, the model's name at that endpoint")

    def _check_reference(self) -> None:
        asks_reference = self.num_mean_field_negatives > 0 and self.mean_field_source == "reference"
        if asks_reference and (self.reference != "frozen" or not self.contrasts):
            raise ValueError(
                f"mean_field_source='reference' needs reference='frozen' and a contrast, got {self.reference!r} and "
                f"alpha={self.alpha}; or let the model draw"
            )
        if self.num_mean_field_negatives and not asks_reference and not self.resample_negatives:
            raise ValueError(
                "resample_negatives=False keeps negatives as they are, but mean_field_source='model' draws them from a "
                "model that changes; let the reference draw"
            )
        if self.ranking == "similarity" and self.embedding_model is None and self.reference != "frozen":
            raise ValueError(
                f"ranking='similarity' needs an embedding_model or the hidden states of reference='frozen', got "
                f"reference={self.reference!r}"
            )
        for name, kind in counted_kinds().items():
            if self.reference == "precomputed" and kind.by_model and getattr(self, name):
                raise ValueError(
                    f"reference='precomputed' scores every candidate before training, but {name}={getattr(self, name)} "
                    "makes new ones along the way; use reference='frozen'"
                )

    def _check_lengths(self) -> None:
        if self.max_length is None:
            if self.max_prompt_length is not None and self.max_prompt_length < 1:
                raise ValueError(f"max_prompt_length must be at least 1, got {self.max_prompt_length}")
            return
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        if not 0 < self.prompt_budget < self.max_length:
            raise ValueError(
                f"max_prompt_length must be in [1, max_length) = [1, {self.max_length}), got {self.max_prompt_length}"
            )
