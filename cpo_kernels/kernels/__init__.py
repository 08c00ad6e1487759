"""What runs a call: the backends, which one a call uses for what, their operators, and the reference in plain torch."""
