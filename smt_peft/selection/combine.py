"""Selections as sets: what several runs chose, together, in common, or the one without the others."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

from ..bases.fingerprint import difference
from ..blocks import BlockSelection

COMBINATIONS = {"union": operator.or_, "intersection": operator.and_, "difference": operator.sub}


def combine(how: str, selections: Sequence[BlockSelection]) -> BlockSelection:
    """The union, the intersection, or the first without the others (`"difference"`).

    Raises:
        ValueError: they were made on different bases or tile a module differently (named), or nothing is left.
    """
    for other in selections[1:]:
        prints = [each.provenance.get("base_fingerprint") or {} for each in (selections[0], other)]
        if (name := difference(*prints)) is not None:
            raise ValueError(f"{name}: the selections were made on different base models; make both on one")
    return reduce(COMBINATIONS[how], selections)


def load_selection(paths: str | Path | Sequence[str | Path]) -> BlockSelection:
    """A selection file, or the union of several.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is no selection, or they cannot be combined.
    """
    if isinstance(paths, (str, Path)):
        return BlockSelection.load(paths)
    return combine("union", [BlockSelection.load(path) for path in paths])


def overlaps(selections: Sequence[BlockSelection], names: Sequence[str]) -> list[str]:
    """For every pair a line that says how many blocks they share, and what share that is of the smaller."""
    lines = []
    for second in range(1, len(selections)):
        for first in range(second):
            one, other = selections[first], selections[second]
            common = one.num_common(other)
            share = common / min(one.num_blocks, other.num_blocks)
            lines.append(
                f"{names[first]} and {names[second]} share {common:,} blocks, {share:.0%} of the smaller"
                if common
                else f"{names[first]} and {names[second]} share no block: their adapters add exactly"
            )
    return lines
