"""Checks of csrc/cpu that need compilers and no Python module; `make warnings` and `make check-arm` run them.

    warnings    compiles all of csrc/cpu for x86-64 and ARM with each compiler that is found; a warning is an error
    arm         builds tests/row_vectors for this machine and for ARM, and compares ARM's row kernels, in an emulator,
                with vectors that the scalar kernels write here

Flags and instruction sets are those of setup.py. Objects stay in build/cpu-kernels, which both checks share.
"""

from __future__ import annotations

import argparse
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pybind11

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cpu-kernels"
SETUP = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))
HERE = platform.machine()
ARM = "aarch64"
ARCHITECTURES = ["x86_64", ARM]
COMMON = [*SETUP.CXX_FLAGS, "-Werror", f"-I{ROOT / 'csrc'}"]
PYTHON_HEADERS = [
    *(f"-isystem {path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))),
    f"-I{BUILD}",  # of the header that setup.py writes
]


def gcc_for(architecture: str) -> str:
    """GCC's name where it compiles for an architecture: Debian's name for a cross compiler."""
    return "g++" if architecture == HERE else f"{architecture}-linux-gnu-g++"


def require(packages: dict[str, str]) -> None:
    """Ends with one sentence that names the programs that are missing, and Debian's packages of them."""
    missing = [program for program in packages if shutil.which(program) is None]
    if missing:
        install = "apt-get install " + " ".join(packages[program] for program in missing)
        sys.exit(f"{' and '.join(missing)} not found: on Debian and Ubuntu, {install}")


class Compilation:
    """A build.ninja that compiles sources of csrc/cpu, and others, for some architectures."""

    def __init__(self) -> None:
        BUILD.mkdir(parents=True, exist_ok=True)
        self.ninja = SETUP.NinjaFile(BUILD)
        summary = BUILD / "cuda_summary.h"
        if not summary.exists():
            summary.write_text('#define CPO_CUDA_SUMMARY "left out of this check"\n')

    def gcc(self, name: str, command: str) -> None:
        """Declares rules NAME, which makes an object, and NAME-link, which makes a program."""
        self.ninja.rule(name, f"{command} -MMD -MF $out.d $flags -c $in -o $out", depfile=True)
        self.ninja.rule(f"{name}-link", f"{command} $in -o $out $flags", depfile=False)

    def clang(self, name: str, command: str) -> None:
        """Declares a rule NAME that only analyses: all warnings of Clang come before it optimises, unlike GCC's."""
        analysis = f"{command} -MMD -MF $out.d -MT $out $flags -fsyntax-only $in && touch $out"
        self.ninja.rule(name, analysis, depfile=True)

    def objects(self, name: str, architecture: str, sources: list[Path], extra: list[str]) -> list[Path | str]:
        """Objects of the sources that this architecture has."""
        made = []
        for source in sources:
            flags = SETUP.isa_flags(source, architecture)
            if flags is not None:
                made.append(self.ninja.build(f"{name}/{source.stem}.o", name, [source], [*COMMON, *extra, *flags]))
        return made


def check_warnings() -> None:
    """Compiles everything with every compiler that is found."""
    compilation = Compilation()
    for architecture in ARCHITECTURES:
        compilers = {"gcc": gcc_for(architecture), "clang": f"clang++ --target={architecture}-linux-gnu"}
        for kind, command in compilers.items():
            name = f"{kind}-{architecture}"
            if shutil.which(command.split()[0]) is None:
                print(f"{name}: not checked, {command.split()[0]} was not found")
                continue
            print(f"{name}: {subprocess.check_output([*command.split(), '--version'], text=True).splitlines()[0]}")
            (compilation.gcc if kind == "gcc" else compilation.clang)(name, command)
            compilation.objects(name, architecture, SETUP.cpu_sources(), PYTHON_HEADERS)
    compilation.ninja.run()


def kernel_sources() -> list[Path]:
    """The row kernels, what chooses between them and their loops; no bindings and no matrix products."""
    return [s for s in SETUP.cpu_sources() if s.stem in ("isa", "parallel") or s.stem.startswith("row_")]


def check_arm() -> None:
    """Writes vectors here and compares them with what ARM's instruction sets make of the same problems."""
    packages = {"g++": "g++"}
    emulator = []
    if HERE != ARM:
        packages |= {gcc_for(ARM): "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}
        emulator = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
    require(packages)
    compilation = Compilation()
    for architecture in {HERE, ARM}:
        name = f"gcc-{architecture}"
        compilation.gcc(name, gcc_for(architecture))
        kernels = compilation.objects(name, architecture, kernel_sources(), PYTHON_HEADERS)
        driver = compilation.objects(name, architecture, [ROOT / "tests" / "row_vectors" / "main.cpp"], [])
        compilation.ninja.build(f"{name}/row_vectors", f"{name}-link", [*kernels, *driver], [])
    compilation.ninja.run()
    vectors = BUILD / "vectors.bin"
    subprocess.run([BUILD / f"gcc-{HERE}" / "row_vectors", "write", vectors], check=True)
    sets = ["scalar", *SETUP.ARM_ISAS]
    checked = subprocess.run([*emulator, BUILD / f"gcc-{ARM}" / "row_vectors", "check", vectors, *sets], check=False)
    vectors.unlink()
    sys.exit(checked.returncode)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["warnings", "arm"])
    {"warnings": check_warnings, "arm": check_arm}[parser.parse_args().check]()
