"""The blocks that an adapter holds now, where a schedule has replaced some of those that were selected."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..blocks import BlockSelection
from .layer import SMTLayer


def held_selection(model: nn.Module, selection: BlockSelection, adapter: str = "default") -> BlockSelection:
    """A selection with the blocks that an adapter holds now; the very same one where these are its blocks still.

    Args:
        model: with the adapter, which was made of `selection`.
        selection: its grids, scores and provenance are taken over; `regrown_blocks` in the provenance counts those that
            were not in it.
    """
    layers = {layer.smt_name: layer for layer in model.modules() if isinstance(layer, SMTLayer)}
    blocks = {
        name: layers[name].smt_blocks[adapter].index.cpu() if name in layers else chosen
        for name, chosen in selection.blocks.items()
    }
    held = replace(selection, blocks=blocks)
    if held == selection:
        return selection
    before = {name: {tuple(block) for block in chosen.tolist()} for name, chosen in selection.blocks.items()}
    regrown = sum(tuple(block) not in before[name] for name, now in blocks.items() for block in now.tolist())
    return replace(held, provenance=selection.provenance | {"regrown_blocks": regrown})
