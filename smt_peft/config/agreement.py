"""Whether settings agree with a selection that was made before: what it decides cannot be set anew beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..blocks import BlockGrid, BlockSelection

# What a selection records, and what is settled by it. Its seed is not among them: the order of the rows follows it too.
_SAME = ("density", "num_blocks", "density_pattern", "score", "budget", "spread", "coupled")
# A selection that keeps to a cap keeps to every looser one.
_CAPS = ("max_column_share", "max_lora_rank")
_SETTLED = (*_SAME, *_CAPS, "block_size")


def disagreements(selection: BlockSelection, given: Mapping[str, Any], what: str = "the selection") -> dict[str, str]:
    """What is set besides a selection and would not hold.

    Args:
        selection: made before.
        given: fields of `SMTConfig` that were set, by name; others than those that a selection settles do not count.
        what: what a message calls the selection.

    Returns:
        By field a message that says what holds instead, and the repair.
    """
    made = selection.provenance
    found = {}
    for field in _SETTLED:
        if field not in given or _agrees(selection, field, given[field]):
            continue
        if field in made:
            holds = f"was made with {field}={made[field]!r}"
        elif field == "block_size":
            grid = next(iter(selection.grids.values()))
            holds = f"has blocks of {grid.block_rows} x {grid.block_cols}"
        else:
            holds = f"was combined of others, for which {field} was set"
        found[field] = (
            f"{field}={given[field]!r} has no effect beside a selection, and {what} {holds}; leave {field} out, or "
            "make a selection with it"
        )
    return found


def _agrees(selection: BlockSelection, field: str, value: Any) -> bool:
    made = selection.provenance
    if field == "block_size":
        return _listed(made.get(field)) == _listed(value) or _tiles(selection, value)
    if field not in made:
        # Of a selection made by hand nothing is known.
        return not made.get("combined")
    if field in _CAPS:
        return made[field] is not None and made[field] <= value
    return made[field] == value


def _listed(size: Any) -> Any:
    return list(size) if isinstance(size, tuple) else size


def _tiles(selection: BlockSelection, size: Any) -> bool:
    if size == "auto":
        return False
    experts = selection.provenance.get("experts", {})
    side = size if isinstance(size, int) else tuple(size)
    # A block lies within one expert, and may be lower there than was asked for.
    return all(
        BlockGrid.fit(grid.shape, side).block_shape == grid.block_shape
        for name, grid in selection.grids.items()
        if name not in experts
    )
