"""Forms of data, and broken files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from smt_peft.training.data import load_data, read_files, to_trl
from smt_peft.training.errors import ConfigError
from smt_peft.training.schema import RunConfig


def write(path, *lines) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("row", "form", "columns"),
    [
        ({"prompt": "a", "completion": "b", "id": 3}, "prompt/completion", ["prompt", "completion"]),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", ["messages"]),
        ({"instruction": "do", "input": "x", "output": "y"}, "instruction/output", ["prompt", "completion"]),
        ({"text": "abc"}, "text", ["text"]),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "tokenised", ["input_ids", "labels"]),
    ],
)
def test_forms_are_detected_by_columns(row, form, columns):
    rows, found = to_trl(Dataset.from_list([row]), "here")
    assert found == form
    assert rows.column_names == columns


def test_an_instruction_becomes_a_prompt():
    table = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Ho"}]
    rows, _ = to_trl(Dataset.from_list(table), "here")
    assert rows[0] == {"prompt": "Add.\n\n1 2\n\n", "completion": "3"}
    assert rows[1] == {"prompt": "Hi\n\n", "completion": "Ho"}


def test_another_text_column_can_be_named():
    assert to_trl(Dataset.from_list([{"body": "abc"}]), "here", text_field="body")[1] == "text"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_is_read(tmp_path, suffix):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    path = str(tmp_path / f"rows.{suffix}")
    {
        "jsonl": rows.to_json,
        "csv": rows.to_csv,
        "parquet": rows.to_parquet,
        "json": lambda path: Path(path).write_text(json.dumps(rows.to_list())),
    }[suffix](path)
    assert read_files([path]).to_list() == rows.to_list()


def test_a_line_says_what_was_found(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a", "completion": "b"}', '{"prompt": "c", "completion": "d"}')
    data = load_data(RunConfig("m", dataset_path=[path, path]))
    assert len(data.train) == 4 and data.evaluation is None
    assert capsys.readouterr().out == f"train set: {path}, {path}, prompt/completion, 4 rows\n"


GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"prompt": "a", "comple'], "rows.jsonl, line 2: no valid JSON"),
        ([GOOD, "", "[1, 2]"], "rows.jsonl, line 3: a row must be an object"),
        ([GOOD, '{"prompt": "a"}'], "rows.jsonl, row 2: completion must be text or a list, got nothing"),
        ([GOOD, '{"prompt": "a", "completion": ""}'], "rows.jsonl, row 2: completion is empty"),
        (['{"prompt": "a", "completion": 3}'], "rows.jsonl, row 1: completion must be text or a list, got int"),
        (['{"question": "a"}'], r"columns \['question'\] are none of the known forms.*prompt\+completion"),
        ([], "rows.jsonl is empty"),
    ],
)
def test_broken_files_are_named_with_the_row(tmp_path, lines, message):
    path = write(tmp_path / "rows.jsonl", *lines)
    with pytest.raises(ConfigError, match=message):
        load_data(RunConfig("m", dataset_path=path))


def test_exact_match_needs_completions(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"text": "abc"}')
    with pytest.raises(ConfigError, match="eval_exact_match"):
        load_data(RunConfig("m", dataset_path=path, eval_dataset_path=path, eval_exact_match=True))
