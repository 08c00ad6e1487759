"""The compiled CPU kernels of csrc/cpu: rows of logits, and matrix products."""
