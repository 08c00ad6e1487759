"""What stops a command from outside: Ctrl-C, servers, paths, packages. One sentence and a status, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_models import save_model, write_config, write_examples
from project import ROOT
from raw_server import drip, raw_server

from cpo_kernels.__main__ import main

pytestmark = pytest.mark.cpu
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1"}
SLOW = drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" ", every=0.05, last=60.0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    return {"model": save_model(folder / "model"), "data": write_examples(folder / "data.jsonl")}


def one_sentence(err: str, command: str) -> str:
    """The line that a command ends with; nothing in what it wrote is a traceback."""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith(f"cpo-kernels {command}: ")]
    assert len(lines) == 1
    return lines[0]


def a_file(path: Path) -> Path:
    path.write_text("mine")
    return path


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_output_path_that_is_a_file(shared, tmp_path, capsys, below):
    file = a_file(tmp_path / "file")
    config = write_config(tmp_path / "run.yaml", **shared, eval_fraction=0.25)
    path = str(file / below)
    negatives = path + (".jsonl" if below else "/negatives.jsonl")
    commands = {
        "train": ["train", config, "--output_dir", path],
        "negatives": ["negatives", config, "--negatives_file", negatives],
        "evaluate": ["evaluate", config, "--checkpoint", shared["model"], "--eval_dir", path],
        "ensemble": ["ensemble", shared["model"], shared["model"], path],
    }
    for command, arguments in commands.items():
        assert main(arguments) in (1, 2), command
        assert str(file) in one_sentence(capsys.readouterr().err, command)
    assert file.read_text() == "mine"


def test_a_file_to_write_that_is_a_directory(shared, tmp_path, capsys):
    (tmp_path / "negatives.jsonl").mkdir()
    config = write_config(tmp_path / "run.yaml", **shared)
    assert main(["negatives", config, "--negatives_file", str(tmp_path / "negatives.jsonl")]) in (1, 2)
    assert "negatives.jsonl" in one_sentence(capsys.readouterr().err, "negatives")


DEAD = "http://127.0.0.1:9/v1"


def test_a_server_that_is_not_there(shared, tmp_path, capsys, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setattr("openai.AsyncOpenAI.__init__", impatient())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = {"autoregressive_url": DEAD, "autoregressive_model": "tiny", "num_autoregressive_negatives": 1}
    config = write_config(tmp_path / "run.yaml", **shared, **server, eval_fraction=0.25)
    file = str(tmp_path / "negatives.jsonl")
    judged = ["--judge", "chat", "--judge_url", DEAD, "--judge_model", "tiny", "--num_autoregressive_negatives", "0"]
    commands = {
        "train": ["train", config],
        "negatives": ["negatives", config, "--negatives_file", file],
        "evaluate": ["evaluate", config, "--checkpoint", shared["model"], *judged, "--eval_max_new_tokens", "3"],
    }
    for command, arguments in commands.items():
        assert main(arguments) == 1, command
        sentence = one_sentence(capsys.readouterr().err, command)
        assert f"{DEAD} gave no " in sentence and "ConnectError" in sentence


def impatient():
    """A client that does not retry: the pauses between are no concern of the test."""
    import openai

    make = openai.AsyncOpenAI.__init__
    return lambda self, **options: make(self, **{**options, "max_retries": 0})


def interrupted(arguments: list[str], ready) -> subprocess.CompletedProcess:
    """A command that gets Ctrl-C once ``ready`` says so."""
    program = [sys.executable, "-m", "cpo_kernels", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that runs the tests in the background has them ignore Ctrl-C, and a child inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(program, env=ENVIRONMENT, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        while not ready() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess(program, process.returncode, out, err)


def test_ctrl_c_while_training(shared, tmp_path):
    config = write_config(tmp_path / "run.yaml", **shared, max_steps=10**6, save_steps=5, save_total_limit=1)
    run = interrupted(["train", config], lambda: any((tmp_path / "run").glob("checkpoint-*")))
    assert run.returncode == 130
    assert one_sentence(run.stderr, "train") == "cpo-kernels train: interrupted"


@pytest.mark.parametrize("command", ["negatives", "evaluate"])
def test_ctrl_c_while_a_server_is_silent(shared, tmp_path, command):
    """A minute before its time is over."""
    pytest.importorskip("openai")
    with raw_server(SLOW) as (url, asked):
        options = {
            "negatives": {"autoregressive_url": url, "autoregressive_model": "m", "num_autoregressive_negatives": 1},
            "evaluate": {"judge": "chat", "judge_url": url, "judge_model": "m", "eval_fraction": 0.25},
        }[command]
        others = {"negatives_file": str(tmp_path / "n.jsonl"), "eval_max_new_tokens": 3, "checkpoint": shared["model"]}
        config = write_config(tmp_path / "run.yaml", **shared, **options, **others)
        run = interrupted([command, config], lambda: bool(asked))
    assert asked
    assert run.returncode == 130
    assert one_sentence(run.stderr, command) == f"cpo-kernels {command}: interrupted"


BLOCKED = {
    "is not there": "ModuleNotFoundError(f'No module named {name!r}', name=name)",
    "is broken": "ImportError('libcudart.so.12: cannot open shared object file')",
    "cannot be read": "OSError('libtorch_cpu.so: file too short')",
}


@pytest.mark.parametrize("how", BLOCKED)
def test_without_torch(tmp_path, how):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        f"            raise {BLOCKED[how]}\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}

    def run(*arguments: str):
        program = [sys.executable, *arguments]
        return subprocess.run(program, env=environment, capture_output=True, text=True)

    info = run("-m", "cpo_kernels", "info")
    assert (info.returncode, info.stdout) == (1, "")
    assert info.stderr.count("\n") == 1
    assert "torch" in one_sentence(info.stderr, "info")
    assert run("-m", "cpo_kernels", "--help").returncode == 0
    used = run("-c", "import cpo_kernels; print(cpo_kernels.__version__); cpo_kernels.cpo_loss")
    assert used.stdout.strip() and "ImportError: cpo_kernels needs torch, which cannot be imported" in used.stderr


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("cpo_kernels.cli.info.report", lambda: {}["missing"])
    with pytest.raises(KeyError):
        main(["info"])


def test_whoever_has_read_enough_of_the_output_sees_no_traceback():
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-m", "cpo_kernels", "info"], env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert run.returncode == 1 and run.stderr == ""
