"""The rule for draws equal to the truth: which drawn completions are wrong, and so can be negatives."""

from __future__ import annotations

from collections.abc import Sequence

from cpo_kernels.options import suggests_arguments

from .endings import without_end


@suggests_arguments
def is_wrong(negative: Sequence[int], completion: Sequence[int], eos_token_id: int | Sequence[int] = ()) -> bool:
    """Tell whether a drawn completion can be a negative: it has tokens, and they are not those of the ground truth.

    This is the one rule of every kind of negative that is drawn, in the functions of :mod:`cpo_kernels.negatives`, in
    training, and in files that ``cpo-kernels negatives`` writes. A model that is sure of the ground truth draws just
    that; such a draw is left out, and no other is drawn in its place. What is given with the data is no draw.

    Args:
        negative: token ids of the draw, as far as they are contrasted.
        completion: token ids of the ground truth.
        eos_token_id: the token that ends a completion, or every one that may. What ends either does not count: an
            answer that is cut off at its last token, or ended by another of these tokens, is the right answer. By
            default every token counts.
    """
    return len(negative) > 0 and without_end(negative, eos_token_id) != without_end(completion, eos_token_id)
