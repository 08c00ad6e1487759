"""Scripts in processes that start with the libraries imported, where torchrun would import them in each anew.

They are forked from a server that has imported them once, and find each other as torchrun's processes do: by the
variables of the environment. What torchrun itself does is a test of the command's (test_cli.py).
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
import tempfile
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

SERVER = get_context("forkserver")
# Of installed packages: before Python 3.14 the server does not see what pytest adds to the path.
MODELS = [f"transformers.models.{family}.modeling_{family}" for family in ("gpt2", "llama")]
SERVER.set_forkserver_preload(["peft", "tokenizers", *MODELS, "cpo_kernels.cli.train", "cpo_kernels.trainer"])


def run_here(script: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    """Run a script in the process of the call, and write its output to a file."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def start_script(script: Path, *arguments: str, output: Path, **environment: str) -> BaseProcess:
    """Start a script in a process of its own, whose output goes to a file."""
    process = SERVER.Process(target=run_here, args=(str(script), list(arguments), environment, str(output)))
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_script(script: Path, *arguments: str, processes: int = 1) -> str:
    """Run a script in some processes at once and return their outputs, one after the other.

    Raises:
        AssertionError: a process failed; the others are ended.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)} if processes > 1 else {}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{rank}.txt" for rank in range(processes)]
        running = []
        for rank, output in enumerate(outputs):
            environment = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            running.append(start_script(script, *arguments, output=output, **environment))
        try:
            waiting = {process.sentinel: process for process in running}
            while waiting and not any(process.exitcode for process in running):
                for sentinel in connection.wait(list(waiting)):
                    waiting.pop(sentinel).join()
        finally:
            for process in running:
                process.kill()
                process.join()
        printed = [output.read_text() if output.exists() else "" for output in outputs]
    codes = [process.exitcode for process in running]
    assert not any(codes), f"{script} ended with {codes}:\n" + "\n".join(printed)
    return "".join(printed)
