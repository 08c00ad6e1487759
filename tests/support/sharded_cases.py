"""Models, ways to distribute them, and two steps of training, alike in one process and in two."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import tiny_models
import torch
from adapter_cases import CASES as ADAPTERS
from attach_cases import contrast_inputs, request_for
from packaging.version import Version
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from cpo_kernels import VocabShard, attach_linear_loss, linear_cpo_loss
from cpo_kernels.models import CPORequest, LogpsRequest, StatisticsRequest

RANKS = 2
# Torch 2.8 adds what ReduceOp.AVG should average, silently, where the processes talk over gloo.
GLOO_AVERAGES = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.11"), reason=f"gloo does not average in torch {torch.__version__}"
)


class Case(NamedTuple):
    """A model, how two processes share it, and whether the loss is attached before that."""

    make: Callable[[], nn.Module]
    distribute: Callable[[nn.Module], nn.Module]
    attach_first: bool = True


def tied_llama():
    return tiny_models.llama(tie_word_embeddings=True)


def layers_and_root(*groups: Callable[[nn.Module], nn.Module | list[nn.Module]], output: torch.dtype | None = None):
    """Return a function that applies FSDP2 to every layer, to some groups of modules, and to the rest of a model.

    Outputs of the groups and the rest have dtype ``output``.
    """
    policy = MixedPrecisionPolicy(output_dtype=output)

    def distribute(model: nn.Module) -> nn.Module:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        body = base.base_model
        for layer in body.layers if hasattr(body, "layers") else body.h:
            fully_shard(layer, reshard_after_forward=True)
        for group in groups:
            fully_shard(group(base), reshard_after_forward=True, mp_policy=policy)
        model = fully_shard(model, reshard_after_forward=True, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # then it divides by itself, see GLOO_AVERAGES
        return model

    return distribute


def head(model: nn.Module) -> nn.Module:
    return model.lm_head


def norm_and_head(model: nn.Module) -> list[nn.Module]:
    return [model.model.norm, model.lm_head]


def embeddings_and_head(model: nn.Module) -> list[nn.Module]:
    return [model.model.embed_tokens, model.model.norm, model.lm_head]


def low_rank(kind: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: getattr(model.lm_head, kind)["default"]


CASES = {
    "DDP": Case(tiny_models.llama, DistributedDataParallel),
    "DDP, tied": Case(tiny_models.gpt2, DistributedDataParallel),
    "root": Case(tiny_models.llama, layers_and_root()),
    "root, tied": Case(tiny_models.gpt2, layers_and_root()),
    "head": Case(tiny_models.llama, layers_and_root(head)),
    "head, sharded before": Case(tiny_models.llama, layers_and_root(head), attach_first=False),
    "root, rounded outputs": Case(tiny_models.gpt2, layers_and_root(output=torch.bfloat16)),
    "head, rounded outputs": Case(tiny_models.llama, layers_and_root(head, output=torch.bfloat16)),
    "norm and head": Case(tiny_models.llama, layers_and_root(norm_and_head)),
    "embeddings and head, tied": Case(tied_llama, layers_and_root(embeddings_and_head)),
    "adapter, root": Case(ADAPTERS["head"], layers_and_root()),
    "adapter, head": Case(ADAPTERS["head"], layers_and_root(head)),
    "adapter, its parts": Case(ADAPTERS["head"], layers_and_root(low_rank("lora_A"), low_rank("lora_B"), head)),
    "DoRA, its parts": Case(ADAPTERS["DoRA"], layers_and_root(low_rank("lora_A"), low_rank("lora_B"))),
    "trained copy": Case(ADAPTERS["trained copy"], layers_and_root(head)),
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def steps(model: nn.Module, ranks: list[int], average: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, list]:
    """Return the results of two steps of the mean loss over inputs of ``ranks``, and of passes without gradient."""
    trainable = [(n.removeprefix("module."), p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in trainable], lr=0.1)
    seen: dict[str, list] = {"losses": [], "grads": [], "logps": [], "tokens": []}
    for _ in range(2):
        with torch.no_grad():
            for name, value in answers(model, ranks).items():
                seen[name].append(average(value))
        loss = torch.stack([losses(model, rank) for rank in ranks]).mean()
        loss.backward()
        seen["losses"].append(average(loss.detach()))
        seen["grads"].append({n: whole(p.grad).clone() for n, p in trainable})
        optimizer.step()
        optimizer.zero_grad()
    return seen


def losses(model: nn.Module, rank: int) -> torch.Tensor:
    """Compute the fused loss, and one whose gradient arrives at the log-likelihoods later."""
    ids, targets, layout, ref_logps = inputs(rank)
    loss = model(input_ids=ids, linear_loss=request_for(targets, layout, ref_logps)).loss
    return loss + 0.01 * model(input_ids=ids, linear_loss=LogpsRequest(targets, layout)).logps.square().mean()


def answers(model: nn.Module, ranks: list[int]) -> dict[str, torch.Tensor]:
    """Compute log-likelihoods, without adapters if there are some, and those of single tokens with them."""
    logps, tokens = [], []
    for rank in ranks:
        ids, targets, layout, _ = inputs(rank)
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            logps.append(model(input_ids=ids, linear_loss=LogpsRequest(targets, layout)).logps)
        tokens.append(model(input_ids=ids, linear_loss=StatisticsRequest(targets, layout.rows)).token_logps)
    return {"logps": torch.stack(logps).mean(0), "tokens": torch.stack(tokens).mean(0)}


def inputs(rank: int):
    """Make inputs that differ for every rank."""
    ids, targets, layout, ref_logps = contrast_inputs()
    return ids.roll(rank, 1), targets.roll(rank), layout, ref_logps + rank


def run_distributed(case: Case, rank: int, average: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, list]:
    model = case.make()
    model = case.distribute(attach_linear_loss(model) if case.attach_first else model)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        assert all(isinstance(p, DTensor) for p in model.parameters())
        attach_linear_loss(model)
    return steps(model, [rank], average)


def run_alone(case: Case) -> dict[str, list]:
    return steps(attach_linear_loss(case.make()), list(range(RANKS)), lambda value: value)


def around_forward(rank: int) -> dict[str, torch.Tensor]:
    """Return the head's gradient under DDP from a loss inside forward and one that reads the weight around it."""
    ids, targets, layout, ref_logps = inputs(rank)
    inside, around = (DistributedDataParallel(attach_linear_loss(tiny_models.llama())) for _ in range(2))
    inside(input_ids=ids, linear_loss=request_for(targets, layout, ref_logps)).loss.backward()
    body, head = around.module.model, around.module.lm_head
    hidden = body(input_ids=ids).last_hidden_state.flatten(0, -2)
    request = request_for(targets, layout, ref_logps)
    linear_cpo_loss(hidden, head.weight, targets, layout=layout, **request.options).loss.backward()
    return {"inside": inside.module.lm_head.weight.grad, "around": head.weight.grad}


