"""What a user of an installed wheel relies on: every backend that is there, every loss, the command, README's example.

    python smoke_test.py README.md [--with-cuda]

Run in an environment that holds the wheel, torch and triton, with no compiler on the PATH.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when the package is imported

import torch

import cpo_kernels
from cpo_kernels.kernels import registry
from cpo_kernels.kernels.cuda import extension as cuda_extension

COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "clang++", "nvcc")
TOLERANCE = 1e-5  # of float32 against float64, in the norm
GROUPS, CANDIDATES, TOKENS, VOCAB, HIDDEN = 3, 4, 5, 37, 16


def check(right: bool, problem: str) -> None:
    if not right:
        raise SystemExit(f"smoke test: {problem}")


def openmp_runtimes() -> set[str]:
    """OpenMP runtimes that this process has loaded, by file; GCC's, LLVM's or Intel's."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        files = {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
    return {file for file in files if re.search(r"/lib(gomp|omp|iomp5)\b[^/]*\.so", file)}


def problem(candidates: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(VOCAB, (GROUPS, candidates, TOKENS))
    targets[0, -1, 3:] = -100
    return {
        "hidden": torch.randn(GROUPS, candidates, TOKENS, HIDDEN),
        "weight": torch.randn(VOCAB, HIDDEN),
        "targets": targets,
        "ref_logps": torch.randn(GROUPS, candidates),
    }


# Each takes hidden, weight, targets, reference log-likelihoods and a backend, and returns numbers to differentiate.
def fused(**options):
    def loss(hidden, weight, targets, ref_logps, backend):
        call = cpo_kernels.linear_cpo_loss
        return call(hidden, weight, targets, ref_logps=ref_logps, beta=0.3, backend=backend, **options).loss

    return loss


def of_logits(hidden, weight, targets, ref_logps, backend):
    return cpo_kernels.cpo_loss(hidden @ weight.T, targets, ref_logps=ref_logps, mle_weight=0.5, backend=backend).loss


def own_loss(hidden, weight, targets, ref_logps, backend):
    def loss(logps, groups):
        return (logps - ref_logps[groups.start : groups.stop]).square().sum()

    return cpo_kernels.linear_sequence_loss(hidden, weight, targets, loss, backend=backend)


def log_likelihoods(hidden, weight, targets, ref_logps, backend):
    return cpo_kernels.linear_sequence_logps(hidden, weight, targets, backend=backend)


LOSSES = {
    "plackett_luce": (CANDIDATES, fused(mle_weight=0.5)),
    "ranked": (CANDIDATES, fused(ranks=torch.arange(CANDIDATES).expand(GROUPS, -1))),
    "length normalized, with a margin": (2, fused(margin=0.2, length_normalized=True)),
    "label smoothing": (2, fused(label_smoothing=0.1)),
    "hinge": (2, fused(loss_type="hinge")),
    "ipo": (2, fused(loss_type="ipo")),
    "of logits": (CANDIDATES, of_logits),
    "a function": (CANDIDATES, own_loss),
    "log-likelihoods": (CANDIDATES, log_likelihoods),
}


def values_and_gradients(loss, inputs: dict[str, torch.Tensor], dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    hidden, weight = (inputs[name].to(dtype).requires_grad_() for name in ("hidden", "weight"))
    value = loss(hidden, weight, inputs["targets"], inputs["ref_logps"].to(dtype), backend)
    value.sum().backward()
    return [tensor.detach().double() for tensor in (value, hidden.grad, weight.grad)]


def check_backend(backend: str) -> None:
    for name, (candidates, loss) in LOSSES.items():
        inputs = problem(candidates)
        expected = values_and_gradients(loss, inputs, torch.float64, "torch")
        found = values_and_gradients(loss, inputs, torch.float32, backend)
        for what, right, ours in zip(
            ("value", "gradient of hidden", "gradient of weight"), expected, found, strict=True
        ):
            error = float((ours - right).norm() / right.norm())
            check(error <= TOLERANCE, f"backend {backend}, loss {name}: the {what} is off by {error:.1e}")


def check_command() -> str:
    command = Path(sys.executable).with_name("cpo-kernels")
    result = subprocess.run([command, "info"], capture_output=True, text=True, check=False)
    check(result.returncode == 0, f"cpo-kernels info failed: {result.stderr}")
    return result.stdout


def check_cuda(info: str, demanded: bool) -> None:
    """The compiled CUDA kernels load anywhere; where they cannot be used, the command says why."""
    if demanded:
        import_module("cpo_kernels._cuda")
        check("cuda extension   compiled for sm_" in info, "the command does not say what _cuda is compiled for")
    reason = cuda_extension.unavailable_reason()
    if reason is not None:
        check(f"not available: {reason}" in info, f"the command does not say why there is no CUDA: {reason}")


def example_of(readme: Path) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", readme.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return next(block for block in blocks if "cpo_kernels.linear_cpo_loss(" in block)


def check_example(readme: Path) -> None:
    names: dict[str, torch.Tensor] = {}
    exec(compile(example_of(readme), str(readme), "exec"), names)
    for name in ("hidden", "weight"):
        check(bool(names[name].grad.isfinite().all()), f"README's example leaves no gradient of {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks an installed wheel.")
    parser.add_argument("readme", type=Path)
    parser.add_argument("--with-cuda", action="store_true", help="the wheel must hold _cuda")
    arguments = parser.parse_args()

    found = [name for name in COMPILERS if shutil.which(name)]
    check(not found, f"compilers are on the PATH: {', '.join(found)}")
    check(Path(cpo_kernels.__file__).is_relative_to(sys.prefix), f"{cpo_kernels.__file__} is not the installed package")
    used = [name for name in ("torch", "cpu", "triton") if name in registry.available()]
    check({"torch", "cpu"} <= set(used), f"backends available: {', '.join(used)}")
    for backend in used:
        check_backend(backend)
    if sys.platform == "linux":
        runtimes = openmp_runtimes()
        check(len(runtimes) == 1, f"expected one OpenMP runtime, found {sorted(runtimes)}")
    info = check_command()
    check_cuda(info, arguments.with_cuda)
    check_example(arguments.readme)
    print(info)
    print(f"smoke test passed: Python {sys.version.split()[0]}, torch {torch.__version__}, backends {', '.join(used)}")


if __name__ == "__main__":
    main()
