"""The operands of the benchmark: which matrices, how many tokens, and where the chosen blocks lie.

*Matched* blocks touch every row stripe and every column stripe at least once and as few times as that allows: what
learns best. *Clustered* blocks crowd in few stripes, as those with the largest gradients do. *Free* ones lie anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..blocks import BlockGrid, BlockLayout

DENSITIES = (0.0084, 0.049)
# Share of the blocks chosen among those of the touched stripes of a clustered selection.
CLUSTERED_SHARE = 0.75


@dataclass(frozen=True)
class Size:
    """What a device is asked to do.

    Args:
        matrices: `(out_features, in_features)`, each with the numbers of tokens.
        matched, clustered: sides of blocks.
        counts: numbers of free blocks of `count_side`, on the first matrix.
        copied: the matrix of the copying operations and of AdamW, its side of a block, and the number of blocks.
        weights: numbers of weights that AdamW updates besides.
    """

    matrices: tuple[tuple[tuple[int, int], tuple[int, ...]], ...]
    matched: tuple[int, ...]
    clustered: tuple[int, ...]
    counts: tuple[int, ...]
    count_side: int
    copied: tuple[tuple[int, int], int, int] = ((8192, 4096), 64, 5000)
    weights: tuple[int, ...] = ()


GPU = Size(
    matrices=(((4096, 4096), (8192, 2048)), ((11008, 4096), (8192, 2048))),
    matched=(16, 32, 64),
    clustered=(128, 256),
    counts=(1, 9, 64, 128, 256),
    count_side=256,
    weights=(57_000_000,),
)
CPU = Size(matrices=(((1024, 1024), (512,)),), matched=(8, 16, 32, 64), clustered=(128,), counts=(1, 9), count_side=256)
QUICK = Size(
    matrices=(((96, 64), (32,)),),
    matched=(16,),
    clustered=(32,),
    counts=(2,),
    count_side=16,
    copied=((256, 256), 16, 40),
)


def size_of(device: torch.device, quick: bool) -> Size:
    if quick:
        return QUICK
    return CPU if device.type == "cpu" else GPU


def selections(size: Size, device: torch.device) -> Iterator[tuple[str, int, BlockLayout]]:
    """`(name, tokens, layout)` of every selection on every matrix."""
    for number, (shape, tokens_each) in enumerate(size.matrices):
        layouts = [(f"matched {side}", matched(shape, side, device)) for side in size.matched]
        for side in size.clustered:
            layouts += [(f"clustered {side}, {d:.2%}", clustered(shape, side, d, device)) for d in DENSITIES]
        if number == 0:
            layouts += [
                (f"{count} free of {size.count_side}", free(shape, size.count_side, count, device))
                for count in size.counts
                if count <= BlockGrid.fit(shape, size.count_side).num_blocks
            ]
        for tokens in tokens_each:
            for name, layout in layouts:
                yield f"{shape[0]} x {shape[1]}, {tokens} tokens, {name}", tokens, layout


def matched(shape: tuple[int, int], side: int, device: torch.device) -> BlockLayout:
    grid = BlockGrid.fit(shape, side)
    turn, generator = torch.arange(max(grid.stripes)), _generator()
    rows, cols = (torch.randperm(count, generator=generator)[turn % count] for count in grid.stripes)
    return _layout(grid, rows * grid.col_stripes + cols, device)


def clustered(shape: tuple[int, int], side: int, density: float, device: torch.device) -> BlockLayout:
    grid, generator = BlockGrid.fit(shape, side), _generator()
    count = max(1, round(density * grid.num_blocks))
    rows = min(grid.row_stripes, math.ceil(math.sqrt(count / CLUSTERED_SHARE)))
    cols = min(grid.col_stripes, math.ceil(count / CLUSTERED_SHARE / rows))
    rows = max(rows, math.ceil(count / cols))
    row_stripes = torch.randperm(grid.row_stripes, generator=generator)[:rows]
    col_stripes = torch.randperm(grid.col_stripes, generator=generator)[:cols]
    crowd = (row_stripes[:, None] * grid.col_stripes + col_stripes).flatten()
    return _layout(grid, crowd[torch.randperm(len(crowd), generator=generator)[:count]], device)


def free(shape: tuple[int, int], side: int, count: int, device: torch.device) -> BlockLayout:
    grid = BlockGrid.fit(shape, side)
    return _layout(grid, torch.randperm(grid.num_blocks, generator=_generator())[:count], device)


def touched(layout: BlockLayout) -> tuple[int, int]:
    """Rows and columns of the matrix that the blocks touch."""
    return layout.transposed.columns.numel(), layout.columns.numel()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _layout(grid: BlockGrid, flat: torch.Tensor, device: torch.device) -> BlockLayout:
    return BlockLayout(grid, grid.unflatten(flat).to(device)).prepare()
