"""Sources of a mixture, as a YAML names them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .files import READERS, LocalFile
from .forms import AUTO, FORMS
from .hub import HubSplit

# What other trainers call them.
_SYNONYMS = {"id": "name", "type": "format", "fraction": "weight", "probability": "weight", "data_files": "path"}


@dataclass(frozen=True)
class Source:
    """One source of rows.

    Args:
        path: one or more local files; or else
        name: a data set on the Hub,
        config: one of its configurations,
        split: and one of its splits.
        format: the form of the rows, `"auto"`: by their columns.
        weight: share of the mixture, relative to the other weights; None: all sources whole, one after the other.
    """

    path: str | tuple[str, ...] | None = None
    name: str | None = None
    config: str | None = None
    split: str = "train"
    format: str = AUTO
    weight: float | None = None

    def parts(self) -> list[LocalFile | HubSplit]:
        """The files of the source, or its split."""
        if self.path is None:
            return [HubSplit(self.name, self.config, self.split)]
        return [LocalFile(path) for path in ([self.path] if isinstance(self.path, str) else self.path)]

    @property
    def label(self) -> str:
        return ", ".join(part.label for part in self.parts())

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Source:
        """The source of an entry in which `mixture_errors` finds none."""
        path = settings.get("path")
        return Source(**{**settings, "path": tuple(path) if isinstance(path, list) else path})


def mixture_errors(
    mixture: Sequence[Mapping[str, Any]], forms: Sequence[str] = tuple(FORMS)
) -> Iterator[tuple[str, str]]:
    """Everything that is wrong with the entries of `dataset_mixture`, before anything is read.

    Args:
        mixture: the entries.
        forms: names of the forms that the rows of a run may have.
    """
    known = [field.name for field in fields(Source)]
    if not mixture:
        yield "", "dataset_mixture is empty; name at least one source, - {path: rows.jsonl, weight: 0.5}"
    for number, entry in enumerate(mixture, start=1):
        where = f"dataset_mixture, source {number}"
        for key in entry:
            if key not in known:
                near = _SYNONYMS.get(key) or next(iter(difflib.get_close_matches(str(key), known, n=1)), None)
                hint = f"did you mean {near!r}?" if near else f"it has {known}"
                yield f".{number - 1}.{key}", f"{where}: unknown key {key!r}; {hint}"
        if (entry.get("path") is None) == (entry.get("name") is None):
            yield (
                f".{number - 1}",
                f"{where}: exactly one of path (local files) and name (a data set on the Hub) is needed",
            )
        if entry.get("format", AUTO) not in (AUTO, *forms):
            yield (
                f".{number - 1}.format",
                f"{where}: format must be one of {', '.join((AUTO, *forms))}, got {entry['format']!r}",
            )
        weight = entry.get("weight")
        if weight is not None and (isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight <= 0):
            yield f".{number - 1}.weight", f"{where}: weight must be a number above 0, got {weight!r}"
        for key in ("name", "config", "split"):
            if entry.get(key) is not None and not isinstance(entry[key], str):
                yield f".{number - 1}.{key}", f"{where}: {key} must be text, got {entry[key]!r}"
        for place, fault in file_errors(entry.get("path")):
            yield f".{number - 1}.path{place}", f"{where}: {fault}"
    given = [entry.get("weight") is not None for entry in mixture]
    if any(given) and not all(given):
        yield (
            f".{given.index(False)}",
            f"dataset_mixture: source {given.index(False) + 1} has no weight, others have; give every source one, or "
            "none of them to train on all rows",
        )


def file_errors(paths: str | Sequence[str] | None) -> Iterator[tuple[str, str]]:
    """What is wrong with the paths of local files, and of which: `.1` is the second of several, "" the only one."""
    several = not isinstance(paths, str)
    for number, path in enumerate((paths or []) if several else [paths]):
        place = f".{number}" if several else ""
        if not isinstance(path, str):
            yield place, f"a path must be text, got {path!r}"
        elif not Path(path).is_file():
            yield place, f"there is no file {path}; paths start at the current directory"
        elif Path(path).suffix not in READERS:
            yield place, f"{path} is none of {', '.join(READERS)}; convert it, e.g. to jsonl"
