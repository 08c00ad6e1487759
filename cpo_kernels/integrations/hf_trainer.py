"""``transformers.Trainer`` whose loss of labels, the mean negative log-likelihood, comes from hidden states."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from cpo_kernels.kernels.numerics import IGNORE_INDEX
from cpo_kernels.layout import CandidateLayout
from cpo_kernels.models import CPORequest, attach_linear_loss

from .padded_rows import candidate_rows


class FusedTrainer(Trainer):
    """``transformers.Trainer`` for a causal language model, without logits while it trains.

    Arguments, data and the loss are those of ``Trainer``: the mean over the labels of a batch, or, where the model
    takes ``num_items_in_batch``, their sum over the labels of all accumulated batches; with the load-balancing loss of
    experts that output router logits. Three products of the head, one pass.

    Evaluation, label smoothing, a ``compute_loss_func``, ``shift_labels`` and a batch without any label go the way of
    ``Trainer``, through logits. ``head_options``, empty at first, takes options of
    :class:`cpo_kernels.options.Head`, such as ``max_logits_bytes``, before training.

    Raises:
        RuntimeError: a model that :func:`cpo_kernels.attach_linear_loss` refuses.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        attach_linear_loss(self.model)  # type: ignore[type-var]
        self.head_options: dict[str, Any] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a batch, a scalar; while training its outputs have no logits."""
        labels: Any = inputs.get("labels")
        smoothed = self.label_smoother is not None or self.compute_loss_func is not None
        plain = model.training and labels is not None and not smoothed and inputs.get("shift_labels") is None
        if plain and bool((labels[:, 1:] != IGNORE_INDEX).any()):
            counted = num_items_in_batch if self.model_accepts_loss_kwargs else None
            rest = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
            inputs = {**rest, "linear_loss": nll_request(labels, counted, **self.head_options)}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def nll_request(labels: Tensor, num_items_in_batch: Tensor | int | None = None, **head: Any) -> CPORequest:
    """Make a request for the negative log-likelihood of labels (B, L), as ``transformers`` computes it.

    Args:
        labels: int64; position t - 1 predicts the label of position t, -100 for none.
        num_items_in_batch: by what the sum is divided; None: by the number of labels.
        head: options of :class:`cpo_kernels.options.Head`.
    """
    targets, layout = candidate_rows(labels, [1] * len(labels))
    whole = CandidateLayout([0, layout.num_tokens], [0, 1], rows=layout.rows)  # rows without a label are no error
    count = None if num_items_in_batch is None else float(num_items_in_batch)
    return CPORequest(targets, whole, contrast_weight=0.0, mle_weight=1.0, num_target_tokens=count, **head)
