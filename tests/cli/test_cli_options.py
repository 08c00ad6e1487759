"""Configuration files, the command line and help texts: what is read, and how mistakes are told."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from project import ROOT

from cpo_kernels import CPOConfig
from cpo_kernels.__main__ import main
from cpo_kernels.cli import help as texts
from cpo_kernels.cli.errors import InputError
from cpo_kernels.cli.options import RunConfig
from cpo_kernels.cli.parsing import parse
from cpo_kernels.cli.tiny import tiny_model, tiny_rows, tiny_tokenizer
from cpo_kernels.options import Head, Objective

pytestmark = pytest.mark.cpu

DOCS = ROOT / "docs" / "distributed.md"


@pytest.fixture
def config(tmp_path):
    """Writes a configuration file; returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(f"output_dir: {tmp_path / 'out'}\nuse_cpu: true\n{text}", encoding="utf-8")
        return str(path)

    return write


# Values


def test_fields_go_where_they_belong(config):
    settings = parse([config("model: some/model\nlearning_rate: 2e-5\nalpha: 1\nlora_targets: [a, b]\n")])
    assert (settings.run.model, settings.run.lora_targets) == ("some/model", ["a", "b"])
    assert (settings.training.learning_rate, settings.training.alpha) == (2e-5, 1.0)
    assert isinstance(settings.training.alpha, float)
    assert settings.given["model"] == "some/model"


def test_words_that_yaml_1_1_takes_for_booleans_stay_words(config):
    settings = parse([config("save_strategy: no\nprefix_sharing: off\nbf16: yes\n")])
    assert settings.training.save_strategy == "no"
    assert settings.training.prefix_sharing == "off"
    assert settings.training.bf16 is True


def test_mappings_lists_and_nothing(config):
    text = "columns: {prompt: question}\nreport_to: [tensorboard]\nmax_prompt_length: null\nlora_targets: all-linear\n"
    settings = parse([config(text + "lr_scheduler_kwargs: {num_cycles: 2}\n")])
    assert settings.run.columns == {"prompt": "question"}
    assert settings.run.lora_targets == ["all-linear"]
    assert settings.training.report_to == ["tensorboard"]
    assert settings.training.max_prompt_length is None
    assert settings.training.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    "arguments",
    [
        ["FILE", "--learning_rate", "3e-4", "--bf16"],
        ["--bf16=true", "FILE", "--learning-rate=3e-4"],
        ["--learning_rate", "3e-4", "--bf16", "true", "FILE"],
    ],
)
def test_the_command_line_wins(config, arguments):
    path = config("learning_rate: 1e-5\nbf16: false\nseed: 7\n")
    training = parse([path if argument == "FILE" else argument for argument in arguments]).training
    assert (training.learning_rate, training.bf16, training.seed) == (3e-4, True, 7)


def test_the_lines_of_the_docs_turn_fsdp2_on(config):
    lines = re.search(r"\(`(fsdp: true)`, `(fsdp_config: .*?)`\)", DOCS.read_text(encoding="utf-8"))
    in_file = parse([config("\n".join(lines.groups()))])
    on_line = parse([config(""), "--fsdp", "true", "--fsdp_config", '{"version": 2}'])
    for settings in (in_file, on_line):
        assert settings.training.fsdp is True
        assert settings.training.fsdp_plugin_args["fsdp_version"] == 2
    assert not parse([config("fsdp: true\n"), "--fsdp", "false"]).training.fsdp
    assert parse([config("fsdp: full_shard\n")]).given["fsdp"] == "full_shard"


def test_booleans_can_be_turned_off(config):
    path = config("bf16: true\n")
    assert parse([path, "--bf16", "false"]).training.bf16 is False
    assert parse([path, "--no_dataloader_pin_memory"]).training.dataloader_pin_memory is False


def test_a_mapping_on_the_command_line_is_json(config):
    assert parse([config(""), "--columns", '{"prompt": "question"}']).run.columns == {"prompt": "question"}


def test_no_file_is_needed(tmp_path):
    settings = parse(["--model", "m", "--output_dir", str(tmp_path), "--use_cpu"])
    assert (settings.run.model, settings.training.output_dir) == ("m", str(tmp_path))


