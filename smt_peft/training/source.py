"""The file that a run is read from: its values, the line of every key, and the errors found in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError


def read_yaml(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, int]]:
    """The settings of a file with overrides applied and interpolations resolved, and the line of every dotted key.

    Raises:
        ConfigError: there is no file, or it is no mapping in valid YAML, or an override is no `key=value`.
    """
    if not path.is_file():
        raise ConfigError(f"there is no YAML file at {path}; pass the path of one, e.g. configs/quickstart.yaml")
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise ConfigError(f"command line: {override!r} is no override; write key=value, e.g. learning_rate=2e-4")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        lines = dict(_key_lines(root)) if isinstance(root, yaml.MappingNode) else {}
        loaded = OmegaConf.load(path) if root is not None else OmegaConf.create({})
        if not isinstance(root, yaml.MappingNode | None):
            raise ConfigError(f"{path}, line 1: a run is a mapping of `key: value` lines")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=True), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: no valid YAML: {getattr(error, 'problem', None) or error}") from error
    except (OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {str(error).strip()}") from error


def _key_lines(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, int]]:
    for key, value in node.value:
        yield prefix + str(key.value), key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _key_lines(value, f"{prefix}{key.value}.")


class Errors:
    """Everything that is wrong with a run, each with its place; raised at once."""

    def __init__(self, path: str, lines: Mapping[str, int], overrides: Sequence[str]):
        self.path, self.lines, self.messages = path, lines, []
        self.overridden = {override.split("=", 1)[0] for override in overrides}

    def add(self, key: str, message: str) -> None:
        """Note an error; `key` says which line it is laid to."""
        line = self.lines.get(key) or self.lines.get(key.split(".")[0])
        place = "command line" if key in self.overridden else f"{self.path}, line {line}" if line else self.path
        self.messages.append((line or 0, f"{place}: {message}"))

    def about(self, part: str) -> bool:
        """Whether an error speaks of `part` already."""
        return any(part in message for _, message in self.messages)

    def raise_any(self) -> None:
        """Raise `ConfigError` with all errors, in the order of their lines, if there is any."""
        if self.messages:
            raise ConfigError("\n".join(message for _, message in sorted(self.messages, key=lambda pair: pair[0])))
