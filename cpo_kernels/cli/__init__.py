"""The commands of ``cpo-kernels``, a module each; see :mod:`cpo_kernels.__main__`."""
