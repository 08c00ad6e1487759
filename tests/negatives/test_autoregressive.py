"""Autoregressive negatives: what they are drawn from, that a draw depends on nothing else, and files of them."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import tiny_models
import torch
from generating_worker import EOS, PAD, PROMPTS
from processes import run_script
from project import SUPPORT
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from cpo_kernels import CandidateLayout, attach_linear_loss, linear_cpo_loss
from cpo_kernels.negatives import Completion, Sampling, autoregressive_negatives, write_negatives

pytestmark = pytest.mark.cpu

SIZES = {"vocab_size": tiny_models.VOCAB, "hidden_size": 16, "num_hidden_layers": 2}


def draw(model, count=3, prompts=PROMPTS, keys=None, completions=None, **sampling):
    options = {"sampling": Sampling(**{"max_new_tokens": 12, **sampling}), "keys": keys, "completions": completions}
    return autoregressive_negatives(model, prompts, count, eos_token_id=EOS, pad_token_id=PAD, **options)


def mistral():
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "sliding_window": 4}
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, **heads, initializer_range=0.3))


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**SIZES, state_size=4, initializer_range=0.3))


def test_completions_end_with_eos_or_are_cut_off():
    drawn = [c for of_prompt in draw(tiny_models.llama(), 20) for c in of_prompt]
    assert len(drawn) == 100
    ended = [c for c in drawn if c[-1] == EOS]
    cut = [c for c in drawn if c[-1] != EOS]
    assert ended and cut
    assert all(c.count(EOS) == 1 and len(c) <= 12 for c in ended)
    assert all(EOS not in c and len(c) == 12 for c in cut)


def test_draws_equal_to_a_given_truth_are_left_out():
    """Whatever ended them: here the truth is a draw that was cut off, given with its end."""
    whole = draw(tiny_models.llama(), 4)
    truths = [[*own[1], EOS] if own[1][-1] != EOS else own[1] for own in whole]
    contents = [[token for token in truth if token != EOS] for truth in truths]
    kept = [
        [own for own in drawn if [token for token in own if token != EOS] != content]
        for drawn, content in zip(whole, contents, strict=True)
    ]
    assert draw(tiny_models.llama(), 4, completions=truths) == kept and kept != whole
    with pytest.raises(ValueError, match="expected one completion per prompt, 5, got 1"):
        draw(tiny_models.llama(), completions=truths[:1])


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.6}, {"top_p": 0.5}, {"temperature": 1.5, "top_p": 0.8}], ids=str
)
def test_draws_follow_the_model(sampling):
    """The first token by the prompt's distribution, the second by that behind the likeliest first."""
    model, prompt = tiny_models.llama(initializer_range=0.4).eval(), [3, 4, 5]
    model.generation_config.update(top_k=3, repetition_penalty=5.0, min_new_tokens=2, suppress_tokens=[5, 6])
    drawn = draw(model, 3000, [prompt], max_new_tokens=2, batch_size=1500, **sampling)[0]

    def check(tokens: list[int], prefix: list[int]) -> None:
        with torch.no_grad():
            logits = model(torch.tensor([prefix])).logits[0, -1].double() / sampling.get("temperature", 1.0)
        p = logits.softmax(-1)
        likeliest, order = p.sort(descending=True)
        outside = likeliest.cumsum(0) - likeliest >= sampling.get("top_p", 1.0)
        p[order[outside]] = 0
        p = p / p.sum()
        counts = torch.tensor(tokens).bincount(minlength=tiny_models.VOCAB)
        assert (counts[p == 0] == 0).all()
        assert ((counts / len(tokens) - p).abs() <= 5 * (p * (1 - p) / len(tokens)).sqrt()).all()

    check([c[0] for c in drawn], prompt)
    first = torch.tensor([c[0] for c in drawn if c[0] != EOS]).mode().values.item()
    second = [c[1] for c in drawn if c[0] == first]
    assert len(second) > 150
    check(second, [*prompt, first])


@pytest.mark.parametrize("make_model", [tiny_models.llama, tiny_models.gpt2])
def test_a_draw_depends_on_its_own_prompt_alone(make_model):
    model = make_model()
    expected = draw(model)
    for batch_size in (1, 4):
        assert draw(model, batch_size=batch_size) == expected
    assert [of_prompt[:2] for of_prompt in expected] == draw(model, 2)
    order = [3, 0, 2]
    assert draw(model, prompts=[PROMPTS[i] for i in order], keys=order) == [expected[i] for i in order]
    assert draw(model, seed=1) != expected
    assert draw(model, keys=[10, 1, 2, 3, 4])[0] != expected[0]
    samples = draw(model, 8, [[3, 4, 5], [3, 4, 5]])
    assert len({tuple(c) for of_prompt in samples for c in of_prompt}) > 10


def multimodal():
    """A model that keeps the offsets of the positions of the texts that it has read."""
    text = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()


