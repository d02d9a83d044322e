"""Rows that cannot be used: named by file and line, or left out and counted."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from sets import load, write

from smt_peft.training.errors import ConfigError

GOOD = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def turn(role, content) -> dict:
    return {"messages": [{"role": "user", "content": "a"}, {"role": role, "content": content}]}


BROKEN = {
    "cut off": ([GOOD, '{"prompt": "a", "comple'], "line 2: no valid JSON"),
    "nested without end": ([GOOD, '{"prompt": ' + "[" * 5000], "line 2: brackets inside brackets"),
    "no object": ([GOOD, "", "[1, 2]"], "line 3: a row must be an object"),
    "half a character": ([GOOD, r'{"prompt": "\ud800", "completion": "b"}'], "line 2: half a surrogate pair"),
    "missing": ([GOOD, "", {"prompt": "a"}], "line 3: completion must be text or a list, got nothing"),
    "empty": ([GOOD, GOOD | {"completion": ""}], "line 2: completion is empty"),
    "a number": ([GOOD, GOOD | {"completion": 3}], "line 2: completion must be text or a list, got int"),
    "text and turns": ([GOOD, GOOD | {"completion": CHAT["messages"]}], "line 2: prompt and completion must both be"),
    "no turns": ([CHAT, {"messages": []}], "line 2: messages is empty"),
    "no list": ([CHAT, {"messages": "a"}], "line 2: messages must be a list of messages, got str"),
    "no role": ([CHAT, {"messages": [{"content": "a"}]}], r"line 2: messages\[0\] has no role"),
    "an unknown role": ([CHAT, turn("asistant", "b")], r"line 2: messages\[1\] has the role 'asistant'"),
    "another spelling": ([CHAT, turn("gpt", "b")], r"line 2: messages\[1\].*dataset_format: sharegpt reads it"),
    "no content": ([CHAT, turn("assistant", None)], r"line 2: messages\[1\] \(assistant\): content must be text"),
    "empty content": ([CHAT, turn("assistant", "")], r"line 2: messages\[1\] \(assistant\): content is empty"),
    "order": ([CHAT, turn("user", "b")], "line 2: the chat template refuses it: roles must alternate"),
    "an empty answer": ([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}], "line 2: output"),
    "labels": (
        [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2], "labels": [1]}],
        "line 2: there are 1 labels for 2 input_ids",
    ),
    "no labels": ([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}], "line 2: labels must be a list"),
    "a speaker": (
        [{"conversations": [{"from": "human", "value": "a"}]}, {"conversations": [{"from": "nobody", "value": "a"}]}],
        r"line 2: conversations\[0\] has the role 'nobody'",
    ),
}


@pytest.mark.parametrize(("rows", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_row_is_named_or_skipped(tmp_path, capsys, rows, message, streaming):
    path = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(ConfigError, match=f"rows.jsonl, {message}.*on_broken_row: skip"):
        list(load(path, dataset_streaming=streaming).train)
    text = (tmp_path / "rows.jsonl").read_text()
    last = dict(rows[0])
    write(tmp_path / "rows.jsonl", *rows, last)
    capsys.readouterr()
    kept = list(load(path, dataset_streaming=streaming, on_broken_row="skip").train)
    assert len(kept) == 2 and kept[0] == kept[1] == next(iter(load(write(tmp_path / "good.jsonl", last)).train))
    told = capsys.readouterr().out
    assert message.split(":")[0] in told and ("skipped" if streaming else "2 rows, 1 row skipped (") in told
    assert (tmp_path / "rows.jsonl").read_text() == text + json.dumps(last) + "\n"


def test_the_first_three_places_are_told_of_many(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", GOOD, *["{"] * 5, *[GOOD | {"prompt": ""}] * 2)
    assert len(load(path, on_broken_row="skip").train) == 1
    told = capsys.readouterr().out
    assert "1 row, 7 rows skipped (" in told and "line 4: no valid" in told
    assert "line 5" not in told and told.endswith("...)\n")


def test_each_broken_row_of_a_stream_is_told_once(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", GOOD, *["{"] * 5)
    data = load(path, on_broken_row="skip", dataset_streaming=True)
    for _ in range(2):
        assert list(data.train.shuffle(seed=0)) == [GOOD]
    told = capsys.readouterr().out
    assert told.count("line 2: no valid JSON") == 1 and told.count("line 5") == 0
    assert told.count("5 rows skipped in all") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('prompt,completion\na,b\n\n"a\nb",\n', "line 4: completion is empty"),
        ("prompt,completion\na,b\na,b,c\n", "line 3: 3 fields, but the header names 2"),
        ("prompt,completion\na,b\na\n", "line 3: completion is empty"),
    ],
)
def test_broken_rows_of_csv_are_named_by_line(tmp_path, text, message):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"rows.csv, {message}"):
        load(str(path))
    assert load(str(path), on_broken_row="skip").train.to_list() == [GOOD]


def test_broken_rows_elsewhere_are_named_by_number(tmp_path):
    rows = [GOOD, GOOD | {"prompt": ""}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.parquet"):
        with pytest.raises(ConfigError, match=f"{name}, row 2: prompt is empty"):
            load(str(tmp_path / name))
        assert load(str(tmp_path / name), on_broken_row="skip").train.to_list() == [GOOD]
    (tmp_path / "rows.json").write_text(json.dumps(rows)[:-9])
    with pytest.raises(ConfigError, match="rows.json, row 2: no valid JSON"):
        load(str(tmp_path / "rows.json"), on_broken_row="skip")


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a"}], r"columns \['question'\] are none of the known forms.*prompt\+completion"),
        ([{"input_ids": [1], "completion_mask": [1]}], "completion_mask without labels; add labels"),
        ([], "rows.jsonl is empty"),
    ],
)
def test_files_without_usable_rows_are_refused(tmp_path, rows, message, policy):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path / "rows.jsonl", *rows), on_broken_row=policy)


def test_a_file_of_broken_rows_only_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no rows that can be used, 2 rows skipped"):
        load(write(tmp_path / "rows.jsonl", *[GOOD | {"prompt": ""}] * 2), on_broken_row="skip")


def test_assistant_only_loss_needs_an_assistant_in_every_row(tmp_path):
    path = write(tmp_path / "rows.jsonl", CHAT, {"messages": CHAT["messages"][:1]})
    with pytest.raises(ConfigError, match="line 2: the assistant says nothing"):
        load(path, trainer={"assistant_only_loss": True})
    assert len(load(path).train) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_null_in_the_first_line_is_a_broken_row(tmp_path, streaming):
    # Arrow's reader of JSON lines ends the process there.
    path = write(tmp_path / "rows.jsonl", "null", GOOD)
    with pytest.raises(ConfigError, match="rows.jsonl, line 1: a row must be an object .* got null"):
        list(load(path, dataset_streaming=streaming).train)
    assert list(load(path, dataset_streaming=streaming, on_broken_row="skip").train) == [GOOD]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_a_file_of_a_byte_order_mark_alone_has_no_rows(tmp_path, suffix, streaming):
    file = tmp_path / f"rows.{suffix}"
    file.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ConfigError, match="put at least one"):
        load(str(file), dataset_streaming=streaming)
