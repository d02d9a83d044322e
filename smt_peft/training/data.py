"""Data sets of a run: local files or the Hub, brought to one of the forms that TRL reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, disable_progress_bars, enable_progress_bars, load_dataset
from datasets.exceptions import DatasetGenerationError

from .errors import ConfigError
from .keys import RunConfig
from .tell import tell

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# What makes a form: the columns that must be there, in the order in which they are looked for.
FORMS = {
    "tokenised": ("input_ids",),
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction/output": ("instruction", "output"),
}
OPTIONAL = {"tokenised": ("labels",), "instruction/output": ("input",), "messages": ("tools",)}
QUIET_ROWS = 50_000


@dataclass
class Data:
    """The rows of a run: `train`, and `evaluation` or None, in a form TRL reads."""

    train: Dataset
    evaluation: Dataset | None


def load_data(config: RunConfig, text_field: str = "text") -> Data:
    """Read, check and convert the data of a run; prints one line per set.

    Raises:
        ConfigError: a file is broken (with its line), empty, or has no columns that are understood.
    """
    train = _load("dataset_path", config.dataset_path, config.dataset_name, config.dataset_train_split, text_field)
    evaluation = None
    if config.eval_dataset_path or config.dataset_test_split:
        evaluation = _load(
            "eval_dataset_path", config.eval_dataset_path, config.dataset_name, config.dataset_test_split, text_field
        )
    if config.eval_exact_match and not {"prompt", "completion"} <= set(evaluation.column_names):
        raise ConfigError(
            "eval_exact_match compares completions, so it needs prompt/completion rows in the evaluation "
            f"set, which has {evaluation.column_names}; set eval_exact_match: false"
        )
    return Data(train, evaluation)


def _load(key: str, paths: str | list[str] | None, name: str | None, split: str | None, text_field: str) -> Dataset:
    if paths is not None:
        files = [paths] if isinstance(paths, str) else paths
        where, rows = ", ".join(files), read_files(files, key)
    else:
        where, rows = f"{name} ({split})", _read_hub(name, split)
    if len(rows) > QUIET_ROWS:
        enable_progress_bars()
    rows, form = to_trl(rows, where, text_field)
    tell(f"{'train' if key == 'dataset_path' else 'evaluation'} set: {where}, {form}, {len(rows):,} rows")
    return rows


def read_files(files: list[str], key: str = "dataset_path") -> Dataset:
    """All rows of local files of one kind."""
    for file in files:
        if Path(file).stat().st_size == 0:
            raise ConfigError(f"{key}: {file} is empty; put at least one row into it")
    kinds = {READERS[Path(file).suffix] for file in files}
    if len(kinds) > 1:
        raise ConfigError(f"{key}: files of different kinds ({', '.join(sorted(kinds))}); convert them to one")
    disable_progress_bars()
    try:
        rows = load_dataset(kinds.pop(), data_files=files, split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        for file in files:
            _find_broken_row(file)
        raise ConfigError(f"{key}: {', '.join(files)} cannot be read: {error.__cause__ or error}") from error
    if len(rows) == 0:
        raise ConfigError(f"{key}: {', '.join(files)} holds no rows; put at least one into it")
    return rows


def _find_broken_row(file: str) -> None:
    """Raise with the first line of a jsonl file that is no JSON object."""
    if Path(file).suffix != ".jsonl":
        return
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{file}, line {number}: no valid JSON ({error.msg}, column {error.colno}); a jsonl "
                    "file has one whole object per line"
                ) from error
            if not isinstance(row, dict):
                raise ConfigError(
                    f"{file}, line {number}: a row must be an object like "
                    f'{{"prompt": ..., "completion": ...}}, got {type(row).__name__}'
                )


def _read_hub(name: str, split: str) -> Dataset:
    try:
        return load_dataset(name, split=split)
    except Exception as error:  # the Hub client raises errors of many libraries
        raise ConfigError(
            f"dataset_name: {name} (split {split}) cannot be read: {error}; check the name, the split "
            "and the network, or use a local file in dataset_path"
        ) from error


def to_trl(rows: Dataset, where: str, text_field: str = "text") -> tuple[Dataset, str]:
    """Detect the form of the rows by their columns, check them, and convert what TRL does not read.

    Args:
        rows: with any columns.
        where: name of the set, for messages.
        text_field: column of plain text.

    Returns:
        The rows with the columns of their form only, and the name of the form.
    """
    columns = set(rows.column_names)
    forms = {**FORMS, "text": (text_field,)}
    form = next((name for name, needed in forms.items() if columns.issuperset(needed)), None)
    if form is None:
        expected = "; ".join("+".join(needed) for needed in forms.values())
        raise ConfigError(
            f"{where}: the columns {sorted(columns)} are none of the known forms: {expected}. Rename "
            "the columns, or set dataset_text_field"
        )
    kept = [name for name in (*forms[form], *OPTIONAL.get(form, ())) if name in columns]
    rows = rows.select_columns(kept)
    for name in forms[form]:
        _check_column(rows, name, where, may_be_list=form not in ("instruction/output", "text"))
    if form == "instruction/output":
        rows = rows.map(_from_instruction, remove_columns=rows.column_names)
    return rows, form


def _check_column(rows: Dataset, name: str, where: str, may_be_list: bool) -> None:
    allowed = (str, list) if may_be_list else (str,)
    for number, value in enumerate(rows[name], start=1):
        if not isinstance(value, allowed):
            got = "nothing" if value is None else type(value).__name__
            raise ConfigError(
                f"{where}, row {number}: {name} must be {'text or a list' if may_be_list else 'text'}, "
                f"got {got}; fill it in or drop the row"
            )
        if not value:
            raise ConfigError(f"{where}, row {number}: {name} is empty; fill it in or drop the row")


def _from_instruction(row: dict) -> dict:
    parts = [row["instruction"], row.get("input")]
    return {"prompt": "\n\n".join(part for part in parts if part) + "\n\n", "completion": row["output"]}
