"""QLoRA: adapters on a body in 4 or 8 bits, whose reference is the body alone; killed, resumed, from the command."""

from __future__ import annotations

import json
import math
import shutil

import peft
import pytest
import tiny_models
import torch
from cli_models import write_config, write_examples
from quantised_models import HEAD_TOO, WIDE, needs_bitsandbytes, quantised, written_out
from safetensors.torch import load_file
from trainer_runs import parameters, steps, trainer

from cpo_kernels.__main__ import main
from cpo_kernels.cli.inputs import quantisation
from cpo_kernels.cli.options import RunConfig

pytestmark = [pytest.mark.cpu, needs_bitsandbytes]
RUN = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "eval_steps": 1, "eval_strategy": "steps"}


def model_of(bits: str = "4bit", **options):
    """A model with fresh adapters, which change nothing yet."""
    model = peft.prepare_model_for_kbit_training(quantised(bits, **options), use_gradient_checkpointing=False)
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def trained(folder, model, **options):
    run = trainer(folder, model, eval_dataset=tiny_models.examples(4, seed=7), **(RUN | options))
    run.train()
    return run


def frozen(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that evaluates after every step."""
    torch.set_num_threads(1)  # as tests have, which begin after it: sums depend on how many there are
    folder = tmp_path_factory.mktemp("quantised")
    model = model_of()
    before = frozen(model)
    return folder, trained(folder, model), before


def test_the_reference_is_the_model_without_adapters(finished):
    """At first they are one, so that every reward of the first step is 0; later ones are not."""
    _, run, _ = finished
    first, *_, last = steps(run)
    assert first["margin"] == 0.0 and last["margin"] != 0.0
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in steps(run))
    assert len([entry for entry in run.state.log_history if "eval_loss" in entry]) == 4


def test_only_adapters_change(finished):
    _, run, before = finished
    after = frozen(run.model)
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    fresh = {
        name: value for name, value in parameters(trainer(finished[0] / "other", model_of())).items() if "lora" in name
    }
    moved = [name for name, value in fresh.items() if not torch.equal(value, parameters(run)[name])]
    assert len(moved) == len(fresh) == 8


def test_it_equals_a_run_of_the_weights_written_out(finished, tmp_path):
    """An independent one: the body has ordinary layers."""
    _, run, _ = finished
    plain = trained(tmp_path, written_out(model_of()))
    for got, want in zip(steps(run), steps(plain), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-3)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-2)


def test_checkpoints_hold_adapters_alone_and_resume_bit_for_bit(finished, tmp_path):
    folder, run, _ = finished
    saved = load_file(folder / "checkpoint-2" / "adapter_model.safetensors")
    assert len(saved) == 8 and all("lora" in name for name in saved)
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    resumed = trainer(tmp_path, model_of(), eval_dataset=tiny_models.examples(4, seed=7), **RUN)
    resumed.train(resume_from_checkpoint=True)
    for name, value in parameters(run).items():
        assert torch.equal(parameters(resumed)[name], value), name
    assert steps(resumed) == steps(run)


def test_another_quantisation_is_not_the_run_that_began(finished, tmp_path):
    shutil.copytree(finished[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    other = trainer(tmp_path, model_of("4bit, nested"), eval_dataset=tiny_models.examples(4, seed=7), **RUN)
    with pytest.raises(ValueError, match="bnb_4bit"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("bits", "options", "settings"),
    [
        ("8bit", {}, {"objective": "dpo", "num_batch_negatives": 1, "num_truncation_negatives": 0}),
        ("4bit, nested", HEAD_TOO, {"num_mean_field_negatives": 1, "num_autoregressive_negatives": 1}),
        ("8bit", HEAD_TOO, {"reference": "precomputed", "resample_negatives": False, "gradient_checkpointing": True}),
        ("4bit", {"dtype": torch.bfloat16}, {"bf16": True, "gradient_checkpointing": True}),
    ],
)
def test_other_bits_heads_and_settings(bits, options, settings, tmp_path):
    run = trained(tmp_path, model_of(bits, **options), **(settings | {"max_steps": 2, "save_strategy": "no"}))
    losses = [entry["loss"] for entry in steps(run)]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    if settings.get("objective") == "dpo":
        # On a CPU, layers of 8 bits round hidden states in evaluation, which the reference is, and not in training.
        assert losses[0] == pytest.approx(math.log(2), abs=0.05)
    assert all(p.grad is None for name, p in run.model.named_parameters() if "lora" not in name)


# The command


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    tiny_models.llama(**WIDE).save_pretrained(folder / "model")
    tiny_models.tokenizer().save_pretrained(folder / "model")
    return {"model": str(folder / "model"), "data": write_examples(folder / "data.jsonl")}


def test_the_command_trains_evaluates_and_goes_on(shared, tmp_path, capsys):
    how = {"load_in_4bit": True, "use_bnb_nested_quant": True}
    lora = {"lora_r": 2, "lora_targets": ["q_proj", "v_proj"]}
    config = write_config(tmp_path / "run.yaml", **shared, **how, **lora, eval_fraction=0.25, eval_generations=2)
    assert main(["train", config]) == 0
    assert main(["evaluate", config]) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert main(["train", config, "--max_steps", "3"]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    told = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert told["r"] == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_what_the_options_ask_for(bits, dtype):
    run = RunConfig(torch_dtype=dtype, bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True, **{bits: True})
    config = quantisation(run)["quantization_config"]
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == "load_in_4bit", bits == "load_in_8bit")
    assert config.bnb_4bit_quant_type == "fp4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert quantisation(RunConfig()) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True}, "load_in_4bit freezes the weights; give lora_r"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"load_in_4bits": True}, "load_in_4bit"),
        ({"load_in_4bit": True, "lora_r": 2, "bnb_4bit_quant_type": "nf5"}, "nf5"),
    ],
)
def test_mistakes_are_told(shared, tmp_path, options, message, capsys):
    assert main(["train", write_config(tmp_path / "run.yaml", **shared, **options)]) == 2
    assert message in capsys.readouterr().err
