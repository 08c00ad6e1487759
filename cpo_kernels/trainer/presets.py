"""The objectives by name: what each sets where the user sets nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Defaults of the fields of the same names of :class:`~cpo_kernels.trainer.CPOConfig`.

    Attributes:
        mle_weight: None for ``1 - alpha``.
        negatives: numbers of batch and of truncation negatives where the data brings none.
    """

    alpha: float = 1.0
    mle_weight: float | None = None
    beta: float = 0.1
    margin: float = 0.0
    length_normalized: bool = False
    reference: str = "none"
    negatives: tuple[int, int] = (1, 0)

    def fields(self) -> dict[str, Any]:
        """The fields of the configuration that a preset fills in."""
        values = asdict(self)
        del values["negatives"]
        return values


PRESETS = {
    "cpo": Preset(alpha=0.5, reference="frozen", negatives=(1, 1)),
    "dpo": Preset(reference="frozen"),
    "xu_cpo": Preset(mle_weight=1.0),
    # beta and gamma of the published SimPO recipes: gamma / beta = 0.5
    "simpo": Preset(beta=2.0, margin=1.0, length_normalized=True),
    "mle": Preset(alpha=0.0, negatives=(0, 0)),
    "scheduled_sampling": Preset(alpha=0.0, negatives=(0, 0)),
}
