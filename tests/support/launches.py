"""A recorder of what a call would launch on a GPU, on CPU tensors: kernels are named and not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from interpreter import interpreter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cpo_kernels.engine.tokens
import cpo_kernels.objective
from cpo_kernels.kernels import registry

PRODUCT = "product"
FREE = ("empty", "detach", "alias", "lift_fresh", "_unsafe_view")


class Recorder(TorchDispatchMode):
    """A mode that records the operators that launch or copy, in order; views and allocations do neither.

    A product of the head is recorded as ``PRODUCT`` and not computed. Operators of the package are ways to kernels,
    which :func:`recorded` records.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        if (
            space != "cpo_kernels"
            and not is_view(func)
            and not any(word in name for word in FREE)
            and not is_poison(name, args)
        ):
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def product(self, *_operands: Any) -> None:
        """Record a product in place of a backend's."""
        self.names.append(PRODUCT)

    def before(self) -> list[str]:
        """Return what was launched before the first product."""
        return self.names[: self.names.index(PRODUCT)]

    def after(self) -> list[str]:
        """Return what was launched after the last product."""
        return self.names[len(self.names) - self.names[::-1].index(PRODUCT) :]


def is_poison(name: str, args: Any) -> bool:
    """Tell whether an operator fills memory with what the tests (conftest.py) put into every allocation."""
    if name != "fill_":
        return False
    tensor, value = args
    return value != value if tensor.is_floating_point() else value == torch.iinfo(tensor.dtype).max


def is_view(func: Any) -> bool:
    """Tell whether an operator returns memory of its arguments without writing to it."""
    infos = [returned.alias_info for returned in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


@contextmanager
def recorded(monkeypatch: Any) -> Iterator[Recorder]:
    """Record as if CPU tensors were a GPU's: transfers are launches, and the host knows what it has copied."""
    recorder = Recorder()

    def launch(executor: Any, *_args: Any, **_kwargs: Any) -> None:
        recorder.names.append(executor.fn.__name__)

    def to_host(*tensors: Tensor | None) -> list[np.ndarray | None]:
        given = [tensor for tensor in tensors if tensor is not None]
        recorder.names.extend(["to_host"] if len(given) == 1 else ["cat", "to_host"])
        return [None if tensor is None else tensor.numpy() for tensor in tensors]

    def upload(arrays: Any, device: torch.device) -> tuple[Tensor, ...]:
        recorder.names.append("upload")
        return tuple(torch.from_numpy(np.array(array)) for array in arrays)

    def to_device(tensor: Tensor, device: torch.device) -> Tensor:
        recorder.names.extend(["pin", "upload"])
        return tensor

    tokens, objective = cpo_kernels.engine.tokens, cpo_kernels.objective
    backends = {
        name: replace(backend, gemm_=recorder.product, gemm_pair_=recorder.product)
        for name, backend in registry.BACKENDS.items()
    }
    with monkeypatch.context() as patch:
        patch.setattr(interpreter().GridExecutor, "__call__", launch)
        patch.setattr(registry, "BACKENDS", backends)
        patch.setattr(tokens, "to_host", to_host)
        patch.setattr(tokens, "upload", upload)
        patch.setattr(tokens, "is_host", lambda device: False)
        patch.setattr(objective, "is_host", lambda device: False)
        patch.setattr(objective, "to_device", to_device)
        with recorder:
            yield recorder
