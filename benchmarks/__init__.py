"""Benchmarks of the head: time against the three-GEMM floor and against other implementations of the same loss."""
