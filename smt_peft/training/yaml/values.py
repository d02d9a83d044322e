"""Values of a YAML against the types of their keys, in the words of a user and not of a type checker."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    list: "a list",
    dict: "a map",
}


def adapter(hint: Any) -> TypeAdapter:
    """Pydantic's view of a type."""
    # A config is refused for types that carry one of their own: dataclasses and models.
    own = hasattr(hint, "__dataclass_fields__")
    return TypeAdapter(hint, config=None if own else ConfigDict(arbitrary_types_allowed=True))


def faults(key: str, value: Any, hint: Any) -> list[tuple[str, str]]:
    """What is wrong with the value of `key`: the dotted path of each wrong part, and a message.

    Of a type with alternatives the one that fits furthest counts: `[q_proj, 3]` is a list with a wrong item, not a
    wrong text.
    """
    try:
        adapter(hint).validate_python(value, strict=True)
        return []
    except ValidationError as error:
        places = [detail["loc"] for detail in error.errors(include_context=False)]
    paths = dict.fromkeys((_steps(value, place), place[-1:] == ("[key]",)) for place in places)
    depth = max(len(steps) for steps, _ in paths)
    return [_fault(key, value, hint, steps, is_name) for steps, is_name in paths if len(steps) == depth]


def describe(hint: Any) -> str:
    """A type in words."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(describe(part) for part in get_args(hint)))
    if origin is Literal:
        return " or ".join(repr(value) for value in get_args(hint))
    return _NAMES.get(origin or hint, getattr(hint, "__name__", str(hint)))


def _steps(value: Any, place: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The steps into `value` of a pydantic location, which names the alternatives of a type as well."""
    steps: list[str | int] = []
    for part in place:
        inside = part in value if isinstance(value, Mapping) else isinstance(value, list) and part in range(len(value))
        if inside:
            steps.append(part)
            value = value[part]
    return tuple(steps)


def _fault(key: str, value: Any, hint: Any, steps: tuple[str | int, ...], is_name: bool) -> tuple[str, str]:
    """The fault of what lies at the end of the steps, or of the name that it has in its map."""
    for step in steps:
        hint, value, key = _inside(hint, value), value[step], f"{key}.{step}"
    if is_name:
        return key, f"{key}: the name {steps[-1]!r} must be text; put it in quotes"
    return key, f"{key} must be {describe(hint)}, got {value!r} ({describe(type(value))})"


def _inside(hint: Any, container: Any) -> Any:
    """The type of what lies in a list or map."""
    kind = dict if isinstance(container, Mapping) else list
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return Union[tuple(get_args(part)[-1] for part in alternatives if get_origin(part) is kind)]  # noqa: UP007
