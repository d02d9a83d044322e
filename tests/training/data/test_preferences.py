"""Preferences: which rows are read, as what, and what is wrong with the others."""

from __future__ import annotations

import pytest
from runs import write_jsonl

from smt_peft.training.data.broken import Broken
from smt_peft.training.data.files import LocalFile
from smt_peft.training.data.preferences import PREFERENCES
from smt_peft.training.data.read import Reading, read_part
from smt_peft.training.errors import ConfigError

USER, GOOD, BAD = (
    {"role": role, "content": content}
    for role, content in (("user", "Hi"), ("assistant", "Yes."), ("assistant", "No."))
)
SYSTEM = {"role": "system", "content": "Be kind."}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
READ = [
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "chosen": "c", "rejected": "r"}),
    ({"chosen": "one two", "rejected": "one ten"}, {"prompt": "one t", "chosen": "wo", "rejected": "en"}),
    (CHAT, CHAT),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
    ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
    ({"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}, CHAT),
    ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
    ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, {**CHAT, "prompt": [SYSTEM, USER]}),
]
BROKEN = [
    ({"prompt": "p", "chosen": "c"}, "rejected must be text or a list, got nothing"),
    ({"prompt": "p", "chosen": "c", "rejected": ""}, "rejected is empty"),
    ({"prompt": None, "chosen": "c", "rejected": "r"}, "prompt is missing"),
    ({"prompt": "p", "chosen": 3, "rejected": "r"}, "chosen must be text or a list, got int"),
    ({"prompt": "p", "chosen": [GOOD], "rejected": "r"}, "chosen and rejected must both be text or both be lists"),
    (
        {"prompt": [USER], "chosen": "c", "rejected": "r"},
        "prompt is a list of messages, so chosen and rejected must be",
    ),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "rejected must end with what the assistant says"),
    (
        {"prompt": "p", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "chosen begins with a user's message",
    ),
    ({"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [BAD]}, r"chosen\[0\] \(assistant\): content"),
]
NO_PROMPT = [
    ({"chosen": "same", "rejected": "same"}, "chosen and rejected are the same"),
    (
        {"chosen": [USER, GOOD], "rejected": [SYSTEM, BAD]},
        "chosen and rejected have no message in common, so there is no prompt",
    ),
]


def read(path, rows, policy="stop"):
    data = write_jsonl(path / "pairs.jsonl", rows)
    broken = Broken(policy)
    reading = Reading(on_broken_row=policy, forms={PREFERENCES.name: PREFERENCES})
    return read_part(LocalFile(str(data)), reading, broken)[0], broken


@pytest.mark.parametrize(("row", "expected"), READ)
def test_every_spelling_becomes_prompt_chosen_and_rejected(tmp_path, row, expected):
    rows, _ = read(tmp_path, [{**row, "score_chosen": 5.0}] * 3)
    assert rows.column_names == ["prompt", "chosen", "rejected"]
    assert list(rows) == [expected] * 3


@pytest.mark.parametrize(("row", "message"), BROKEN)
def test_a_broken_row_is_named_with_file_and_line(tmp_path, row, message):
    sound = {"prompt": "p", "chosen": "c", "rejected": "r"} if isinstance(row["chosen"], str) else CHAT
    with pytest.raises(ConfigError, match=rf"pairs.jsonl, line 2: {message}"):
        read(tmp_path, [sound, row])


@pytest.mark.parametrize(("row", "message"), NO_PROMPT)
def test_rows_without_a_prompt_must_show_where_it_ends(tmp_path, row, message):
    sound = READ[1][0] if isinstance(row["chosen"], str) else READ[3][0]
    with pytest.raises(ConfigError, match=f"line 2: {message}"):
        read(tmp_path, [sound, row])
    rows, broken = read(tmp_path, [sound, row, sound], "skip")
    assert len(rows) == 2 and broken.count == 1


def test_other_columns_are_an_error_that_says_which_are_needed(tmp_path):
    with pytest.raises(ConfigError, match="need the columns chosen, rejected .*; rename rejected, or set another task"):
        read(tmp_path, [{"prompt": "p", "chosen": "c", "worse": "r"}])
