"""Where each setting of a run stands, for messages that say so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..errors import ConfigError


class Source:
    """Where the keys of a run stand: on a line of the file, on the command line, in a preset, or nowhere.

    A key is a dotted path, `smt.density` or `dataset_path.1`. What is not found itself stands where its parent does.

    Args:
        path: of the file.
        lines: of its keys, counted from 1.
        overrides: the `key=value` of the command line.
    """

    def __init__(self, path: str, lines: Mapping[str, int], overrides: Sequence[str] = ()):
        self.path, self.lines, self.overrides = path, lines, tuple(overrides)
        self.overridden = {override.split("=", 1)[0] for override in overrides}
        self.written_as: dict[str, str] = {}
        self.preset: str | None = None
        self.in_preset: set[str] = set()

    def rename(self, alias: str, key: str) -> None:
        """`key` stands where `alias` does."""
        self.written_as[key] = alias

    def line(self, key: str) -> int | None:
        return next((self.lines[part] for part in self._path(key) if part in self.lines), None)

    def is_overridden(self, key: str) -> bool:
        return any(part in self.overridden for part in self._path(key))

    def place(self, key: str) -> str:
        """For messages: `run.yaml, line 3 (lr)`, `command line`, or the file alone."""
        line, alias = self.line(key), f" ({self.written_as[key]})" if key in self.written_as else ""
        if self.is_overridden(key):
            return "command line" + alias
        if key in self.in_preset and key not in self.lines:
            return f"{self.path}, preset {self.preset}"
        return f"{self.path}, line {line}{alias}" if line else self.path

    def origin(self, key: str) -> str:
        """For lists of values: `line 3`, `line 3, as lr`, `command line` or `default`."""
        alias = f", as {self.written_as[key]}" if key in self.written_as else ""
        if self.is_overridden(key):
            return "command line" + alias
        found = next((part for part in self._path(key) if part in self.lines), "")
        # A block that is given says nothing of what it leaves out.
        if found == self._written(key):
            return f"line {self.lines[found]}{alias}"
        return f"preset {self.preset}" if key in self.in_preset else "default"

    def _written(self, key: str) -> str:
        return self.written_as.get(key, key)

    def _path(self, key: str) -> Iterator[str]:
        """The key as it was written, then its parents."""
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            yield self._written(".".join(parts[:end]))


class Errors:
    """Everything that is wrong with a run, each with its place; raised at once."""

    def __init__(self, source: Source):
        self.source = source
        self.messages: list[tuple[int, str]] = []
        self.subjects: set[str] = set()

    def add(self, key: str, message: str, subject: str = "") -> None:
        """Note an error; `key` says which line it is laid to, `subject` which key has no value because of it."""
        self.subjects.add(subject)
        self.messages.append((self.source.line(key) or 0, f"{self.source.place(key)}: {message}"))

    def about(self, part: str) -> bool:
        """Whether an error speaks of `part` already."""
        return part in self.subjects or any(part in message for _, message in self.messages)

    def raise_any(self) -> None:
        """Raise `ConfigError` with all errors, in the order of their lines, if there is any."""
        if self.messages:
            raise ConfigError("\n".join(message for _, message in sorted(self.messages, key=lambda pair: pair[0])))
