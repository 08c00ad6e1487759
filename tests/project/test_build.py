"""The build: what a source distribution holds, that it builds without torch, what info says, who takes addresses."""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from project import ROOT

from build_tools.readme_links import with_absolute_links

pytestmark = pytest.mark.cpu  # files and compilers, no device

PACKAGE = ROOT / "cpo_kernels"


def repository_files() -> list[str]:
    """What git knows, or has not been told to ignore; in an unpacked source distribution, every file."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    made = {"build", "dist", "__pycache__", ".venv"}
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file() and path.suffix != ".so")
    return [str(path) for path in files if not made & set(path.parts)]


def run(arguments: list[str], where: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python; what it compiles is not optimised, which takes a third of the time."""
    env = {**os.environ, "CXXFLAGS": "-O0", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=where, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def source_tree(tmp_path):
    """A copy of the repository's files, so that building them leaves the checkout alone."""
    tree = tmp_path / "source"
    for name in repository_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
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
    (made,) = output.glob("cpo_kernels-*")
    return made


def build_extensions(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(["setup.py", "build_ext", "--inplace"], tree, **environment)


def test_source_distribution_builds_without_torch_and_rebuilds_only_what_changed(source_tree, tmp_path):
    archive = back_end("build_sdist", source_tree, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    missing = [name for name in repository_files() if not (unpacked / name).is_file()]
    assert not missing, f"missing from the sdist: {missing}"

    # Left by an earlier build with CUDA.
    name = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    platform = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = [unpacked / "build" / platform / "cpo_kernels" / name, unpacked / "cpo_kernels" / name]
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    wheel = back_end("build_wheel", unpacked, tmp_path / "wheel", CPO_KERNELS_CUDA="0")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert (installed / "cpo_kernels" / "py.typed").is_file()
    assert (installed / "cpo_kernels" / "kernels" / "selection.json").is_file()
    assert not list(installed.rglob("_cuda*"))
    info = run(["-m", "cpo_kernels", "info"], tmp_path, PYTHONPATH=str(installed))
    assert info.returncode == 0, info.stderr
    assert "compiled by" in info.stdout and "cpu              available" in info.stdout
    where = run(["-c", "from cpo_kernels import _cpu; print(_cpu.__file__)"], tmp_path, PYTHONPATH=str(installed))
    assert Path(where.stdout.strip()).is_relative_to(installed)

    assert (
        "cuda extension   left out because CPO_KERNELS_CUDA=0 (to change it: unset it, or CPO_KERNELS_CUDA=1)\n"
        in info.stdout
    )

    assert "no work to do" in build_extensions(unpacked, CPO_KERNELS_CUDA="0").stdout
    (unpacked / "csrc" / "cpu" / "isa.cpp").touch()
    assert not [path for path in stale if path.exists()]
    rebuild = build_extensions(unpacked, CPO_KERNELS_CUDA="0").stdout
    assert rebuild.count(" cxx ") == 1 and "isa.cpp.o" in rebuild


def test_the_build_says_in_one_line_what_it_compiles(source_tree):
    for source in (source_tree / "csrc" / "cpu").glob("*.cpp"):
        source.write_text("#error nothing is compiled in this test")
    result = build_extensions(source_tree, CPO_KERNELS_CUDA="0")
    assert "nothing is compiled in this test" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("cpo-kernels: ")]
    assert "_cpu is compiled for " in line and "(scalar, " in line
    assert "_cuda is left out because CPO_KERNELS_CUDA=0 (to change it: " in line


def test_cuda_demanded_without_nvcc_fails_with_the_reason(source_tree):
    result = build_extensions(source_tree, CPO_KERNELS_CUDA="1", CUDA_HOME=str(source_tree))
    assert result.returncode != 0
    assert "CPO_KERNELS_CUDA=1, but nvcc was not found" in result.stderr


def test_links_of_the_readme_are_complete_in_the_metadata(source_tree, tmp_path):
    folder = back_end("prepare_metadata_for_build_wheel", source_tree, tmp_path / "metadata")
    message = email.message_from_string((folder / "METADATA").read_text(encoding="utf-8"))
    assert message["Description-Content-Type"] == "text/markdown"
    source = dict(url.split(", ") for url in message.get_all("Project-URL"))["Source"]
    readme, text = (ROOT / "README.md").read_text(encoding="utf-8"), message.get_payload()
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target for target in re.findall(r"\]\(([^)\s]+)\)", readme) if "://" not in target and target[0] != "#"]
    assert local and all((ROOT / target.partition("#")[0]).exists() for target in local)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", readme)
    whole = {f"{source}/{'raw' if t in pictures else 'blob'}/v{message['Version']}/{t}" for t in local}
    assert pictures and {target for target in targets if target.startswith(source)} == whole
    assert not [target for target in targets if "://" not in target and target[0] != "#"]


def test_links_that_are_complete_stay_and_pictures_lead_to_their_bytes():
    text = "[a](docs/a.md#b) ![p](docs/p.png) [web](https://x.org/y) [here](#part) [mail](mailto:a@b.c)"
    expected = (
        "[a](S/blob/v1/docs/a.md#b) ![p](S/raw/v1/docs/p.png) [web](https://x.org/y) [here](#part) [mail](mailto:a@b.c)"
    )
    assert with_absolute_links(text, "S", "1") == expected


def test_the_smoke_test_of_wheels_runs_the_loss_example_of_the_readme():
    from build_tools.smoke_test import example_of

    example = example_of(ROOT / "README.md")
    assert "cpo_kernels.linear_cpo_loss(" in example and "out.loss.backward()" in example
    compile(example, "README.md", "exec")


def uses_of(name: str) -> set[str]:
    """Files of the package that read an attribute of this name."""
    return {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == name
    }


def test_only_modules_of_compiled_kernels_take_addresses():
    compiled = {f"kernels/{path.name}" for path in (PACKAGE / "kernels").glob("*.py") if path.name == "checks.py"}
    compiled |= {
        str(path.relative_to(PACKAGE)) for name in ("cpu", "cuda") for path in (PACKAGE / "kernels" / name).glob("*.py")
    }
    assert set() < uses_of("data_ptr") <= compiled


def test_extension_does_not_link_torch():
    from cpo_kernels import _cpu

    library = Path(_cpu.__file__).read_bytes()
    assert b"libtorch" not in library and b"libc10" not in library


def test_info_names_versions_backends_and_instruction_sets():
    from cpo_kernels.kernels.cpu import extension as cpu_extension
    from cpo_kernels.kernels.registry import describe

    result = run(["-m", "cpo_kernels", "info"], ROOT)
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line)
    assert {"cpo-kernels", "python", "torch", "triton", "extension", "cuda", "threads"} <= lines.keys()
    assert f"instruction set  {cpu_extension.isa()}" in result.stdout
    for status in describe():
        assert lines[status.name] == ("available: " if status.available else "not available: ") + status.reason
