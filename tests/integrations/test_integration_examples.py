"""examples/plugging_in: the compute_loss of ``transformers.Trainer`` against a dense loss, and runs of the scripts."""

from __future__ import annotations

import copy
import importlib.util
import random
import re
import runpy
from types import ModuleType

import pytest
import tiny_models
import torch
from processes import run_script
from project import ROOT
from tolerance import assert_accurate
from torch import Tensor

pytestmark = pytest.mark.cpu  # the examples run on the CPU

EXAMPLES = ROOT / "examples" / "plugging_in"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("transformers_trainer_example", EXAMPLES / "transformers_trainer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_trainer(example, folder, count=8, **arguments):
    rng = random.Random(0)
    model = tiny_models.llama(vocab_size=example.WORDS)
    trainer = example.make_trainer(
        model, [example.make_example(rng) for _ in range(count)], output_dir=str(folder), **arguments
    )
    with torch.no_grad():
        for parameter in model.parameters():  # so that model and reference differ
            parameter.add_(0.05 * torch.randn_like(parameter))
    return trainer


def dense_loss(example, model, reference, batch: dict[str, Tensor]) -> Tensor:
    """The contrast of the paper from both models' logits, with beta = 1."""

    def logps(model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        chosen = logits.log_softmax(-1).gather(-1, batch["targets"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (chosen * (batch["targets"] != -100)).sum(-1).view(-1, example.CANDIDATES)

    return -(logps(model) - logps(reference).detach()).log_softmax(-1)[:, 0].mean()


def test_compute_loss_equals_the_dense_loss(example, tmp_path):
    trainer = make_trainer(example, tmp_path)
    model, reference = trainer.model.eval(), trainer.reference
    batch = example.collate(trainer.train_dataset)
    names = [name for name, _ in model.named_parameters()]
    oracle = copy.deepcopy(model).double()
    exact = dense_loss(example, oracle, copy.deepcopy(reference).double(), batch)
    eager = dense_loss(example, model, reference, batch)
    loss, out = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert out.logits is None
    assert_accurate(loss, eager, exact, "loss")
    grads = [torch.autograd.grad(x, list(m.parameters())) for x, m in ((loss, model), (eager, model), (exact, oracle))]
    for name, *values in zip(names, *grads, strict=True):
        assert_accurate(*values, name)


def test_accumulated_batches_train_as_one(example, tmp_path):
    """What ``loss_is_scaled_for_ga = False`` is for: the model takes keywords, and Trainer would not divide."""
    trained = []
    for size, steps in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        arguments = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "max_grad_norm": 0.0}
        trainer = make_trainer(
            example, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **arguments
        )
        before = copy.deepcopy(trainer.model)
        trainer.train()
        changes = [(a - b).detach() for a, b in zip(trainer.model.parameters(), before.parameters(), strict=True)]
        trained.append(torch.cat([change.flatten() for change in changes]))
    assert trained[0].norm() > 0.01
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-4, atol=1e-6)


def test_the_trainer_example_learns(example, capsys):
    example.main()
    out = capsys.readouterr().out
    first, last = map(float, re.search(r"last 20 steps: (\S+) (\S+)", out).groups())
    assert last < first / 2
    assert float(re.search(r"held-out progressions: (\S+)", out).group(1)) < first / 2


def test_the_plain_example_learns():
    losses = [float(loss) for loss in re.findall(r"loss (\S+),", run_script(EXAMPLES / "plain_pytorch.py"))]
    assert len(losses) == 6 and losses[-1] < losses[0] / 5


def test_the_example_of_ligers_losses_learns():
    shares = [int(share) for share in re.findall(r"preferred in (\d+)%", run_script(EXAMPLES / "liger_losses.py"))]
    assert len(shares) == 6 and shares[-1] > 90


def test_the_example_of_trls_cpo_learns(monkeypatch, capsys):
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / "trl_cpo.py"), run_name="__main__")
    shares = [int(share) for share in re.findall(r"preferred in (\d+)%", capsys.readouterr().out)]
    assert len(shares) == 4 and shares[-1] > 90


def test_the_distributed_example_learns_sharded_or_not():
    outputs = [run_script(EXAMPLES / "distributed.py", *how, processes=2) for how in ((), ("--fsdp2",))]
    # Torch 2.8 prints a greeting of each process.
    lines = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out in outputs]
    for out in outputs:
        losses = [float(loss) for loss in re.findall(r"loss (\S+),", out)]
        assert len(losses) == 4 and losses[-1] < losses[0] / 5
    assert lines[0] == lines[1], "DDP and FSDP2 train alike"


def test_the_example_of_other_losses_learns(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)  # as for a script, which imports another beside it
    runpy.run_path(str(EXAMPLES / "other_losses.py"), run_name="__main__")
    shares = dict(re.findall(r"(\w+): .* in (\d+)%", capsys.readouterr().out))
    assert shares.keys() == {"kto", "orpo", "info_nca", "nca", "gspo"}
    assert all(int(share) > 60 for share in shares.values()), shares  # chance is 25


def test_the_lightning_example_learns():
    # A development dependency, which constraints.txt pins and CI installs.
    pytest.importorskip("lightning")
    out = run_script(EXAMPLES / "lightning_module.py")
    assert "after 100 steps" in out
    assert float(re.search(r"'loss': ([\d.]+)", out).group(1)) < 0.5
    assert float(re.search(r"'accuracy': ([\d.]+)", out).group(1)) > 0.9
