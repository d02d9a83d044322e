"""What a run learns from a row: its text in pieces, each with whether it is learned."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

IGNORED = -100


def preview(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The text of a tokenised row, special tokens and all, cut where learning starts or stops.

    Args:
        row: of a trainer's data set (`run.prepare(...).train_set[0]`, or the first of a stream): `input_ids` and
            `labels`, both (tokens,), where a label of -100 is not learned; without `labels` all tokens are.
        tokenizer: of the run.

    Returns:
        `(text, trained)` pairs, which joined are the whole text. A character whose bytes are spread over the cut
        belongs to the piece in which it ends.
    """
    ids = list(row["input_ids"])
    labels = row.get("labels")
    trained = [True] * len(ids) if labels is None else [label != IGNORED for label in labels]
    pieces, end, told = [], 0, ""
    for learned, run in groupby(trained):
        end += len(list(run))
        # What tokens say depends on those before them, so it is what they add to the text.
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = text if end == len(ids) else text.rstrip("\N{REPLACEMENT CHARACTER}")
        pieces.append((whole[len(told) :], learned))
        told = whole
    return [piece for piece in pieces if piece[0]]
