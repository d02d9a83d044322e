"""Rows of one file or split, read, checked, and brought to what TRL reads."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..errors import ConfigError
from .broken import SHOWN, STOP, Broken
from .features import features_of_row, free_turns, is_plain
from .files import LocalFile
from .forms import AUTO, FORMS, Form, find_form, row_fault
from .hub import HubSplit
from .labelled import named
from .screen import faults, is_readable

Part = LocalFile | HubSplit
# Rows that are looked at to learn the columns, where they are read one after the other.
SAMPLE = 100


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Args:
        form: the name of one, or `"auto"`.
        text_field: the column of plain text.
        also: what else may be wrong with a row as TRL reads it.
        on_broken_row: `"stop"` or `"skip"`.
        forms: that a row may have.
    """

    form: str = AUTO
    text_field: str = "text"
    also: Callable[[dict], str | None] | None = None
    on_broken_row: str = STOP
    forms: Mapping[str, Form] = field(default_factory=lambda: FORMS)

    def find(self, columns: Sequence[str], row: dict, where: str) -> Form:
        return find_form(columns, row, where, self.form, self.text_field, self.forms)


def read_part(part: Part, reading: Reading, broken: Broken, by_arrow: bool = True) -> tuple[Dataset, Form]:
    """All sound rows of a file or a split, in the columns TRL reads, mapped from a cache, and their form.

    Args:
        part: where they are.
        reading: how.
        broken: is told of the others.
        by_arrow: whether to read and check whole columns at once; where their types do not allow it, rows are
            read one after the other.

    Raises:
        ConfigError: a row is broken and stops the run, none is left, or the columns make no form.
    """
    rows = part.arrow() if by_arrow else None
    if rows is not None and len(rows):
        form = reading.find(rows.column_names, rows[0], part.label)
        if is_readable(rows, form) or part.suffix == ".parquet" or isinstance(part, HubSplit):
            return _sound(rows, form, part, reading, broken), form
    return _scanned(part, reading, broken)


def _sound(rows: Dataset, form: Form, part: Part, reading: Reading, broken: Broken) -> Dataset:
    """The rows of a table without the broken ones."""
    rows = named(rows.select_columns(list(form.columns(rows.column_names))), form)
    # Text has neither speakers nor a template, and need not be looked at row by row.
    chat = any(
        "turns" in what and rows.features[name] != Value("string")
        for name, what in form.columns(rows.column_names).items()
    )
    keep = None
    for index, fault in faults(rows, form, reading.also if chat or form.check else None):
        place = part.place(index) if len(broken.first) < SHOWN else ""
        broken.add(place, fault)
        keep = np.ones(len(rows), bool) if keep is None else keep
        keep[index] = False
    if keep is not None:
        rows = rows.select(np.flatnonzero(keep))
    _not_empty(len(rows), part, broken)
    if is_plain(rows.features, form):
        return rows
    if form.check is not None:
        features = features_of_row(form.to_trl(rows[0]), reading.text_field)
        return rows.map(form.to_trl, remove_columns=rows.column_names, features=features)
    features = free_turns(rows.features, form) if set(form.needed) <= set(form.to_trl(rows[0])) else None
    gone = [name for name in rows.column_names if name not in form.to_trl(rows[0])]
    return rows.map(form.to_trl, remove_columns=gone, features=features)


def _scanned(part: Part, reading: Reading, broken: Broken) -> tuple[Dataset, Form]:
    """The same for rows that are read one after the other: the sound ones lie in the cache as lines of JSON."""
    form, columns = scanned_form(part, reading)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "smt_peft"
    cache.mkdir(parents=True, exist_ok=True)
    content, count, features = hashlib.sha256(), 0, None
    handle, name = tempfile.mkstemp(suffix=".part", dir=cache)
    try:
        with os.fdopen(handle, "wb") as file:
            for row in sound_rows(part, form, columns, reading, broken):
                line = json.dumps(row).encode() + b"\n"
                content.update(line)
                file.write(line)
                features = features or features_of_row(row, reading.text_field)
                count += 1
        _not_empty(count, part, broken)
        # Named by what is in it: the next run finds the table that was made from it, and what TRL made of that.
        path = cache / f"{content.hexdigest()}.jsonl"
        if not path.exists():
            os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    try:
        return load_dataset("json", data_files=[str(path)], split="train", features=features), form
    except (DatasetGenerationError, ValueError, TypeError) as error:
        raise ConfigError(f"{part.label} cannot be read: {error.__cause__ or error}") from error


def scanned_form(part: Part, reading: Reading) -> tuple[Form, list[str]]:
    """The form of rows that are read one after the other, and all columns of the first of them.

    Raises:
        ConfigError: as `find_form`; or none of these is a row, so that there is nothing to go by.
    """
    broken = Broken(reading.on_broken_row)
    columns: dict[str, None] = {}
    first = None
    for place, row in islice(part.scan(), SAMPLE):
        if isinstance(row, str):
            broken.add(place, row)
            continue
        columns |= dict.fromkeys(row)
        # The one with the most columns says most about the form.
        first = row if first is None or len(row) > len(first) else first
    if first is None:
        _not_empty(0, part, broken)
    return reading.find(list(columns), first, part.label), list(columns)


def sound_rows(part: Part, form: Form, columns: Sequence[str], reading: Reading, broken: Broken) -> Iterator[dict]:
    """The rows that are not broken, as TRL reads them; one in memory at a time.

    Args:
        part, reading, broken: as in `read_part`.
        form: of the rows.
        columns: that the rows have; those of the form are read, and are None in a row that lacks one.
    """
    names = list(form.columns(columns))
    for place, row in part.scan():
        fault = row if isinstance(row, str) else None
        if fault is None:
            row = {name: row.get(name) for name in names}
            fault = row_fault(row, form)
        if fault is None:
            row = form.to_trl(row)
            fault = reading.also(row) if reading.also else None
        if fault:
            broken.add(place, fault)
        else:
            yield row


def _not_empty(count: int, part: Part, broken: Broken) -> None:
    if count == 0:
        raise ConfigError(f"{part.label} holds no rows that can be used{broken}; put at least one into it")
