"""The tiling of one weight in blocks. R row stripes, C column stripes, B blocks in shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layout import BlockLayout


@dataclass(frozen=True)
class BlockGrid:
    """The tiling of one `(rows, cols)` weight in blocks of `(block_rows, block_cols)`."""

    rows: int
    cols: int
    block_rows: int
    block_cols: int

    def __post_init__(self):
        for name in ("rows", "cols", "block_rows", "block_cols"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"BlockGrid.{name} must be a positive int, got {value!r}")

    @classmethod
    def fit(cls, shape: tuple[int, int], block_size: int | tuple[int, int]) -> BlockGrid:
        """The grid of a `(rows, cols)` matrix for a block size.

        Args:
            shape: `(rows, cols)` of the matrix.
            block_size: side of a square block or `(rows, cols)` of a block; `-1` stands for the whole side, and a side
                larger than the matrix is clipped to it.
        """
        sides = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
        fitted = [full if side == -1 else min(side, full) for side, full in zip(sides, shape, strict=True)]
        return cls(int(shape[0]), int(shape[1]), *fitted)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def block_shape(self) -> tuple[int, int]:
        return self.block_rows, self.block_cols

    @property
    def row_stripes(self) -> int:
        return math.ceil(self.rows / self.block_rows)

    @property
    def col_stripes(self) -> int:
        return math.ceil(self.cols / self.block_cols)

    @property
    def stripes(self) -> tuple[int, int]:
        """`(row stripes, column stripes)`: the shape of a score grid."""
        return self.row_stripes, self.col_stripes

    @property
    def num_blocks(self) -> int:
        return self.row_stripes * self.col_stripes

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def is_ragged(self) -> bool:
        return self.rows % self.block_rows != 0 or self.cols % self.block_cols != 0

    @property
    def transposed(self) -> BlockGrid:
        return BlockGrid(self.cols, self.rows, self.block_cols, self.block_rows)

    def heights(self) -> Tensor:
        """Rows of the weight in each row stripe, int64 `(R,)`."""
        return _extents(self.rows, self.block_rows)

    def widths(self) -> Tensor:
        """Columns of the weight in each column stripe, int64 `(C,)`."""
        return _extents(self.cols, self.block_cols)

    def effective_sizes(self) -> Tensor:
        """Weights in each block without padding, int64 `(R, C)`."""
        return self.heights()[:, None] * self.widths()[None, :]

    def effective_numel(self, blocks: Tensor) -> int:
        """Weights covered by `blocks` `(B, 2)`, padding not counted."""
        blocks = blocks.long().cpu()
        return int((self.heights()[blocks[:, 0]] * self.widths()[blocks[:, 1]]).sum())

    def touched_by(self, layout: BlockLayout) -> Tensor:
        """Which blocks share a weight with these, which may belong to another tiling of the matrix: bool `(R, C)`."""
        # Every given block adds one to a rectangle of these: its corners, summed along both sides.
        steps = torch.zeros(self.row_stripes + 1, self.col_stripes + 1, dtype=torch.int32)
        theirs = layout.grid
        top, bottom = _span(layout.block_rows.long().cpu(), theirs.block_rows, self.block_rows, self.rows)
        left, right = _span(layout.block_cols.long().cpu(), theirs.block_cols, self.block_cols, self.cols)
        for row, col, step in ((top, left, 1), (bottom, left, -1), (top, right, -1), (bottom, right, 1)):
            steps.index_put_((row, col), torch.tensor(step, dtype=torch.int32), accumulate=True)
        return steps.cumsum(0).cumsum(1)[:-1, :-1] > 0

    def flatten(self, blocks: Tensor) -> Tensor:
        """Row-major number of each block, int64 `(B,)`."""
        return blocks[:, 0].long() * self.col_stripes + blocks[:, 1].long()

    def unflatten(self, flat: Tensor) -> Tensor:
        """Inverse of `flatten`: int32 `(B, 2)`, sorted and without duplicates."""
        flat = torch.unique(flat.long())
        return torch.stack((flat // self.col_stripes, flat % self.col_stripes), dim=1).to(torch.int32)

    def check_blocks(self, blocks: Tensor, name: str) -> None:
        """Raise `ValueError`, naming the module `name`, unless `blocks` is int32 `(B, 2)`, sorted, unique, in range."""
        repair = "the file or selection is damaged or was made for another model; make it again with select_blocks"
        if blocks.dtype != torch.int32:
            raise ValueError(f"{name}: block coordinates must be int32, got {blocks.dtype}; {repair}")
        if blocks.ndim != 2 or blocks.shape[1] != 2:
            raise ValueError(
                f"{name}: block coordinates must have shape (num_blocks, 2), got {tuple(blocks.shape)}; {repair}"
            )
        if blocks.numel() == 0:
            return
        limit = torch.tensor(self.stripes, device=blocks.device)
        outside = (blocks < 0) | (blocks >= limit)
        if bool(outside.any()):
            first = blocks[outside.any(dim=1)][0].tolist()
            raise ValueError(
                f"{name}: block {tuple(first)} lies outside the grid of {self.row_stripes} x "
                f"{self.col_stripes} blocks; {repair}"
            )
        steps = self.flatten(blocks).diff()
        if bool((steps == 0).any()):
            raise ValueError(f"{name}: a block is listed twice; {repair}")
        if bool((steps < 0).any()):
            raise ValueError(f"{name}: blocks are not sorted by (row, column); {repair}")

    def __str__(self) -> str:
        return f"{self.rows} x {self.cols} in blocks of {self.block_rows} x {self.block_cols}"


def _extents(size: int, step: int) -> Tensor:
    lengths = torch.full((math.ceil(size / step),), step, dtype=torch.int64)
    lengths[-1] = size - step * (len(lengths) - 1)
    return lengths


def _span(stripes: Tensor, width: int, own: int, full: int) -> tuple[Tensor, Tensor]:
    """First stripe of width `own` that stripes of another width reach, and the one after the last, int64 `(B,)`."""
    last = ((stripes + 1) * width).clamp(max=full) - 1
    return stripes * width // own, last // own + 1
