"""Checks of checkpoints and models on disk, whenever a run was killed, by records of the files of a directory.

A checkpoint and a finished model have a record, ``cpo_kernels.json``: the size and hash of every file, and facts about
the run. It is written last, whole or not at all, so a directory that has a record was complete once, and damage shows.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cpo_kernels.negatives.files import whole_file, write_whole

__all__ = [
    "RECORD",
    "Needs",
    "checkpoints",
    "condition",
    "hash_file",
    "lacking",
    "last_complete_checkpoint",
    "malformed",
    "own_files",
    "read_record",
    "whole_file",
    "write_record",
    "write_whole",
]

RECORD = "cpo_kernels.json"
FORMAT = 1
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*", "*/adapter_model.*", "pytorch_model_fsdp*")
DEEPSPEED = "global_step*"  # A directory with weights, optimizer and schedule.
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Needs:
    """The parts that a checkpoint must hold, besides weights, for a run to go on from it bit for bit.

    Attributes:
        processes: number of processes of the run, each with its own random generators.
        scaler: whether losses are scaled, as in float16.
        negatives: whether negatives are written ahead of their steps.
    """

    processes: int = 1
    scaler: bool = False
    negatives: bool = False


@dataclass
class Condition:
    """The differences between the files of a checkpoint or model and their record.

    Attributes:
        damaged: files that are cut off or changed, and missing ones that a run cannot do without: weights, Trainer's
            state.
        missing: other files that were written and no longer exist.
    """

    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def hash_file(path: str | Path) -> str:
    """Return the 128-bit xxh3 hash of every byte of a file, in hexadecimal digits."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


# Records


def write_record(directory: Path, files: Iterable[Path], **about: Any) -> None:
    """Write the record of some files in a directory, with further facts ``about`` them."""
    entries = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
        for path in sorted(files)
    }
    record = {"format": FORMAT, **about, "files": entries}
    write_whole(directory / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")


def read_record(directory: str | Path) -> dict[str, Any] | None:
    """Return a directory's record; None where there is none, as in directories of older versions.

    Raises:
        ValueError: a record that is damaged; the message says what to do.
    """
    path = Path(directory, RECORD)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and isinstance(record["files"], dict):
            return record
        raise ValueError("it has no list of files")
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{RECORD} cannot be read ({error})") from error


def condition(directory: str | Path) -> Condition:
    """Compare the files of a checkpoint, or of a finished model, with their record.

    Without a record, as in directories of older versions, only the form and names of files can be checked.
    """
    directory = Path(directory)
    try:
        record = read_record(directory)
    except ValueError as error:
        return Condition([str(error)])
    if record is None:
        return Condition(_faults_of_form(directory))
    found = Condition()
    for name, entry in record["files"].items():
        path = directory / name
        if path.is_file():
            found.damaged += _faults(path, name, entry)
        elif _is_vital(name):
            found.damaged.append(f"{name} is missing")
        else:
            found.missing.append(name)
    return found


def _is_vital(name: str) -> bool:
    """Tell whether a run cannot do without this file: Trainer's state, and weights, also those within directories."""
    top = Path(Path(name).parts[0])
    vital = (TRAINER_STATE_NAME, *INDICES, *WEIGHTS, DEEPSPEED)
    return any(Path(name).match(pattern) or top.match(pattern) for pattern in vital)


def _faults(path: Path, name: str, entry: dict[str, Any]) -> list[str]:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return [f"{name} has {size} of {entry['bytes']} bytes"]
        return [] if hash_file(path) == entry["xxh3_128"] else [f"{name} is not what was written: its hash differs"]
    except (OSError, KeyError, TypeError) as error:
        return [f"{name} cannot be checked ({error!r})"]


def _faults_of_form(checkpoint: Path) -> list[str]:
    """Find files of a checkpoint without a record that are missing, or whose form shows that they are cut off."""
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return [f"it has no {TRAINER_STATE_NAME}, which is written last"]
    found = []
    for path in sorted(checkpoint.iterdir()):
        reason = malformed(path)
        if reason is not None:
            found.append(f"{path.name} {reason}")
        elif path.name in INDICES:
            shards = set(json.loads(path.read_text(encoding="utf-8")).get("weight_map", {}).values())
            found += [f"{name} is missing" for name in sorted(shards) if not (checkpoint / name).is_file()]
    if not _has(checkpoint, *WEIGHTS, DEEPSPEED):
        found.append("its weights are missing")
    return found


def malformed(path: Path) -> str | None:
    """Say how a file breaks the form of its suffix; None where it does not, or for other suffixes."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".pt", ".pth", ".bin") and path.is_file() and not zipfile.is_zipfile(path):
            return "is cut off, or not written by torch.save"
        elif path.suffix == ".safetensors":
            return _malformed_safetensors(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({error})"
    return None


def _malformed_safetensors(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return f"is cut off: {size} bytes end within its header"
        header = json.loads(file.read(length))
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    return None if size == 8 + length + end else f"has {size} of {8 + length + end} bytes"


# Checkpoints


def checkpoints(output_dir: str | Path) -> list[Path]:
    """List the checkpoints in a directory, whole or not, the newest first."""
    found = []
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and path.is_dir():
            found.append((int(step), path))
    return [path for _, path in sorted(found, reverse=True)]


def lacking(checkpoint: str | Path, needs: Needs) -> list[str]:
    """Name the state that a run needs to go on from a checkpoint bit for bit and that the checkpoint lacks."""
    checkpoint = Path(checkpoint)
    generators = [f"rng_state_{i}.pth" for i in range(needs.processes)] if needs.processes > 1 else ["rng_state.pth"]
    wanted = {
        "optimizer": _has(checkpoint, "optimizer.pt", "optimizer.bin", "optimizer_*", DEEPSPEED),
        "learning-rate schedule": _has(checkpoint, "scheduler.pt", DEEPSPEED),
        "random generators": all((checkpoint / name).is_file() for name in generators),
        "scale of the loss": not needs.scaler or _has(checkpoint, "scaler.pt", DEEPSPEED),
        "negatives written ahead": not needs.negatives or _has(checkpoint, "autoregressive-*.json"),
    }
    return [name for name, there in wanted.items() if not there]


def _has(directory: Path, *patterns: str) -> bool:
    return any(any(directory.glob(pattern)) for pattern in patterns)


def last_complete_checkpoint(output_dir: str | Path, needs: Needs | None = None) -> str | None:
    """Find the checkpoint of the most steps that is whole and lacks nothing; None if there is none."""
    for path in checkpoints(output_dir):
        found = condition(path)
        if not found.damaged and not found.missing and not lacking(path, needs or Needs(max(1, _processes(path)))):
            return str(path)
    return None


def _processes(checkpoint: Path) -> int:
    return len([*checkpoint.glob("rng_state_*.pth")])


def own_files(directory: Path) -> list[Path]:
    """List the files of a checkpoint that its record is to name."""
    return [
        Path(folder, name)
        for folder, _, names in os.walk(directory)
        for name in names
        if not name.endswith(".partial") and Path(folder, name) != directory / RECORD
    ]
