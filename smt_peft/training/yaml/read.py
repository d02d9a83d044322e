"""The file of a run, read, with its preset beneath."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import ConfigError
from .beneath import settings_beneath
from .source import Source


def read_yaml(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], Source]:
    """The settings of a file with its preset beneath, overrides applied and interpolations resolved, and where each of
    them stands.

    Raises:
        ConfigError: there is no file, or it is no mapping in valid YAML, an override is no `key=value`, or there is no
            such preset.
    """
    if not path.is_file():
        raise ConfigError(f"there is no YAML file at {path}; pass the path of one, e.g. configs/quickstart.yaml")
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise ConfigError(f"command line: {override!r} is no override; write key=value, e.g. learning_rate=2e-4")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        loaded = OmegaConf.load(path) if root is not None else OmegaConf.create({})
        if not isinstance(root, yaml.MappingNode | None):
            raise ConfigError(f"{path}, line 1: a run is a mapping of `key: value` lines")
        given = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        source = Source(str(path), dict(_lines(root)), overrides)
        merged = OmegaConf.merge(OmegaConf.create(settings_beneath(given, source)), given)
        return OmegaConf.to_container(merged, resolve=True), source
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: no valid YAML: {getattr(error, 'problem', None) or error}") from error
    except (OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {str(error).strip()}") from error


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The line of every key and list item, as dotted paths: `smt.target_modules.1`."""
    children: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(number), item, item) for number, item in enumerate(node.value)]
    for name, begin, value in children:
        yield prefix + name, begin.start_mark.line + 1
        yield from _lines(value, f"{prefix}{name}.")
