"""Set-up of a fresh clone: the lower bounds, the constraints, and one sentence where something is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from project import ROOT

pytestmark = pytest.mark.cpu  # files and a shell, no device

TORCH_PINS = re.compile(r"(triton|nvidia-.*|cuda-.*|sympy|mpmath)")


def script(name: str):
    """A module of .ci, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_every_requirement_has_one_lower_bound():
    bounds = script("oldest").oldest((ROOT / "pyproject.toml").read_text())
    assert {"setuptools", "torch", "transformers", "trl", "pytest"} <= bounds.keys()
    assert bounds["torch"] == "torch==2.8"
    named = re.findall(r'"([A-Za-z][\w.-]*)>=', (ROOT / "pyproject.toml").read_text())
    assert bounds.keys() == set(named)
    for exact in bounds.values():
        assert re.fullmatch(r"==[\d.]+", str(Requirement(exact).specifier))


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        ("torch", "'torch' has no lower bound"),
        ("torch<3", "'torch<3' is not of the form name>=version"),
        ("numpy>=2", "two lower bounds: numpy==1.26 and numpy==2"),
    ],
)
def test_a_requirement_without_a_true_lower_bound_is_an_error(requirement, message):
    text = '[build-system]\nrequires = []\n[project]\nname = "own"\ndependencies = ["numpy>=1.26", "{}"]\n'
    text = text.format(requirement) + '[project.optional-dependencies]\nall = ["own[all]"]\n'
    with pytest.raises(SystemExit, match=re.escape(message)):
        script("oldest").oldest(text)


def test_constraints_leave_to_torch_what_torch_pins():
    assert [str(pin) for pin in constraints() if TORCH_PINS.fullmatch(pin.name)] == []


def test_constraints_are_within_the_bounds_and_pin_each_requirement_for_each_python():
    bounds = script("oldest").oldest((ROOT / "pyproject.toml").read_text())
    for python in script("resolve").supported_pythons():
        machine = {"python_version": python, "python_full_version": f"{python}.5", "sys_platform": "linux"}
        chosen = {pin.name.lower(): pin for pin in constraints() if not pin.marker or pin.marker.evaluate(machine)}
        for name, exact in bounds.items():
            marker = Requirement(exact).marker
            if TORCH_PINS.fullmatch(name) or (marker and not marker.evaluate(machine)):
                continue
            (pinned,) = chosen[name.lower()].specifier
            (bound,) = Requirement(exact).specifier
            assert Requirement(f"{name}>={bound.version}").specifier.contains(pinned.version), (python, name)


def test_the_workflow_of_the_tests_runs_every_supported_python():
    pythons = script("resolve").supported_pythons()
    assert pythons[0] == "3.10" and f">={pythons[0]}" in (ROOT / "pyproject.toml").read_text()
    matrix = re.search(r"python: \[(.+)\]", (ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert re.findall(r'"(.+?)"', matrix[1]) == pythons


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def prepare(tmp_path: Path, python: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(ROOT / "build_tools" / "prepare.sh"), str(python), str(tmp_path / "environment"), "dev"]
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def python_without(tmp_path: Path, word: str) -> Path:
    """An interpreter that says no to the one question of set-up that holds a word."""
    cases = f'*--version*) echo Python 3.8.18;; *{word}*) exit 1;; *) exec {sys.executable} "$@";;'
    return executable(tmp_path / "python", f'#!/bin/sh\ncase "$*" in {cases} esac\n')


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("version_info", "Python 3.8.18 is too old; Python 3.10 or newer is needed"),
        (
            "ensurepip",
            "Python's venv module is missing; install it (on Debian and Ubuntu: apt-get install python3-venv)",
        ),
        ("Python.h", "Python's headers are missing; install them (on Debian and Ubuntu: apt-get install python3-dev)"),
    ],
)
def test_a_python_that_lacks_something_ends_set_up_with_one_sentence(tmp_path, word, sentence):
    done = prepare(tmp_path, python_without(tmp_path, word))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"set-up: {sentence}") and done.stderr.count("\n") == 1


def test_missing_programs_end_set_up_with_one_sentence(tmp_path):
    done = prepare(tmp_path, "python9.99")
    assert done.returncode == 1 and done.stderr.startswith(
        "set-up: there is no python9.99 that runs; install Python 3.10"
    )
    done = prepare(tmp_path, sys.executable, CXX="no-such-compiler")
    assert done.returncode == 1 and done.stderr.startswith("set-up: no C++ compiler was found; install g++")
    assert done.stderr.count("\n") == 1


def failing_pip(tmp_path: Path, says: str) -> subprocess.CompletedProcess[str]:
    executable(tmp_path / "environment" / "bin" / "python", f"#!/bin/sh\necho '{says}'\nexit 1\n")
    done = prepare(tmp_path, sys.executable)
    assert done.returncode == 1
    return done


def test_a_full_disk_ends_set_up_with_one_sentence(tmp_path):
    done = failing_pip(tmp_path, "OSError: [Errno 28] No space left on device")
    assert done.stderr.startswith("set-up: the disk is full; ") and done.stderr.count("\n") == 1


def test_a_failing_pip_ends_set_up_with_its_last_words_and_one_sentence(tmp_path):
    words, last = failing_pip(tmp_path, "ResolutionImpossible").stderr.splitlines()
    assert words == "ResolutionImpossible" and last.startswith("set-up: pip failed after ")


def test_set_up_says_what_pip_is_doing(tmp_path):
    executable(tmp_path / "environment" / "bin" / "python", "#!/bin/sh\necho 'Collecting torch'\nsleep 6\n")
    done = prepare(tmp_path, sys.executable)
    assert done.returncode == 0, done.stderr
    assert re.search(r"set-up: 5 s: Collecting torch\nset-up: done after \d+ s\n$", done.stdout)
