"""The compiled CUDA kernels of csrc/cuda: rows of logits, groups of candidates, and Hopper's linear path."""
