"""Parameters of functions of other frameworks, in the versions that the Makefile's test-frameworks installs."""

from __future__ import annotations

# verl 0.9.1, without self or the context of autograd.
VERL = {
    "FusedLinearForPPO": ["chunk_size", "impl_backend"],
    "FusedLinearForPPO.forward": ["hidden_states", "vocab_weights", "input_ids", "temperature"],
    "linear_cross_entropy": ["hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"],
}
