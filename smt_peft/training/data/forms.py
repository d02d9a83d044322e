"""Forms of rows: which columns make one, what is wrong with a row of it, and what TRL is given for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import ConfigError
from .turns import described, to_messages, turns_fault, without_nulls

AUTO = "auto"
# What a column may hold.
TEXT, ANY_TEXT, TURNS, SPELLED_TURNS, TEXT_OR_TURNS, IDS, LABEL, ANYTHING = (
    "text",
    "text or nothing",
    "turns",
    "turns in any spelling",
    "text or turns",
    "token ids",
    "the name or number of a class",
    "anything",
)


@dataclass(frozen=True)
class Form:
    """A form of rows.

    Args:
        name: as `dataset_format` says it.
        needed: the columns that make the form, and what they hold.
        optional: columns that are read where they are.
        convert: a row in this form as TRL reads it; None: TRL reads it as it is.
        check: what is wrong with a row whose columns are each sound, or None.
    """

    name: str
    needed: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    convert: Callable[[dict], dict] | None = None
    check: Callable[[dict], str | None] | None = None

    def columns(self, present: Sequence[str]) -> dict[str, str]:
        """The columns of the form among those that are present, with what they hold."""
        return {name: what for name, what in {**self.needed, **self.optional}.items() if name in present}

    def to_trl(self, row: dict) -> dict:
        """A sound row as TRL reads it."""
        return self.convert(row) if self.convert else row


def _from_conversations(row: dict) -> dict:
    turns = to_messages(row["conversations"] if "conversations" in row else row["messages"])
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": row["system"]})
    return {"messages": turns, **({"tools": row["tools"]} if "tools" in row else {})}


def _from_instruction(row: dict) -> dict:
    parts = [row.get("system"), row["instruction"], row.get("input")]
    return {"prompt": "\n\n".join(part for part in parts if part) + "\n\n", "completion": row["output"]}


def _from_messages(row: dict) -> dict:
    return {**row, "messages": without_nulls(row["messages"])}


def _from_pair(row: dict) -> dict:
    if isinstance(row["prompt"], str):
        return row
    return {**row, "prompt": without_nulls(row["prompt"]), "completion": without_nulls(row["completion"])}


FORMS = {
    form.name: form
    for form in (
        Form("tokenised", {"input_ids": IDS}, {"labels": IDS}),
        Form("messages", {"messages": TURNS}, {"tools": ANYTHING}, _from_messages),
        Form(
            "sharegpt",
            {"conversations": SPELLED_TURNS},
            {"system": ANY_TEXT, "tools": ANYTHING},
            _from_conversations,
        ),
        Form(
            "prompt/completion",
            {"prompt": TEXT_OR_TURNS, "completion": TEXT_OR_TURNS},
            {"tools": ANYTHING},
            _from_pair,
        ),
        Form(
            "alpaca", {"instruction": TEXT, "output": TEXT}, {"input": ANY_TEXT, "system": ANY_TEXT}, _from_instruction
        ),
        Form("text", {"text": TEXT}),
    )
}


def find_form(
    columns: Sequence[str],
    row: dict,
    where: str,
    asked: str = AUTO,
    text_field: str = "text",
    forms: Mapping[str, Form] = FORMS,
) -> Form:
    """The form of rows with these columns.

    Args:
        columns: all that the rows have.
        row: one of them.
        where: name of the set, for messages.
        asked: the name of a form, or `"auto"`: by the columns. Where several fit, one wins if it holds the others'
            words (a set may bring its rendered text along), in the order of `FORMS`.
        text_field: the column of plain text.
        forms: the forms that a run can use.

    Raises:
        ConfigError: no form fits, or several that say different things.
    """
    if forms is not FORMS:
        return _only_form(columns, where, forms)
    masks = {"completion_mask", "assistant_masks"} & set(columns)
    if masks and "labels" not in columns:
        raise ConfigError(
            f"{where}: {' and '.join(sorted(masks))} without labels; add labels: the token ids, with -100 for every "
            "token that is not to be learned"
        )
    forms = {**FORMS, "text": replace(FORMS["text"], needed={text_field: TEXT})}
    if "conversations" not in columns and _is_from_value(row.get("messages")):
        forms["sharegpt"] = replace(forms["sharegpt"], needed={"messages": SPELLED_TURNS})
        if asked == AUTO:
            del forms["messages"]
    if asked == "sharegpt" and "conversations" not in columns and "messages" in columns:
        forms["sharegpt"] = replace(forms["sharegpt"], needed={"messages": SPELLED_TURNS})
    if asked != AUTO:
        form = forms[asked]
        missing = [name for name in form.needed if name not in columns]
        if missing:
            raise ConfigError(
                f"{where}: dataset_format: {asked} needs the columns {', '.join(form.needed)}, but the rows have "
                f"{sorted(columns)}; rename them, or say another form"
            )
        return form
    fitting = [form for form in forms.values() if set(form.needed) <= set(columns)]
    if not fitting:
        expected = "; ".join("+".join(form.needed) for form in forms.values())
        raise ConfigError(
            f"{where}: the columns {sorted(columns)} are none of the known forms: {expected}. Rename "
            "the columns, or set dataset_text_field"
        )
    first, *others = fitting
    for other in others if first.name != "tokenised" else ():
        if not _same_words(_words(row, first), _words(row, other)):
            raise ConfigError(
                f"{where}: the columns {sorted(columns)} fit {first.name} ({'+'.join(first.needed)}) as well as "
                f"{other.name} ({'+'.join(other.needed)}), which say different things; name the one to train on in "
                f"dataset_format"
            )
    return first


def _only_form(columns: Sequence[str], where: str, forms: Mapping[str, Form]) -> Form:
    """Tasks other than language modelling have one form each."""
    (form,) = forms.values()
    missing = [name for name in form.needed if name not in columns]
    if missing:
        optional = f" (and {', '.join(form.optional)} where there are any)" if form.optional else ""
        raise ConfigError(
            f"{where}: rows of the form {form.name} need the columns {', '.join(form.needed)}{optional}, but they have "
            f"{sorted(columns)}; rename {', '.join(missing)}, or set another task"
        )
    return form


def row_fault(row: dict, form: Form) -> str | None:
    """What is wrong with a row, or None; `row` has the form's columns."""
    for name, what in form.columns(list(row)).items():
        if name in form.optional and row[name] is None and what != IDS:
            continue
        fault = _value_fault(row[name], name, what)
        if fault:
            return fault
    missing = next((name for name in form.needed if name not in row), None)
    if missing:
        return f"{missing} is missing"
    if form.check is not None:
        return form.check(row)
    if form.name == "prompt/completion" and type(row["prompt"]) is not type(row["completion"]):
        return "prompt and completion must both be text or both be lists of messages"
    if form.name == "tokenised" and "labels" in row and len(row["labels"]) != len(row["input_ids"]):
        return f"there are {len(row['labels'])} labels for {len(row['input_ids'])} input_ids"
    return None


