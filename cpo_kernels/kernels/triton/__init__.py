"""Triton kernels and their launchers: rows of logits, the contrast, and log-likelihoods that never write logits.

``rows``, ``gradients``, ``contrast`` and ``linear`` hold the operations, kernel first, launcher after it. ``transform``
is what lies between a raw logit and the softmax, ``blocks`` where the vectors of a row lie; ``tuning`` is the table of
block sizes. Launchers check nothing about values.
"""
