"""Triton kernels and their launchers: rows of logits, the contrast, and log-likelihoods that never write logits.

``rows``, ``contrast`` and ``linear`` hold one operation each, kernel first, launcher after it. ``transform`` is what
lies between a raw logit and the softmax; ``tuning`` is the table of block sizes. Launchers check nothing about values.
"""
