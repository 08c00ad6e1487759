"""One pass over the logits: tokens, plan, the loop over chunks, losses, their autograd functions and operators."""
