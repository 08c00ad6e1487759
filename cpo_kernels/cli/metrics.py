"""Metrics on the terminal: a line for each log of a run, and a table at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback


class ProgressLines(ProgressCallback):
    """The bars of transformers, with a line above them for each log in place of a dictionary."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line of metrics above the bar."""
        if self.training_bar is not None and _is_of_a_step(logs):
            self.training_bar.write(log_line(state, logs))


class PrinterLines(PrinterCallback):
    """A line for each log where there are no bars."""

    training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that logs are those of training from now on."""
        self.training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that what is logged now stands in the table at the end."""
        self.training = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print a line of metrics."""
        if state.is_world_process_zero and self.training and _is_of_a_step(logs):
            print(log_line(state, logs), flush=True)


def show_lines(trainer: Any) -> None:
    """Let a trainer log lines of metrics in place of dictionaries."""
    pairs: Any = ((ProgressCallback, ProgressLines), (PrinterCallback, PrinterLines))
    for theirs, ours in pairs:
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours)


def log_line(state: Any, logs: Mapping[str, Any]) -> str:
    """Return a log of a run as one line: the step, then names and values."""
    values = [f"{name} {_shown(value, 4)}" for name, value in logs.items() if name not in ("epoch", "total_flos")]
    return "  ".join([f"step {state.global_step}/{state.max_steps}", *values])


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Return metrics by name, one a line, with their values below one another."""
    width = max(map(len, metrics), default=0)
    return "\n".join(f"{name:<{width}}  {_shown(value, 6)}" for name, value in sorted(metrics.items()))


def _is_of_a_step(logs: Mapping[str, Any] | None) -> bool:
    """Tell whether a log is one of a step; that of the whole run stands in the table at the end."""
    return bool(logs) and "train_runtime" not in (logs or ())


def _shown(value: Any, digits: int) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