def gathered_around_forward(rank: int) -> torch.Tensor:
    """Return the head's gradient from a weight of FSDP2 that full_tensor() gathers outside of forward."""
    ids, targets, layout, ref_logps = inputs(rank)
    hidden = tiny_models.llama().model(input_ids=ids).last_hidden_state.flatten(0, -2).detach()
    head = fully_shard(tiny_models.llama().lm_head)
    weight = head.weight.full_tensor(grad_placements=[Partial("avg")])
    request = request_for(targets, layout, ref_logps)
    linear_cpo_loss(hidden, weight, targets, layout=layout, **request.options).loss.backward()
    return whole(head.weight.grad)


def tensor_parallel(attach_first: bool | None) -> dict[str, torch.Tensor]:
    """Return loss, log-likelihoods and gradients of a model whose head is split by its words, or whole for None."""
    ids, targets, layout, ref_logps = contrast_inputs()
    options, model = request_for(targets, layout, ref_logps).options, tiny_models.llama()
    if attach_first is not None:
        attach_linear_loss(model) if attach_first else None
        plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan)
        options["vocab_shard"] = VocabShard.of(model.lm_head.weight)
    attach_linear_loss(model)
    out = model(input_ids=ids, linear_loss=CPORequest(targets, layout, **options))
    out.loss.backward()
    options = {name: value for name, value in options.items() if name == "vocab_shard"}
    logps = model(input_ids=ids, linear_loss=LogpsRequest(targets, layout, **options)).logps.detach()
    grads = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    return {"loss": out.loss.detach(), "logps": logps, **grads}