def prompt_tuned(kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, f"{kind}TuningConfig")(task_type="CAUSAL_LM", num_virtual_tokens=3)
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_models.gpt2(), config)


@pytest.mark.parametrize(
    "make_model",
    [multimodal, partial(prompt_tuned, "Prompt"), partial(prompt_tuned, "Prefix")],
    ids=["multimodal", "prompt tuning", "prefix tuning"],
)
def test_what_a_model_keeps_besides_a_cache_of_the_prompt_is_not_repeated(make_model):
    model = make_model()
    assert [own[:1] for own in draw(model, 3)] == draw(model, 1)


@pytest.mark.parametrize("make_model", [tiny_models.llama, tiny_models.gpt2, mistral, mamba])
def test_a_prompt_is_read_once_for_all_its_draws(make_model):
    """A single draw, which reads its prompt for itself, is the first of several; also where nothing can be shared.

    Of the models here, Mistral attends to its last tokens alone, and Mamba has a state in place of keys.
    """
    model, rows = make_model(), []
    expected = draw(model, 1)
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape)))
    drawn = draw(model, 4)
    assert [own[:1] for own in drawn] == expected
    assert rows[0] == (len(PROMPTS), max(map(len, PROMPTS)))
    again = rows[1] == (4 * len(PROMPTS), max(map(len, PROMPTS)))
    assert again == (make_model is mamba)
    assert [own[:1] for own in draw(model, 3, max_new_tokens=1)] == [[own[0][:1]] for own in expected]
    assert [own[:1] for own in draw(model, 4, batch_size=3)] == expected


