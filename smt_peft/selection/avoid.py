"""Blocks that are not to be chosen, as another adapter has them: adapters that share no block add exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..bases.fingerprint import difference, mismatch
from ..bases.parameters import ParameterTarget
from ..bases.target import Target
from ..blocks import BlockGrid, BlockLayout, BlockSelection
from ..config import SMTConfig


def avoided_selections(config: SMTConfig) -> list[BlockSelection]:
    """The selections of `config.avoid`, files read.

    Raises:
        FileNotFoundError: one is the path of no file.
        ValueError: a file is no selection.
    """
    given = config.avoid if isinstance(config.avoid, (list, tuple)) else [config.avoid]
    return [BlockSelection.load(each) if isinstance(each, str) else each for each in given if each is not None]


def avoided_blocks(
    config: SMTConfig, targets: Mapping[str, Target | ParameterTarget], grids: Mapping[str, BlockGrid]
) -> dict[str, np.ndarray]:
    """Which blocks share a weight with those of `config.avoid`.

    Args:
        config: its `avoid` says which; the block size may be another there.
        targets: the modules and parameters that are chosen among.
        grids: the tiling of each of their matrices, an expert's under its own name.

    Returns:
        Bool `(R, C)` for every matrix of which a block is to be avoided.

    Raises:
        FileNotFoundError: `avoid` names no file.
        ValueError: a selection was made on another base, or for a weight of another shape; names the module.
    """
    selections = avoided_selections(config)
    for selection in selections:
        _check_base(selection, targets)
    return touched_blocks(selections, grids)


def touched_blocks(selections: Sequence[BlockSelection], grids: Mapping[str, BlockGrid]) -> dict[str, np.ndarray]:
    """Which blocks share a weight with those of the selections: bool `(R, C)` for every matrix that has some."""
    marks: dict[str, np.ndarray] = {}
    for selection in selections:
        for name, grid in grids.items():
            layout = _layout(selection, name, grid)
            if layout is not None:
                touched = grid.touched_by(layout).numpy()
                marks[name] = marks[name] | touched if name in marks else touched
    return marks


def _check_base(selection: BlockSelection, targets: Mapping[str, Target | ParameterTarget]) -> None:
    expected = selection.provenance.get("base_fingerprint")
    bases = {name: target.evidence for name, target in targets.items() if not target.is_merged}
    if expected and (name := mismatch(expected, bases)):
        raise ValueError(_of_another_base(name))


def _of_another_base(name: str) -> str:
    return (
        f"avoid: {name}: the base weights are not those expected; the selection to avoid was made on another base "
        "model, so its adapter cannot be added here. Take it out of avoid, or load its base"
    )


def _layout(selection: BlockSelection, name: str, grid: BlockGrid) -> BlockLayout | None:
    """The blocks of a selection that lie in a matrix, over this matrix alone where it is one of several experts."""
    owner, _, number = name.removesuffix("]").partition("[")
    if owner not in selection.blocks:
        return None
    theirs, blocks = selection.grids[owner], selection.blocks[owner].cpu()
    experts = theirs.rows // grid.rows if number else 1
    if (theirs.rows, theirs.cols) != (experts * grid.rows, grid.cols):
        raise ValueError(
            f"avoid: {name}: the selection to avoid is for a {theirs.rows} x {theirs.cols} weight, this model's has "
            f"matrices of {grid.rows} x {grid.cols}; it was made for another model, take it out of avoid"
        )
    if number:
        stripes = theirs.row_stripes // experts
        blocks = blocks[blocks[:, 0] // stripes == int(number)].clone()
        blocks[:, 0] -= int(number) * stripes
        theirs = BlockGrid(grid.rows, grid.cols, *theirs.block_shape)
    return BlockLayout(theirs, blocks) if len(blocks) else None


def check_avoided(selection: BlockSelection, config: SMTConfig) -> None:
    """Raise `ValueError`, naming the module, when a selection that was made before has blocks of `config.avoid`, or
    when those were chosen on another base or for weights of another shape."""
    for other in avoided_selections(config):
        bases = (each.provenance.get("base_fingerprint") or {} for each in (selection, other))
        if (name := difference(*bases)) is not None:
            raise ValueError(_of_another_base(name))
        for name in selection.blocks:
            layout = _layout(other, name, selection.grids[name])
            if layout is not None and selection.layout(name).meets(layout):
                raise ValueError(
                    f"avoid: {name}: the selection given has blocks of one to avoid; leave out avoid, or make the "
                    "selection with it"
                )
