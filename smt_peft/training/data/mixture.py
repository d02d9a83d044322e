"""Several sources as one set: in one form, with the same columns and types, one after the other or by weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from datasets import Dataset, Features, IterableDataset, concatenate_datasets, interleave_datasets

from ..errors import ConfigError
from .features import PLAIN_TURNS, features_of
from .loss import kind_of

Rows = Dataset | IterableDataset


def mix(
    sources: Sequence[Rows],
    labels: Sequence[str],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    stopping_strategy: str = "first_exhausted",
    text_field: str = "text",
) -> Rows:
    """All sources as one set.

    Conversations beside prompts and completions make messages of all of them.

    Args:
        sources: as TRL reads them, all tables or all streams.
        labels: what they are called, for messages.
        weights: of the sources, on any scale; None: all rows of one after all rows of the other.
        seed: of the draw by weight.
        stopping_strategy: when that ends, as of `datasets.interleave_datasets`.
        text_field: the column of plain text.

    Raises:
        ConfigError: the sources have forms that do not go together.
    """
    if len(sources) == 1:
        return sources[0]
    kinds = [kind_of(next(iter(source))) for source in sources]
    kind = _common_kind(kinds, labels)
    features = features_of(
        kind, [_features(source, one, kind) for source, one in zip(sources, kinds, strict=True)], text_field
    )
    sources = [
        source
        if one == kind and (features is None or source.features == features)
        else source.map(
            partial(_bring, kind=kind, names=tuple(features) if features else ("messages",)),
            features=features,
            remove_columns=source.column_names,
        )
        for source, one in zip(sources, kinds, strict=True)
    ]
    try:
        if weights is None:
            return concatenate_datasets(list(sources))
        return interleave_datasets(
            list(sources),
            probabilities=[weight / sum(weights) for weight in weights],
            seed=seed,
            stopping_strategy=stopping_strategy,
        )
    except ValueError as error:
        raise ConfigError(f"{', '.join(labels)}: the columns do not fit together: {error}") from error


def _common_kind(kinds: Sequence[str], labels: Sequence[str]) -> str:
    if len(set(kinds)) == 1:
        return kinds[0]
    if set(kinds) <= {"pairs", "chat pairs"}:
        return "chat pairs"
    if set(kinds) <= {"pairs", "chat pairs", "messages"}:
        return "messages"
    found = "; ".join(f"{label}: {kind}" for label, kind in zip(labels, kinds, strict=True))
    raise ConfigError(f"rows of these kinds cannot be trained on together: {found}; bring them to one form")


def _features(source: Rows, kind: str, wanted: str) -> Features | None:
    """The types that a source of one kind has as another; None: it does not say."""
    if kind == wanted or source.features is None:
        return source.features
    turns = PLAIN_TURNS if kind == "pairs" else source.features["prompt"]
    columns = {"messages": turns} if wanted == "messages" else {"prompt": turns, "completion": turns}
    return Features(columns | {name: one for name, one in source.features.items() if name == "tools"})


def _bring(row: dict, kind: str, names: Sequence[str]) -> dict:
    """A row as one of `kind`, with all of `names`."""
    if kind in ("messages", "chat pairs") and isinstance(row.get("prompt"), str):
        row = {
            **row,
            "prompt": [{"role": "user", "content": row["prompt"].strip()}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
    if kind == "messages" and "messages" not in row:
        row = {**row, "messages": [*row["prompt"], *row["completion"]]}
    if kind == "tokens" and "labels" in names and row.get("labels") is None:
        row = {**row, "labels": row["input_ids"]}
    return {name: row.get(name) for name in names}
