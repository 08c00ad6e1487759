"""One of two processes of test_autoregressive.py that generate together; the second has fewer prompts, then none."""

from __future__ import annotations

import sys

import tiny_models
import torch
from torch import distributed

from cpo_kernels.negatives import Sampling, autoregressive_negatives

EOS, PAD = 2, 0
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12], [13, 14], [5, 5, 5]]

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    rank, options = distributed.get_rank(), {"eos_token_id": EOS, "pad_token_id": PAD, "synced_gpus": True}
    sampling = Sampling(max_new_tokens=12, batch_size=4)
    drawn = [
        autoregressive_negatives(tiny_models.llama(), prompts, 3, sampling=sampling, **options)
        for prompts in ((PROMPTS, PROMPTS[:2])[rank], (PROMPTS[:1], [])[rank])
    ]
    distributed.destroy_process_group()
    torch.save(drawn, f"{sys.argv[1]}/drawn-{rank}.pt")
