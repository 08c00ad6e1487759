"""Packed rows against separate rows: hidden states, logits and gradients of every family, masks, packing, the probe."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from tiny_models import gpt2, llama
from torch.nn import functional
from torch.nn.attention.bias import CausalBias
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from cpo_kernels import CandidateLayout
from cpo_kernels.models import LogpsRequest, attach_linear_loss, sharing, sharing_masks
from cpo_kernels.models.sharing import PrefixTree, check_prefix_sharing, pack_groups, tree_inputs
from cpo_kernels.models.sharing_attention import TreeMask

pytestmark = pytest.mark.cpu

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
WINDOW = {"sliding_window": 5}
# One layer slides and one does not: Qwen counts the first full ones, the others list them.
QWEN = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "gpt2": GPT2_SIZES | NO_DROPOUT,
    "llama": {},
    "mistral": WINDOW,
    "qwen2": QWEN,
    "qwen3": QWEN,
    "gemma2": MIXED,
    "gemma3_text": MIXED,
    "phi3": WINDOW | NO_DROPOUT,
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32, "dropout": 0.0},
    "olmo2": {},
    "smollm3": MIXED | {"use_sliding_window": True, "no_rope_layer_interval": 2},
    "granite": {},
}
# What transformers itself has no attention for: scores with a cap in sdpa, and GPT-2 in flex attention.
SDPA = [name for name in FAMILIES if name != "gemma2"]
FLEX = [name for name in FAMILIES if name != "gpt2"]
DENSE = [(name, "sdpa") for name in SDPA] + [(name, "eager") for name in FAMILIES]
SLIDING = ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3"]


def tiny(family: str, implementation: str, **config):
    """A random model of a family."""
    torch.manual_seed(0)
    built = AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | config))
    return AutoModelForCausalLM.from_config(built, attn_implementation=implementation)


def groups(seed: int = 0, lengths: tuple[tuple[int, ...], ...] = ((9, 6, 1, 12), (3, 7), (1, 4, 4, 2), (6, 1, 1))):
    """Prompts and candidates of these lengths: longer than the windows, and of one token."""
    draw = random.Random(seed)

    def text(length: int) -> list[int]:
        return [draw.randrange(3, VOCAB) for _ in range(length)]

    return [text(p) for p, *_ in lengths], [[text(c) for c in own] for _, *own in lengths]


def all_rows(batch) -> list[int]:
    return [row for group in batch.rows for candidate in group for row in candidate]


def shared_logits(model, batch) -> torch.Tensor:
    """Logits (N, V) of all tokens of all candidates, from packed rows."""
    inputs = tree_inputs(model, batch.tree.to(model.device))
    out = model(input_ids=batch.input_ids.to(model.device), use_cache=False, **inputs)
    return out.logits.flatten(0, -2)[all_rows(batch)]


def separate_logits(model, prompts, completions) -> torch.Tensor:
    """The same from one row a candidate, without any mask."""
    parts = []
    for prompt, own in zip(prompts, completions, strict=True):
        for candidate in own:
            ids = torch.tensor([[*prompt, *candidate[:-1]]], device=model.device)
            parts.append(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :])
    return torch.cat(parts)


def gradients(model, logits, completions) -> dict[str, torch.Tensor]:
    """Of a loss that weighs every token differently."""
    targets = torch.tensor([token for own in completions for candidate in own for token in candidate])
    targets, weights = targets.to(logits.device), torch.linspace(-1.0, 2.0, len(targets), device=logits.device)
    model.zero_grad(set_to_none=True)
    (functional.cross_entropy(logits, targets, reduction="none") * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(value: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """Within 1e-5 of the largest entry, or of 1."""
    bound = 1e-5 * max(1.0, float(expected.detach().abs().max()))
    assert value.shape == expected.shape, name
    assert torch.isfinite(value).all(), name
    assert float((value - expected).detach().abs().max()) <= bound, name


def assert_shares(model, prompts, completions, **packing) -> None:
    batch = pack_groups(prompts, completions, **packing)
    shared, separate = shared_logits(model, batch), separate_logits(model, prompts, completions)
    assert_same(shared, separate)
    got, expected = gradients(model, shared, completions), gradients(model, separate, completions)
    assert got.keys() == expected.keys()
    for name in expected:
        assert_same(got[name], expected[name], name)


@pytest.mark.parametrize(("family", "implementation"), DENSE)
def test_logits_and_gradients_are_those_of_separate_rows(family, implementation):
    model = tiny(family, implementation)
    assert_shares(model, *groups())
    # Everything in one row, and one group a row with much padding.
    assert_shares(model, *groups(1), max_row_tokens=200)
    assert_shares(model, *groups(2, ((20, 9, 9), (1, 2, 1))), max_row_tokens=1)


@pytest.mark.parametrize(("family", "implementation"), DENSE)
def test_every_family_passes_the_probe(family, implementation):
    check_prefix_sharing(tiny(family, implementation))


@pytest.mark.parametrize("family", FLEX)
def test_flex_attention_gives_the_logits_of_separate_rows(family):
    # Uncompiled, and forward only: on the CPU flex attention has no backward.
    model = tiny(family, "flex_attention")
    prompts, completions = groups()
    batch = pack_groups(prompts, completions, max_row_tokens=40)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert_same(shared_logits(model, batch), separate_logits(model, prompts, completions))


def test_what_transformers_supports_is_tested():
    classes = {name: type(tiny(name, "eager")) for name in FAMILIES}
    assert [name for name, kind in classes.items() if kind._supports_sdpa] == SDPA
    assert [name for name, kind in classes.items() if kind._supports_flex_attn] == FLEX


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("family", "implementation"), [("gpt2", "sdpa"), ("qwen3", "sdpa"), ("gemma2", "eager")])
def test_gradient_checkpointing_changes_nothing(family, implementation, reentrant):
    prompts, completions = groups()
    batch = pack_groups(prompts, completions)
    model = tiny(family, implementation).train()
    expected = gradients(model, shared_logits(model, batch), completions)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = gradients(model, shared_logits(model, batch), completions)
    assert got.keys() == expected.keys()
    for name in expected:
        assert_same(got[name], expected[name], name)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_close_to_float32_as_separate_rows_are(implementation, autocast):
    prompts, completions = groups()
    batch = pack_groups(prompts, completions)
    model = tiny("gemma3_text", implementation)
    exact = separate_logits(model, prompts, completions)
    model = model if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        shared, separate = shared_logits(model, batch), separate_logits(model, prompts, completions)
    assert (shared - exact).norm() <= 1.5 * (separate - exact).norm()
    shared.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_row_may_be_longer_than_the_positions_of_the_model():
    prompts, completions = groups(lengths=((6, 5, 5, 5),))
    model = gpt2(n_positions=10)
    assert pack_groups(prompts, completions).input_ids.shape == (1, 18)
    batch = pack_groups(prompts, completions)
    out = model(input_ids=batch.input_ids % 20, **tree_inputs(model, batch.tree))
    assert torch.isfinite(out.logits).all()
    check_prefix_sharing(model)


def flat_layout(batch_rows, completions) -> tuple[torch.Tensor, CandidateLayout]:
    """Targets and the layout of all candidates, from the row of each of their tokens."""
    segments = [candidate for own in completions for candidate in own]
    cu_tokens = list(itertools.accumulate(map(len, segments), initial=0))
    cu_groups = list(itertools.accumulate(map(len, completions), initial=0))
    targets = torch.tensor([token for segment in segments for token in segment])
    return targets, CandidateLayout(cu_tokens, cu_groups, rows=torch.tensor(batch_rows))


@pytest.mark.parametrize("wrap", [False, True])
def test_an_attached_model_takes_a_prefix_tree(wrap):
    prompts, completions = groups()
    batch = pack_groups(prompts, completions)
    model = attach_linear_loss(tiny("qwen3", "sdpa"))
    if wrap:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    targets, layout = flat_layout(all_rows(batch), completions)
    out = model(input_ids=batch.input_ids, prefix_tree=batch.tree, linear_loss=LogpsRequest(targets, layout))
    logits = separate_logits(model, prompts, completions)
    token_logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = torch.stack([part.sum() for part in token_logps.split([len(c) for own in completions for c in own])])
    assert_same(out.logps, expected)
    packed = model(input_ids=batch.input_ids, prefix_tree=batch.tree).logits.flatten(0, -2)[all_rows(batch)]
    assert_same(packed, logits)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_a_prefix_tree_takes_the_place_of_mask_and_positions(name):
    batch = pack_groups(*groups())
    model = attach_linear_loss(tiny("llama", "sdpa"))
    with pytest.raises(ValueError, match=f"prefix_tree brings its own .*; got {name} too"):
        model(input_ids=batch.input_ids, prefix_tree=batch.tree, **{name: batch.tree.positions})


# Masks


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


# Packing


def test_packed_rows_hold_prompts_once_and_candidates_without_their_last_tokens():
    prompts, completions = groups()
    batch = pack_groups(prompts, completions, pad_token_id=9)
    length = batch.input_ids.shape[1]
    ids, positions = batch.input_ids.flatten().tolist(), batch.tree.positions.flatten().tolist()
    branches, numbers = batch.tree.branches.flatten().tolist(), batch.tree.groups.flatten().tolist()
    used = set()
    for g, (prompt, own) in enumerate(zip(prompts, completions, strict=True)):
        for c, candidate in enumerate(own):
            rows = batch.rows[g][c]
            start = rows[0] - len(prompt) + 1
            path = [*range(start, rows[0]), *rows]
            assert [ids[row] for row in path] == [*prompt, *candidate[:-1]]
            assert [positions[row] for row in path] == list(range(len(path)))
            assert [branches[row] for row in path] == [0] * len(prompt) + [c + 1] * (len(candidate) - 1)
            assert {numbers[row] for row in path} == {g}
            assert len({row // length for row in path}) == 1
            used.update(path)
    padded = set(range(len(ids))) - used
    assert {(ids[i], numbers[i], branches[i], positions[i]) for i in padded} <= {(9, -1, 0, 0)}
    assert len(used) == sum(len(p) + sum(len(c) - 1 for c in own) for p, own in zip(prompts, completions, strict=True))
    assert (batch.tree.groups.dtype, batch.tree.branches.dtype) == (torch.int32, torch.int32)
    assert (batch.tree.positions.dtype, batch.input_ids.dtype) == (torch.int64, torch.int64)


@pytest.mark.parametrize(
    ("limit", "shape"),
    [(1, (3, 10)), (12, (3, 11)), (15, (2, 14)), (100, (1, 27)), (None, (2, 14))],
)
def test_groups_fill_rows_up_to_the_limit(limit, shape):
    # Groups of 10, 7, 6 and 4 positions.
    prompts, completions = groups(lengths=((4, 4, 4), (7, 1), (3, 4), (2, 3)))
    assert pack_groups(prompts, completions, max_row_tokens=limit).input_ids.shape == shape


def test_packing_depends_on_nothing_but_its_arguments():
    first, second = (pack_groups(*groups()) for _ in range(2))
    assert torch.equal(first.input_ids, second.input_ids) and first.rows == second.rows


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([], [], "at least one prompt, got 0 prompts"),
        ([[1]], [[[1]], [[2]]], "got 1 prompts and the candidates of 2"),
        ([[1], []], [[[1]], [[2]]], "group 1 has an empty prompt"),
        ([[1], [2]], [[[1]], []], "group 1 has no candidates"),
        ([[1], [2]], [[[1], [2]], [[3], []]], "candidate 1 of group 1 is empty"),
    ],
)
def test_what_cannot_be_packed_is_named(prompts, completions, message):
    with pytest.raises(ValueError, match=message):
        pack_groups(prompts, completions)


# The probe


def no_windows(config):
    """One mask for all layers, as if no layer had a window."""
    return dict.fromkeys(config.layer_types) if hasattr(config, "layer_types") else {None: None}


def by_index(tree: PrefixTree) -> PrefixTree:
    """A window of indices: right in a row without branches."""
    return PrefixTree(tree.groups, tree.branches, torch.arange(tree.groups.shape[1]).expand_as(tree.positions))


@pytest.mark.parametrize("window", [5, 4096])
@pytest.mark.parametrize("family", SLIDING)
def test_the_probe_detects_one_mask_for_a_model_with_windows(family, window, monkeypatch):
    model = tiny(family, "eager", sliding_window=window)
    check_prefix_sharing(model)
    monkeypatch.setattr(sharing_masks, "layer_windows", no_windows)
    with pytest.raises(RuntimeError, match=r"hidden states differ .* expected at most 0.001 in torch.float32"):
        check_prefix_sharing(model)
    assert model.config.sliding_window == window


@pytest.mark.parametrize("window", [5, 4096])
@pytest.mark.parametrize("family", SLIDING)
def test_the_probe_detects_windows_of_indices(family, window, monkeypatch):
    model = tiny(family, "eager", sliding_window=window)

    def wrong(model, tree):
        return tree_inputs(model, by_index(tree)) | {"position_ids": tree.positions}

    monkeypatch.setattr(sharing, "tree_inputs", wrong)
    with pytest.raises(RuntimeError, match="hidden states differ"):
        check_prefix_sharing(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_detects_positions_that_are_not_restarted(family, monkeypatch):
    model = tiny(family, "eager")

    def wrong(model, tree):
        return tree_inputs(model, tree) | {"position_ids": by_index(tree).positions}

    monkeypatch.setattr(sharing, "tree_inputs", wrong)
    with pytest.raises(RuntimeError, match=r"hidden states differ|failed on packed rows"):
        check_prefix_sharing(model)


class ShiftedModel(LlamaModel):
    """Nothing tells that it also reads the token before, whatever the mask."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        embeds = self.embed_tokens(input_ids)
        embeds = embeds + 0.1 * functional.pad(embeds[:, :-1], (0, 0, 1, 0))
        keywords = {"attention_mask": attention_mask, "position_ids": position_ids} | kwargs
        return super().forward(inputs_embeds=embeds, **keywords)


