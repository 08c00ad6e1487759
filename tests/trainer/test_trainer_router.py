"""The trainer adds the load-balancing loss of a mixture of experts: its value, its gradients, its share of a step."""

from __future__ import annotations

import pytest
import torch
from expert_models import experts, router_loss
from trainer_runs import steps, trainer
from trainer_steps import GIVEN, NONE, micro_batch

pytestmark = pytest.mark.cpu
OPTIONS = {**NONE, "beta": 0.4, "reference": "none", "prefix_sharing": "off"}


def run_of(path, on: bool = True, **options):
    return trainer(path, experts(output_router_logits=on), GIVEN, **OPTIONS | options)


def gradients(run) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in run.model.named_parameters()}


@pytest.mark.parametrize("prefix_sharing", ["off", "required"])
@pytest.mark.parametrize("own_loss", [False, True])
def test_a_step_adds_what_the_model_adds(tmp_path, prefix_sharing, own_loss):
    """To the loss of the same step without it, over the tokens of all candidates."""

    def squares(logps, groups):
        return (logps[:, 0] - logps[:, 1] - 0.5).square().sum()

    options = {"loss_fn": squares} if own_loss else {}
    plain, run = (run_of(tmp_path, on, prefix_sharing=prefix_sharing, **options) for on in (False, True))
    apart = micro_batch(run_of(tmp_path), [0, 1])  # a row for each candidate
    inputs = micro_batch(run, [0, 1])
    assert ("tree_groups" in inputs) is (prefix_sharing == "required")
    plain._forward(plain.model, micro_batch(plain, [0, 1])).loss.backward()
    added = router_loss(plain.model, apart["input_ids"], apart["attention_mask"])
    without = plain._forward(plain.model, micro_batch(plain, [0, 1])).loss.detach()
    added.backward()
    out = run._forward(run.model, inputs)
    out.loss.backward()
    assert float(added) > 0.1
    torch.testing.assert_close(out.loss, without + added, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.router_loss, added.detach(), rtol=1e-5, atol=1e-6)
    for name, grad in gradients(run).items():
        torch.testing.assert_close(
            grad, gradients(plain)[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_accumulated_batches_add_their_mean(tmp_path):
    """Of two examples in two batches; the loss counts tokens within a batch, so it is not that of one."""
    arguments = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 1}
    runs = [run_of(tmp_path, on, **arguments) for on in (False, True)]
    batches = [[micro_batch(run, [i]) for i in (0, 1)] for run in runs]
    parts = [router_loss(runs[0].model, b["input_ids"], b["attention_mask"]).detach() for b in batches[0]]
    for run in runs:
        run.train()
    without, logged = (steps(run)[0] for run in runs)
    want = float(sum(parts)) / 2
    assert logged["loss"] - without["loss"] == pytest.approx(want, rel=1e-4)
    assert logged["aux_loss"] == pytest.approx(want / 0.3, rel=1e-4)
    assert "aux_loss" not in without and "router_loss" not in logged


def test_evaluation_has_it_in_its_loss(tmp_path):
    without, evaluated = (run_of(tmp_path, on, eval_dataset=GIVEN).evaluate() for on in (False, True))
    batch = micro_batch(run_of(tmp_path), [0, 1])
    want = float(router_loss(experts().eval(), batch["input_ids"], batch["attention_mask"]).detach())
    assert evaluated["eval_loss"] - without["eval_loss"] == pytest.approx(want, rel=1e-4)
    assert evaluated["eval_aux_loss"] == pytest.approx(want / 0.3, rel=1e-4)
    assert "eval_router_loss" not in evaluated
