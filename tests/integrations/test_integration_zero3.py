"""The fused loss under DeepSpeed ZeRO-3, in two gloo processes: `make test-deepspeed`."""

from __future__ import annotations

import pytest
import torch
from deepspeed_cases import NEEDS_DEEPSPEED
from processes import run_script
from project import SUPPORT

pytestmark = [pytest.mark.cpu, NEEDS_DEEPSPEED]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("zero3")
    run_script(SUPPORT / "zero3_worker.py", str(path), processes=2)
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("model", ["llama", "gpt2, tied", "LoRA on the head"])
def test_gradients_equal_those_of_one_process(model, attach_first, runs):
    for run in runs:
        pairs = run[model, attach_first]
        assert not isinstance(pairs, str), pairs
        assert len(pairs) > 3
        for name, (ours, wanted) in pairs.items():
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
