"""A ``transformers.Trainer`` that records its checkpoints, and resumes only from complete ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .config import CPOConfig
from .files import Needs, own_files, write_record
from .resuming import find_checkpoint, nothing_found, on_main_process

logger = logging.get_logger(__name__)


def restore_to_host(storage: Any, location: str) -> Any:
    """Return a storage that was loaded for a CPU with a number, or None for another device."""
    return storage if location.startswith("cpu:") else None


# Of several processes on CPUs, early releases of transformers load the optimizer to "cpu:0", which torch does not know.
torch.serialization.register_package(100, lambda storage: None, restore_to_host)


class ResumableTrainer(Trainer):
    """A Trainer that records every checkpoint, and checks record, settings and data before it resumes from one."""

    args: CPOConfig
    _run: dict[str, Any] | None = None
    _found: str | None = None
    _took_steps: bool = True

    # Methods that subclasses extend

    def run_record(self) -> dict[str, Any]:
        """Return the record of the run for its checkpoints, which is compared when the run resumes."""
        raise NotImplementedError

    def _prepare_run(self) -> None:
        """Forget the state of an earlier run."""

    def _load_own_state(self, checkpoint: str) -> None:
        """Read the state that :meth:`_save_own_state` wrote."""

    def _save_own_state(self, checkpoint: Path) -> None:
        """Write the state that Trainer does not save to a checkpoint; called in every process."""

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as ``Trainer.train`` does; ``resume_from_checkpoint=True`` resumes from the newest whole checkpoint.

        A run whose checkpoint is already at its end takes no step.

        Raises:
            ValueError: no such checkpoint, one that is damaged or lacks state (``allow_partial_resume`` permits
                that), or one of other settings, data or models (``allow_changed_resume`` permits them).
        """
        self._prepare_run()
        self._took_steps = False
        checkpoint: str | None = None
        if resume_from_checkpoint:
            checkpoint = self.find_checkpoint(resume_from_checkpoint)
            self._found = None
            if checkpoint is None:
                raise ValueError(f"no complete checkpoint in {self.args.output_dir} to resume from")
            self._load_own_state(checkpoint)
        self._run = self.run_record()
        return super().train(checkpoint, *args, **kwargs)

    def find_checkpoint(self, asked: str | bool = True, say: Callable[[str], Any] = logger.warning) -> str | None:
        """Find the checkpoint from which ``train`` resumes.

        Args:
            asked: a checkpoint, or True for the newest in ``output_dir`` that is whole and lacks nothing.
            say: called with sentences about checkpoints passed over and about state lacking, changed or unknown.

        Returns:
            Its path; None where no checkpoint was ever written to its end.

        Raises:
            ValueError: as :meth:`train`.
        """
        if self._found is not None and asked == self._found:  # It was checked a moment ago.
            return self._found
        needs = Needs(
            processes=self.args.world_size,
            scaler=getattr(self.accelerator, "scaler", None) is not None,
            negatives=self.args.num_autoregressive_negatives > 0,
        )
        run, main = self.run_record(), self.accelerator.is_main_process
        found = on_main_process(lambda: find_checkpoint(asked, self.args, needs, run), main)
        if found.path is None and not found.unfinished:
            raise ValueError(nothing_found(self.args.output_dir, found))
        for note in found.notes if main else ():
            say(note)
        self._found = found.path
        return found.path

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            done, asked = self.state.global_step, self.state.max_steps
            logger.warning(f"training has finished: {done} steps were taken and {asked} are asked for")
            self.control.should_training_stop = True
            return
        self._took_steps = True
        super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as ``Trainer.log`` does, without a training loss for a run that took no step."""
        if not self._took_steps:
            logs.pop("train_loss", None)
        super().log(logs, start_time)

    # Saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        checkpoint = Path(self._get_output_dir(trial=trial), name)
        if self.args.should_save:  # Files that a killed run left must not count as files of this run.
            shutil.rmtree(checkpoint, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        checkpoint.mkdir(parents=True, exist_ok=True)
        self._save_own_state(checkpoint)
        self.accelerator.wait_for_everyone()
        # The state of Trainer comes last: a checkpoint that has it has everything but the record.
        super()._save_checkpoint(model, trial)
        if self.args.should_save and checkpoint.is_dir():
            write_record(
                checkpoint, own_files(checkpoint), step=self.state.global_step, run=self._run or self.run_record()
            )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # All processes have saved their state before Trainer saves its own.
