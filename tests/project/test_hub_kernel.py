"""The folder of `make hub-kernel` loads beside the package, under another name, and computes what the package does."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from types import FunctionType, MethodType

import pytest
import torch
from project import ROOT
from torch import nn

import cpo_kernels
from build_tools import hub_kernel

pytestmark = pytest.mark.cpu
# Not by its name, which is also that of a folder of tests.
HAS_KERNELS = any(importlib.metadata.distributions(name="kernels"))
needs_kernels = pytest.mark.skipif(
    not HAS_KERNELS, reason="the library kernels is not installed: make check-hub-kernel"
)
# What a kernel may import besides itself. NumPy is no dependency of torch, but one of the package.
FOREIGN = {"numpy", "torch", "triton"}
NOT_OF_THE_KERNEL = {"CPOConfig", "CPOTrainer", "attach_linear_loss"}


def load(variant):
    """Import a variant as the library does, under the name in its metadata."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "hub-kernel"
    hub_kernel.build(out)
    return out


@pytest.fixture(scope="module", params=["import", pytest.param("get_local_kernel", marks=needs_kernels)])
def kernel(request, repository):
    if request.param == "import":
        yield load(repository / "build" / "torch-cpu")
    else:
        yield importlib.import_module("kernels").get_local_kernel(repository)


def problem(dtype, seed=0):
    """Hidden states (G, C, T, H), weight (V, H), bias; targets with padding and an absent candidate."""
    torch.manual_seed(seed)
    hidden, weight, bias = torch.randn(3, 3, 6, 16), torch.randn(37, 16), torch.randn(37)
    targets = torch.randint(37, (3, 3, 6))
    targets[:, :, 4:], targets[0, 1, 0], targets[2, 1, :] = -100, -100, -100
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)], targets


def of_linear_loss(module, tensors, targets):
    hidden, weight, bias = tensors
    options = {"ref_logps": torch.linspace(-9, -5, 9).view(3, 3), "mle_weight": 0.5, "max_logits_bytes": 8 * 37 * 4}
    out = module.linear_cpo_loss(hidden, weight, targets, bias=bias, backend="torch", **options)
    return out.loss, out.logps


def of_linear_logps(module, tensors, targets):
    hidden, weight, bias = tensors
    logps = module.linear_token_logps(hidden, weight, targets, bias=bias, backend="torch", max_logits_bytes=8 * 37 * 4)
    return logps.square().sum(), logps


def of_logits_loss(module, tensors, targets):
    hidden, weight, bias = tensors
    out = module.cpo_loss(hidden @ weight.T + bias, targets, backend="torch")
    return out.loss, out.logps


