"""Weight-space ensembles: ``theta = alpha * theta_CPO + (1 - alpha) * theta_MLE`` (Feng et al. 2025)."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from cpo_kernels.models.sharded import gathered, whole_shape
from cpo_kernels.options import suggests_arguments

from .zero import loading_whole

Source = str | os.PathLike[str]
Weights = Mapping[str, Tensor]


@suggests_arguments
def ensemble(first: nn.Module, second: nn.Module, alpha: float) -> dict[str, Tensor]:
    """Average the states of two models: ``alpha * first + (1 - alpha) * second``, entry by entry.

    Args:
        first: a model, such as one trained with CPO.
        second: a model of the same names and shapes, such as one trained with MLE.
        alpha: in [0, 1]; 1 gives the first and 0 the second.

    Returns:
        A state for ``first.load_state_dict`` or ``save_pretrained(state_dict=...)``: dtypes, devices and tied entries
        as in ``first``; averages are formed in float32 (float64 for float64). Integers must be equal in both.

    Raises:
        ValueError: an alpha outside [0, 1], or models that differ in more than the values of their weights; the
            message names the first entry in which they do.
    """
    return _average_states(_state(first), _state(second), alpha)


@suggests_arguments
def ensemble_checkpoints(first_dir: Source, second_dir: Source, out_dir: Source, alpha: float) -> None:
    """Write the ensemble of two saved models, with the configuration and the tokenizer of the first.

    Two adapters (LoRA) of the same base give one adapter whose rank is the sum of theirs. It is the average of the
    merged weights, which an average of the low-rank factors would not be.

    Args:
        first_dir: directory that ``save_pretrained`` wrote.
        second_dir: directory that ``save_pretrained`` wrote of the other model.
        out_dir: directory to write safetensors to, other than the first two.
        alpha: weight of the first, in [0, 1].

    Raises:
        ValueError: as for :func:`ensemble`; tokenizers that differ; a model and an adapter; adapters other than plain
            LoRA of one base.
        OSError: a directory that holds no model, or ``out_dir`` is a file.
    """
    check_alpha(alpha)
    if Path(out_dir).resolve() in (Path(first_dir).resolve(), Path(second_dir).resolve()):
        raise ValueError(f"the ensemble would overwrite one of its parts, {out_dir}; expected another directory")
    _check_not_a_file(out_dir)
    tokenizer = _common_tokenizer(first_dir, second_dir)
    adapters = [_is_adapter(path) for path in (first_dir, second_dir)]
    if all(adapters):
        _ensemble_adapters(first_dir, second_dir, out_dir, alpha)
    elif any(adapters):
        one, other = (first_dir, second_dir) if adapters[0] else (second_dir, first_dir)
        raise ValueError(f"{one} is an adapter and {other} is not; expected two models or two adapters of one model")
    else:
        model = AutoModelForCausalLM.from_pretrained(first_dir)
        model.load_state_dict(ensemble(model, AutoModelForCausalLM.from_pretrained(second_dir), alpha))
        model.save_pretrained(out_dir)
    if tokenizer is not None:
        tokenizer.save_pretrained(out_dir)


@suggests_arguments
class EnsembleCallback(TrainerCallback):
    """A callback that writes an ensemble of the trained and another model to ``output_dir/ensemble`` at the end.

    Args:
        other: the other model, such as one trained with MLE, or the directory that it was saved in.
        alpha: weight of the trained model, in [0, 1].

    Raises:
        ValueError: at the beginning of training, as :func:`ensemble` for the two models.
        OSError: at the beginning of training, a directory that holds no model.
    """

    def __init__(self, other: Source | nn.Module, alpha: float) -> None:
        check_alpha(alpha)
        self.other, self.alpha = other, alpha

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check both models now, so that the ensemble does not fail after hours of training."""
        if hasattr(model, "peft_config"):
            raise ValueError(
                "EnsembleCallback averages whole models, not adapters; use ensemble_checkpoints afterwards"
            )
        if isinstance(self.other, nn.Module):
            check_alike(_state(model), _state(self.other))
            return
        expected, got = model.config.model_type, AutoConfig.from_pretrained(self.other).model_type
        if got != expected:
            raise ValueError(f"{self.other} is a model of type {got!r}, expected {expected!r}")

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Write the ensemble and the tokenizer; sharded parameters are gathered by all processes, one at a time."""
        keep, other = state.is_world_process_zero, self.other
        trained = _gather(_state(model), keep)
        if isinstance(other, nn.Module):
            given = _gather(_state(other), keep)
        elif keep:
            with loading_whole():  # in this process alone
                given = _state(AutoModelForCausalLM.from_pretrained(other))
        if not keep:
            return
        out = os.path.join(args.output_dir, "ensemble")
        _check_not_a_file(out)
        model.save_pretrained(out, state_dict=_average_states(trained, given, self.alpha))
        if kwargs.get("processing_class") is not None:
            kwargs["processing_class"].save_pretrained(out)


def _check_not_a_file(path: Source) -> None:
    """Raise ``NotADirectoryError`` for a file, to which ``save_pretrained`` would write nothing without an error."""
    if os.path.isfile(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(path))


def check_alpha(alpha: float) -> None:
    """Raise ``ValueError`` unless alpha is in [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")


def check_alike(first: Weights, second: Weights) -> None:
    """Raise ``ValueError`` unless two states have the same names, shapes, kinds of numbers and equal integers."""
    for name in [*first, *second]:
        if name not in first or name not in second:
            where = "first" if name in first else "second"
            raise ValueError(f"only the {where} model has {name!r}; expected two models of the same architecture")
    for name, own in first.items():
        other = second[name]
        shape, of_other = whole_shape(own), whole_shape(other)
        if shape != of_other or own.is_floating_point() != other.is_floating_point():
            raise ValueError(
                f"{name!r} is {own.dtype} {tuple(shape)} in the first model and {other.dtype} {tuple(of_other)} "
                "in the second; expected two models of the same architecture"
            )
        if not own.is_floating_point() and not torch.equal(own, other.to(own.device)):
            raise ValueError(f"{name!r} ({own.dtype}) differs between the models, and integers cannot be averaged")


def _average_states(first: Weights, second: Weights, alpha: float) -> dict[str, Tensor]:
    """Average by name; entries that are the same tensor in the first state are the same in the result."""
    check_alpha(alpha)
    check_alike(first, second)
    averages: dict[str, Tensor] = {}
    tied: dict[Tensor, str] = {}
    for name, own in first.items():
        value = _average(own.detach(), second[name].detach().to(own.device), alpha)
        known = tied.setdefault(own, name)
        if known != name and not torch.equal(value, averages[known]):
            raise ValueError(f"{name!r} is tied to {known!r} in the first model and not in the second; expected both")
        averages[name] = averages.get(known, value)
    return averages


def _average(own: Tensor, other: Tensor, alpha: float) -> Tensor:
    if not own.is_floating_point() or alpha == 1:
        return own.clone()
    if alpha == 0:
        return other.to(own.dtype, copy=True)
    exact = torch.promote_types(own.dtype, torch.float32)
    return (alpha * own.to(exact) + (1 - alpha) * other.to(exact)).to(own.dtype)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return every entry of a model's state by name; tied entries are the same tensor."""
    return model.state_dict(keep_vars=True)


def _gather(state: Weights, keep: bool) -> dict[str, Tensor]:
    """Gather whole tensors from the shards of all processes: on the host if ``keep``, else empty; ties stay."""
    whole: dict[Tensor, Tensor] = {}
    for tensor in state.values():
        if tensor not in whole:
            with gathered(tensor):
                full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                whole[tensor] = full.detach().cpu() if keep else full.detach().new_empty(0)
    return {name: whole[tensor] for name, tensor in state.items()}


def _common_tokenizer(first: Source, second: Source) -> Any:
    """Load the tokenizer saved with the first model, or None; raise ``ValueError`` if the second has another."""
    own, other = (
        AutoTokenizer.from_pretrained(path) if Path(path, "tokenizer_config.json").is_file() else None
        for path in (first, second)
    )
    if own is not None and other is not None and own.get_vocab() != other.get_vocab():
        raise ValueError(f"the tokenizers of {first} and {second} differ; their models cannot be averaged")
    return own


def _is_adapter(path: Source) -> bool:
    return Path(path, "adapter_config.json").is_file()


def _ensemble_adapters(first: Source, second: Source, out: Source, alpha: float) -> None:
    from peft import PeftConfig, PeftModel

    own, other = PeftConfig.from_pretrained(str(first)), PeftConfig.from_pretrained(str(second))
    if own.base_model_name_or_path != other.base_model_name_or_path:
        raise ValueError(
            f"{first} adapts {own.base_model_name_or_path!r} and {second} {other.base_model_name_or_path!r}; expected "
            "adapters of one model"
        )
    for path, config in ((first, own), (second, other)):
        _check_plain_lora(path, config)
    base = AutoModelForCausalLM.from_pretrained(own.base_model_name_or_path)
    model = PeftModel.from_pretrained(base, str(first), adapter_name="first")
    model.load_adapter(str(second), "second")
    model.add_weighted_adapter(["first", "second"], [alpha, 1 - alpha], "default", combination_type="cat")
    model.save_pretrained(str(out), selected_adapters=["default"])


def _check_plain_lora(path: Source, config: Any) -> None:
    """Raise ``ValueError`` for an adapter whose average is not the adapter of both ranks."""
    kind = config.peft_type.value
    extras = ("use_dora", "use_rslora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
    found = [name for name in extras if getattr(config, name, None)]
    if kind != "LORA" or found or getattr(config, "bias", "none") != "none":
        what = f"{kind} with {', '.join(found) or 'bias'}" if kind == "LORA" else kind
        raise ValueError(
            f"{path} is an adapter of kind {what}; expected plain LoRA. Merge it into its model (merge_and_unload), "
            "save that, and average the models"
        )
