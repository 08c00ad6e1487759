"""``cpo-kernels negatives``: autoregressive negatives for a whole data set, written ahead of time and part by part.

Every part is a separate file, named by a digest of all that it depends on, and whole or absent. So an interrupted call
goes on where it was, and a change to one line of the data costs only the part with that line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from cpo_kernels.negatives import write_negatives
from cpo_kernels.negatives.progress import progress_bar
from cpo_kernels.trainer.files import hash_file, write_whole

from .errors import InputError, input_errors
from .parsing import Settings, parse
from .parts import Job, Part

COMPLETE = "complete"
REPLACE = "give another negatives_file, or --overwrite to replace it"
TEXTS = {
    "other": "of other data or with other settings",
    "changed": "but was changed since",
    "unknown": "and how it was written is not known",
}


def run(arguments: Sequence[str]) -> None:
    """Write the examples that ``arguments`` name, with negatives."""
    settings = parse(arguments)
    path = _target(settings)
    folder = path.with_name(f"{path.name}.parts")
    overwrite = settings.run.overwrite
    if path.is_file() and not folder.is_dir() and not overwrite:
        raise InputError(f"{path} is there already, and was not written by this command; {REPLACE}")
    job = Job(settings)
    parts = job.parts()
    whole = hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()
    if path.is_file() and not overwrite:
        state = _state(path, folder, whole)
        if state == "complete":
            print(f"{path} is complete")
            return
        # A call killed after it wrote the file, but before it marked it as complete, still has all of its parts.
        if state != "unknown" or not all((folder / part.name).is_file() for part in parts):
            raise InputError(f"{path} is finished, {TEXTS[state]}; {REPLACE}")
    folder.mkdir(parents=True, exist_ok=True)
    training = settings.training
    own = parts[training.process_index :: training.world_size]
    missing = [part for part in own if not (folder / part.name).is_file()]
    if len(missing) < len(own):
        print(f"{len(own) - len(missing)} of {len(own)} parts are there already, in {folder}")
    total = sum(part.stop - part.start for part in missing)
    with progress_bar("Writing negatives", "example", total, training.hides_progress) as bar:
        for part in missing:
            write_whole(folder / part.name, json.dumps(job.write(part)))
            bar.update(part.stop - part.start)
    if training.world_size > 1:
        torch.distributed.barrier()
    if training.process_index == 0:
        if not all((folder / part.name).is_file() for part in parts) and _state(path, folder, whole) == "complete":
            print(f"{path} is complete: another call has written it meanwhile")
            return
        _merge(path, folder, parts, job)
        write_whole(folder / COMPLETE, json.dumps({"parts": whole, "xxh3_128": hash_file(path)}))
        for file in folder.glob("*.json"):
            file.unlink(missing_ok=True)


def _state(path: Path, folder: Path, whole: str) -> str:
    """Compare a file with its record of completion, and with the parts that are now asked for."""
    try:
        said = json.loads(_read(folder / COMPLETE))
    except ValueError:
        said = _read(folder / COMPLETE)  # Older versions recorded only the digest of the parts.
    if isinstance(said, dict):
        if said.get("parts") != whole:
            return "other"
        return "complete" if path.is_file() and said.get("xxh3_128") == hash_file(path) else "changed"
    return {whole: "complete", "": "unknown"}.get(said, "other")


def _target(settings: Settings) -> Path:
    if settings.run.negatives_file is None:
        raise InputError("negatives_file is not given: the .parquet or .jsonl file to write")
    path = Path(settings.run.negatives_file)
    if path.suffix not in (".parquet", ".jsonl"):
        raise InputError(f"negatives_file must end with .parquet or .jsonl, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _merge(path: Path, folder: Path, parts: Sequence[Part], job: Job) -> None:
    """Join the parts into the one file that training reads."""
    written = [json.loads(_read(folder / part.name)) for part in parts]
    negatives = [own for part in written for own in part["negatives"]]
    ranks = None if job.ranking is None else [own for part in written for own in part["ranks"]]
    with input_errors():
        write_negatives(path, job.rows(), negatives, ranks=ranks)
    bare = sum(not own for own in negatives)
    print(f"wrote {sum(map(len, negatives))} negatives of {len(negatives)} examples to {path}")
    if bare:
        print(
            f"{bare} examples got none: what was written for them was the ground truth itself; they need another kind "
            "in training, such as num_batch_negatives"
        )


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
