"""What the head costs in one training step: time and peak memory of loss and gradients, fused and eager.

Each is measured in a process of its own, on the same hidden states, weights and targets.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpo_kernels import CandidateLayout, linear_cpo_loss

LOGITS_BYTES = 16 * 2**20
OBJECTIVE = {"beta": 0.1, "contrast_weight": 0.5, "mle_weight": 0.5}


@dataclass(frozen=True)
class HeadCost:
    """Of one call: median seconds, bytes at the peak above what was there before, and the loss it computed."""

    seconds: float
    peak_bytes: int
    loss: float


def fused(hidden: Tensor, weight: Tensor, inputs: dict[str, Any]) -> Tensor:
    layout = CandidateLayout(inputs["cu_tokens"], inputs["cu_groups"], rows=inputs["rows"])
    options = OBJECTIVE | {"ref_logps": inputs["ref_logps"], "max_logits_bytes": LOGITS_BYTES}
    return linear_cpo_loss(hidden, weight, inputs["targets"], layout=layout, **options).loss


def eager(hidden: Tensor, weight: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Plain PyTorch, on the rows that predict something and no others, as the fused loss does."""
    rows, inverse = inputs["rows"].unique(return_inverse=True)
    logps = (hidden[rows] @ weight.T).log_softmax(-1)[inverse, inputs["targets"]]
    lengths = torch.tensor(inputs["cu_tokens"]).diff()
    sums = torch.segment_reduce(logps, "sum", lengths=lengths)
    scores = (OBJECTIVE["beta"] * (sums - inputs["ref_logps"])).split(torch.tensor(inputs["cu_groups"]).diff().tolist())
    contrast = torch.stack([-group.log_softmax(0)[0] for group in scores]).mean()
    first = torch.tensor(inputs["cu_groups"][:-1])
    return OBJECTIVE["contrast_weight"] * contrast - OBJECTIVE["mle_weight"] * sums[first].sum() / lengths[first].sum()


def measure_head(hidden: Tensor, weight: Tensor, inputs: dict[str, Any]) -> dict[str, HeadCost]:
    """The costs of ``fused`` and ``eager``.

    Raises:
        RuntimeError: they compute different losses.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "head.pt")
        torch.save({"hidden": hidden, "weight": weight, "inputs": inputs}, path)
        costs = {name: _measure_elsewhere(name, path) for name in ("fused", "eager")}
    if abs(costs["fused"].loss - costs["eager"].loss) > 1e-4 * abs(costs["eager"].loss):
        raise RuntimeError(f"the fused loss is {costs['fused'].loss}, the eager one {costs['eager'].loss}")
    return costs


def _measure_elsewhere(name: str, path: Path) -> HeadCost:
    command = [sys.executable, __file__, name, str(path), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the {name} head failed:\n{done.stderr}")
    return HeadCost(**json.loads(done.stdout))


def _resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _call(function: Any, tensors: dict[str, Any]) -> float:
    hidden = tensors["hidden"].requires_grad_()
    weight = tensors["weight"].requires_grad_()
    hidden.grad = weight.grad = None
    loss = function(hidden, weight, tensors["inputs"])
    loss.backward()
    return float(loss)


def _measure_here(name: str, path: str, threads: int, rounds: int = 7) -> HeadCost:
    torch.set_num_threads(threads)
    tensors = torch.load(path)
    function = {"fused": fused, "eager": eager}[name]
    # Warm-up on one group, so that libraries and thread pools are not counted.
    inputs = tensors["inputs"]
    segments = inputs["cu_groups"][1]
    tokens = inputs["cu_tokens"][segments]
    small = {"cu_groups": [0, segments], "cu_tokens": inputs["cu_tokens"][: segments + 1]}
    small |= {name: inputs[name][:tokens] for name in ("rows", "targets")} | {
        "ref_logps": inputs["ref_logps"][:segments]
    }
    _call(function, tensors | {"inputs": small})
    tensors["hidden"].grad = tensors["weight"].grad = None

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark restarts from here
    before = _resident_bytes("VmRSS")
    loss = _call(function, tensors)
    peak = _resident_bytes("VmHWM") - before
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        _call(function, tensors)
        seconds.append(time.perf_counter() - start)
    return HeadCost(statistics.median(seconds), peak, loss)


if __name__ == "__main__":
    print(json.dumps(vars(_measure_here(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
