"""Builds cpo_kernels._cpu always, and cpo_kernels._cuda for the NVIDIA GPUs that are visible or asked for.

The C++ needs neither torch nor a CPU of the kind it will run on: a file named `*_<isa>.cpp` is compiled for that
instruction set only, where the compiler's architecture has it, and the module picks one at run time. Objects and
build.ninja stay in build/ninja-*, so that a rebuild is incremental; all but the bindings serve every Python.

Environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, CUDA_HOME; CPO_KERNELS_CUDA=0 (never) or 1 (required, for the
architectures of a release where no GPU is visible); CPO_KERNELS_CUDA_ARCHS (such as "80 90a 100+PTX").
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "build_tools"))

from cuda_choice import CudaChoice, choose  # noqa: E402
from readme_links import with_absolute_links  # noqa: E402

MACOS = sys.platform == "darwin"

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_ISAS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
ARM_ISAS: dict[str, list[str]] = {"neon": []}  # part of every 64-bit ARM processor
# Instruction sets and their flags by architecture, as `-dumpmachine` spells it: Linux says aarch64, macOS arm64.
ISA_FLAGS = {"x86_64": X86_ISAS, "aarch64": ARM_ISAS, "arm64": ARM_ISAS}

# No -ffast-math: NaN and infinity must propagate. Contraction is off so that every fused multiply-add is one we wrote.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    # The row kernels write 16-bit gradients over the float32 logits that they were computed from.
    "-fno-strict-aliasing",
    *("-Wall", "-Wextra"),
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
LINK_FLAGS = ["-bundle", "-undefined", "dynamic_lookup"] if MACOS else ["-shared", "-Wl,--as-needed"]


def isa_of(source: Path) -> str | None:
    """The instruction set that a file is compiled for, from its name; None for baseline code."""
    suffix = source.stem.rpartition("_")[2]
    return suffix if any(suffix in isas for isas in ISA_FLAGS.values()) else None


def isa_flags(source: Path, architecture: str) -> list[str] | None:
    """What compiles a file for its instruction set; None where the architecture has no such set."""
    isa = isa_of(source)
    return [] if isa is None else ISA_FLAGS.get(architecture, {}).get(isa)


def cpu_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))


def cuda_sources() -> list[Path]:
    cuda = ROOT / "csrc" / "cuda"
    return sorted(cuda.glob("*.cu")) + sorted(cuda.glob("*.cpp"))


def is_binding(source: Path) -> bool:
    """Whether a file includes Python.h: its object serves one version of Python, the others serve all."""
    return source.stem.startswith("bind")


def compiler() -> str:
    named = os.environ.get("CXX")
    found = named or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if sys.platform == "win32" or not found:
        raise SystemExit("cpo-kernels needs GCC or Clang: install g++, or set CXX to the compiler")
    return found


def architecture_of(cxx: str) -> str:
    """What the compiler compiles for, such as x86_64 or aarch64: for a cross compiler, not the machine it runs on."""
    return subprocess.check_output([*cxx.split(), "-dumpmachine"], text=True).partition("-")[0]


class NinjaFile:
    """The text of a build.ninja; an object is rebuilt when its source, a header, or its command line changes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines: list[str] = ["ninja_required_version = 1.5"]

    @staticmethod
    def escape(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def rule(self, name: str, command: str, *, depfile: bool) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, output: Path | str, rule: str, inputs: list[Path | str], flags: list[str]) -> Path | str:
        self.lines.append(f"build {self.escape(output)}: {rule} {' '.join(map(self.escape, inputs))}")
        self.lines.append("  flags = " + " ".join(flags).replace("$", "$$"))
        return output

    def run(self) -> None:
        file = self.directory / "build.ninja"
        file.write_text("\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS")
        command = [sys.executable, "-m", "ninja", "-C", str(self.directory), *(["-j", jobs] if jobs else [])]
        if subprocess.call(command):
            raise SystemExit(f"compilation failed: {' '.join(command)}")