FUNCTIONS = [of_linear_loss, of_linear_logps, of_logits_loss]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_equal_the_package(kernel, function, dtype):
    results = []
    for module in (kernel, cpo_kernels):
        tensors, targets = problem(dtype)
        loss, more = function(module, tensors, targets)
        results.append((loss, more, *torch.autograd.grad(loss, tensors)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert torch.isfinite(results[0][0]) and results[0][2].any()


def test_plain_torch_serves_it(kernel):
    assert "torch" in kernel.backends.available() and "cpu" not in kernel.backends.available()
    assert "cpu" in cpo_kernels.backends.available()
    tensors, targets = problem(torch.float32)
    loss = kernel.linear_cpo_loss(*tensors[:2], targets).loss  # backend="auto"
    assert torch.equal(loss, kernel.linear_cpo_loss(*tensors[:2], targets, backend="torch").loss)


def test_public_names(kernel):
    assert set(kernel.__all__) == {*cpo_kernels.__all__, "layers"} - NOT_OF_THE_KERNEL
    assert all(hasattr(kernel, name) for name in kernel.__all__)


def test_it_is_a_package_of_its_own(kernel):
    """Nothing of the installed package is in it: neither classes nor operators."""
    assert kernel.CandidateLayout is not cpo_kernels.CandidateLayout
    parts = [module for name, module in sys.modules.items() if name.startswith(f"{kernel.__name__}.")]
    assert len(parts) > 30
    for part in parts:
        defined = {value.__module__ for value in vars(part).values() if isinstance(value, (type, FunctionType))}
        assert not [name for name in defined if name.split(".")[0] == "cpo_kernels"]
    ours, theirs = getattr(torch.ops, kernel.__name__), torch.ops.cpo_kernels
    assert ours.row_forward is not theirs.row_forward
    logits = torch.zeros(2, 4), torch.tensor([1, -100]), None, None, 1.0, 0.0, 1.0
    torch.testing.assert_close(ours.row_forward(*logits)[1], torch.tensor([-math.log(4), 0.0]))


def test_compiles_without_graph_breaks(kernel):
    tensors, targets = problem(torch.float32)
    results = []
    for function in (of_linear_logps, torch.compile(of_linear_logps, fullgraph=True, backend="eager")):
        loss, logps = function(kernel, tensors, targets)
        results.append((loss, logps, *torch.autograd.grad(loss, tensors)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_several_in_one_process(repository, tmp_path):
    """Another version, and the same one at another place, beside the package."""
    source = tmp_path / "cpo_kernels"
    shutil.copytree(ROOT / "cpo_kernels", source, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    with (source / "layout.py").open("a") as file:
        file.write("\n# another version\n")
    other, *_ = hub_kernel.build(tmp_path / "other", source)
    hub_kernel.build(tmp_path / "same")
    modules = [
        load(folder) for folder in (repository / "build" / "torch-cpu", other, tmp_path / "same/build/torch-cpu")
    ]
    assert len({module.__name__ for module in modules}) == 2
    results = []
    for module in (cpo_kernels, *modules):
        tensors, targets = problem(torch.float32)
        loss, _ = of_linear_loss(module, tensors, targets)
        results.append(torch.autograd.grad(loss, tensors))
    assert all(torch.equal(a, b) for grads in results[1:] for a, b in zip(grads, results[0], strict=True))


# Layers


class PlainLogps(nn.Module):
    """What a layer of the Hub may replace: the same arguments, logits in memory."""

    def forward(self, hidden, weight, targets, bias=None, temperature=1.0):
        logits = nn.functional.linear(hidden, weight, bias).float() / temperature
        chosen = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return chosen.where(targets != -100, 0.0)


def cross_entropy(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs):
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)


def replaced(kernel, repository, module, name):
    """A module with the forward of a layer: by `kernelize` where the library loaded the kernel."""
    if not HAS_KERNELS or not any(m.module is kernel for m in importlib.import_module("kernels").get_loaded_kernels()):
        module.forward = MethodType(getattr(kernel.layers, name).forward, module)
        return module
    from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

    replace_kernel_forward_from_hub(type(module), name)
    layer = LocalLayerRepository(repository, layer_name=name)
    with use_kernel_mapping({name: {"cpu": layer}}, inherit_mapping=False):
        kernelize(module, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
    assert module.forward.__func__ is getattr(kernel.layers, name).forward
    return module


def test_layer_of_token_logps(kernel, repository):
    tensors, targets = problem(torch.float32)
    hidden, weight, bias = tensors
    layer = replaced(kernel, repository, PlainLogps(), "LinearTokenLogps")
    for call in ((hidden, weight, targets), (hidden, weight, targets, bias, 0.7)):
        logps, expected = layer(*call), PlainLogps()(*call)
        torch.testing.assert_close(logps, expected)
        grads, expected = (torch.autograd.grad(x.square().sum(), (hidden, weight)) for x in (logps, expected))
        torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("how", ["mean", "items", "items_tensor", "shifted", "other_index"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_of_cross_entropy(kernel, repository, how, dtype):
    class Module(nn.Module):
        def forward(
            self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
        ):
            return cross_entropy(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)

    torch.manual_seed(0)
    labels = torch.randint(23, (2, 7))
    labels[0, :3] = labels[1, 5:] = 22 if how == "other_index" else -100
    options = {
        "mean": {},
        "items": {"num_items_in_batch": 5},
        "items_tensor": {"num_items_in_batch": torch.tensor(5)},
        "shifted": {"shift_labels": labels.roll(1, 1)},
        "other_index": {"ignore_index": 22},
    }[how]
    layer, results = replaced(kernel, repository, Module(), "ForCausalLMLoss"), []
    values = torch.randn(2, 7, 23).to(dtype)
    for function in (layer, cross_entropy):
        logits = values.clone().requires_grad_()
        loss = function(logits, labels, 23, **options)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    (loss, grad), (expected, expected_grad) = results
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["CPOLoss", "LinearCPOLoss"])
def test_layers_of_the_loss_have_the_options_of_the_module(kernel, repository, name):
    kind = type(name, (getattr(cpo_kernels, name),), {})  # its class attribute must not stay on the package's
    (hidden, weight, _), targets = problem(torch.float32)
    inputs = (hidden, weight, targets) if name == "LinearCPOLoss" else (hidden @ weight.T, targets)
    results = []
    for module in (
        replaced(kernel, repository, kind(beta=0.3, backend="torch"), name),
        kind(beta=0.3, backend="torch"),
    ):
        loss = module(*inputs, ref_logps=torch.linspace(-9, -5, 9).view(3, 3)).loss
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight), retain_graph=True)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_layers_have_no_state(kernel):
    layers = [
        value
        for value in vars(kernel.layers).values()
        if isinstance(value, type) and value.__module__ == kernel.layers.__name__
    ]
    assert len(layers) == 4
    for layer in layers:
        own = {name for name in dir(layer) if name not in dir(nn.Module)}
        assert issubclass(layer, nn.Module) and layer.__init__ is nn.Module.__init__
        assert own <= {"can_torch_compile", "has_backward"}


# The folder


@pytest.mark.parametrize("backend", ["cpu", "cuda", "rocm"])
def test_metadata(repository, backend):
    variant = repository / "build" / f"torch-{backend}"
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["name"] == "cpo-kernels" and metadata["backend"] == {"type": backend}
    assert metadata["id"].isidentifier() and metadata["id"].startswith(f"_cpo_kernels_{backend}_")
    assert isinstance(metadata["version"], int) and metadata["license"] == "Apache-2.0"
    files = metadata["digest"]["files"]
    there = {
        path.relative_to(variant).as_posix(): path for path in variant.rglob("*.*") if path.suffix in (".py", ".json")
    }
    assert set(files) == {*there} - {"metadata.json"}
    for name, digest in files.items():
        assert base64.b64decode(digest) == hashlib.sha256(there[name].read_bytes()).digest()


def test_two_builds_are_one(repository, tmp_path):
    hub_kernel.build(tmp_path)
    variant = "build/torch-cuda/metadata.json"
    assert (tmp_path / variant).read_bytes() == (repository / variant).read_bytes()


def test_every_import_is_of_the_kernel_or_allowed(repository):
    root = repository / "build" / "torch-cuda"
    modules = list(root.rglob("*.py"))
    assert len(modules) > 40
    for path in modules:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = {node.module.split(".")[0]}
            elif isinstance(node, ast.ImportFrom):
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                assert base.is_relative_to(root)
                found = base.with_suffix(".py").exists() or (base / "__init__.py").exists()
                assert found, f"{path}:{node.lineno}: no {base}"
                continue
            else:
                continue
            assert names <= FOREIGN | sys.stdlib_module_names, f"{path}:{node.lineno}: {names}"


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("options.py", "from cpo_kernels.engine import plan", "from .engine import plan"),
        ("engine/call.py", "from cpo_kernels.kernels.cpu import gemm as g", "from ..kernels.cpu import gemm as g"),
        ("kernels/cpu/gemm.py", "from cpo_kernels import options", "from ... import options"),
        ("kernels/__init__.py", "from cpo_kernels.options import Head", "from ..options import Head"),
        ("a.py", "from cpo_kernels.b import (\n    c,  # é\n    d,\n)\nx = 1", None),
        ("a.py", "x = 'é'; from cpo_kernels.b import c; from cpo_kernels.d import e", None),
        ("a.py", "def f():\n    from  cpo_kernels.b import c\n    return c", None),
        ("a.py", '"""See cpo_kernels.b."""\n# cpo_kernels\nfrom torch import nn', ...),
        ("a.py", "from cpo_kernels_peer import b", ...),
        ("a.py", "x = 'my cpo_kernels here'", ...),
    ],
)  # fmt: skip
def test_imports_become_relative(name, code, expected):
    if expected is None:
        expected = code.replace("cpo_kernels", "")
    made = hub_kernel.relocatable(code.encode(), hub_kernel.Path(name)).decode()
    assert made == (code if expected is ... else expected)


@pytest.mark.parametrize(
    "code",
    [
        "import cpo_kernels",
        "import torch, cpo_kernels.options as o",
        "from \\\n  cpo_kernels import a",
        "import_module('cpo_kernels.kernels')",
        "import_module(f'cpo_kernels.{name}')",
        "custom_op('cpo_kernels::gemm_')",
        "torch.ops.cpo_kernels.gemm_()",
        "find_spec('cpo_kernels')",
    ],
)
def test_other_ways_to_the_package_are_errors(code):
    with pytest.raises(ValueError, match=r"^a\.py:[12]: .*cpo_kernels"):
        hub_kernel.relocatable(code.encode(), hub_kernel.Path("a.py"))


# Triton's kernels, in the interpreter

INTERPRETED = """
import importlib.util, json, sys, torch
from pathlib import Path
variant = Path(sys.argv[1])
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
status = next(s for s in kernel.backends.describe() if s.name == "triton")
if not status.available:
    sys.exit("triton: " + status.reason)
torch.manual_seed(0)
values, targets = (torch.randn(1, 2, 3, 8), torch.randn(19, 8)), torch.randint(19, (1, 2, 3))
targets[:, 1, 2:] = -100
results = []
for backend in ("triton", "torch"):
    hidden, weight = (value.clone().requires_grad_() for value in values)
    loss = kernel.linear_cpo_loss(hidden, weight, targets, backend=backend).loss
    results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
for one, other in zip(*results):
    torch.testing.assert_close(one, other)
assert not any(module.split(".")[0] == "cpo_kernels" for module in sys.modules)
print("equal")
"""


def test_triton_runs_without_the_package(repository, tmp_path):
    """In a process that cannot import the package; the interpreter stands for the GPU."""
    variant = repository / "build" / "torch-cuda"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(variant)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    if run.returncode and "triton is not installed" in run.stderr:
        pytest.skip("triton is not installed: pip install triton")
    assert run.stdout.strip() == "equal", run.stderr
