"""Which rows are surely sound, found on whole Arrow columns: the others are looked at one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .forms import ANY_TEXT, ANYTHING, IDS, LABEL, SPELLED_TURNS, TEXT, TEXT_OR_TURNS, TURNS, Form, row_fault
from .turns import MAY_BE_EMPTY, ROLES, SPELLINGS

BATCH = 1000


def faults(rows: Dataset, form: Form, also: Callable[[dict], str | None] | None = None) -> Iterator[tuple[int, str]]:
    """The number of every row that is not sound, counted from 0, and what is wrong with it.

    Args:
        rows: in the columns of `form` only; a batch of them is in memory at a time.
        form: what they are to be.
        also: looks at every row that is sound by its form, as TRL reads it.
    """
    tables = rows.with_format("arrow")
    for start in range(0, len(rows), BATCH):
        table = tables[start : start + BATCH]
        sure = np.zeros(len(table), bool) if also else sound(table, form)
        if sure.all():
            continue
        batch = rows[start : start + BATCH]
        for i in np.flatnonzero(~sure):
            row = {name: column[i] for name, column in batch.items()}
            fault = row_fault(row, form) or (also(form.to_trl(row)) if also else None)
            if fault:
                yield start + int(i), fault


def sound(table: pa.Table, form: Form) -> np.ndarray:
    """bool (rows,): rows in which `row_fault` surely finds nothing; False where it must look."""
    columns = {name: _whole(table.column(name)) for name in form.columns(table.column_names)}
    what = form.columns(table.column_names)
    sure = np.ones(len(table), bool)
    for name, column in columns.items():
        sure &= _SCREENS[what[name]](column)
    if form.check is not None:
        sure[:] = False
    if form.name == "prompt/completion" and _is_text(columns["prompt"]) != _is_text(columns["completion"]):
        sure[:] = False
    if form.name == "tokenised" and "labels" in columns and sure.any():
        sure &= _lengths(columns["input_ids"]) == _lengths(columns["labels"])
    return sure


def is_readable(rows: Dataset, form: Form) -> bool:
    """Whether the types of the columns are those of the form, so that a row that is not sound is an exception.

    Where JSON holds several types in one column, a reader has to choose one, and the rows are no longer what they were.
    """
    schema = rows.features.arrow_schema
    for name, what in form.columns(rows.column_names).items():
        kind = schema.field(name).type
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
        fits = {
            TEXT: text,
            ANY_TEXT: text,
            TEXT_OR_TURNS: text or listed,
            LABEL: text or pa.types.is_integer(kind),
            ANYTHING: True,
        }
        if not fits.get(what, listed):
            return False
    return True


def _text(column: pa.Array) -> np.ndarray:
    return _lengths(column) > 0 if _is_text(column) else _none(column)


def _any_text(column: pa.Array) -> np.ndarray:
    return ~_none(column) if _is_text(column) or pa.types.is_null(column.type) else _none(column)


def _turns(column: pa.Array, role: str = "role", content: str = "content", known=ROLES) -> np.ndarray:
    if not _is_list(column) or not pa.types.is_struct(column.type.value_type):
        return _none(column)
    turns = column.flatten()
    fields = {field.name: field.type for field in column.type.value_type}
    if not all(name in fields and pa.types.is_string(fields[name]) for name in (role, content)):
        return _none(column)
    speakers, said = pc.struct_field(turns, role), pc.struct_field(turns, content)
    may_be_empty = [name for name in known if SPELLINGS[name] in MAY_BE_EMPTY]
    good = pc.is_in(speakers, value_set=pa.array(known)).to_numpy(zero_copy_only=False) & (
        (_lengths(said) > 0)
        | said.is_valid().to_numpy(zero_copy_only=False)
        & pc.is_in(speakers, value_set=pa.array(may_be_empty)).to_numpy(zero_copy_only=False)
    )
    sure = _lengths(column) > 0
    sure[pc.list_parent_indices(column).to_numpy()[~good]] = False
    return sure


def _spelled_turns(column: pa.Array) -> np.ndarray:
    return _turns(column, known=tuple(SPELLINGS)) | _turns(column, "from", "value", tuple(SPELLINGS))


def _text_or_turns(column: pa.Array) -> np.ndarray:
    return _text(column) | _turns(column)


def _ids(column: pa.Array) -> np.ndarray:
    if not _is_list(column) or not pa.types.is_integer(column.type.value_type):
        return _none(column)
    sure = _lengths(column) > 0
    sure[pc.list_parent_indices(column).to_numpy()[~column.flatten().is_valid().to_numpy(zero_copy_only=False)]] = False
    return sure


def _label(column: pa.Array) -> np.ndarray:
    if not pa.types.is_integer(column.type):
        return _text(column)
    return pc.fill_null(pc.greater_equal(column, 0), False).to_numpy(zero_copy_only=False)


def _anything(column: pa.Array) -> np.ndarray:
    return ~_none(column)


_SCREENS = {
    TEXT: _text,
    ANY_TEXT: _any_text,
    TURNS: _turns,
    SPELLED_TURNS: _spelled_turns,
    TEXT_OR_TURNS: _text_or_turns,
    IDS: _ids,
    LABEL: _label,
    ANYTHING: _anything,
}


def _whole(column: pa.ChunkedArray) -> pa.Array:
    chunks = column.combine_chunks()
    return pa.concat_arrays(chunks.chunks) if isinstance(chunks, pa.ChunkedArray) else chunks


def _is_text(column: pa.Array) -> bool:
    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def _is_list(column: pa.Array) -> bool:
    return pa.types.is_list(column.type) or pa.types.is_large_list(column.type)


def _lengths(column: pa.Array) -> np.ndarray:
    """int64 (rows,): bytes of a text, entries of a list, 0 for null."""
    lengths = pc.list_value_length(column) if _is_list(column) else pc.binary_length(column)
    return pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _none(column: pa.Array) -> np.ndarray:
    return np.zeros(len(column), bool)