def test_pieces_of_documents_fill_max_length(config):
    training = parse([config("prompt_tokens: 24\ncompletion_tokens: 40\n")]).training
    assert (training.max_length, training.prompt_budget) == (64, 24)


# Mistakes

WRONG = {
    "unknown": ("learning_rat: 1\n", "run.yaml: there is no field 'learning_rat'; did you mean 'learning_rate'?"),
    "stranger": ("xyzzy: 1\n", "run.yaml: there is no field 'xyzzy'"),
    "integer": ("max_length: long\n", "run.yaml: argument --max_length/--max-length: invalid int value: 'long'"),
    "fraction": ("max_length: 1.5\n", "run.yaml: argument --max_length/--max-length: invalid int value: '1.5'"),
    "boolean": ("bf16: maybe\n", "run.yaml: argument --bf16: Truthy value expected: got maybe"),
    "not a boolean": ("model: true\n", "run.yaml: model cannot be true"),
    "number": ("learning_rate: [1]\n", "run.yaml: learning_rate cannot be [1]"),
    "null": ("learning_rate: null\n", "run.yaml: learning_rate cannot be null"),
    "mapping": ("model: {a: 1}\n", 'run.yaml: model cannot be {"a": 1}'),
    "not a mapping": ("columns: 3\n", "columns must be a mapping, got '3'"),
    "sharding": ("fsdp: [a]\n", 'run.yaml: fsdp cannot be ["a"]'),
    "choice": (
        "lr_scheduler_type: magic\n",
        "run.yaml: argument --lr_scheduler_type/--lr-scheduler-type: invalid choice: 'magic'",
    ),
    "twice": ("seed: 1\nseed: 2\n", "run.yaml is not YAML: "),
    "yaml": ("seed: [1\n", "run.yaml is not YAML: "),
    "range": ("alpha: 2\n", "alpha must be in [0, 1], got 2.0"),
    "objective": ("objective: magic\n", "objective must be one of cpo, "),
    "fraction held out": ("eval_fraction: 1\n", "eval_fraction must be in [0, 1), got 1.0"),
    "two ways": ("eval_fraction: 0.1\neval_data: x\n", "expected no eval_data and no eval_split beside it, got 'x'"),
    "count": ("negatives_count: 0\n", "negatives_count must be at least 1, got 0"),
    "judge": ("judge: magic\n", "judge must be one of none, chat, likelihood or MODULE:FUNCTION, got 'magic'"),
    "chat": ("judge: chat\n", "judge='chat' needs judge_url and judge_model, got None and None"),
    "format": ("negatives_format: words\n", "argument --negatives_format/--negatives-format: invalid choice: 'words'"),
    "ranking": (
        "negatives_ranking: magic\n",
        "argument --negatives_ranking/--negatives-ranking: invalid choice: 'magic'",
    ),
    "lengths": (
        "prompt_tokens: 8\ncompletion_tokens: 8\nmax_length: 32\n",
        "max_length must be prompt_tokens + completion_tokens = 16, got 32",
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_mistake_in_the_file_names_the_field(config, text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse([config(text)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "there is no option 'learning_rat'; did you mean 'learning_rate'?"),
        (["--learn", "1"], "there is no option 'learn'"),
        (["--learning_rate", "fast"], "--learning_rate"),
        (["--learning_rate"], "--learning_rate"),
        (["--bf16", "run.yaml"], "argument --bf16: Truthy value expected: got run.yaml"),
        (["other.yaml"], "expected one configuration file and options --key value"),
        (["--columns", "{"], "Expecting property name"),
    ],
)
def test_a_mistake_on_the_command_line_names_the_option(config, arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse([config(""), *arguments])


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the configuration .*none.yaml: No such file"):
        parse([str(tmp_path / "none.yaml")])
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(InputError, match=r"list.yaml must have fields, as 'model: gpt2', got list"):
        parse([str(tmp_path / "list.yaml")])
    with pytest.raises(InputError, match="output_dir is not given"):
        parse(["--model", "m"])


def test_a_mistake_is_told_without_a_traceback(config, capsys):
    assert main(["train", config("learning_rat: 1\n")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cpo-kernels train: ")
    assert "did you mean 'learning_rate'?" in error
    assert "Traceback" not in error


# Dry runs


def test_a_dry_run_is_small_and_apart(config, tmp_path):
    text = "max_length: 1024\nbf16: true\nwarmup_steps: 100\nreport_to: wandb\ngradient_accumulation_steps: 16\n"
    text += "negatives_file: runs/n.parquet\nfsdp: full_shard\nembedding_model: some/model\nmax_steps: -1\n"
    settings = parse([config(text), "--tiny", "--max_steps", "5"])
    training, run = settings.training, settings.run
    assert training.output_dir == f"{tmp_path / 'out'}-tiny"
    assert run.negatives_file == "runs/n-tiny.parquet"
    assert training.max_steps == 5  # the command line is kept
    assert (training.max_length, training.gradient_accumulation_steps) == (48, 2)
    assert (training.report_to, training.embedding_model, training.warmup_steps) == ([], None, 0)
    assert torch.cuda.is_available() or (training.bf16 is False and training.use_cpu)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"text"}),
        ({"text_column": "body"}, {"body"}),
        ({"columns": {"prompt": "q", "completion": "a"}}, {"q", "a"}),
        ({"columns": {"completion": "a"}}, {"prompt", "a"}),
        (
            {"prompt_template": "{{ q }} {% if c %}{{ c }}{% endif %}", "completion_template": "{{ a }}"},
            {"q", "c", "a"},
        ),
        ({"prompt_template": "{{ q }}"}, {"q", "completion"}),
    ],
)
def test_rows_of_a_dry_run_have_the_fields_that_are_asked_for(options, names):
    row = next(tiny_rows(RunConfig(**options)))
    assert row.keys() == names
    assert all(row.values())


FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "opt", "olmo2"]
FAMILIES += ["smollm3", "granite", "falcon", "bloom"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_of_every_family(family):
    options = RunConfig(tiny_model={"model_type": family})
    tokenizer = tiny_tokenizer([{"text": "the cat sat on the mat"}] * 2)
    model = tiny_model(options, tokenizer, 32, seed=0)
    assert model.config.model_type == family
    assert model.num_parameters() < 1_000_000
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = torch.arange(32)[None] % len(tokenizer)
    assert model(ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 32, len(tokenizer))


# Help


@pytest.mark.parametrize("command", ["train", "negatives", "evaluate"])
def test_help_is_what_the_fields_say(command, capsys, monkeypatch):
    """Every option with the text and the default of its field, and nothing else."""
    monkeypatch.setenv("COLUMNS", "10000")
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"cpo-kernels {command} my.yaml" in shown
    fields = [item for cls in (RunConfig, CPOConfig) for item in dataclasses.fields(cls) if item.init]
    for item in fields:
        text = item.metadata["help"] % {} if "%%" in item.metadata["help"] else item.metadata["help"]
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        entry = re.search(rf"^  --{item.name}\b.*?(?=^  -|^\S|\Z)", shown, re.MULTILINE | re.DOTALL)
        words = " ".join(entry[0].split())
        assert " ".join(text.split()) in words
        if item.name != "debug":  # HfArgumentParser leaves out the default of a list, here ""
            assert f"(default: {default})" in words
    options = {name for name in re.findall(r"^  --(\w+)", shown, re.MULTILINE) if not name.startswith("no_")}
    assert options == {item.name for item in fields}


def test_help_is_grouped(capsys):
    """Every field stands under the title that says what it is about, wherever it is defined."""
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    titles = re.findall(r"^([A-Z][^\n]*):$", shown, re.MULTILINE)
    for name, title in {
        "model": "Model",
        "data": "Data",
        "beta": "Objective and reference (CPOConfig)",
        "scheduled_sampling_passes": "Objective and reference (CPOConfig)",
        "num_mean_field_negatives": "Negatives (CPOConfig)",
        "embedding_model": "Negatives (CPOConfig)",
        "max_length": "Lengths, memory and kernels (CPOConfig)",
        "prefix_sharing": "Lengths, memory and kernels (CPOConfig)",
        "allow_changed_resume": "Resuming (CPOConfig)",
        "negatives_file": "Negatives made ahead of time",
        "judge": "Evaluation",
        "learning_rate": "Training (transformers.TrainingArguments)",
        "weight_decay": "Training (transformers.TrainingArguments)",
    }.items():
        before = shown[: re.search(rf"^  --{name}\b", shown, re.MULTILINE).start()]
        assert max(titles, key=lambda own: before.rfind(f"\n{own}:\n")) == title, name


# Search


def entries(capsys, *words):
    """The names that a search shows, each with the whole of its entry."""
    assert main(["options", *words]) == 0
    shown = capsys.readouterr().out.strip().split("\n\n")
    return [(entry.partition(" = ")[0], entry) for entry in shown]


def test_a_search_finds_names_and_texts(capsys, monkeypatch):
    """By hand, over the fields and the docstrings: whatever has the word, with the word in its name first."""
    monkeypatch.setenv("COLUMNS", "10000")
    found = [name for name, _ in entries(capsys, "softcap")]
    assert found[0] == "softcap" and "softcap" not in found[1:]
    names = [name for name, _ in entries(capsys, "Mean-Field")]
    named = [name for name in names if "mean_field" in name]
    fields = [item.name for item in dataclasses.fields(CPOConfig) if "mean_field" in item.name]
    assert named == names[: len(named)] == fields
    assert "num_batch_negatives" in names[len(named) :]  # whose text says when it is 0
    assert [name for name, _ in entries(capsys, "mean", "share", "replaces")] == ["mean_field_fraction"]
    (beta, own), (again, config), *_ = entries(capsys, "beta")
    assert (beta, again) == ("beta", "beta")
    assert own.startswith("beta = 0.1    [linear_cpo_loss") and "inverse temperature of the contrast, > 0." in own
    assert config.startswith("beta = None    [Objective and reference (CPOConfig)]")


def test_a_search_without_words_shows_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    shown = entries(capsys)
    expected = [
        item.name for cls in (Objective, Head, RunConfig, CPOConfig) for item in dataclasses.fields(cls) if item.init
    ]
    assert sorted(name for name, _ in shown) == sorted(expected)
    for name, entry in shown:
        assert entry.splitlines()[1].strip(), name
        if "linear_cpo_loss" in entry.splitlines()[0]:
            assert not re.search("``|:[a-z]+:`", entry), name


def test_a_search_for_nothing_names_the_nearest(capsys):
    assert main(["options", "betaa"]) == 2
    assert "there is no option 'betaa'; did you mean 'beta'?" in capsys.readouterr().err
    assert main(["options", "--help"]) == 0
    assert "usage: cpo-kernels options [WORD ...]" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    for option in ("--version", "-V"):
        assert main([option]) == 0
        assert capsys.readouterr().out == f"cpo-kernels {version}\n"


def test_overview_and_unknown_commands(capsys):
    assert main([]) == 0
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(text.count(f"\n    {name} ") == 2 for name in texts.COMMANDS)
    assert main(["trian"]) == 2
    assert "there is no command 'trian'; did you mean 'train'?" in capsys.readouterr().err
    assert main(["xyzzy"]) == 2
    assert "expected one of train, negatives, evaluate, ensemble, info" in capsys.readouterr().err


def test_the_overview_and_info_do_not_wait_for_transformers():
    program = (
        "import sys; from cpo_kernels.__main__ import main; "
        "assert main(['--help']) == main(['info']) == 0; "
        "assert not {'transformers', 'datasets', 'peft'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "cpo-kernels      " in run.stdout


def test_a_package_that_is_not_there_is_named(monkeypatch, capsys, config):
    monkeypatch.setitem(sys.modules, "cpo_kernels.cli.train", None)
    with pytest.raises(ModuleNotFoundError):  # ours: a fault of the installation itself
        main(["train", config("")])
    monkeypatch.delitem(sys.modules, "cpo_kernels.cli.train")
    monkeypatch.delitem(sys.modules, "cpo_kernels.cli.parsing")
    monkeypatch.delitem(sys.modules, "cpo_kernels.cli.yaml12")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert main(["train", config("")]) == 2
    assert "pip install 'cpo-kernels[trainer]'" in capsys.readouterr().err


def test_info_takes_nothing(capsys):
    assert main(["info", "--help"]) == 0
    assert main(["info", "more"]) == 2
    assert "takes no arguments, got 'more'" in capsys.readouterr().err
