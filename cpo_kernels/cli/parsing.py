"""Parse a configuration file and the command line into ``RunConfig`` and ``CPOConfig``, and print their help.

``transformers.HfArgumentParser`` makes an option of every field, with the field's text and default. Values of a file
go through the same options, as if they had been written on the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from cpo_kernels.trainer.config import CPOConfig, sections

from .errors import InputError, input_errors, unknown
from .help import DESCRIPTIONS, FILE
from .options import GROUPS, RunConfig
from .tiny import cut_down
from .yaml12 import read_yaml


@dataclass
class Settings:
    """The settings of a command.

    Attributes:
        run: model, data and outputs of the command.
        training: the configuration of the trainer.
        given: the values in the file and on the command line, without defaults.
    """

    run: RunConfig
    training: CPOConfig
    given: dict[str, Any]


def parse(arguments: Sequence[str]) -> Settings:
    """Read ``[CONFIG.yaml] [--key value ...]``; values of the command line take precedence.

    Raises:
        InputError: a file that does not exist or is not YAML, an unknown field, or a value of a wrong type or outside
            its range; the message names the field.
    """
    parser = OptionParser()
    overrides = parser.read(arguments)
    path = overrides.pop("config", None)
    given = {} if path is None else parser.read_file(path)
    if overrides.get("tiny", given.get("tiny", False)):
        given = cut_down(given)
    given |= overrides
    with input_errors(TypeError, ImportError):
        run, training = (_construct(cls, given) for cls in (RunConfig, CPOConfig))
    if "output_dir" not in given:
        raise InputError("output_dir is not given: the directory to write to")
    return Settings(run, training, given)


def help_of(command: str) -> str:
    """Return the text of ``cpo-kernels COMMAND --help``."""
    usage = f"cpo-kernels {command} CONFIG.yaml [--option value ...]"
    return OptionParser(usage=usage, description=f"{DESCRIPTIONS[command]}\n{FILE}").format_help()


def _construct(cls: type, given: Mapping[str, Any]) -> Any:
    names = {item.name for item in dataclasses.fields(cls)}
    values = {name: value for name, value in given.items() if name in names}
    if cls is CPOConfig:
        lengths = _lengths(given)
        values |= {name: length for name, length in lengths.items() if values.get(name) is None}
        if not sys.stderr.isatty():
            values.setdefault("disable_tqdm", True)  # bars make logs unreadable
    return cls(**values)


def _lengths(given: Mapping[str, Any]) -> dict[str, int]:
    """Return the lengths that follow from cutting documents into pieces by tokens.

    A piece from within a document has to fill ``max_length``, so that no EOS is appended to it.
    """
    prompt, completion = given.get("prompt_tokens"), given.get("completion_tokens")
    if not prompt or not completion:
        return {}
    if (given.get("max_length") or prompt + completion) != prompt + completion:
        raise InputError(
            f"max_length must be prompt_tokens + completion_tokens = {prompt + completion}, got {given['max_length']}: "
            "pieces from within a document would be ended with EOS, or cut"
        )
    return {"max_length": prompt + completion, "max_prompt_length": prompt}


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A formatter that shows every default, and keeps the line breaks of descriptions."""


class OptionParser(HfArgumentParser):
    """The options of ``RunConfig`` and ``CPOConfig``, in groups for the help text.

    Attributes:
        types: the type of the field of every option.
    """

    def __init__(self, **options: Any) -> None:
        groups: Any = option_groups()
        options |= {"allow_abbrev": False, "add_help": False, "formatter_class": _Formatter}
        super().__init__(groups, **options)
        self.add_argument(
            "config", nargs="?", metavar="CONFIG.yaml", default=argparse.SUPPRESS, help="may hold every option below"
        )
        self.types = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
        # The first action of a name; later ones are its --no_NAME.
        self._by_name = {action.dest: action for action in reversed(self._actions)}
        for name, hint in self.types.items():
            if dict in _kinds(hint):
                self._by_name[name].type = _mapping_or_text
        # TrainingArguments annotates it as a text, for old values, but takes True.
        self.types["fsdp"] = bool | str | None
        self._by_name["fsdp"].type = _boolean_or_text

    def error(self, message: str) -> NoReturn:
        """Raise ``InputError`` instead of ending the program."""
        raise InputError(message)

    def read(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Read options and the path of a configuration, and return only those that are given."""
        for action in self._actions:
            action.default = argparse.SUPPRESS
        namespace, others = self.parse_known_args(list(arguments))
        for argument in others:
            if argument.startswith("-"):
                name = argument.lstrip("-").partition("=")[0].replace("-", "_")
                raise InputError(unknown("option", name, self.types))
        if others:
            raise InputError(f"expected one configuration file and options --key value, got {' '.join(others)!r} more")
        return vars(namespace)

    def read_file(self, path: str) -> dict[str, Any]:
        """Read the values of a configuration file."""
        taken: dict[str, Any] = {}
        arguments: list[str] = []
        for name, value in read_yaml(path).items():
            if name not in self.types:
                raise InputError(f"{path}: {unknown('field', str(name), self.types)}")
            if isinstance(value, list) and value and self._by_name[name].nargs == "+":
                arguments += [f"--{name}", *map(str, value)]
            elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
                arguments.append(f"--{name}={value}")
            elif type(value) in _kinds(self.types[name]):
                taken[name] = value
            else:
                raise InputError(f"{path}: {name} cannot be {json.dumps(value, default=str)}")
        try:
            return taken | self.read(arguments)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def option_groups() -> list[Any]:
    """Return dataclasses that hold every option of ``RunConfig`` and ``CPOConfig``, in the order of the help text."""
    *own, (title, _) = sections().items()
    added = {name for _, names in own for name in names}
    inherited = {item.name for item in dataclasses.fields(CPOConfig)} - added
    ours = [_subset(CPOConfig, {*names}, f"{title} (CPOConfig)") for title, names in own]
    first, *others = GROUPS
    return [first, *ours, *others, _subset(CPOConfig, inherited, f"{title} (transformers.TrainingArguments)")]


def _subset(cls: type, names: set[str], title: str) -> type:
    """Make a dataclass of some fields of ``cls``, which ``HfArgumentParser`` shows under a title."""
    hints = get_type_hints(cls)
    fields: Any = [
        (item.name, hints[item.name], _copy(item))
        for item in dataclasses.fields(cls)
        if item.init and item.name in names
    ]
    return dataclasses.make_dataclass(cls.__name__, fields, namespace={"_argument_group_name": title})


def _copy(item: Any) -> Any:
    return dataclasses.field(default=item.default, default_factory=item.default_factory, metadata=item.metadata)


def _kinds(hint: Any) -> set[Any]:
    """Return the types that a field may have, ``list[str]`` as ``list``."""
    parts = get_args(hint) if get_origin(hint) not in (None, list, dict) else (hint,)
    return {get_origin(part) or part for part in parts}


def _mapping_or_text(text: str) -> Any:
    """Read a mapping given as JSON on the command line; any other text is returned unchanged."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error


def _boolean_or_text(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)
