"""Several sources as one set."""

from __future__ import annotations

from collections import Counter

import pytest
from datasets import Dataset
from sets import load, write

from smt_peft.training.errors import ConfigError

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def letters(tmp_path):
    """Files of 40, 20 and 20 texts."""
    return {
        name: write(tmp_path / f"{name}.jsonl", *[{"text": f"{name}{number}"} for number in range(count)])
        for name, count in {"a": 40, "b": 20, "c": 20}.items()
    }


def shares(data) -> Counter:
    return Counter(row["text"][0] for row in data.train)


def test_without_weights_every_row_comes_once(letters, capsys):
    data = load(dataset_mixture=[{"path": letters["a"]}, {"path": [letters["b"], letters["c"]]}])
    assert shares(data) == {"a": 40, "b": 20, "c": 20}
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"train set: {letters['b']}, {letters['c']}, text, 40 rows",
        "train set: a mixture of 2 sources as text, all rows of each, 80 rows",
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_odds_and_the_seed_decides(letters, capsys, streaming):
    mixture = [{"path": letters["a"], "weight": 3}, {"path": letters["b"], "weight": 1.0}]
    rows = [
        list(load(dataset_mixture=mixture, dataset_streaming=streaming, trainer={"seed": seed}).train)
        for seed in (0, 0, 1)
    ]
    assert rows[0] == rows[1] != rows[2]
    for drawn in rows:
        texts = [row["text"] for row in drawn]
        assert len(set(texts)) == len(texts), "no row comes twice"
        # One source ran out, and until then rows were drawn 3 : 1.
        count = Counter(text[0] for text in texts)
        assert count["a"] == 40 or count["b"] == 20
        assert 0.55 < count["a"] / len(texts) < 0.95
    assert "a mixture of 2 sources as text, drawn 0.75 : 0.25" in capsys.readouterr().out


def test_smaller_sources_may_come_again_until_all_have_come(letters):
    mixture = [{"path": letters["a"], "weight": 1}, {"path": letters["b"], "weight": 1}]
    data = load(dataset_mixture=mixture, dataset_mixture_stopping_strategy="all_exhausted")
    texts = [row["text"] for row in data.train]
    assert len(set(texts)) == 60 < len(texts)


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_make_messages_of_the_others(tmp_path, streaming):
    files = {
        "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "pairs": {"prompt": "a", "completion": "b"},
        "chat": {"prompt": CHAT[:1], "completion": CHAT[1:]},
        "alpaca": {"instruction": "a", "output": "b"},
        "messages": {"messages": [{"content": turn["content"], "role": turn["role"]} for turn in CHAT]},
    }
    mixture = [{"path": write(tmp_path / f"{name}.jsonl", row)} for name, row in files.items()]
    assert list(load(dataset_mixture=mixture, dataset_streaming=streaming).train) == [{"messages": CHAT}] * 5
    pairs = load(dataset_mixture=mixture[1:4], dataset_streaming=streaming).train
    assert list(pairs) == [{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 3


def test_tools_and_labels_that_others_lack_are_filled_in(tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    paths = [
        write(tmp_path / "a.jsonl", {"messages": CHAT, "tools": tools}),
        write(tmp_path / "b.jsonl", {"messages": CHAT}),
    ]
    assert load(paths).train["tools"][:] == [tools, None]
    Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}]).to_parquet(tmp_path / "a.parquet")
    paths = [str(tmp_path / "a.parquet"), write(tmp_path / "c.jsonl", {"input_ids": [3]})]
    assert load(paths).train["labels"][:] == [[-100, 2], [3]]


def test_forms_that_do_not_go_together_are_refused_by_name(tmp_path, letters):
    chat = write(tmp_path / "chat.jsonl", {"messages": CHAT})
    with pytest.raises(ConfigError, match=rf"{letters['a']}: text; {chat}: messages; bring them to one form"):
        load(dataset_mixture=[{"path": letters["a"]}, {"path": chat}])


def test_a_source_has_a_form_of_its_own(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"text": "x", "body": "y", "prompt": "p", "completion": "c"})
    mixture = [{"path": path, "format": "text"}, {"path": path, "format": "text"}]
    assert load(dataset_mixture=mixture).train.to_list() == [{"text": "x"}] * 2