def test_a_model_nobody_listed_is_refused_where_it_differs_and_taken_where_not():
    check_prefix_sharing(tiny("stablelm", "sdpa"))
    model = llama()
    model.model = ShiftedModel(model.config)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM cannot share prefixes: on a probe"):
        check_prefix_sharing(model)


HYBRID = {"num_attention_heads": 2, "num_hidden_layers": 2}
REFUSED = {
    "mamba": ({}, "carry a state"),
    "rwkv": ({"attention_hidden_size": 16}, "carry a state"),
    "jamba": (HYBRID, "carry a state"),
    "falcon_h1": ({}, "carry a state"),
    "recurrent_gemma": ({}, "carry a state"),
    "qwen3_next": ({}, "carry a state"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    "bloom": ({"n_head": 2, "n_layer": 2}, "takes no position_ids"),
    "mpt": ({"d_model": 16, "n_heads": 2, "n_layers": 2}, "takes no position_ids"),
    "gpt_neo": ({"attention_types": [[["global", "local"], 1]], "num_layers": 2}, "layers of type local"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_share_prefixes_are_refused_with_the_reason(family):
    config, reason = REFUSED[family]
    with pytest.raises(RuntimeError, match=f"cannot share prefixes: .*{reason}"):
        check_prefix_sharing(tiny(family, "eager", **config))


def test_alibi_and_flash_attention_are_refused():
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    falcon = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes, alibi=True))
    with pytest.raises(RuntimeError, match="ALiBi"):
        check_prefix_sharing(falcon)
    model = llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(RuntimeError, match="'flash_attention_2' takes no such mask; expected one of sdpa, eager, flex"):
        check_prefix_sharing(model)
    with pytest.raises(RuntimeError, match="'flash_attention_2' takes no mask"):
        tree_inputs(model, pack_groups([[1]], [[[1, 2]]]).tree)


def test_the_probe_leaves_the_model_as_it_was():
    model = tiny("gemma3_text", "sdpa", sliding_window=4096).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    check_prefix_sharing(model)
    assert [module.training for module in model.modules()] == modes
    assert model.config.sliding_window == 4096
    assert all(p.grad is None for p in model.parameters())


def test_the_probe_needs_parameters():
    with torch.device("meta"):
        model = tiny("llama", "sdpa")
    check_prefix_sharing(model)


def test_adapters_of_the_weights_share_and_virtual_tokens_do_not():
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    check_prefix_sharing(lora)
    prefix = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(RuntimeError, match="virtual tokens"):
        check_prefix_sharing(peft.get_peft_model(llama(), prefix))


def test_the_default_device_does_not_matter():
    prompts, completions = groups()
    model = tiny("qwen3", "sdpa")
    expected = shared_logits(model, pack_groups(prompts, completions))
    with torch.device("meta"):
        batch = pack_groups(prompts, completions)
        inputs = tree_inputs(model, batch.tree)
        check_prefix_sharing(model)
    logits = model(input_ids=batch.input_ids, use_cache=False, **inputs).logits
    assert torch.equal(logits.flatten(0, -2)[all_rows(batch)], expected)
