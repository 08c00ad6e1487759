"""The frozen reference: the same one has to be there when a run is resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import nn

FILE_NAME = "reference.json"


def fingerprint(model: nn.Module, samples: int = 64) -> str:
    """A digest of a model's parameters: their names, shapes and ``samples`` values of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        stride = max(1, values.numel() // samples)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(json.dumps(values[::stride][:samples].double().tolist()).encode())
    return digest.hexdigest()


def save_fingerprint(model: nn.Module, checkpoint: str) -> None:
    """Leave the reference's fingerprint in a checkpoint, in place of the reference itself."""
    Path(checkpoint, FILE_NAME).write_text(json.dumps({"fingerprint": fingerprint(model)}), encoding="utf-8")


def check_fingerprint(model: nn.Module, checkpoint: str) -> None:
    """Raise ``ValueError`` if a checkpoint was trained with another reference; one without a fingerprint passes."""
    path = Path(checkpoint, FILE_NAME)
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["fingerprint"] != fingerprint(model):
        raise ValueError(
            f"the reference of this trainer is not the one that {checkpoint} was trained with; construct CPOTrainer "
            "with the model that the run began with, or pass it as ref_model"
        )