def _value_fault(value: Any, name: str, what: str) -> str | None:
    if what in (TURNS, SPELLED_TURNS):
        return turns_fault(value, name, spelled=what == SPELLED_TURNS)
    if what == TEXT_OR_TURNS and isinstance(value, list):
        return turns_fault(value, name)
    if what == IDS:
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            return f"{name} must be a list of whole numbers, got {described(value)}"
        return None if value else f"{name} is empty"
    if what == ANYTHING:
        return None
    if what == LABEL and not isinstance(value, str):
        return _label_fault(value, name)
    if not isinstance(value, str):
        return f"{name} must be {'text or a list' if what == TEXT_OR_TURNS else 'text'}, got {described(value)}"
    return None if value or what == ANY_TEXT else f"{name} is empty"


def _label_fault(value: Any, name: str) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return None if value >= 0 else f"{name} is {value}, which is no class"
    hint = "; numbers to be predicted (regression) are not supported" if isinstance(value, float) else ""
    return f"{name} must be the name or the number of a class, got {described(value)}{hint}"


def _is_from_value(turns: Any) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and first.get("from") is not None and first.get("role") is None


def _words(row: dict, form: Form) -> list[str]:
    """The texts of a row in a form's columns."""
    found: list[str] = []
    left = [row.get(name) for name, what in form.needed.items() if what != IDS]
    while left:
        value = left.pop()
        if isinstance(value, str):
            found.append(value.strip())
        elif isinstance(value, list):
            left.extend(value)
        elif isinstance(value, dict):
            left.extend(turn for key, turn in value.items() if key in ("content", "value"))
    return [text for text in found if text]


def _same_words(one: list[str], other: list[str]) -> bool:
    """Whether the texts of one are all found in the other's, or the other way round."""
    return any(
        texts and all(text in "\n".join(whole) for text in texts) for texts, whole in ((one, other), (other, one))
    )
