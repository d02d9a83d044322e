"""Local files of rows: read at once by Arrow where it can, else one row after the other, each with its place."""

from __future__ import annotations

import codecs
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.utils.logging import CRITICAL, get_verbosity, set_verbosity

from ..errors import ConfigError

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
CHUNK = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")


class LocalFile:
    """A jsonl, json, csv or parquet file."""

    def __init__(self, path: str):
        self.path = self.label = path
        self.suffix = Path(path).suffix

    def arrow(self) -> Dataset | None:
        """All rows, mapped from a cache; None where they have to be read one after the other.

        One JSON array is such a case: its reader would hold the whole file.

        Raises:
            ConfigError: the file is empty, or no valid Parquet.
        """
        if not (first := _first_byte(self.path)):
            raise ConfigError(f"{self.path} is empty; put at least one row into it")
        if READERS[self.suffix] == "json" and first != b"{":
            # An array, or no row: of a `null` in the first place Arrow's reader dies (pyarrow 26, 2026-11).
            return None
        verbosity = get_verbosity()
        # What cannot be read is told with its line, and not by its reader.
        set_verbosity(CRITICAL)
        try:
            options = {"features": _text_columns(self.path), "keep_default_na": False} if self.suffix == ".csv" else {}
            return load_dataset(READERS[self.suffix], data_files=[self.path], split="train", **options)
        except (DatasetGenerationError, ValueError, OSError, TypeError, NotImplementedError) as error:
            if self.suffix == ".parquet":
                raise ConfigError(f"{self.path} cannot be read: {error.__cause__ or error}") from error
            return None
        finally:
            set_verbosity(verbosity)

    def scan(self) -> Iterator[tuple[str, dict | str]]:
        """The place of every row and the row, or in its stead what is wrong with it; one row in memory at a time."""
        if self.suffix == ".parquet":
            rows = load_dataset("parquet", data_files=[self.path], split="train", streaming=True)
            found = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        elif self.suffix == ".csv":
            found = _records(self.path)
        elif self.suffix == ".json" and _first_byte(self.path) == b"[":
            found = _array(self.path)
        else:
            found = _lines(self.path)
        try:
            for place, row in found:
                yield f"{self.path}, {place}", row
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{self.path} cannot be read: {error}; save it as UTF-8") from error

    def place(self, index: int) -> str:
        """Where the row is that `arrow` counts as `index`, from 0."""
        row = f"{self.path}, row {index + 1}"
        if self.suffix == ".parquet":
            return row
        for number, (place, content) in enumerate(self.scan()):
            if isinstance(content, str) and self.suffix != ".csv":
                # Arrow does not mind how objects are spread over lines, so its count is the only one here.
                return row
            if number == index:
                return place
        return row


def _first_byte(path: str) -> bytes:
    """The first one that is no blank; empty where there is none."""
    with open(path, "rb") as file:
        return file.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def _lines(path: str) -> Iterator[tuple[str, dict | str]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield f"line {number}", _parse(line.rstrip(b"\r\n"))


def _parse(line: bytes) -> dict | str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"no valid UTF-8 (byte {error.start + 1})"
    except json.JSONDecodeError as error:
        return f"no valid JSON ({error.msg}, column {error.colno}); a jsonl file has one whole object per line"
    except RecursionError:
        return "brackets inside brackets, too many to be read"
    return _as_row(row, escaped=b"\\u" in line)


def _as_row(row: object, escaped: bool = True) -> dict | str:
    if not isinstance(row, dict):
        return f'a row must be an object like {{"prompt": ..., "completion": ...}}, got {json.dumps(row)[:40]}'
    if escaped:
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return "half a surrogate pair (\\ud800 to \\udfff), which is no character"
    return row


def _array(path: str) -> Iterator[tuple[str, dict | str]]:
    """The entries of one JSON array, which is decoded piece by piece."""
    decoder = json.JSONDecoder()
    with open(path, encoding="utf-8-sig") as file:
        text, at, number = file.read(CHUNK).lstrip(), 1, 0
        while True:
            at = _BETWEEN.match(text, at).end()
            try:
                if text[at : at + 1] == "]":
                    return
                row, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                cut_off = error.pos >= len(text) - 16 or error.msg.startswith("Unterminated")
                more = file.read(max(CHUNK, len(text) - at)) if cut_off else ""
                if not more:
                    raise ConfigError(
                        f"{path}, row {number + 1}: no valid JSON ({error.msg}), and nothing behind it can be told "
                        "apart; mend it, or keep one object per line in a jsonl file"
                    ) from error
                text, at = text[at:] + more, 0
                continue
            number += 1
            yield f"row {number}", _as_row(row)


def _records(path: str) -> Iterator[tuple[str, dict | str]]:
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        line = reader.line_num + 1
        for values in reader:
            if values:
                sound = len(values) == len(header)
                yield (
                    f"line {line}",
                    dict(zip(header, values, strict=True))
                    if sound
                    else f"{len(values)} fields, but the header names {len(header)}",
                )
            line = reader.line_num + 1


def _text_columns(path: str) -> Features:
    """All columns of a csv file as text: an answer `42` is text too."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return Features({name: Value("string") for name in next(csv.reader(file))})
