"""The kernels that run a call: backends, the choice among them, their operators, and a reference in plain torch."""
