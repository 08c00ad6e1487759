"""A configuration file and the command line, read into ``RunConfig`` and ``CPOConfig``."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from cpo_kernels.trainer.config import CPOConfig

from .errors import InputError, input_errors
from .options import RunConfig
from .tiny import cut_down

BOOLEANS = ("true", "false", "yes", "no", "1", "0", "y", "n", "t", "f")
# TrainingArguments annotates it as ``str | None``, for values of old, and wants True.
MISANNOTATED: dict[str, Any] = {"fsdp": bool | str | None}


@dataclass
class Settings:
    """What a command is to do.

    Attributes:
        run: model, data and what the command writes.
        training: the configuration of the trainer.
        given: the values that the file and the command line name, before defaults.
    """

    run: RunConfig
    training: CPOConfig
    given: dict[str, Any]


def parse(arguments: Sequence[str]) -> Settings:
    """Read ``[CONFIG.yaml] [--key value ...]``; what the command line says wins.

    Raises:
        InputError: a file that is not there or not YAML, a field that nothing is known of, or a value of a wrong type
            or outside its range; the message names the field.
    """
    parser = _Parser()
    path, overrides = parser.read_command_line(arguments)
    given = {} if path is None else parser.convert_all(_read_yaml(path), path)
    if overrides.get("tiny", given.get("tiny", False)):
        given = cut_down(given)
    given |= overrides
    with input_errors(TypeError, ImportError):
        run, training = (_construct(cls, given) for cls in (RunConfig, CPOConfig))
    if "output_dir" not in given:
        raise InputError("output_dir is not given: the directory to write to")
    return Settings(run, training, given)


def field_types() -> dict[str, Any]:
    """Every field that a configuration file may have, with its type."""
    types = {
        item.name: hints[item.name]
        for cls in (RunConfig, CPOConfig)
        for hints in [get_type_hints(cls)]
        for item in dataclasses.fields(cls)
        if item.init
    }
    return types | MISANNOTATED


def _construct(cls: type, given: Mapping[str, Any]) -> Any:
    names = {item.name for item in dataclasses.fields(cls)}
    values = {name: value for name, value in given.items() if name in names}
    if cls is CPOConfig:
        values = _lengths(given) | values
    return cls(**values)


def _lengths(given: Mapping[str, Any]) -> dict[str, int]:
    """The lengths that pieces of documents have; one from within a document fills them, so that no EOS ends it."""
    prompt, completion = given.get("prompt_tokens"), given.get("completion_tokens")
    if not prompt or not completion:
        return {}
    if given.get("max_length", prompt + completion) != prompt + completion:
        raise InputError(
            f"max_length must be prompt_tokens + completion_tokens = {prompt + completion}, got {given['max_length']}: "
            "pieces from within a document would be ended with EOS, or cut"
        )
    return {"max_length": prompt + completion, "max_prompt_length": prompt}


class _Parser(HfArgumentParser):
    """The options of both classes, without defaults: what is not given stays out."""

    def __init__(self) -> None:
        self.by_name: dict[str, argparse.Action] = {}
        classes: Any = (RunConfig, CPOConfig)
        super().__init__(classes, allow_abbrev=False, add_help=False)
        self.types = field_types()
        for action in self._actions:
            action.default, action.required = argparse.SUPPRESS, False

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        self.by_name.setdefault(action.dest, action)
        return action

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def read_command_line(self, arguments: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
        """The configuration's path, and the values that are given beside it."""
        namespace, others = self.parse_known_args(list(self._join_booleans(arguments)))
        for argument in others:
            if argument.startswith("-"):
                raise InputError(self._unknown(argument.lstrip("-").partition("=")[0].replace("-", "_"), "option"))
        if len(others) > 1:
            raise InputError(f"expected one configuration file and options --key value, got {' '.join(others)!r}")
        values = {name: self._from_text(name, value) for name, value in vars(namespace).items()}
        return (others[0] if others else None), values

    def _join_booleans(self, arguments: Sequence[str]) -> Iterable[str]:
        """``--flag FILE`` as ``--flag=true FILE``: argparse would take the file for the flag's value."""
        position = 0
        while position < len(arguments):
            argument = arguments[position]
            action = self.by_name.get(argument[2:].replace("-", "_")) if argument.startswith("--") else None
            if action is not None and _is_boolean(self.types[action.dest]):
                following = arguments[position + 1 : position + 2]
                says = bool(following) and following[0].lower() in BOOLEANS
                yield f"{argument}={following[0] if says else 'true'}"
                position += says
            else:
                yield argument
            position += 1

    def _from_text(self, name: str, value: Any) -> Any:
        """A value of the command line: a mapping is written as JSON; true is no text where a boolean may stand."""
        kinds = _kinds(self.types[name])
        if isinstance(value, str) and bool in kinds and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, str) and dict in kinds and value.lstrip().startswith("{"):
            with input_errors():
                return json.loads(value)
        return value

    def convert_all(self, values: Mapping[Any, Any], source: str) -> dict[str, Any]:
        """The values of a file as their fields take them."""
        converted = {}
        for name, value in values.items():
            if name not in self.types:
                raise InputError(f"{source}: {self._unknown(str(name), 'field')}")
            try:
                converted[name] = self._convert(self.by_name[name], _kinds(self.types[name]), value)
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                raise InputError(f"{source}: {name} must be {self._expected(name)}, got {value!r}") from error
        return converted

    def _convert(self, action: argparse.Action, kinds: set[Any], value: Any) -> Any:
        if type(value) in kinds and not isinstance(value, str) and action.nargs != "+":
            return value
        if value is None and type(None) in kinds:
            return None
        if action.nargs == "+":
            return [self._convert_one(action, item) for item in (value if isinstance(value, list) else [value])]
        if isinstance(value, bool) and bool not in kinds:
            raise TypeError("bool")
        return self._convert_one(action, value)

    @staticmethod
    def _convert_one(action: argparse.Action, value: Any) -> Any:
        if not isinstance(value, (str, int, float)):
            raise TypeError(type(value).__name__)
        convert: Any = action.type or str
        converted = convert(str(value))
        if action.choices is not None and converted not in action.choices:
            raise ValueError(converted)
        return converted

    def _expected(self, name: str) -> str:
        choices = self.by_name[name].choices
        return _describe(self.types[name]) if choices is None else f"one of {', '.join(map(str, choices))}"

    def _unknown(self, name: str, what: str) -> str:
        near = difflib.get_close_matches(name, self.types, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"there is no {what} {name!r}{hint}"


def _kinds(hint: Any) -> set[Any]:
    """The types that a field may have, ``list[str]`` as ``list``."""
    parts = get_args(hint) if get_origin(hint) not in (None, list, dict) else (hint,)
    return {get_origin(part) or part for part in parts}


def _is_boolean(hint: Any) -> bool:
    return bool in _kinds(hint) and _kinds(hint) <= {bool, type(None)}


def _describe(hint: Any) -> str:
    names = {type(None): "null", dict: "a mapping", list: "a list", bool: "true or false", int: "an integer"}
    names |= {float: "a number", str: "a string"}
    return " or ".join(sorted(names.get(kind, getattr(kind, "__name__", str(kind))) for kind in _kinds(hint)))


# YAML


class _Loader(yaml.SafeLoader):
    """YAML as 1.2 has it: ``no`` and ``off`` are words, ``1e-5`` is a number, and no field comes twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"found {key.value!r} twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _read_yaml(path: str) -> dict[Any, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, _Loader)
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path} must have fields, as 'model: gpt2', got {type(values).__name__}")
    return values
