"""Where a module sits in a model, read from its name."""

from __future__ import annotations

from dataclasses import dataclass

from ..blocks import BlockSelection


@dataclass(frozen=True)
class Place:
    """One targeted matrix.

    Args:
        name: of the module.
        layer: the first number in the name, or None for a module outside the layers.
        kind: the name after that number, which modules of the same kind share.
        share: chosen share of the matrix's weights, 0 to 1.
        blocks: number of chosen blocks.
    """

    name: str
    layer: int | None
    kind: str
    share: float
    blocks: int


def places(selection: BlockSelection) -> list[Place]:
    """Every targeted matrix of a selection, in the model's order; kinds are shortened as far as they stay distinct."""
    split = {name: _split(name) for name in selection.grids}
    kinds = {kind for _, kind in split.values()}
    short = {kind: kind.rsplit(".", 1)[-1] for kind in kinds}
    if len(set(short.values())) < len(kinds):
        short = {kind: kind for kind in kinds}
    found = []
    for name, (layer, kind) in split.items():
        blocks = selection.blocks.get(name)
        grid = selection.grids[name]
        share = 0.0 if blocks is None else grid.effective_numel(blocks) / grid.numel
        found.append(Place(name, layer, short[kind], share, 0 if blocks is None else len(blocks)))
    return found


def _split(name: str) -> tuple[int | None, str]:
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(parts[position + 1 :]) or name
    return None, name
