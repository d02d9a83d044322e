"""What is found sound on whole columns, against every row looked at."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from smt_peft.training.data.forms import FORMS, row_fault
from smt_peft.training.data.screen import faults, sound

TEXTS = ["a", "", None, "é", " "]


def turns(*pairs, role="role", content="content"):
    return [{role: speaker, content: said} for speaker, said in pairs]


def spoken(*pairs):
    return turns(*pairs, role="from", content="value")


TALKS = [
    [("user", "a"), ("assistant", "b")],
    [("system", ""), ("user", "a")],
    [("user", "")],
    [("user", "a"), ("assistant", None)],
    [("asistant", "a")],
    [(None, "a")],
    [("tool", ""), ("developer", "")],
    [],
    [("system", None)],
    [("user", "a")],
]
CASES = {
    "text": [{"text": text} for text in TEXTS],
    "prompt/completion": [{"prompt": one, "completion": other} for one in TEXTS for other in TEXTS],
    "alpaca": [
        {"instruction": one, "input": other, "output": third} for one in TEXTS for other in TEXTS for third in TEXTS
    ],
    "messages": [{"messages": turns(*talk)} for talk in TALKS] + [{"messages": None}, {"messages": turns(*TALKS[0])}],
    "sharegpt": [{"conversations": spoken(*talk)} for talk in [*TALKS, [("Human", "a")], [("gpt", "b")]]],
    "tokenised": [
        {"input_ids": ids, "labels": labels}
        for ids in ([1, 2], [], None, [1, None], [3])
        for labels in ([1, 2], [], None, [1, None], [-100])
    ],
}


@pytest.mark.parametrize("form", CASES)
def test_what_is_found_sound_is_sound(form):
    rows = CASES[form]
    truth = np.array([row_fault(row, FORMS[form]) is None for row in rows])
    assert truth.any() and not truth.all()
    table = pa.Table.from_pylist(rows)
    for start in (0, 1, 3):
        # A slice keeps the buffers of the whole; two chunks have offsets of their own.
        for part in (table[start:], pa.concat_tables([table[start : start + 2], table[start + 2 :]])):
            found = sound(part, FORMS[form])
            assert not (found & ~truth[start:]).any()
    dataset = Dataset(table)
    assert [index for index, _ in faults(dataset, FORMS[form])] == np.flatnonzero(~truth).tolist()
    assert [index for index, _ in faults(dataset.select(range(2, len(rows))), FORMS[form])] == [
        index - 2 for index in np.flatnonzero(~truth) if index >= 2
    ]


@pytest.mark.parametrize("form", CASES)
def test_sound_rows_are_not_looked_at(form, monkeypatch):
    rows = [row for row in CASES[form] if row_fault(row, FORMS[form]) is None and "Human" not in str(row)]
    assert sound(pa.Table.from_pylist(rows), FORMS[form]).all()
    monkeypatch.setattr("smt_peft.training.data.screen.row_fault", None)
    assert list(faults(Dataset.from_list(rows), FORMS[form])) == []