def test_nothing_changes_but_what_is_returned():
    """Modes of single modules, the configurations, torch's generator, gradients."""
    model = tiny_models.gpt2(resid_pdrop=0.5, embd_pdrop=0.5).train()
    model.transformer.h[1].eval()
    model.config.use_cache = False
    model.generation_config.top_k = 1
    modes = {name: module.training for name, module in model.named_modules()}
    config, before = model.generation_config, copy.deepcopy(model.generation_config.to_dict())
    state = torch.get_rng_state()
    drawn = draw(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.generation_config is config
    assert config.to_dict() == before
    assert model.config.use_cache is False
    assert drawn == draw(tiny_models.gpt2().eval())


def test_the_cache_is_used_under_gradient_checkpointing():
    model = tiny_models.llama().train()
    expected = draw(model)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    widths = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    assert draw(model) == expected
    assert widths[0] == 6
    assert set(widths[1:]) == {1}
    assert model.is_gradient_checkpointing


def test_attached_models_and_adapters():
    model = tiny_models.llama()
    expected = draw(model)
    assert draw(attach_linear_loss(tiny_models.llama())) == expected

    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(attach_linear_loss(model), config).train()
    inner = adapted.get_base_model().generation_config
    inner.top_k = 1
    drawn = draw(adapted)
    assert adapted.get_base_model().generation_config is inner
    assert adapted.training
    assert drawn != expected
    with adapted.disable_adapter():
        assert draw(adapted) == expected
    assert drawn == draw(adapted.merge_and_unload())


def test_bad_calls_are_named():
    model = tiny_models.llama()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        draw(model, prompts=[[3], []])
    with pytest.raises(ValueError, match="one key per prompt, 5, got 2"):
        draw(model, keys=[1, 2])
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        draw(model, -1)
    with pytest.raises(ValueError, match="a prompt of 6 tokens and max_new_tokens=60 exceed the 64 positions"):
        draw(model, max_new_tokens=60)
    assert draw(model, 0) == [[]] * 5
    assert draw(model, prompts=[]) == []
    with torch.no_grad():
        model.lm_head.weight[4] = torch.nan
    with pytest.raises(RuntimeError, match="logits hold NaN"):
        draw(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
    ids=str,
)
def test_sampling_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_processes_that_generate_together_draw_what_each_would_alone(tmp_path):
    run_script(SUPPORT / "generating_worker.py", str(tmp_path), processes=2)
    first, second = (torch.load(tmp_path / f"drawn-{rank}.pt") for rank in range(2))
    alone = draw(tiny_models.llama())
    assert first == [alone, alone[:1]]
    assert second == [alone[:2], []]


def test_plain_loop():
    """The model's own completions pushed below the ground truth, without the trainer."""
    model = tiny_models.llama()
    prompt, completion = [3, 4, 5], [6, 7, 8, 9, EOS]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(3):
        (drawn,) = draw(model, 3, [prompt], completions=[completion], max_new_tokens=6, seed=step)
        candidates = [completion, *drawn]
        width = max(map(len, candidates))
        ids = torch.tensor([prompt + c + [PAD] * (width - len(c)) for c in candidates])
        rows = [s * ids.shape[1] + len(prompt) - 1 + t for s, c in enumerate(candidates) for t in range(len(c))]
        cu_tokens = torch.tensor([0, *map(len, candidates)]).cumsum(0).tolist()
        layout = CandidateLayout(cu_tokens, [0, len(candidates)], rows=torch.tensor(rows))
        targets = torch.tensor([token for c in candidates for token in c])
        hidden = model.base_model(ids).last_hidden_state.flatten(0, 1)
        loss = linear_cpo_loss(hidden, model.lm_head.weight, targets, layout=layout, mle_weight=0.5).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# Files

EXAMPLES = [
    {"prompt": "the cat", "completion": "sat"},
    {"prompt": "ein H\u00fcndchen", "completion": "ran", "note": "n"},
]


def read_back(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache")).to_list()


def test_files_take_the_completions_of_a_server(tmp_path):
    written = [[Completion("sat down", True), Completion("ran", False)], []]
    write_negatives(tmp_path / "negatives.jsonl", EXAMPLES, written)
    assert [row["negatives"] for row in read_back(tmp_path / "negatives.jsonl")] == [["sat down", "ran"], []]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("as_dataset", [False, True], ids=["list", "dataset"])
def test_files_hold_texts_or_tokens(tmp_path, suffix, as_dataset):
    datasets = pytest.importorskip("datasets")
    examples = datasets.Dataset.from_list([{"note": None, **e} for e in EXAMPLES]) if as_dataset else EXAMPLES
    path = tmp_path / f"negatives{suffix}"
    for negatives in ([["a", "b"], []], [[[3, 4, EOS], [5]], [[6, EOS]]]):
        write_negatives(path, examples, negatives)
        rows = read_back(path)
        assert [row["negatives"] for row in rows] == negatives
        assert [row["kinds"] for row in rows] == [["autoregressive"] * len(n) for n in negatives]
        assert [row["prompt"] for row in rows] == ["the cat", "ein H\u00fcndchen"]
        assert [row["note"] for row in rows] == [None, "n"]
        assert "ranks" not in rows[0]
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == [path.name]


def test_files_are_extended(tmp_path):
    """By another kind, with ranks; TRL's preference data keeps its form."""
    pytest.importorskip("datasets")
    path = tmp_path / "negatives.jsonl"
    write_negatives(path, EXAMPLES, [["a"], ["b", "c"]], kind="given", ranks=[[1], [2, 1]])
    write_negatives(path, read_back(path), [["d"], ["e"]])
    rows = read_back(path)
    assert [row["negatives"] for row in rows] == [["a", "d"], ["b", "c", "e"]]
    assert [row["kinds"] for row in rows] == [["given", "autoregressive"], ["given", "given", "autoregressive"]]
    assert [row["ranks"] for row in rows] == [[1, 2], [2, 1, 3]]
    write_negatives(path, [{"prompt": "p", "chosen": "c", "rejected": "r"}], [["d"]])
    assert read_back(path)[0] == {
        "prompt": "p",
        "chosen": "c",
        "rejected": ["r", "d"],
        "kinds": ["given", "autoregressive"],
    }
    write_negatives(path, [{"prompt": [3], "chosen": [4], "rejected": [5, 6]}], [[[7]]], ranks=[[4]])
    assert read_back(path)[0]["rejected"] == [[5, 6], [7]]
    assert read_back(path)[0]["ranks"] == [1, 4]


def test_a_file_that_cannot_be_written_is_left_alone(tmp_path):
    path = tmp_path / "negatives.parquet"
    path.write_text("before")
    for negatives, options, message in (
        ([["a"]], {}, "expected 2 lists of negatives, one per example, got 1"),
        ([["a"], [[3]]], {"ranks": [[1]]}, "expected 2 lists of ranks"),
        ([["a", [3]], []], {}, "'negatives' of example 0 would hold texts and token ids"),
        ([["a"], ["b"]], {"ranks": [[1], [1, 2]]}, "example 1 has 1 new negatives, got 2 ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            write_negatives(path, EXAMPLES, negatives, **options)
    with pytest.raises(ValueError, match=r"ends with .parquet or .jsonl, got '.*negatives.csv'"):
        write_negatives(tmp_path / "negatives.csv", EXAMPLES, [[], []])
    conversation = [{"role": "assistant", "content": "r"}]
    with pytest.raises(ValueError, match="'rejected' of example 0 holds conversations"):
        write_negatives(path, [{"chosen": conversation, "rejected": conversation}], [["a"]])
    assert path.read_text() == "before"


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_training_reads_them_back(tmp_path, suffix):
    """The form that training brings examples to has the negatives, of their kind."""
    pytest.importorskip("datasets")
    from cpo_kernels.trainer.formats import normalize_example

    path = tmp_path / f"negatives{suffix}"
    write_negatives(path, EXAMPLES, [["a"], []], ranks=[[1], []])
    rows = [normalize_example(row, index, tiny_models.tokenizer()) for index, row in enumerate(read_back(path))]
    assert rows[0].candidates[1:] == ["a"]
    assert rows[0].kinds == ["autoregressive"]
    assert rows[0].ranks == [1]
    assert rows[1].candidates[1:] == []
