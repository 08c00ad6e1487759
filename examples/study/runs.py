"""All runs of the study: each is one file of results, so that an interrupted study goes on where it was."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from analysis import above_curve
from brackets import Brackets
from measures import nll_per_token, sampled
from protocol import PLAIN, TEMPERATURES, Arm, Options, Protocol, Regime
from rich.progress import Progress
from tasks import Task
from text import Text
from training import make_model, train_arm, train_base, train_judge
from transformers import GPT2LMHeadModel
from walks import Walks

from cpo_kernels.trainer.ensemble import ensemble

Record = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """A folder with the results and the models of runs."""

    folder: Path

    def kept(self, name: str, settings: Record) -> Record | None:
        """Return the results of a run, or None if it has none.

        Raises:
            SystemExit: they come from other settings.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["settings"] != json.loads(json.dumps(settings)):
            raise SystemExit(f"{path} is of a run with other settings; choose another --out, or delete it")
        return record["results"]

    def keep(self, name: str, settings: Record, results: Record) -> Record:
        """Write the results of a run, all or nothing."""
        self._write(f"{name}.json", json.dumps({"settings": settings, "results": results}).encode())
        return results

    def keep_model(self, name: str, model: GPT2LMHeadModel) -> None:
        """Write the weights of a model, all or nothing."""
        partial = self.folder / f"{name}.part-{os.getpid()}"
        torch.save(model.state_dict(), partial)
        partial.replace(self.folder / f"{name}.pt")

    def load_model(self, name: str, model: GPT2LMHeadModel) -> GPT2LMHeadModel:
        """Read the weights of a model into one of the same sizes."""
        model.load_state_dict(torch.load(self.folder / f"{name}.pt"))
        return model

    def _write(self, name: str, content: bytes) -> None:
        partial = self.folder / f"{name}.part-{os.getpid()}"
        partial.write_bytes(content)
        partial.replace(self.folder / name)


@cache
def make_task(name: str, data: str | None, judge_data: str | None) -> Task:
    """Make a task, once in a process."""
    return {"walks": Walks, "brackets": Brackets}[name]() if name != "text" else Text(data, judge_data)


