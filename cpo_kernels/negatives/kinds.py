"""The kinds of negatives: one table that configuration, data, drawing, evaluation and help texts read.

A kind that is drawn from the data alone needs a function in this module and two fields in the trainer's configuration,
its number and its weight. A kind that a model draws is also made in ``cpo_kernels.trainer.negatives``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from cpo_kernels.options import suggests_arguments

from .batch import draw_others
from .truncation import draw_cuts


@suggests_arguments
@dataclass(frozen=True)
class Negative:
    """A candidate besides the ground truth.

    Args:
        kind: a name in :data:`KINDS`.
        tokens: its token ids.
        cut: instead of tokens, the number of tokens after which the ground truth is cut and ended with EOS; such a
            negative costs the body nothing.
        rank: 0 if it is as good as the ground truth; equal ranks express no preference.
        ref_logp: its log-likelihood under the reference, if that is known already.
    """

    kind: str
    tokens: Sequence[int] = ()
    cut: int | None = None
    rank: int = 1
    ref_logp: float | None = None


@dataclass(frozen=True)
class Task:
    """The example that negatives are drawn for, and the data around it.

    Args:
        completions: token ids of every example's completion.
        index: the index of the example in ``completions``.
        eos_token_id: the token that ends a completion, or every one that may.
        room: how many tokens fit behind the example's prompt; None for any number.
        rank: the rank that drawn negatives get.
    """

    completions: Sequence[Sequence[int]]
    index: int
    eos_token_id: int | Sequence[int]
    room: int | None = None
    rank: int = 1


# Draws a number of negatives, as a function of the task and of the generator's state.
Draw = Callable[[Task, int, Random], list[Negative]]


def _draw_batch(task: Task, count: int, rng: Random) -> list[Negative]:
    # Even the part of a completion that fits behind this prompt must differ from the ground truth.
    others = draw_others(task.completions, task.index, count, rng, task.eos_token_id, task.room)
    return [Negative("batch", task.completions[other], rank=task.rank) for other in others]


def _draw_truncation(task: Task, count: int, rng: Random) -> list[Negative]:
    cuts = draw_cuts(task.completions[task.index], task.eos_token_id, count, rng)
    return [Negative("truncation", cut=cut, rank=task.rank) for cut in cuts]


@dataclass(frozen=True)
class Kind:
    """A kind of negatives.

    Args:
        name: its name in configurations, data and metrics.
        text: a description of its negatives.
        cost: what one such negative costs in training.
        default: the default number of its negatives; None where the objective decides.
        draw: draws its negatives from the data alone; None for a kind that needs more.
        by_model: whether a model draws its negatives. They change with the model, and their token ids may lack an EOS.
    """

    name: str
    text: str
    cost: str
    default: int | None = 0
    draw: Draw | None = None
    by_model: bool = False

    @property
    def count_field(self) -> str | None:
        """The field of the configuration that says how many are drawn; None for a kind that only data brings."""
        return f"num_{self.name}_negatives" if self.draw or self.by_model else None

    @property
    def weight_field(self) -> str:
        """The field of the configuration that says how much one of them counts."""
        return f"{self.name}_weight"


# In the order in which the negatives of an example are drawn. The kinds drawn from the data share one generator, so a
# new one goes behind the existing ones: in front of them it would change what they draw.
KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "batch",
            "completions of other examples of the whole data set",
            "one more sequence",
            default=None,
            draw=_draw_batch,
        ),
        Kind(
            "truncation",
            "the ground truth, cut early and ended with EOS",
            "nothing: its rows are the ground truth's",
            default=None,
            draw=_draw_truncation,
        ),
        Kind(
            "mean_field",
            "the ground truth with a random share of its tokens drawn anew, each given the true ones before it",
            "one more sequence, and for all of them one forward pass over the ground truths",
            by_model=True,
        ),
        Kind(
            "autoregressive",
            "written by the model itself, or by a server",
            "one more sequence, and its generation",
            by_model=True,
        ),
        Kind("given", "what the data brings", "one more sequence"),
    )
}


def counted_kinds() -> dict[str, Kind]:
    """Return the kinds that are drawn, by the field of the configuration that counts them."""
    return {kind.count_field: kind for kind in KINDS.values() if kind.count_field is not None}
