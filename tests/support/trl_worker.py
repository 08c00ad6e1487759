"""Run by torchrun on two processes: TRL trainers on our loss log what stock TRL logs, and share one cache."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import tiny_models
import trl
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl_runs import assert_histories_equal, history, make

from cpo_kernels.cli.processes import leave_process_group
from cpo_kernels.integrations.trl import FusedCPOTrainer, FusedDPOTrainer

ARGUMENTS = {"ddp_backend": "gloo", "per_device_train_batch_size": 2, "max_steps": 2}
PAIRS_ONLY = {"loss_type": ["aot", "sft"], "ld_alpha": 0.3}


def dpo(trainer, directory: Path, **keywords):
    return history(make(trainer, trl.DPOConfig, directory, ref_model=tiny_models.llama(1), **keywords))


def main(directory: Path) -> None:
    datasets.disable_progress_bars()
    pairs, lists = (datasets.load_from_disk(str(directory / name)) for name in ("pairs", "lists"))
    for arguments in (ARGUMENTS, ARGUMENTS | PAIRS_ONLY):
        options = {"data": pairs, "arguments": arguments}
        stock = dpo(trl.DPOTrainer, directory, **options)
        assert_histories_equal(stock, dpo(FusedDPOTrainer, directory, **options, token_metrics=True))
    runs = [
        history(make(trainer, CPOConfig, directory, data=pairs, arguments=ARGUMENTS))
        for trainer in (CPOTrainer, FusedCPOTrainer)
    ]
    assert_histories_equal(*runs)
    precomputed = ARGUMENTS | {"precompute_ref_log_probs": True}
    runs = [dpo(FusedDPOTrainer, directory, data=lists, arguments=more) for more in (ARGUMENTS, precomputed)]
    assert_histories_equal(*runs)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    main(folder)
    leave_process_group()
