"""Types of the columns that TRL is given, so that rows of several sources fit into one table."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
from datasets import Features, List, Value

from .forms import Form
from .loss import kind_of

# Objects with keys of their own, which a struct cannot hold; new in datasets 5.
JSON = getattr(datasets, "Json", lambda: None)()
PLAIN_TURNS = List({"role": Value("string"), "content": Value("string")})
_TEXT, _IDS = Value("string"), List(Value("int64"))
# The columns of a kind of rows that hold turns, or text.
_TURNS = {
    "messages": ("messages",),
    "chat pairs": ("prompt", "completion"),
    "chat preferences": ("prompt", "chosen", "rejected"),
}
_TEXTS = {
    "pairs": ("prompt", "completion"),
    "preferences": ("prompt", "chosen", "rejected"),
    "labelled": ("text", "label"),
}


def is_plain(features: Features, form: Form) -> bool:
    """Whether no turn has keys that others lack, so that TRL reads the rows as they are."""
    if form.name not in ("messages", "prompt/completion"):
        return form.convert is None
    return JSON is None or all(_is_plain(features[name]) for name in form.needed)


def free_turns(features: Features, form: Form) -> Features:
    """`features`, with turns of the form's columns that have keys of their own."""
    return Features({name: List(JSON) if name in form.needed else kind for name, kind in features.items()})


def features_of(kind: str, sources: Sequence[Features | None], text_field: str = "text") -> Features | None:
    """The types of rows of a kind (`loss.kind_of`) that hold those of every source; None: they are not known.

    Args:
        kind: of all the rows.
        sources: what each source has; None for one that does not say.
        text_field: the column of plain text.
    """
    present = [one for one in sources if one is not None]
    turns = _TURNS.get(kind, ())
    if turns:
        kinds = [one[name] for one in present for name in turns if name in one]
        plain = len(present) == len(sources) and all(one in (_TEXT, PLAIN_TURNS) for one in kinds)
        if not plain and JSON is None:
            return None
        columns = dict.fromkeys(turns, PLAIN_TURNS if plain else List(JSON))
    elif kind == "tokens":
        columns = {"input_ids": _IDS} | ({"labels": _IDS} if any("labels" in one for one in present) else {})
    else:
        columns = dict.fromkeys(_TEXTS.get(kind, (text_field,)), _TEXT)
        if any("text_pair" in one for one in present):
            columns["text_pair"] = _TEXT
    tools = [one["tools"] for one in present if "tools" in one]
    if tools:
        columns["tools"] = tools[0] if all(one == tools[0] for one in tools) else JSON
    return Features(columns)


def features_of_row(row: dict, text_field: str) -> Features | None:
    """Types that every row of the same form fits, where those of the first rows might not fit a later one.

    Args:
        row: as TRL reads it.
        text_field: the column of plain text.
    """
    features = features_of(kind_of(row), [None], text_field)
    if features is None or "tools" in row and JSON is None:
        return None
    if "labels" in row:
        features["labels"] = features["input_ids"]
    if "text_pair" in row:
        features["text_pair"] = _TEXT
    if "tools" in row:
        features["tools"] = JSON
    return features


def _is_plain(kind) -> bool:
    return not isinstance(kind, List) or not isinstance(kind.feature, dict) or set(kind.feature) == {"role", "content"}
