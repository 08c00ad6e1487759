"""Weight-space ensembles of models, of saved models and adapters, and at the end of a run."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import tiny_models
import torch
import transformers
from trainer_runs import trainer

from cpo_kernels.trainer.ensemble import EnsembleCallback, ensemble, ensemble_checkpoints

pytestmark = pytest.mark.cpu


def expected(first, second, alpha: float) -> dict[str, torch.Tensor]:
    """In float64, by the formula."""
    other = dict(second.named_parameters())
    return {n: (alpha * p.double() + (1 - alpha) * other[n].double()).float() for n, p in first.named_parameters()}


@pytest.mark.parametrize("make_model", [tiny_models.gpt2, tiny_models.llama])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_every_weight_is_between_those_of_the_two(make_model, alpha):
    first, second = make_model(seed=0), make_model(seed=1)
    want = expected(first, second, alpha)
    state = ensemble(first, second, alpha)
    assert state.keys() == first.state_dict().keys()
    first.load_state_dict(state)
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(parameter.data, want[name], rtol=0, atol=2.0**-22)
        assert alpha in (0.3, 1.0) or torch.equal(parameter, dict(second.named_parameters())[name])


def test_tied_entries_stay_one_tensor():
    state = ensemble(tiny_models.gpt2(seed=0), tiny_models.gpt2(seed=1), 0.5)
    assert state["lm_head.weight"] is state["transformer.wte.weight"]


def test_half_precision_is_averaged_in_float32():
    """The result is rounded once; in bfloat16 the shares 0.1 and 0.9 and their products would be too."""
    first, second = tiny_models.llama(seed=0).bfloat16(), tiny_models.llama(seed=1).bfloat16()
    state = ensemble(first, second, 0.1)
    for name, parameter in first.named_parameters():
        exact = 0.1 * parameter.double() + 0.9 * second.get_parameter(name).double()
        assert state[name].dtype == torch.bfloat16
        once = torch.finfo(torch.bfloat16).eps / 2
        assert bool(((state[name] - exact).abs() <= (once + 1e-6) * exact.abs() + 1e-8).all()), name


def counter(value: int) -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    module.register_buffer("count", torch.tensor(value))
    return module


def untied() -> torch.nn.Module:
    model = tiny_models.gpt2(seed=1)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    return model


@pytest.mark.parametrize(
    ("first", "second", "alpha", "message"),
    [
        (tiny_models.llama, tiny_models.llama, 1.5, r"alpha must be in \[0, 1\], got 1.5"),
        (tiny_models.llama, tiny_models.llama, float("nan"), r"alpha must be in \[0, 1\], got nan"),
        (tiny_models.llama, tiny_models.gpt2, 0.5, "only the first model has 'model.embed_tokens.weight'"),
        (lambda: tiny_models.llama(num_hidden_layers=1), tiny_models.llama, 0.5, "only the second model has 'model.la"),
        (tiny_models.llama, lambda: tiny_models.llama(vocab_size=9), 0.5, r"\(24, 16\) in the first .*\(9, 16\) in"),
        (lambda: counter(1), lambda: counter(2), 0.5, r"'count' \(torch.int64\) differs"),
        (tiny_models.gpt2, untied, 0.5, "'lm_head.weight' is tied to 'transformer.wte.weight' in the first"),
    ],
)
def test_models_that_do_not_fit_are_refused(first, second, alpha, message):
    with pytest.raises(ValueError, match=message):
        ensemble(first(), second(), alpha)


# Saved models


def save(model, path):
    model.save_pretrained(path)
    tiny_models.tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("make_model", [tiny_models.gpt2, tiny_models.llama])
def test_saved_models(tmp_path, make_model):
    first, second = make_model(seed=0), make_model(seed=1)
    ensemble_checkpoints(save(first, tmp_path / "a"), save(second, tmp_path / "b"), tmp_path / "out", 0.3)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    loaded = type(first).from_pretrained(tmp_path / "out")
    for name, want in expected(first, second, 0.3).items():
        torch.testing.assert_close(loaded.get_parameter(name).data, want, rtol=0, atol=2.0**-22)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == tiny_models.tokenizer().get_vocab()


def test_saved_models_without_a_tokenizer(tmp_path):
    for seed, name in enumerate("ab"):
        tiny_models.llama(seed=seed).save_pretrained(tmp_path / name)
    ensemble_checkpoints(tmp_path / "a", tmp_path / "b", tmp_path / "out", 0.5)
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_saved_models_that_do_not_fit_are_refused(tmp_path):
    a, b = save(tiny_models.llama(seed=0), tmp_path / "a"), save(tiny_models.llama(seed=1), tmp_path / "b")
    with pytest.raises(ValueError, match="would overwrite one of its parts"):
        ensemble_checkpoints(a, b, tmp_path / "c" / ".." / "a", 0.5)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got -1"):
        ensemble_checkpoints(a, b, tmp_path / "out", -1)
    with pytest.raises(OSError, match="nothing"):
        ensemble_checkpoints(a, tmp_path / "nothing", tmp_path / "out", 0.5)
    tokenizer = json.loads((b / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab["cat"], vocab["dog"] = vocab["dog"], vocab["cat"]
    (b / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ValueError, match=r"the tokenizers of .* differ"):
        ensemble_checkpoints(a, b, tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


# Adapters


def save_adapter(tmp_path, name: str, seed: int, **options) -> str:
    base = tmp_path / "base"
    if not base.exists():
        tiny_models.llama().save_pretrained(base)
    torch.manual_seed(seed)
    defaults = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    config = peft.LoraConfig(**(defaults | {"task_type": "CAUSAL_LM"} | options))
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / name)
    return str(tmp_path / name)


def merged(path: str):
    return peft.AutoPeftModelForCausalLM.from_pretrained(path).merge_and_unload()


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_saved_adapters_give_the_average_of_the_merged_weights(tmp_path, alpha):
    first = save_adapter(tmp_path, "a", seed=1)
    second = save_adapter(tmp_path, "b", seed=2, r=3, lora_alpha=1, target_modules=["q_proj", "v_proj"])
    ensemble_checkpoints(first, second, tmp_path / "out", alpha)
    got = merged(str(tmp_path / "out"))
    for name, want in expected(merged(first), merged(second), alpha).items():
        torch.testing.assert_close(got.get_parameter(name).data, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "LORA with use_dora; expected plain LoRA"),
        ({"use_rslora": True}, "LORA with use_rslora"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "LORA with modules_to_save"),
        ({"bias": "all"}, "LORA with bias"),
    ],
)
def test_other_adapters_are_refused(tmp_path, options, message):
    first, second = save_adapter(tmp_path, "a", seed=1), save_adapter(tmp_path, "b", seed=2, **options)
    with pytest.raises(ValueError, match=message):
        ensemble_checkpoints(first, second, tmp_path / "out", 0.5)


def test_adapters_of_other_models_are_refused(tmp_path):
    first, second = save_adapter(tmp_path, "a", seed=1), save_adapter(tmp_path, "b", seed=2)
    with pytest.raises(ValueError, match=r"a is an adapter and .*base is not"):
        ensemble_checkpoints(first, tmp_path / "base", tmp_path / "out", 0.5)
    config = tmp_path / "b" / "adapter_config.json"
    moved = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": "elsewhere"}
    config.write_text(json.dumps(moved), encoding="utf-8")
    with pytest.raises(ValueError, match=r"adapts .*base' and .*b 'elsewhere'; expected adapters of one model"):
        ensemble_checkpoints(first, second, tmp_path / "out", 0.5)


# At the end of a run


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_leaves_the_ensemble(tmp_path, saved):
    other = tiny_models.gpt2(seed=1)
    callback = EnsembleCallback(save(other, tmp_path / "mle") if saved else other, 0.3)
    run = trainer(tmp_path / "run", tiny_models.gpt2(), callbacks=[callback])
    run.train()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "ensemble")
    for name, want in expected(run.model, other, 0.3).items():
        torch.testing.assert_close(loaded.get_parameter(name).data, want, rtol=0, atol=2.0**-22)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert (tmp_path / "run" / "ensemble" / "tokenizer_config.json").is_file()


def test_a_run_that_could_not_leave_one_does_not_begin(tmp_path):
    saved = save(tiny_models.llama(), tmp_path / "llama")
    for other, error, message in [
        (saved, ValueError, "a model of type 'llama', expected 'gpt2'"),
        (tiny_models.llama(), ValueError, "only the first model has 'transformer.wte.weight'"),
        (tmp_path / "nothing", OSError, "nothing"),
    ]:
        run = trainer(tmp_path / "run", tiny_models.gpt2(), callbacks=[EnsembleCallback(other, 0.5)])
        with pytest.raises(error, match=message):
            run.train()
        assert run.state.global_step == 0
    shutil.rmtree(saved)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        EnsembleCallback(saved, 2)
