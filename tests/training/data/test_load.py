"""Forms of rows, kinds of files, and what is told of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from sets import TEMPLATE, load, write

from smt_peft.training.errors import ConfigError

PAIR = {"prompt": "a", "completion": "b"}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SPOKEN = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("row", "form", "expected"),
    [
        (PAIR | {"id": 3}, "prompt/completion", PAIR),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt/completion", None),
        ({"messages": CHAT}, "messages", None),
        ({"messages": CHAT, "prompt": "a"}, "messages", {"messages": CHAT}),
        ({"conversations": SPOKEN}, "sharegpt", {"messages": CHAT}),
        ({"conversations": CHAT}, "sharegpt", {"messages": CHAT}),
        ({"messages": SPOKEN}, "sharegpt", {"messages": CHAT}),
        (
            {"conversations": SPOKEN, "system": "s"},
            "sharegpt",
            {"messages": [{"role": "system", "content": "s"}, *CHAT]},
        ),
        (
            {"instruction": "do", "input": "x", "output": "y", "system": "s"},
            "alpaca",
            {"prompt": "s\n\ndo\n\nx\n\n", "completion": "y"},
        ),
        ({"instruction": "do", "input": "", "output": "y"}, "alpaca", {"prompt": "do\n\n", "completion": "y"}),
        ({"instruction": "do", "output": "y"}, "alpaca", {"prompt": "do\n\n", "completion": "y"}),
        ({"text": "abc"}, "text", None),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "tokenised", None),
        ({"input_ids": [1, 2], "text": "ab"}, "tokenised", {"input_ids": [1, 2]}),
    ],
)
def test_forms_are_detected_by_columns(tmp_path, capsys, row, form, expected):
    path = write(tmp_path / "rows.jsonl", row)
    assert load(path).train.to_list() == [expected or row]
    assert capsys.readouterr().out == f"train set: {path}, {form}, 1 row\n"


@pytest.mark.parametrize(("spelling", "role"), [("GPT", "assistant"), ("observation", "tool"), ("system", "system")])
def test_speakers_are_spelled_in_many_ways(tmp_path, spelling, role):
    path = write(tmp_path / "rows.jsonl", {"conversations": [{"from": spelling, "value": "a"}]})
    assert load(path).train[0]["messages"] == [{"role": role, "content": "a"}]


def test_a_rendered_text_beside_its_parts_is_not_ambiguous(tmp_path):
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is a task.\nAdd.\n1 2\nAnswer: 3"}
    assert load(write(tmp_path / "rows.jsonl", row)).train.column_names == ["prompt", "completion"]


def test_columns_that_say_different_things_are_refused_until_the_form_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", PAIR | {"text": "something else"})
    with pytest.raises(ConfigError, match=r"fit prompt/completion .* as well as text \(text\).*dataset_format"):
        load(path)
    assert load(path, dataset_format="text").train.column_names == ["text"]
    with pytest.raises(ConfigError, match=r"dataset_format: alpaca needs the columns instruction, output"):
        load(path, dataset_format="alpaca")


def test_another_text_column_can_be_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"body": "abc"})
    assert load(path, trainer={"dataset_text_field": "body"}).train.to_list() == [{"body": "abc"}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_is_read(tmp_path, suffix):
    rows = Dataset.from_list([{"prompt": "a\nb", "completion": "42"}, {"prompt": "NA", "completion": "d, e"}])
    path = str(tmp_path / f"rows.{suffix}")
    {
        "jsonl": rows.to_json,
        "csv": rows.to_csv,
        "parquet": rows.to_parquet,
        "json": lambda path: Path(path).write_text(json.dumps(rows.to_list(), indent=1)),
    }[suffix](path)
    assert load(path).train.to_list() == rows.to_list()


def test_an_array_larger_than_a_piece_of_it_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("smt_peft.training.data.files.CHUNK", 64)
    rows = [{"prompt": "p" * number, "completion": 'é"\\'} for number in range(1, 200)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert load(str(path)).train.to_list() == rows


def test_files_of_several_kinds_make_one_set(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("completion,prompt\nb,a\n")
    paths = [write(tmp_path / "a.jsonl", PAIR | {"id": 3}), str(tmp_path / "a.csv")]
    assert load(paths).train.to_list() == [PAIR, PAIR]
    assert capsys.readouterr().out == f"train set: {', '.join(paths)}, prompt/completion, 2 rows\n"


def test_a_data_set_has_splits(tmp_path, capsys):
    """A local directory in the layout of the Hub: no network."""
    write(tmp_path / "train.jsonl", PAIR, PAIR)
    write(tmp_path / "test.jsonl", PAIR)
    for streaming in (False, True):
        data = load(dataset_name=str(tmp_path), dataset_test_split="test", dataset_streaming=streaming)
        assert list(data.train) == [PAIR, PAIR] and data.evaluation.to_list() == [PAIR]
    assert f"evaluation set: {tmp_path} (test), prompt/completion, 1 row\n" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"\(split nowhere\) cannot be read"):
        load(dataset_name=str(tmp_path), dataset_train_split="nowhere")


def test_keys_of_single_messages_stay_theirs(tmp_path):
    """A table would give every message the keys of all, and templates ask whether there are `tool_calls`."""
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    turns = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "1"}]
    path = str(tmp_path / "rows.parquet")
    Dataset.from_list([{"messages": turns}, {"messages": CHAT}]).to_parquet(path)
    rows = write(tmp_path / "rows.jsonl", {"messages": turns}, {"messages": CHAT})
    template = TEMPLATE.replace("raise_exception", "nothing")
    for file in (path, rows):
        assert load(file, template).train.to_list() == [{"messages": turns}, {"messages": CHAT}]


def test_keys_that_come_late_in_a_long_file_are_read(tmp_path):
    """A reader learns the columns from the first ten megabytes."""
    long = [CHAT[0] | {"content": "a" * (1 << 20)}, CHAT[1]]
    late = {"messages": [*CHAT, {"role": "tool", "content": "1", "name": "add"}]}
    path = write(tmp_path / "rows.jsonl", *[{"messages": long}] * 11, late | {"id": 3})
    assert load(path).train[11] == late


def test_exact_match_needs_completions(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"text": "abc"})
    with pytest.raises(ConfigError, match="eval_exact_match"):
        load(path, eval_dataset_path=path, eval_exact_match=True)


def test_messages_need_a_template(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"messages": CHAT})
    with pytest.raises(ConfigError, match="training set holds messages, but the tokenizer has no chat template"):
        load(path, template=None)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    load(path, template=None, trainer={"chat_template_path": str(tmp_path / "chat.jinja")})
