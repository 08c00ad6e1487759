"""README and docs: every block of code runs as it stands, or says why not; every command is one that there is."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from documentation import PAGES, PICTURES_AND_TEXT, Block, Command, Document, read
from packaging.requirements import Requirement
from processes import free_port
from project import ROOT

from cpo_kernels.__main__ import main
from cpo_kernels.cli import help as texts
from cpo_kernels.cli.tiny import tiny_tokenizer

pytestmark = pytest.mark.cpu  # what a reader without a GPU meets

DOCUMENTS = [read(page) for page in PAGES]
BLOCKS = [block for document in DOCUMENTS for block in document.blocks]
COMMANDS = [command for block in BLOCKS if block.language == "sh" for command in block.commands()]
COMMANDS += [command for document in DOCUMENTS for command in document.mentioned]
# Where a page says what model and tokenizer its examples take; without it, its blocks are given nothing.
GIVEN = "index.md#a-model-and-a-tokenizer"
# Libraries that are not there for every supported Python, or that no test depends on.
OPTIONAL = ("trl", "lightning", "bitsandbytes")


def commands_of(program: str) -> list:
    return [pytest.param(c, id=f"{c.place} {' '.join(c.words)}") for c in COMMANDS if c.program == program]


def with_python(documents: list[Document]) -> list:
    return [pytest.param(d, id=d.page.name) for d in documents if d.of("python")]


def test_every_block_runs_or_says_why_not():
    unknown = [b.place for b in BLOCKS if b.language not in ("python", "sh", *PICTURES_AND_TEXT)]
    assert not unknown, f"of a language that no test knows: {unknown}"
    hidden = [b.place for b in BLOCKS if b.language == "text" and "import " in b.text]
    assert not hidden, f"Python that is not fenced as such: {hidden}"
    python, shell = ([b for b in BLOCKS if b.language == language] for language in ("python", "sh"))
    left = [block for block in (*python, *shell) if block.not_run]
    for block in python:
        block.compiled()
    undecided = [c.place for b in shell if not b.not_run for c in b.commands() if c.program not in CHECKS]
    assert not undecided, f"commands that are neither run nor checked, nor is there a reason: {undecided}"
    print(f"\n{len(python) + len(shell)} blocks of README and docs: {len(python)} of Python, {len(shell)} of commands")
    print(
        f"{len(python) + len(shell) - len(left)} run; not run:",
        *(f"{b.place}: {b.not_run}" for b in left),
        sep="\n    ",
    )
    assert len(python) > 10 and len(shell) > 5 and len(COMMANDS) > 30


# Python


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer([{"text": document.text} for document in DOCUMENTS])


def small_model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **ends, **sizes))


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory with what commands name: the examples, a configuration, files and folders of results."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def one_process(monkeypatch):
    """What torchrun tells the only process of a run."""
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

    def tell():
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    yield tell
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def unpatched(code: str) -> contextlib.AbstractContextManager:
    """A context at whose end TRL's head is its own again, whatever was done to it."""
    if "patch_fused_head" not in code:
        return contextlib.nullcontext()
    from cpo_kernels.integrations.trl import fused_head

    return fused_head()


@pytest.mark.parametrize("document", with_python(DOCUMENTS))
def test_python_runs_as_it_stands(document, tokenizer, desk, one_process):
    """In order and in one namespace, as who reads the page from top to bottom would run it."""
    blocks = [block for block in document.of("python") if not block.not_run]
    code = "\n".join(block.text for block in blocks)
    for name in OPTIONAL:
        if re.search(rf"^(import|from) .*\b{name}\b", code, re.MULTILINE):
            pytest.importorskip(name)
    names = {"__name__": "__main__"}
    if GIVEN in document.text or document.page.name == GIVEN.partition("#")[0]:
        names |= {"model": small_model(tokenizer), "tokenizer": tokenizer}
    with unpatched(code), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries; what is ours to warn of is tested elsewhere
        for block in blocks:
            if "init_process_group" in block.text:
                one_process()
            exec(block.compiled(), names)
    names.clear()


# Commands


def targets_and_variables() -> tuple[set[str], set[str]]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    return targets, set(re.findall(r"^(\w+) [:?]?=", text, re.MULTILINE))


class Parsed(Exception):  # noqa: N818
    """The arguments of a program were parsed, and it went no further."""


