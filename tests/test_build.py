"""The build: what a source distribution holds, that it builds without torch, and who may take addresses."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu  # files and compilers, no device

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cpo_kernels"
BUILD_INPUTS = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "csrc", "cpo_kernels"]


def run(arguments: list[str], where: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], cwd=where, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def source_tree(tmp_path):
    """A copy of what the build reads, so that building it leaves the checkout alone."""
    tree = tmp_path / "source"
    tree.mkdir()
    for name in BUILD_INPUTS:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(path, tree)
    return tree


# The build back end as `pip` and `python -m build` call it, in an interpreter that refuses to import torch.
BACK_END = """
import sys
sys.modules["torch"] = None
from setuptools import build_meta
build_meta.{hook}(sys.argv[1])
"""


def back_end(hook: str, tree: Path, output: Path, **environment: str) -> Path:
    output.mkdir()
    result = run(["-c", BACK_END.format(hook=hook), str(output)], tree, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (made,) = output.iterdir()
    return made


def build_extensions(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(["setup.py", "build_ext", "--inplace"], tree, **environment)


@pytest.mark.slow
def test_source_distribution_builds_without_torch_and_rebuilds_only_what_changed(source_tree, tmp_path):
    archive = back_end("build_sdist", source_tree, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for source in (source_tree / "csrc").rglob("*.*"):
        assert (unpacked / source.relative_to(source_tree)).is_file(), f"{source.name} is missing from the sdist"

    wheel = back_end("build_wheel", unpacked, tmp_path / "wheel", CPO_KERNELS_CUDA="0")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert (installed / "cpo_kernels" / "py.typed").is_file()
    assert (installed / "cpo_kernels" / "backends" / "selection.json").is_file()
    assert not list(installed.rglob("_cuda*"))
    info = run(["-m", "cpo_kernels", "info"], tmp_path, PYTHONPATH=str(installed))
    assert info.returncode == 0, info.stderr
    assert "compiled by" in info.stdout and "cpu              available" in info.stdout
    where = run(["-c", "from cpo_kernels import _cpu; print(_cpu.__file__)"], tmp_path, PYTHONPATH=str(installed))
    assert Path(where.stdout.strip()).is_relative_to(installed)

    assert "no work to do" in build_extensions(unpacked, CPO_KERNELS_CUDA="0").stdout
    (unpacked / "csrc" / "cpu" / "isa.cpp").touch()
    rebuild = build_extensions(unpacked, CPO_KERNELS_CUDA="0").stdout
    assert rebuild.count(" cxx ") == 1 and "isa.cpp.o" in rebuild


def test_cuda_demanded_without_nvcc_or_sources_fails_with_the_reason(source_tree):
    for source in (source_tree / "csrc" / "cuda").glob("*.cu"):
        source.unlink()
    result = build_extensions(source_tree, CPO_KERNELS_CUDA="1", CUDA_HOME=str(source_tree))
    assert result.returncode != 0
    assert "CPO_KERNELS_CUDA=1, but csrc/cuda holds no .cu sources and nvcc was not found" in result.stderr


def test_unknown_value_of_the_cuda_switch_is_an_error(source_tree):
    result = build_extensions(source_tree, CPO_KERNELS_CUDA="yes")
    assert result.returncode != 0
    assert "CPO_KERNELS_CUDA is 'yes'; expected 0 (never), 1 (required)" in result.stderr


def uses_of(name: str) -> set[str]:
    """Files of the package that read an attribute of this name."""
    return {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == name
    }


def test_only_native_modules_take_addresses():
    native = {f"backends/{path.name}" for path in (PACKAGE / "backends").glob("native_*.py")}
    assert set() < uses_of("data_ptr") <= native


def test_extension_does_not_link_torch():
    from cpo_kernels import _cpu

    library = Path(_cpu.__file__).read_bytes()
    assert b"libtorch" not in library and b"libc10" not in library


def test_info_names_versions_backends_and_instruction_sets():
    from cpo_kernels.backends import describe, native

    result = run(["-m", "cpo_kernels", "info"], ROOT)
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line)
    assert {"cpo-kernels", "python", "torch", "triton", "extension", "threads"} <= lines.keys()
    assert f"instruction set  {native.isa()}" in result.stdout
    for status in describe():
        assert lines[status.name] == ("available: " if status.available else "not available: ") + status.reason
