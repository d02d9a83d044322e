"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """One line per row, the first column to the left and the others to the right.

    Raises:
        ValueError: a line has not as many cells as there are heads.
    """
    for line in lines:
        if len(line) != len(heads):
            raise ValueError(f"{len(line)} cells under {len(heads)} heads: {line}")
    rule = ["---", *["--:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in (heads, rule, *lines))
