"""Measures and compiles kernels one by one: for those who write them, not for users of the losses."""
