"""The models of a run: the policy, which is trained, and the frozen reference, which a resumed run needs too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from cpo_kernels.models import LinearLossOutput, LogpsRequest, attach_linear_loss
from cpo_kernels.models.adapters import adapter_parameters
from cpo_kernels.models.head import evaluating

from .batch import body_inputs, layout_of
from .config import CPOConfig
from .fingerprint import fingerprint
from .zero import copy_model, serve, shards_parameters, under_deepspeed


class Reference:
    """A frozen model, or the model in training with its adapters disabled.

    Weights that are trained besides adapters (``bias="all"``, parts of the base model) are copied at the start. The
    copies take the place of the trained weights while the reference runs.

    Args:
        model: returns a frozen model in evaluation mode, or the model in training with its adapters.
        adapters: whether it returns the model in training.
    """

    def __init__(self, model: Callable[[], nn.Module], adapters: bool) -> None:
        self._model, self.adapters = model, adapters
        self.engine: Any = None  # of DeepSpeed, whose hooks end with it
        self._start = trained_besides_adapters(model()) if adapters else {}
        # Computed before parameters are sharded or trained.
        self.fingerprint = self.take_fingerprint()
        self.description = describe(model())

    def take_fingerprint(self) -> str:
        """Compute the fingerprint of the present weights of the reference."""
        return fingerprint(self._model(), frozen_only=self.adapters, as_they_were=self._start)

    @property
    def moving(self) -> list[str]:
        """The names of the parameters that are trained besides adapters."""
        return list(self._start)

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Yield the reference model, ready to run."""
        with evaluating(self._model()) as model:
            if not self.adapters:
                yield model
                return
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            with model.disable_adapter(), self._as_at_the_start(model):  # type: ignore[operator]
                # Disabling freezes adapters, and FSDP2 takes parameters frozen in their first pass for always frozen.
                for parameter in trained:
                    parameter.requires_grad_(True)
                yield model

    @contextmanager
    def _as_at_the_start(self, model: nn.Module) -> Iterator[None]:
        """Restore the initial values of weights trained besides adapters, within the context."""
        parameters = dict(model.named_parameters())
        now = {name: parameters[name].data for name in self._start}
        try:
            for name, value in self._start.items():
                self._start[name] = parameters[name].data = value.to(now[name])
            yield
        finally:
            for name, value in now.items():
                parameters[name].data = value

    def score(self, inputs: Mapping[str, Any], head: Mapping[str, Any], pool: bool) -> LinearLossOutput:
        """Compute log-likelihoods (S,) of a batch's candidates and, with ``pool``, their embeddings (S, H)."""
        with self.active() as model:
            # Before training, Trainer may have left the model on the CPU.
            device = next(model.parameters()).device
            inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
            request = LogpsRequest(inputs["targets"], layout_of(inputs), pool=pool, **head)
            return model(**body_inputs(inputs), linear_loss=request)


@dataclass
class Sources:
    """The model that is trained and its reference.

    Args:
        policy: returns the model that is trained.
        reference: its frozen reference, or None.
        head: options of the head: backend and budget.
        autocast: the context of forward passes.
        device: device of the models.
        synced_gpus: whether all processes have to run the same number of forward passes, as with sharded parameters.
    """

    policy: Callable[[], nn.Module]
    reference: Reference | None
    head: dict[str, Any]
    autocast: Callable[[], AbstractContextManager]
    device: torch.device
    synced_gpus: bool = False

    @contextmanager
    def asking(self, who: str = "model") -> Iterator[nn.Module]:
        """Yield the policy or, if named and present, the reference, in evaluation mode and without gradients."""
        of_reference = self.reference if who == "reference" else None
        source = evaluating(self.policy()) if of_reference is None else of_reference.active()
        with source as model, self.autocast():
            yield model


def trained_besides_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Return copies, by name, of the trained parameters that disabling adapters does not switch off."""
    of_adapters = {id(parameter) for parameter in adapter_parameters(model)}
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in of_adapters
    }


def not_saved_with_adapters(model: nn.Module) -> list[str]:
    """Return the names of trained parameters that a checkpoint of adapters does not hold."""
    if not hasattr(model, "peft_config"):
        return []
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(model)
    return [name for name in trained_besides_adapters(model) if name not in saved]


def make_reference(
    config: CPOConfig, policy: Callable[[], nn.Module], ref_model: PreTrainedModel | None, accelerator: Accelerator
) -> tuple[nn.Module | None, Reference | None]:
    """Make the reference, and its model unless that is the policy.

    Args:
        config: says whether there is a reference.
        policy: returns the model that is trained.
        ref_model: the reference that the user gave, or None.
        accelerator: the accelerator of the run; if it shards parameters, those of the reference are sharded too.
    """
    if config.reference == "none":
        if ref_model is not None:
            raise ValueError("ref_model was given together with reference='none'")
        return None, None
    if ref_model is None and not config.contrasts:
        return None, None
    model = accelerator.unwrap_model(policy())
    if ref_model is None and hasattr(model, "disable_adapter"):
        reference = Reference(policy, adapters=True)
        if reference.moving and shards_parameters(accelerator):
            raise ValueError(
                f"{reference.moving[0]!r} is trained besides the adapters, so the model without them does not stay as "
                "it was, and sharded parameters cannot be put back; pass ref_model, or train the adapters alone"
            )
        return None, reference
    if ref_model is None and config.reference == "precomputed":  # The policy is scored before it is trained.
        return None, Reference(policy, adapters=False)
    frozen = attach_linear_loss(copy_model(model) if ref_model is None else ref_model)
    frozen = frozen.eval().requires_grad_(False)
    reference = Reference(lambda: frozen, adapters=False)
    # Sharding moves parameters to the device by itself, one group at a time.
    if under_deepspeed(accelerator):
        reference.engine = serve(frozen, accelerator)
    else:
        frozen = fsdp2_prepare_model(accelerator, frozen) if accelerator.is_fsdp2 else frozen.to(accelerator.device)
    return frozen, reference


def describe(model: nn.Module) -> dict[str, Any]:
    """Return the configuration and dtypes of a model, on which its outputs depend besides its parameters."""
    config: Any = model.config
    return {"config": config.to_dict(), "dtypes": sorted({str(p.dtype) for p in model.parameters()})}
