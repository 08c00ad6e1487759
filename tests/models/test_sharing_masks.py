"""Masks of a prefix tree: dense, by branches, and as the flash kernel knows them."""

from __future__ import annotations

import pytest
import torch
from sharing_models import (
    assert_same,
    groups,
    tiny,
)
from torch.nn import functional
from torch.nn.attention.bias import CausalBias

from cpo_kernels.models.prefix.attention import TreeMask
from cpo_kernels.models.prefix.probe import PrefixTree, pack_groups, tree_inputs

pytestmark = pytest.mark.cpu


def seen_by(tree: PrefixTree, b: int, q: int, k: int, window: int | None) -> bool:
    """Whether a query sees a key, from the words of the definition."""
    group, branch = tree.groups[b].tolist(), tree.branches[b].tolist()
    same_path = group[q] == group[k] and branch[k] in (0, branch[q])
    distance = int(tree.positions[b, q] - tree.positions[b, k])
    return k <= q and same_path and (window is None or distance < window)


def dense(tree: PrefixTree, window: int | None) -> torch.Tensor:
    batch, length = tree.groups.shape
    index = range(length)
    return torch.tensor([[[[seen_by(tree, b, q, k, window) for k in index] for q in index]] for b in range(batch)])


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_there_is_a_mask_for_every_type_of_attention(implementation):
    batch = pack_groups(*groups(), max_row_tokens=40)
    assert (batch.tree.groups < 0).any()
    model = tiny("gemma3_text", implementation)
    with torch.compiler.set_stance("force_eager"):
        inputs = tree_inputs(model, batch.tree)
    assert inputs["position_ids"] is batch.tree.positions
    assert inputs["attention_mask"].keys() == {"full_attention", "sliding_attention"}
    for name, window in (("full_attention", None), ("sliding_attention", 5)):
        mask, expected = inputs["attention_mask"][name], dense(batch.tree, window)
        assert expected.any(-1).all()
        if implementation == "sdpa":
            assert torch.equal(mask.as_subclass(torch.Tensor), expected)
        elif implementation == "eager":
            assert torch.equal(mask == 0.0, expected)
            assert mask.dtype == torch.float32 and mask[~expected].max() == torch.finfo(torch.float32).min
        else:
            blocks, length = mask.mask_mod, batch.tree.groups.shape[1]
            b, q, k = (torch.arange(n) for n in (len(expected), length, length))
            seen = blocks(b[:, None, None], torch.tensor(0), q[None, :, None], k[None, None, :])
            assert torch.equal(seen, expected[:, 0])


def test_one_window_for_all_layers_is_one_mask():
    batch = pack_groups(*groups())
    mask = tree_inputs(tiny("mistral", "eager"), batch.tree)["attention_mask"]
    assert torch.equal(mask == 0.0, dense(batch.tree, 5))


def attention(mask, tensors, real):
    """Output and gradients at real positions; what is at padded ones must not matter."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = functional.scaled_dot_product_attention(*leaves, attn_mask=mask, scale=0.3).transpose(1, 2)[real]
    (out * torch.linspace(-1.0, 1.0, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(x.grad.transpose(1, 2) for x in leaves)]


TREES = {
    "ragged": {"lengths": ((9, 6, 1, 12), (3, 7), (1, 4, 4, 2), (6, 1, 1)), "max_row_tokens": 40},
    "one row": {"lengths": ((9, 6, 12), (3, 7, 8)), "max_row_tokens": 80},
    "equal lengths": {"lengths": ((8, 6, 6, 6), (8, 6, 6, 6)), "max_row_tokens": 1},
    "equal prompts": {"lengths": ((8, 6, 6, 6), (8, 5, 3, 6)), "max_row_tokens": 1},
    "no position for a candidate": {"lengths": ((5, 1, 1), (3, 1)), "max_row_tokens": 20},
}


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("name", TREES)
def test_attention_by_branches_is_attention_with_the_dense_mask(name, window):
    options = dict(TREES[name])
    tree = pack_groups(*groups(lengths=options.pop("lengths")), **options).tree
    model = tiny("mistral", "sdpa", sliding_window=window)
    mask = tree_inputs(model, tree)["attention_mask"]
    assert isinstance(mask, TreeMask)
    assert (mask.blocks.gather is None) == (name == "equal lengths")
    batch, length = tree.groups.shape
    real = tree.groups >= 0
    tensors = [torch.randn(batch, 3, length, size) for size in (8, 8, 4)]
    plain = mask.as_subclass(torch.Tensor)
    for got, expected in zip(attention(mask, tensors, real), attention(plain, tensors, real), strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("name", ["equal lengths", "equal prompts"])
def test_the_mask_that_the_flash_kernel_knows_is_the_dense_one(name, monkeypatch):
    options = dict(TREES[name])
    tree = pack_groups(*groups(lengths=options.pop("lengths")), **options).tree
    mask = tree_inputs(tiny("llama", "sdpa"), tree)["attention_mask"]
    tensors = [torch.randn(*tree.groups.shape, 3, 8).transpose(1, 2) for _ in range(3)]
    expected = attention(mask.as_subclass(torch.Tensor), tensors, tree.groups >= 0)
    bias = mask.blocks._mask(torch.device("cuda"))
    assert isinstance(bias, CausalBias)
    monkeypatch.setattr(type(mask.blocks), "_mask", lambda *_: bias)
    for got, want in zip(attention(mask, tensors, tree.groups >= 0), expected, strict=True):
        assert_same(got, want)


def test_branches_are_used_where_they_are_less_work():
    model = tiny("llama", "sdpa")
    even, uneven = pack_groups(*groups(lengths=((8, 8, 8, 8),))), pack_groups(*groups(lengths=((1, 30, 2, 2, 2),)))
    assert isinstance(tree_inputs(model, even.tree)["attention_mask"], TreeMask)
    assert type(tree_inputs(model, uneven.tree)["attention_mask"]) is torch.Tensor


def test_a_tree_whose_groups_are_not_runs_has_the_dense_mask():
    # The candidates of two groups take turns.
    batch = pack_groups(*groups(lengths=((4, 4, 4), (4, 4, 4))), max_row_tokens=40)
    order = torch.arange(batch.input_ids.shape[1]).view(2, -1).t().flatten()
    tree = PrefixTree(batch.tree.groups[:, order], batch.tree.branches[:, order], batch.tree.positions[:, order])
    mask = tree_inputs(tiny("llama", "sdpa"), tree)["attention_mask"]
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, dense(tree, None))
