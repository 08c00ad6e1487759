"""Candidates that share the forward pass of their prompt: the tree of their tokens, its masks and its attention."""
