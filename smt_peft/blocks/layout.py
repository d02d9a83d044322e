"""Chosen blocks of one matrix, and the tables that operations derive from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .grid import BlockGrid


class _Derived:
    """An attribute of a layout, computed when first asked for and kept.

    Nothing is kept while a compiler, tracer or transform looks on: a tensor made then is part of its program and means
    nothing after it. What such a program is to take as given is made before; see `BlockLayout.prepare`.
    """

    def __init__(self, compute: Callable[[BlockLayout], Any]):
        self.compute, self.name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, layout: BlockLayout | None, owner: type) -> Any:
        if layout is None:
            return self
        if _is_traced():
            return self.compute(layout)
        # Ordinary tensors also in inference mode: a training step may be the next to use them.
        with torch.inference_mode(False):
            value = self.compute(layout)
        tensor = value.blocks if isinstance(value, BlockLayout) else value
        # Found there before this method from now on. Not so the stand-ins of a FakeTensorMode.
        if type(tensor) is Tensor or not isinstance(tensor, Tensor):
            layout.__dict__[self.name] = value
        return value


def _is_traced() -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Chosen blocks of one matrix, with what the operations derive from them.

    The compiled kernels read `blocks` alone, so that most layouts hold 8 bytes a block and little more. Every other
    table belongs to a route (plain PyTorch, Triton, embedding tables, inputs kept by columns) and is made when that
    route is first taken. None grows with the elements of the blocks.

    Args:
        grid: the tiling.
        blocks: int32 `(B, 2)` block coordinates, sorted, unique and in range, which `check` holds; the derived tensors
            live on its device.
    """

    grid: BlockGrid
    blocks: Tensor

    def __len__(self) -> int:
        return self.blocks.shape[0]

    def check(self) -> None:
        """Raise `ValueError` unless the blocks are as `BlockGrid.check_blocks` wants them, or, as in the layout of a
        transposed matrix, sorted by (column, row) instead; looked at once."""
        self._checked  # noqa: B018

    @_Derived
    def _checked(self) -> bool:
        try:
            self.grid.check_blocks(self.blocks, "block layout")
        except ValueError as error:
            if self.blocks.ndim != 2 or self.blocks.shape[1] != 2:
                raise
            try:
                self.grid.transposed.check_blocks(self.blocks.flip(1), "block layout")
            except ValueError:
                raise error from None
        return True

    @property
    def block_rows(self) -> Tensor:
        """Row stripe of each block, int32 `(B,)`: a view of `blocks`."""
        return self.blocks[:, 0]

    @property
    def block_cols(self) -> Tensor:
        """Column stripe of each block, int32 `(B,)`: a view of `blocks`."""
        return self.blocks[:, 1]

    @_Derived
    def row_starts(self) -> Tensor:
        """Number of the first block of each row stripe, then B, int32 `(R + 1,)`; for blocks sorted by row."""
        stripes = torch.arange(self.grid.row_stripes + 1, dtype=torch.int32, device=self.blocks.device)
        return torch.searchsorted(self.block_rows.contiguous(), stripes, out_int32=True)

    @_Derived
    def max_blocks_in_row(self) -> int:
        """How many blocks the fullest row stripe holds."""
        return int(self.row_starts.diff().max())

    @_Derived
    def effective_numel(self) -> int:
        return self.grid.effective_numel(self.blocks)

    @_Derived
    def num_columns(self) -> int:
        """How many columns of the weight the blocks touch."""
        return int(self.grid.widths()[self._touched_cols().long().cpu()].sum())

    @_Derived
    def columns(self) -> Tensor:
        """Union of the columns of the weight that the blocks touch, sorted int32."""
        return _stripe_members(self._touched_cols(), self.grid.block_cols, self.grid.cols)

    @_Derived
    def packed(self) -> BlockLayout:
        """The same blocks over the touched columns only: `x[:, columns]` goes with it as `x` goes with this layout."""
        grid = BlockGrid(self.grid.rows, self.num_columns, *self.grid.block_shape)
        local = torch.searchsorted(self._touched_cols(), self.block_cols.contiguous(), out_int32=True)
        return self._derived(grid, torch.stack((self.block_rows, local), dim=1))

    @_Derived
    def transposed(self) -> BlockLayout:
        """The layout of the transposed matrix; blocks keep their order, so they are *not* sorted by row there."""
        return self._derived(self.grid.transposed, self.blocks.flip(1))

    def _touched_cols(self) -> Tensor:
        """Column stripes that hold a chosen block, sorted int32 `(U,)`."""
        return torch.unique(self.block_cols)

    def _derived(self, grid: BlockGrid, blocks: Tensor) -> BlockLayout:
        """Blocks that are right because these are, though not sorted by row when transposed."""
        self.check()
        layout = BlockLayout(grid, blocks)
        layout.__dict__["_checked"] = True
        return layout

    @_Derived
    def segments(self) -> Tensor:
        """Where each row of each block starts in `weight.view(-1, block_cols)`, int64 `(B * block_rows,)`.

        Of a ragged grid: in the weight padded to whole blocks.
        """
        grid = self.grid
        first = self.block_rows.long() * grid.block_rows * grid.col_stripes + self.block_cols
        within = torch.arange(grid.block_rows, device=first.device) * grid.col_stripes
        return (first[:, None] + within[None, :]).reshape(-1)

    def prepare(self) -> BlockLayout:
        """Check the blocks and count what tracers cannot, as it depends on values. Returns itself."""
        self.check()
        self.num_columns  # noqa: B018
        return self

    def sketch(self) -> BlockLayout:
        """This layout without values, on the meta device: there, what depends on the positions is as it is here."""
        sketch = BlockLayout(self.grid, self.blocks.to("meta"))
        packed = BlockLayout(BlockGrid(self.grid.rows, self.num_columns, *self.grid.block_shape), sketch.blocks)
        packed.__dict__["_checked"] = True
        sketch.__dict__.update(
            _checked=True,
            num_columns=self.num_columns,
            effective_numel=self.effective_numel,
            columns=torch.empty(self.num_columns, dtype=torch.int32, device="meta"),
            packed=packed,
        )
        return sketch

    def meets(self, other: BlockLayout) -> bool:
        """Whether the blocks share a weight with those of another layout of the same matrix, of any block size."""
        touched = self.grid.touched_by(other)
        rows, cols = self.blocks.long().cpu().unbind(1)
        return bool(touched[rows, cols].any())

    def padding_mask(self) -> Tensor:
        """True where a packed block holds an element of the weight, bool `(B, block_rows, block_cols)`."""
        row_Br, col_Bc = self.lines()
        return (row_Br < self.grid.rows)[:, :, None] & (col_Bc < self.grid.cols)[:, None, :]

    def lines(self) -> tuple[Tensor, Tensor]:
        """Which rows and columns of the matrix each block spans, int64 `(B, block_rows)` and `(B, block_cols)`; past
        the edge of the matrix where the block is ragged. Made anew at each call."""
        grid, device = self.grid, self.blocks.device
        row_Br = self.block_rows[:, None] * grid.block_rows + torch.arange(grid.block_rows, device=device)
        col_Bc = self.block_cols[:, None] * grid.block_cols + torch.arange(grid.block_cols, device=device)
        return row_Br, col_Bc

    def mask(self) -> Tensor:
        """True on the chosen blocks, bool `(rows, cols)`."""
        grid = self.grid
        chosen = torch.zeros(grid.stripes, dtype=torch.bool, device=self.blocks.device)
        chosen[self.block_rows, self.block_cols] = True
        rows = torch.arange(grid.rows, device=chosen.device) // grid.block_rows
        cols = torch.arange(grid.cols, device=chosen.device) // grid.block_cols
        return chosen[rows][:, cols]


def _stripe_members(stripes: Tensor, width: int, limit: int) -> Tensor:
    within = torch.arange(width, dtype=torch.int32, device=stripes.device)
    members = (stripes[:, None] * width + within).reshape(-1)
    return members[members < limit]
