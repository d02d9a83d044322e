"""Texts, or pairs of texts, each with the name or number of its class."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import ClassLabel, Dataset, Features, Value

from ..errors import ConfigError
from .forms import LABEL, TEXT, Form

MISSING = -1


def labelled(text: str = "text", text_pair: str | None = None, label: str = "label") -> Form:
    """The form of rows with columns of these names; `text_pair` alone need not be there."""
    pair = text_pair or "text_pair"

    def convert(row: dict) -> dict:
        return {"text": row[text], **({"text_pair": row[pair]} if pair in row else {}), "label": str(row[label])}

    def fault(row: dict) -> str | None:
        return f"{pair} is missing" if pair in row and row[pair] is None else None

    needed = {text: TEXT, label: LABEL} | ({pair: TEXT} if text_pair else {})
    return Form("text/label", needed, {} if text_pair else {pair: TEXT}, convert, fault)


def named(rows: Dataset, form: Form) -> Dataset:
    """Rows whose numbered classes have names, with the names."""
    for column, kind in form.columns(rows.column_names).items():
        classes = rows.features[column]
        if kind == LABEL and isinstance(classes, ClassLabel):
            # A test split that keeps its labels to itself has -1 for all of them.
            rows = rows.map(
                lambda batch, column=column, names=classes.names: {
                    column: [None if number in (None, MISSING) else names[number] for number in batch[column]]
                },
                batched=True,
                features=Features({**rows.features, column: Value("string")}),
            )
    return rows


def classes_of(labels: Sequence[str]) -> tuple[str, ...]:
    """The names of the classes, each once: numbers by their size, other names by the alphabet.

    Raises:
        ConfigError: there is but one, or they are numbers to be predicted rather than names.
    """
    names = set(labels)
    if all(name.lstrip("-").isdecimal() for name in names):
        found = sorted(names, key=int)
    else:
        found = sorted(names)
        if all(map(_is_number, names)):
            raise ConfigError(
                f"the labels are numbers with fractions ({', '.join(found[:3])}, ...): predicting numbers (regression) "
                "is not supported; give the rows classes"
            )
    if len(found) < 2:
        raise ConfigError(f"all rows of the training set have the label {found[0]!r}; a classifier needs two or more")
    return tuple(found)


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True