@dataclass(frozen=True)
class Study:
    """A protocol, the text it is run on, and where its results lie.

    Args:
        protocol: what is run.
        folder: of the results.
        data, judge_data: files of text; None for those of :class:`text.Text`.
    """

    protocol: Protocol
    folder: Path
    data: str | None = None
    judge_data: str | None = None

    @cached_property
    def store(self) -> Store:
        """The folder of results."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return Store(self.folder)

    def task(self, name: str) -> Task:
        """Return a task, that of the text with its judge."""
        task = make_task(name, self.data, self.judge_data)
        if isinstance(task, Text) and task.judge is None:
            sizes = (task.judge_width, task.judge_layers)
            task.judge = self.store.load_model("judge", make_model(task, 0, *sizes))
        return task

    def settings(self, **own: Any) -> Record:
        """Return what the results of a run depend on besides the code."""
        protocol = self.protocol
        return own | {
            "data": [self.data, self.judge_data],
            "batches": [protocol.batch_size, protocol.base_batch_size],
            "prompts": list(protocol.prompts),
            "judge_steps": protocol.judge_steps,
        }

    # Single runs; each returns what it has kept.

    def judge(self) -> Record:
        """Train the judge of the text."""
        settings = self.settings()
        kept = self.store.kept("judge", settings)
        if kept is not None:
            return kept
        task = Text(self.data, self.judge_data)
        with tempfile.TemporaryDirectory() as scratch:
            model, losses = train_judge(task, self.protocol, Path(scratch))
        self.store.keep_model("judge", model)
        sizes = {part: len(task.examples(part, 0)) for part in ("train", "other", "judge", "validation", "test")}
        return self.store.keep("judge", settings, {"losses": losses, "examples": sizes})

    def base(self, task_name: str, regime: Regime, seed: int) -> Record:
        """Train the base model of a regime, and measure it."""
        name = f"{task_name}-{regime.name}-base-{seed}"
        settings = self.settings(regime=asdict(regime))
        kept = self.store.kept(name, settings)
        if kept is not None:
            return kept
        task = self.task(task_name)
        with tempfile.TemporaryDirectory() as scratch:
            model, losses = train_base(task, regime, seed, self.protocol, Path(scratch))
        self.store.keep_model(name, model)
        return self.store.keep(name, settings, {"losses": losses, **self.measured(model, task, seed)})

    def arm(self, task_name: str, regime: Regime, arm: Arm, setting: Options, seed: int) -> Record:
        """Continue a base as an arm does, and measure what comes of it."""
        tried = seed == self.protocol.tuning_seed
        chosen = "-".join(f"{value:g}" for value in setting.values()) if tried else ""
        name = f"{task_name}-{regime.name}-{arm.name}-{seed}-{chosen}".replace(" ", "_").rstrip("-")
        settings = self.settings(regime=asdict(regime), arm=asdict(arm), setting=dict(setting))
        kept = self.store.kept(name, settings)
        if kept is not None:
            return kept
        task = self.task(task_name)
        stem = f"{task_name}-{regime.name}"
        base = self.store.load_model(f"{stem}-base-{seed}", make_model(task, seed))
        seconds = 0.0
        if arm.average_of is None:
            with tempfile.TemporaryDirectory() as scratch:
                model = copy.deepcopy(base)
                seconds = train_arm(model, task, regime, arm, setting, seed, self.protocol, Path(scratch))
        else:
            model = self._average(base, [f"{stem}-{part}-{seed}".replace(" ", "_") for part in arm.average_of])
        if not tried and any(arm.name in (other.average_of or ()) for other in self.protocol.arms):
            self.store.keep_model(name, model)
        return self.store.keep(name, settings, {"seconds": seconds, **self.measured(model, task, seed)})

    def _average(self, model: GPT2LMHeadModel, names: list[str]) -> GPT2LMHeadModel:
        parts = [self.store.load_model(name, copy.deepcopy(model)) for name in names]
        model.load_state_dict(ensemble(*parts, alpha=0.5))
        return model

    def measured(self, model: GPT2LMHeadModel, task: Task, seed: int) -> Record:
        """Measure a model: likelihood, and samples at every temperature; on other prompts for tries than for runs."""
        tried = seed == self.protocol.tuning_seed
        held_out = task.examples("validation" if tried else "test", 0)
        count = self.protocol.prompts[0 if tried else 1]
        samples = {}
        for temperature in TEMPERATURES:
            samples[str(temperature)] = sampled(model, task, held_out.prompts[:count], temperature, seed)
            if temperature != PLAIN:
                del samples[str(temperature)]["each"]
        nll = nll_per_token(model, held_out.prompts, held_out.completions, task.eos)
        return {"nll": nll, "samples": samples}

    # All runs

    def run(self, workers: int) -> dict[str, Any]:
        """Run what is missing, and return everything: ``judge``, ``bases``, ``tries``, ``chosen`` and ``runs``."""
        protocol = self.protocol
        settings = [(task, regime) for task, regimes in protocol.regimes.items() for regime in regimes]
        seeds = (protocol.tuning_seed, *protocol.seeds)
        firsts = {task: regimes[0] for task, regimes in protocol.regimes.items()}
        trained = [arm for arm in protocol.arms if arm.average_of is None]
        with Workers(self, workers) as pool:
            judge = pool.do("judge", {(): ()} if "text" in protocol.regimes else {})
            bases = pool.do(
                "base",
                {
                    (task, regime.name, seed): (task, regime, seed)
                    for task, regime in settings
                    for seed in seeds
                    if seed != protocol.tuning_seed or regime is firsts[task]
                },
            )
            tries = pool.do(
                "arm",
                {
                    (task, arm.name, number): (task, regime, arm, setting, protocol.tuning_seed)
                    for task, regime in firsts.items()
                    for arm in trained
                    for number, setting in enumerate(protocol.tries(arm))
                },
            )
            chosen = self.choose(bases, tries)
            runs: dict[Any, Record] = {}
            # An average needs its parts.
            for arms in (trained, [arm for arm in protocol.arms if arm.average_of]):
                runs |= pool.do(
                    "arm",
                    {
                        (task, regime.name, arm.name, seed): (task, regime, arm, chosen.get((task, arm.name), {}), seed)
                        for seed in protocol.seeds
                        for task, regime in settings
                        for arm in arms
                    },
                )
        return {"judge": judge.get(()), "bases": bases, "tries": tries, "chosen": chosen, "runs": runs}

    def choose(self, bases: dict[Any, Record], tries: dict[Any, Record]) -> dict[tuple[str, str], Options]:
        """Return the setting of each arm of each task whose samples are furthest above the base's curve."""
        chosen = {}
        for task, regimes in self.protocol.regimes.items():
            base = bases[task, regimes[0].name, self.protocol.tuning_seed]
            for arm in self.protocol.arms:
                settings = self.protocol.tries(arm)
                gains = [above_curve(tries[task, arm.name, number], base) for number in range(len(settings))]
                if gains:
                    chosen[task, arm.name] = settings[gains.index(max(gains))]
        return chosen


class Workers:
    """Processes of one thread each, which do the runs of a study."""

    def __init__(self, study: Study, count: int) -> None:
        self.study = study
        self.pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_begin_worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def do(self, what: str, jobs: dict[Any, tuple]) -> dict[Any, Record]:
        """Call a method of the study with the arguments of each job, and return what it returns by the job's key."""
        done = {}
        with Progress(transient=True) as progress:
            bar = progress.add_task(f"{what}s", total=len(jobs))
            futures = {self.pool.submit(getattr(self.study, what), *job): key for key, job in jobs.items()}
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                progress.advance(bar)
        return {key: done[key] for key in jobs}


def _begin_worker() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
