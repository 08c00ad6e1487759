"""Builds cpo_kernels._cpu always, and cpo_kernels._cuda where csrc/cuda has sources and nvcc is found.

The C++ needs neither torch nor a CPU of the kind it will run on: a file named `*_<isa>.cpp` is compiled for that
instruction set only, where the compiler's architecture has it, and the module picks one at run time. Objects and
build.ninja stay in build/ninja-*, so that a rebuild is incremental.

Environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS; CPO_KERNELS_CUDA=0 (never) or 1 (fail if CUDA cannot be built);
CUDA_HOME; CPO_KERNELS_CUDA_ARCHS (default "80 90a 100+PTX").
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
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
# Apple's Clang has no OpenMP; the kernels then run on one thread.
OPENMP_FLAGS = ["-Wno-unknown-pragmas"] if MACOS else ["-fopenmp"]
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
    kernels = sorted(cuda.glob("*.cu"))
    return kernels + sorted(cuda.glob("*.cpp")) if kernels else []


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home:
        candidate = Path(home) / "bin" / "nvcc"
        return str(candidate) if candidate.exists() else None
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_wanted() -> bool:
    """Whether to build _cuda; raises where it is demanded and cannot be built."""
    demand = os.environ.get("CPO_KERNELS_CUDA", "")
    if demand not in ("", "0", "1"):
        raise SystemExit(f"CPO_KERNELS_CUDA is {demand!r}; expected 0 (never), 1 (required) or unset (when possible)")
    missing = [] if cuda_sources() else ["csrc/cuda holds no .cu sources"]
    if find_nvcc() is None:
        missing.append("nvcc was not found (install the CUDA toolkit, or set CUDA_HOME to it)")
    if demand == "1" and missing:
        raise SystemExit("CPO_KERNELS_CUDA=1, but " + " and ".join(missing))
    return demand != "0" and not missing


def cuda_flags() -> list[str]:
    """-gencode for each architecture; `+PTX` adds PTX, which newer GPUs compile when the module is loaded."""
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
    for arch in os.environ.get("CPO_KERNELS_CUDA_ARCHS", "80 90a 100+PTX").split():
        number, _, ptx = arch.partition("+")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


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

    def build_extensions(self) -> None:
        work = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        work.mkdir(parents=True, exist_ok=True)
        ninja = NinjaFile(work)
        self.write_rules(ninja)
        for ext in self.extensions:
            self.write_extension(ninja, ext, self.include_flags(work))
        ninja.run()
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # Renamed into place: a process that has the old module loaded keeps it whole.
            fresh = target.with_name(target.name + ".new")
            shutil.copy2(work / target.name, fresh)
            os.replace(fresh, target)

    def write_rules(self, ninja: NinjaFile) -> None:
        cxx = compiler()
        ninja.rule("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out", depfile=True)
        ninja.rule("link", f"{cxx} $in -o $out $flags", depfile=False)
        nvcc = find_nvcc()
        if nvcc:
            ninja.rule("nvcc", f"{nvcc} -MMD -MF $out.d $flags -c $in -o $out", depfile=True)
            ninja.rule("nvlink", f"{nvcc} $in -o $out $flags", depfile=False)

    def include_flags(self, work: Path) -> list[str]:
        """Python's and pybind11's headers, as system headers.

        pip's isolated environment lies in another folder each time. The link keeps its path, and so the command line,
        the same for one version of pybind11, and `-MMD` leaves system headers out of the dependencies.
        """
        link = work / f"pybind11-{pybind11.__version__}"
        link.unlink(missing_ok=True)
        link.symlink_to(pybind11.get_include(), target_is_directory=True)
        return [f"-isystem {NinjaFile.escape(p)}" for p in (link, sysconfig.get_path("include"))]

    def write_extension(self, ninja: NinjaFile, ext: Extension, includes: list[str]) -> None:
        common = [*CXX_FLAGS, *OPENMP_FLAGS, f"-I{ROOT / 'csrc'}", *includes, *os.environ.get("CXXFLAGS", "").split()]
        is_cuda = ext.name.endswith("_cuda")
        architecture = architecture_of(compiler())
        objects: list[Path | str] = []
        for source in map(Path, ext.sources):
            output = f"{ext.name}/{source.stem}{source.suffix}.o"
            if source.suffix == ".cu":
                objects.append(ninja.build(output, "nvcc", [ROOT / source], [*cuda_flags(), f"-I{ROOT / 'csrc'}"]))
            elif (flags := isa_flags(source, architecture)) is not None:
                objects.append(ninja.build(output, "cxx", [ROOT / source], common + flags))
        library = Path(self.get_ext_fullpath(ext.name)).name
        if is_cuda:
            ninja.build(library, "nvlink", objects, ["-shared", "-cudart=static"])
        else:
            extra = os.environ.get("LDFLAGS", "").split()
            ninja.build(library, "link", objects, [*LINK_FLAGS, *OPENMP_FLAGS, *extra])


def extension(name: str, sources: list[Path]) -> Extension:
    return Extension(f"cpo_kernels.{name}", [str(s.relative_to(ROOT)) for s in sources])


if __name__ == "__main__":
    setup(
        ext_modules=[
            extension("_cpu", cpu_sources()),
            *([extension("_cuda", cuda_sources())] if cuda_wanted() else []),
        ],
        cmdclass={"build_ext": NinjaBuild},
    )
