"""The fingerprint of a model: every byte counts, and nothing but what the model is."""

from __future__ import annotations

import copy
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from torch import nn
from trainer_runs import trainer

from cpo_kernels.trainer.fingerprint import fingerprint
from cpo_kernels.trainer.judges import LikelihoodJudge
from cpo_kernels.trainer.reference import Reference
from cpo_kernels.trainer.writing import ModelWriter

pytestmark = pytest.mark.cpu

DTYPES = ["float32", "float64", "bfloat16", "float16", "int64", "int8", "bool", "complex64"]
DTYPES += ["float8_e4m3fn", "float8_e5m2"]


class Holder(nn.Module):
    """One tensor, as a parameter, a buffer or a buffer that is not saved."""

    def __init__(self, value: torch.Tensor, kind: str = "buffer") -> None:
        super().__init__()
        if kind == "parameter":
            self.value = nn.Parameter(value, requires_grad=False)
        else:
            self.register_buffer("value", value, persistent=kind == "buffer")


def of(value: torch.Tensor, kind: str = "buffer") -> str:
    return fingerprint(Holder(value, kind))


@pytest.mark.parametrize("kind", ["parameter", "buffer", "unsaved"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_counts(dtype, kind):
    value = torch.zeros(3, 5, 7, dtype=getattr(torch, dtype))
    start, seen = of(value, kind), set()
    flat = value.view(-1).view(torch.uint8)
    for byte in range(len(flat)):
        flat[byte] = 1
        seen.add(of(value, kind))
        flat[byte] = 0
    assert of(value, kind) == start
    assert len(seen | {start}) == len(flat) + 1


def test_every_number_of_a_model_counts():
    model = tiny_models.gpt2()
    start, seen = fingerprint(model), set()
    for tensor in [*model.parameters(), *model.buffers()]:
        for index in {0, tensor.numel() // 3, tensor.numel() - 1}:
            flat, kept = tensor.data.view(-1), tensor.data.view(-1)[index].item()
            flat[index] = kept + 1e-6 if abs(kept) < 1 else kept * 1.0001
            seen.add(fingerprint(model))
            flat[index] = kept
    assert fingerprint(model) == start and start not in seen


def test_what_one_in_many_numbers_would_miss_is_another_model(tmp_path, monkeypatch):
    """The precomputed scores of a model are not those of one that differs in a single weight."""
    asked, score = [], Reference.score
    monkeypatch.setattr(Reference, "score", lambda self, *a, **k: asked.append(1) or score(self, *a, **k))
    options = {"reference": "precomputed", "resample_negatives": False, "reference_cache": str(tmp_path / "cache")}
    for expected in (True, False):
        trainer(tmp_path, tiny_models.llama(), **options)
        assert bool(asked) == expected
        asked.clear()
    other = tiny_models.llama()
    other.lm_head.weight.data[7, 3] += 50
    trainer(tmp_path, other, **options)
    assert asked


@pytest.mark.parametrize("make", [ModelWriter, LikelihoodJudge], ids=["writer", "judge"])
def test_judges_and_writers_are_told_apart_and_never_stale(make):
    model = tiny_models.llama()
    one = (
        make(model, tiny_models.tokenizer())
        if make is LikelihoodJudge
        else make(lambda: model, tiny_models.tokenizer())
    )
    before = one.identity
    assert one.identity == before
    model.model.layers[1].mlp.up_proj.weight.data[5, 5] += 1e-3
    assert one.identity != before


def test_names_shapes_dtypes_and_configuration_count():
    value = torch.arange(12.0)
    other = nn.Module()
    other.register_buffer("another", value)
    prints = [of(value), of(value.view(3, 4)), of(value.view(4, 3)), of(value.view(torch.int32)), fingerprint(other)]
    prints += [of(torch.zeros(0)), of(torch.zeros(0, 4)), of(torch.zeros(())), of(torch.zeros(1))]
    prints += [fingerprint(tiny_models.llama()), fingerprint(tiny_models.llama(rms_norm_eps=1e-3))]
    prints += [fingerprint(tiny_models.adapted()), fingerprint(tiny_models.adapted(lora_alpha=3))]
    assert len(set(prints)) == len(prints)


def test_strides_ties_and_where_it_was_saved_do_not_count(tmp_path):
    value = torch.randn(6, 4)
    assert of(value.T.contiguous().T) == of(value) == of(torch.cat([value, value])[:6])
    tied = tiny_models.gpt2()
    assert tied.lm_head.weight is tied.transformer.wte.weight
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    assert fingerprint(untied) == fingerprint(tied)
    tied.save_pretrained(tmp_path)
    assert fingerprint(type(tied).from_pretrained(tmp_path)) == fingerprint(tied) == fingerprint(tiny_models.gpt2())


@pytest.mark.parametrize("change", ["scale", "zero", "values"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_quantised_tensors(per_channel, change):
    def quantised(**changed):
        values = torch.arange(8.0).view(4, 2) + changed.get("values", 0)
        scale, zero = 0.5 + changed.get("scale", 0), changed.get("zero", 0)
        if per_channel:
            scales, zeros = torch.full((4,), scale), torch.full((4,), zero)
            return torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8)
        return torch.quantize_per_tensor(values, scale, zero, torch.qint8)

    assert of(quantised()) == of(quantised())
    assert of(quantised(**{change: 1})) != of(quantised())


def test_sparse_and_conjugate_tensors():
    eye = torch.eye(3)
    assert len({of(eye.to_sparse()), of((2 * eye).to_sparse()), of((2 * eye).to_sparse_csr())}) == 2
    value = torch.randn(3, dtype=torch.complex64)
    assert of(value.conj()) == of(value.conj().resolve_conj()) != of(value)


def test_what_wraps_tensors_is_read_to_its_inside():
    from torch.testing._internal.two_tensor import TwoTensor

    one, two = torch.randn(3), torch.randn(3)
    assert of(TwoTensor(one, two)) == of(TwoTensor(one.clone(), two.clone()))
    assert len({of(TwoTensor(one, two)), of(TwoTensor(two, one)), of(TwoTensor(one, one))}) == 3


def test_state_that_is_no_tensor_counts():
    class Scaled(nn.Linear):
        def get_extra_state(self):
            return {"scale": self.scale}

        def set_extra_state(self, state):
            self.scale = state["scale"]

    layer = Scaled(2, 2)
    layer.scale = 1.0
    before = fingerprint(layer)
    layer.scale = 2.0
    assert fingerprint(layer) != before


@pytest.mark.parametrize("lazy", [False, True])
def test_a_model_without_values_is_refused(lazy):
    model = nn.LazyLinear(2) if lazy else nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"a model with values to take a fingerprint of, but '(bias|weight)' has none"):
        fingerprint(model)


def test_sharded_parameters_count_as_the_whole(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_models.llama()
    whole = fingerprint(model)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        assert fingerprint(model) == whole
    finally:
        distributed.destroy_process_group()


def test_parameters_of_zero_3_are_gathered(monkeypatch):
    model = tiny_models.llama()
    whole = fingerprint(model)
    kept = {}
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, kept[number] = number, parameter.data
        parameter.data = torch.empty(0)

    @contextmanager
    def gathered(parameters):
        for parameter in parameters:
            parameter.data = kept[parameter.ds_id]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered)))
    assert fingerprint(model) == whole


def test_trained_parameters_are_left_out():
    model = tiny_models.adapted()
    before = fingerprint(model, frozen_only=True)
    trained = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    trained.data += 1
    assert fingerprint(model, frozen_only=True) == before
    next(parameter for parameter in model.parameters() if not parameter.requires_grad).data.view(-1)[-1] += 1
    assert fingerprint(model, frozen_only=True) != before