class NinjaBuild(build_ext):
    """Compiles all extensions with one ninja run."""

    cuda: CudaChoice

    def run(self) -> None:
        self.cuda = choose()
        if not self.cuda.architectures:
            self.leave_out("cpo_kernels._cuda")
        super().run()

    def leave_out(self, name: str) -> None:
        """Drops an extension, and what an earlier build left of it, which would be imported or go into the wheel."""
        self.extensions = [ext for ext in self.extensions if ext.name != name]
        file = self.get_ext_filename(name)
        for folder in (Path(self.build_lib), *([ROOT] if self.inplace else [])):
            (folder / file).unlink(missing_ok=True)

    def build_extensions(self) -> None:
        cxx = compiler()
        architecture = architecture_of(cxx)
        compiled = [source for source in cpu_sources() if isa_flags(source, architecture) is not None]
        isas = ", ".join(dict.fromkeys(isa_of(source) or "scalar" for source in compiled))
        print(f"cpo-kernels: _cpu is compiled for {architecture} ({isas}); _cuda is {self.cuda.summary}", flush=True)

        work = ROOT / "build" / f"ninja-{sysconfig.get_platform()}"
        work.mkdir(parents=True, exist_ok=True)
        self.write_summary(work / "cuda_summary.h")
        ninja = NinjaFile(work)
        self.write_rules(ninja, cxx)
        for ext in self.extensions:
            self.write_extension(ninja, ext, architecture)
        ninja.run()
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # Renamed into place: a process that has the old module loaded keeps it whole.
            fresh = target.with_name(target.name + ".new")
            shutil.copy2(work / target.name, fresh)
            os.replace(fresh, target)

    def write_summary(self, header: Path) -> None:
        """What became of _cuda, for _cpu to tell. A header that stays the same keeps its time, and its object."""
        text = f"#define CPO_CUDA_SUMMARY {json.dumps(self.cuda.summary)}\n"
        if not header.exists() or header.read_text() != text:
            header.write_text(text)

    def write_rules(self, ninja: NinjaFile, cxx: str) -> None:
        ninja.rule("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out", depfile=True)
        ninja.rule("link", f"{cxx} $in -o $out $flags", depfile=False)
        if self.cuda.nvcc:
            ninja.rule("nvcc", f"{self.cuda.nvcc} -MMD -MF $out.d $flags -c $in -o $out", depfile=True)
            ninja.rule("nvlink", f"{self.cuda.nvcc} $in -o $out $flags", depfile=False)

    def binding_flags(self, work: Path) -> list[str]:
        """Python's and pybind11's headers, as system headers.

        pip's isolated environment lies in another folder each time. The link keeps its path, and so the command line,
        the same for one version of pybind11, and `-MMD` leaves system headers out of the dependencies.
        """
        link = work / f"pybind11-{pybind11.__version__}"
        link.unlink(missing_ok=True)
        link.symlink_to(pybind11.get_include(), target_is_directory=True)
        includes = [f"-isystem {NinjaFile.escape(p)}" for p in (link, sysconfig.get_path("include"))]
        return [*includes, f"-I{NinjaFile.escape(work)}"]

    def write_extension(self, ninja: NinjaFile, ext: Extension, architecture: str) -> None:
        include = f"-I{ROOT / 'csrc'}"
        common = [*CXX_FLAGS, include, *os.environ.get("CXXFLAGS", "").split()]
        bindings = self.binding_flags(ninja.directory)
        objects: list[Path | str] = []
        for source in map(Path, ext.sources):
            output = f"{ext.name}/{source.stem}{source.suffix}.o"
            if source.suffix == ".cu":
                objects.append(ninja.build(output, "nvcc", [ROOT / source], [*NVCC_FLAGS, *self.cuda.flags(), include]))
            elif is_binding(source):
                output = f"{ext.name}/{sys.implementation.cache_tag}/{source.stem}{source.suffix}.o"
                objects.append(ninja.build(output, "cxx", [ROOT / source], common + bindings))
            elif (flags := isa_flags(source, architecture)) is not None:
                objects.append(ninja.build(output, "cxx", [ROOT / source], common + flags))
        library = Path(self.get_ext_fullpath(ext.name)).name
        if ext.name.endswith("_cuda"):
            ninja.build(library, "nvlink", objects, ["-shared", "-cudart=static"])
        else:
            ninja.build(library, "link", objects, [*LINK_FLAGS, *os.environ.get("LDFLAGS", "").split()])


def extension(name: str, sources: list[Path]) -> Extension:
    return Extension(f"cpo_kernels.{name}", [str(s.relative_to(ROOT)) for s in sources])


def long_description() -> str:
    """README, with links that work where no files lie beside it."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (source,) = re.findall(r'^Source = "(.+)"$', settings, re.MULTILINE)
    (version,) = re.findall(r'^version = "(.+)"$', settings, re.MULTILINE)
    return with_absolute_links((ROOT / "README.md").read_text(encoding="utf-8"), source, version)


if __name__ == "__main__":
    setup(
        ext_modules=[extension("_cpu", cpu_sources()), extension("_cuda", cuda_sources())],
        cmdclass={"build_ext": NinjaBuild},
        long_description=long_description(),
        long_description_content_type="text/markdown",
    )
