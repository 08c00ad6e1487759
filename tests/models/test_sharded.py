"""The fused loss under DDP, FSDP2 and parameters that hooks gather: equal to one process with all of the data."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import transformers
from adapter_cases import CASES as ADAPTERS
from attach_cases import contrast_inputs, request_for
from processes import run_script
from project import SUPPORT
from sharded_cases import CASES, GLOO_AVERAGES, RANKS, run_alone, tensor_parallel
from torch.utils._pytree import tree_leaves

from cpo_kernels import attach_linear_loss
from cpo_kernels.trainer.ensemble import ensemble

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def distributed_runs(tmp_path_factory):
    """Every case in the same two processes, over gloo."""
    path = tmp_path_factory.mktemp("sharded")
    run_script(SUPPORT / "sharded_worker.py", str(path), processes=RANKS)
    return torch.load(path / "run.pt") | {"ensemble": path / "ensemble"}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, distributed_runs):
    got, want = distributed_runs[case], run_alone(CASES[case])
    assert not isinstance(got, str), got
    for name in ("losses", "logps", "tokens"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)
    for step, (mine, expected) in enumerate(zip(got["grads"], want["grads"], strict=True)):
        assert mine.keys() == expected.keys()
        for name, grad in mine.items():
            torch.testing.assert_close(
                grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name, s=step: f"{n}, step {s}: {m}"
            )


def test_a_loss_around_the_forward_of_ddp_leaves_gradients_unreduced(distributed_runs):
    """What the loss inside forward avoids: the hooks that reduce gradients never hear of the call."""
    inside, around = (distributed_runs[f"gradients {how} forward"] for how in ("inside", "around"))
    assert torch.equal(*inside)
    assert not torch.allclose(*around, rtol=0.1)
    torch.testing.assert_close(torch.stack(around).mean(0), inside[0], rtol=1e-4, atol=1e-6)


@GLOO_AVERAGES
def test_a_weight_of_fsdp_that_the_caller_gathers_gets_the_mean_gradient(distributed_runs):
    """As the message for a DTensor says; full_tensor() alone leaves every process its own gradient."""
    want = distributed_runs["gradients inside forward"][0]
    torch.testing.assert_close(distributed_runs["gathered around forward"], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attach_first", [True, False])
def test_a_head_split_by_tensor_parallelism_equals_a_whole_one(attach_first, distributed_runs):
    got, want = distributed_runs[f"tensor parallel, {attach_first}"], tensor_parallel(None)
    assert got.keys() == want.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_an_ensemble_is_gathered_from_the_shards(distributed_runs):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(distributed_runs["ensemble"])
    want = ensemble(tiny_models.gpt2(seed=1), tiny_models.gpt2(seed=0), 0.3)
    assert type(loaded) is transformers.GPT2LMHeadModel and loaded.state_dict().keys() == want.keys()
    assert all(torch.equal(value, want[name]) for name, value in loaded.state_dict().items())


def empty_parameters(model) -> None:
    """As ZeRO-3 does: a module's parameters have data only inside its forward and its backward."""
    whole = {p: p.data for p in model.parameters()}
    for number, parameter in enumerate(whole):
        parameter.data, parameter.ds_id = torch.empty(0), number

    def gather(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = whole[parameter]

    def release(module, _inputs, output):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _grad: gather(module))

    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)


@pytest.mark.parametrize("make_model", [tiny_models.llama, tiny_models.gpt2, ADAPTERS["head"]])
@pytest.mark.parametrize("attach_first", [True, False])
def test_parameters_that_hooks_bring_equal_parameters_that_are_there(make_model, attach_first):
    ids, targets, layout, ref_logps = contrast_inputs()
    losses, grads = [], []
    for emptied in (False, True):
        model = make_model()
        if attach_first or not emptied:
            attach_linear_loss(model)
        if emptied:
            empty_parameters(model)
            attach_linear_loss(model)
        loss = model(input_ids=ids, linear_loss=request_for(targets, layout, ref_logps)).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert torch.equal(*losses)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name
