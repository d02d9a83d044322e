"""What lies beneath the settings that are given: those of a preset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ...presets import preset
from ..errors import ConfigError
from .aliases import ALIASES
from .source import Source

PRESET = "preset"
# Of each pair one alone may be set, so what is given takes the other out of a preset.
_EITHER = (("smt.density", "smt.num_blocks"), ("smt.num_blocks", "smt.density"))


def settings_beneath(given: DictConfig, source: Source) -> dict[str, Any]:
    """The settings of the preset that is named, without those that given ones stand for; noted in the source.

    Raises:
        ConfigError: there is no such preset.
    """
    name = OmegaConf.select(given, PRESET)
    if name is None:
        return {}
    try:
        beneath = preset(name)
    except ValueError as error:
        raise ConfigError(f"{source.place(PRESET)}: {error}") from error
    _drop(beneath, [ALIASES[key].key for key in given if key in ALIASES])
    _drop(beneath, [other for key, other in _EITHER if OmegaConf.select(given, key) is not None])
    source.preset, source.in_preset = name, set(_paths(beneath))
    return beneath


def _drop(settings: dict[str, Any], keys: list[str]) -> None:
    for key in keys:
        block, _, name = key.rpartition(".")
        (settings.get(block, {}) if block else settings).pop(name, None)


def _paths(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted path of every key."""
    for key, value in settings.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")