def check_python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program of this repository parse its arguments, and stop it there."""
    module = arguments[0] == "-m"
    name, rest = (arguments[1], arguments[2:]) if module else (arguments[0], arguments[1:])
    path = ROOT / (f"{name.replace('.', '/')}.py" if module else name)
    if module and not path.exists():
        assert importlib.util.find_spec(name), f"there is no module {name}"
        return
    if ".parse_args(" not in path.read_text(encoding="utf-8"):
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *given, **options):
        parse(self, *given, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [str(path), *rest])
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(Parsed):
        runpy.run_path(str(path), run_name="__main__")


def check_make(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask make what it would do, without set-up, and let the programs that it would start parse their arguments."""
    targets, variables = targets_and_variables()
    given = dict(word.split("=", 1) for word in command.arguments[1:] if "=" in word)
    goals = [word for word in command.arguments[1:] if "=" not in word]
    assert set(given) <= variables, f"variables that the Makefile does not know, of {sorted(given)}"
    assert set(goals[:1]) <= targets, f"there is no target {goals[0]}"
    old = [word for name in ("dev", "trainer", "docs") for word in ("-o", f"{given.get('VENV', '.venv')}/.{name}")]
    dry = ["make", "-n", "-f", str(ROOT / "Makefile"), *old, *command.arguments[1:]]
    # What is given to a make that runs this test, such as ARGS, is not given to the command of the page.
    environment = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKEOVERRIDES", "ARGS"}
    }
    said = subprocess.run(dry, capture_output=True, text=True, check=False, env=environment)
    assert said.returncode == 0, said.stderr
    for line in said.stdout.replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        if words and re.fullmatch(r"(.*/)?python3?(\.\d+)?", words[0]) and "pytest" not in words:
            with monkeypatch.context() as patch:
                check_python(list(Command("", tuple(words)).arguments[1:]), patch)


def check_pip(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed is this project, with extras that it has, or something that an extra asks for."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^([a-z]+) = \[", text.split("[project.optional-dependencies]")[1], re.MULTILINE))
    known = {re.split(r"[>;\[]", one)[0].strip() for one in re.findall(r'"([A-Za-z][\w.-]*[>\[].*?)"', text)}
    assert command.arguments[1] == "install"
    for what in command.arguments[2:]:
        requirement = Requirement(re.sub(r"^\.(?=\[|$)", "cpo-kernels", what))
        assert requirement.name in known | {"torch"}, f"{requirement.name} is in no extra"
        if requirement.name == "cpo-kernels":
            assert requirement.extras <= extras, f"there is no extra among {sorted(requirement.extras - extras)}"


def run_command(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of a block; one that a sentence mentions has to be there."""
    arguments = command.arguments[1:]
    assert arguments[0] in texts.COMMANDS or arguments[0].startswith("-")
    if not command.mentioned or "--help" in arguments:
        assert main(arguments) == 0


CHECKS = {
    "make": check_make,
    "pip": check_pip,
    "python": lambda command, patch: check_python(command.arguments[1:], patch),
    "cpo-kernels": run_command,
}


def configuration(folder: Path, tokenizer) -> None:
    """CONFIG.yaml, and beside it the folders and files that commands name in capitals."""
    for name in ("CPO_DIR", "MLE_DIR"):
        small_model(tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"The number {i} is followed by", "completion": f" the number {i + 1}."} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields = {"model": "CPO_DIR", "data": "data.jsonl", "output_dir": "runs/first", "use_cpu": True, "max_steps": 2}
    fields |= {"eval_fraction": 0.25, "negatives_count": 1, "disable_tqdm": True}
    fields |= {"max_length": 96, "per_device_train_batch_size": 4, "eval_generations": 2, "report_to": "none"}
    (folder / "CONFIG.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")


def runnable(block: Block) -> bool:
    return not block.not_run and any(command.program == "cpo-kernels" for command in block.commands())


@pytest.mark.parametrize("block", [pytest.param(b, id=b.place) for b in BLOCKS if b.language == "sh" and runnable(b)])
def test_commands_run_as_they_stand(block, desk, tokenizer, monkeypatch, capsys):
    """The project's own command, in the order of the block."""
    configuration(desk, tokenizer)
    for command in block.commands():
        if command.program == "cpo-kernels":
            run_command(command, monkeypatch)


@pytest.mark.parametrize("command", [p for name in ("make", "pip", "python") for p in commands_of(name)])
def test_commands_of_others_are_there(command, desk, monkeypatch):
    for name in ("BEFORE.json", "AFTER.json", "FILE"):
        (desk / name).touch()
    CHECKS[command.program](command, monkeypatch)


@pytest.mark.parametrize("command", [p for p in commands_of("cpo-kernels") if p.values[0].mentioned])
def test_commands_in_sentences_are_there(command, desk, monkeypatch):
    run_command(command, monkeypatch)
