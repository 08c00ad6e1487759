"""The run of test_trainer_runs.py that is killed: it trains until nobody lets it live."""

from __future__ import annotations

import sys

import torch
from killed_runs import SURVIVOR, slow_down
from trainer_runs import trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer(sys.argv[1], callbacks=[slow_down()], **SURVIVOR).train()
