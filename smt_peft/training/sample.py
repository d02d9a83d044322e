"""One row as a model sees it: which of its tokens are learned, and which only stand before them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from .preview import IGNORED, preview

MAX_TOKENS = 1024
_DIM, _NORMAL = "\x1b[2m", "\x1b[22m"


def render_sample(trainer: SFTTrainer, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first row that `trainer` would train on, decoded, and a line that says how much of it is learned."""
    row = next(iter(trainer.train_dataset))
    length = len(row["input_ids"])
    batch = trainer.data_collator([row])
    ids, labels = (batch[name][0, :length].tolist() for name in ("input_ids", "labels"))
    learned = sum(label != IGNORED for label in labels)
    colour = has_colour()
    how = "dimmed" if colour else "inside [-  -]"
    head = f"one sample, {length:,} tokens, {learned:,} of them learned" + (
        f"; the others are {how}" * (learned < length)
    )
    rest = f"\n... and {length - MAX_TOKENS:,} further tokens" if length > MAX_TOKENS else ""
    return f"{head}:\n{marked(tokenizer, ids[:MAX_TOKENS], labels[:MAX_TOKENS], colour)}{rest}"


def marked(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int], colour: bool) -> str:
    """Tokens as text, those with the label -100 dimmed, or inside `[-  -]`."""
    before, after = (_DIM, _NORMAL) if colour else ("[-", "-]")
    pieces = preview({"input_ids": ids, "labels": labels}, tokenizer)
    return "".join(text if learned else f"{before}{text}{after}" for text, learned in pieces)


def has_colour() -> bool:
    """Whether the output is a terminal, or was asked for colour; https://force-color.org, https://no-color.org."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()
