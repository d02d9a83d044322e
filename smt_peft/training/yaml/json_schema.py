"""The keys of a run as a JSON schema, by which an editor completes and checks a YAML while it is written."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter

from ...config import BUDGETS, SCORES
from ...schedules import SCHEDULES
from .aliases import ALIASES
from .keys import BLOCKS, OWN_OPTIMIZERS, TRAINER_OPTIMIZERS, TRAINERS, RunConfig, Warmup, known_keys
from .values import adapter

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_ABOUT = {"smt": "Which blocks of which weights train: fields of SMTConfig."} | {
    name: " ".join(inspect.getdoc(schedule).partition("\n\n")[0].split()) for name, schedule in SCHEDULES.items()
}
# `${run_name}` may stand for a value of any type.
_INTERPOLATION = {"type": "string", "pattern": r"^\$\{"}
_REQUIRED = (("model_name_or_path",), ("output_dir",), ("dataset_path", "dataset_name", "dataset_mixture"))


def json_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of a whole file.

    What one key alone shows to be wrong is refused; what takes two keys or a look at the disk is left to `smt train`.
    """
    known = {task: known_keys(task) for task in TRAINERS}
    hints = {key: hint for keys in reversed(known.values()) for key, hint in keys.items()}
    hints = {key: _tightened(key, hint) for key, hint in hints.items()}
    hints |= {name: alias.hint or hints[alias.key] for name, alias in ALIASES.items()}
    schemas, shared = TypeAdapter.json_schemas([(key, "validation", adapter(hint)) for key, hint in hints.items()])
    notes = _notes()
    properties = {key: notes.get(key, {}) | _or_interpolated(schemas[key, "validation"]) for key in hints}
    blocks = {
        name: {
            key.removeprefix(f"{name}."): properties.pop(key) for key in list(properties) if key.startswith(f"{name}.")
        }
        for name in BLOCKS
    }
    return {
        "$schema": DIALECT,
        "title": "A run of smt train",
        "type": "object",
        "properties": properties | {name: _object(block, _ABOUT[name]) for name, block in blocks.items()},
        "additionalProperties": False,
        "allOf": [
            *({"anyOf": [{"required": [name]} for name in _names(keys)]} for keys in _REQUIRED),
            *(_of_task(task, known) for task in known),
        ],
        "$defs": shared.get("$defs", {}),
    }


def _of_task(task: str, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What else there is only for other tasks is refused; a file that names no task is for the first."""
    elsewhere = {key: False for keys in known.values() for key in keys if key not in known[task]}
    named = {"properties": {"task": {"const": task}}}
    first = task == next(iter(known))
    return {"if": named if first else named | {"required": ["task"]}, "then": {"properties": elsewhere}}


def _object(properties: dict[str, Any], description: str) -> dict[str, Any]:
    return {
        "description": description,
        "type": ["object", "null"],
        "properties": properties,
        "additionalProperties": False,
    }


def _names(keys: tuple[str, ...]) -> list[str]:
    """Keys and their aliases."""
    return [*keys, *(name for name, alias in ALIASES.items() if alias.key in keys)]


def _tightened(key: str, hint: Any) -> Any:
    """The type without values that are refused later, and with what the reader of a file takes for one."""
    choices = {
        "optim": Literal[(*OWN_OPTIMIZERS, *TRAINER_OPTIMIZERS)],
        "smt.score": Literal[SCORES],
        "smt.budget": Literal[BUDGETS] | dict[str, float],
    }
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    if any(isinstance(part, type) and issubclass(part, Enum) for part in parts):
        # The `str` beside an enumeration says that it is given by name, not that any text will do.
        hint = Union[tuple(part for part in parts if part is not str)]  # noqa: UP007
    if key.endswith("_strategy"):
        # YAML 1.1 reads a bare `no` as false.
        hint = Union[hint, Literal[False]]  # noqa: UP007
    return choices.get(key, hint)


def _or_interpolated(schema: dict[str, Any]) -> dict[str, Any]:
    alternatives = schema.get("anyOf", [schema])
    return schema if {"type": "string"} in alternatives else {"anyOf": [*alternatives, _INTERPOLATION]}


def _notes() -> dict[str, dict[str, Any]]:
    """What an editor shows of a key besides its type."""
    notes: dict[str, dict[str, Any]] = {key: {"description": text} for key, text in _descriptions().items()}
    trainers = TRAINERS.values()
    nested = ((f"{name}.", owner) for name, owner in BLOCKS.items())
    for prefix, owner in (*(("", owner) for owner in (*trainers, RunConfig)), *nested, ("smt.", Warmup)):
        for field in fields(owner):
            differs = any(field.default != _default(other, field.name, field.default) for other in trainers)
            if isinstance(field.default, (bool, int, float, str)) and (prefix or not differs):
                notes.setdefault(prefix + field.name, {})["default"] = field.default
    for name, alias in ALIASES.items():
        said = f"{'Converted to' if alias.convert else 'Another name of'} `{alias.key}`"
        notes[name] = {"deprecated": True, "description": f"{said}{'; ' if alias.note else ''}{alias.note}."}
    return notes


def _default(owner: type, name: str, otherwise: Any) -> Any:
    return next((field.default for field in fields(owner) if field.name == name), otherwise)


def _descriptions() -> dict[str, str]:
    """What the fields say of themselves, or else what the docstring of their class says of them."""
    trainers: dict[str, str] = {}
    for owner in reversed(TRAINERS.values()):
        trainers |= documented(owner)
        trainers |= {field.name: field.metadata["help"] for field in fields(owner) if "help" in field.metadata}
    blocks = {name: documented(owner) for name, owner in BLOCKS.items()}
    blocks["smt"] |= documented(Warmup)
    nested = {f"{block}.{name}": text for block, texts in blocks.items() for name, text in texts.items()}
    return trainers | documented(RunConfig) | nested


def documented(owner: type) -> dict[str, str]:
    """The entries of the `Args:` section of a docstring, each as one paragraph."""
    section = (inspect.getdoc(owner) or "").partition("Args:\n")[2]
    entries: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if found := re.match(r" {4}(\w+)(?: \(.*\))?:(.*)", line):
            name, line = found.groups()
        if name:
            entries[name] = f"{entries.get(name, '')} {line.strip()}".strip()
    return entries
