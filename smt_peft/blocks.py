"""Blocks: which sub-matrices of a weight are trained. Pure PyTorch; everything else in the package speaks this noun.

A weight of shape `(rows, cols)` = `(out_features, in_features)` is tiled by blocks of one shape. A horizontal band of
blocks is a *row stripe*, a vertical one a *column stripe*; a block is named by its `(row stripe, column stripe)`.
Blocks at the right and lower edge may be ragged: they are stored padded with zeros to the full shape, and the padding
is never counted.

Shape suffixes used below: B blocks, R row stripes, C column stripes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


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


@dataclass(eq=False)
class BlockSelection:
    """The chosen blocks of a model: data that can be saved, drawn, compared, combined and handed to another run.

    Args:
        blocks: per module name (as in `model.named_modules()` of the base model) the chosen blocks, int32 `(B, 2)`
            sorted `(row stripe, column stripe)`. A module without a chosen block is left out.
        grids: the tiling of every module that could have been chosen, so of at least those in `blocks`.
        scores: optionally the score of every block, fp32 `(R, C)` per module.
        provenance: how the selection came about (score, batches, seed, fingerprints): JSON values.

    Raises:
        ValueError: blocks are not sorted, unique, int32 and inside their grid; a module has no grid; a score grid has
            the wrong shape or a value that is not finite.
    """

    blocks: dict[str, Tensor]
    grids: dict[str, BlockGrid]
    scores: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.blocks:
            raise ValueError("a selection without a single block trains nothing; raise density or num_blocks")
        for name, blocks in self.blocks.items():
            if name not in self.grids:
                raise ValueError(f"{name}: the selection has blocks but no grid for this module; pass its BlockGrid")
            self.grids[name].check_blocks(blocks, name)
            if len(blocks) == 0:
                raise ValueError(f"{name}: an empty list of blocks; leave the module out instead")
        for name, score in self.scores.items():
            if name not in self.grids or tuple(score.shape) != self.grids[name].stripes:
                raise ValueError(
                    f"{name}: kept scores of shape {tuple(score.shape)} do not fit the module's grid; "
                    "make the selection again with select_blocks"
                )
            if not bool(torch.isfinite(score).all()):
                raise ValueError(f"{name}: kept scores hold a value that is not finite; make the selection again")

    def layout(self, name: str) -> BlockLayout:
        return BlockLayout(self.grids[name], self.blocks[name])

    @property
    def num_blocks(self) -> int:
        return sum(len(blocks) for blocks in self.blocks.values())

    @property
    def effective_numel(self) -> int:
        """Trained weights, padding not counted."""
        return sum(self.grids[name].effective_numel(blocks) for name, blocks in self.blocks.items())

    @property
    def density(self) -> float:
        """Trained weights as a share of the weights of all targeted modules."""
        return self.effective_numel / sum(grid.numel for grid in self.grids.values())

    def stripe_coverage(self) -> tuple[float, float]:
        """Share of the row stripes, and of the column stripes, of all targeted modules that hold a chosen block."""
        rows = sum(len(torch.unique(blocks[:, 0])) for blocks in self.blocks.values())
        cols = sum(len(torch.unique(blocks[:, 1])) for blocks in self.blocks.values())
        grids = self.grids.values()
        return rows / sum(grid.row_stripes for grid in grids), cols / sum(grid.col_stripes for grid in grids)

    def summary(self) -> str:
        """One line: modules reached, blocks, share of weights, and share of row and column stripes."""
        rows, cols = self.stripe_coverage()
        return (
            f"{self.num_blocks:,} blocks in {len(self.blocks)} of {len(self.grids)} modules, "
            f"{self.density:.2%} of their weights ({self.effective_numel:,}), reaching {rows:.0%} of the row "
            f"stripes and {cols:.0%} of the column stripes"
        )

    def __eq__(self, other: object) -> bool:
        """Same blocks on the same grids; scores and provenance may differ."""
        if not isinstance(other, BlockSelection):
            return NotImplemented
        return self.blocks.keys() == other.blocks.keys() and all(
            self.grids[name] == other.grids[name] and torch.equal(blocks.cpu(), other.blocks[name].cpu())
            for name, blocks in self.blocks.items()
        )

    __hash__ = None

    def __or__(self, other: BlockSelection) -> BlockSelection:
        """Blocks in either selection."""
        return self._combine(other, lambda mine, theirs: torch.cat((mine, theirs)))

    def __and__(self, other: BlockSelection) -> BlockSelection:
        """Blocks in both selections. Raises `ValueError` when there is none."""
        return self._combine(other, lambda mine, theirs: mine[torch.isin(mine, theirs)])

    def __sub__(self, other: BlockSelection) -> BlockSelection:
        """Blocks of this selection that the other lacks. Raises `ValueError` when none is left."""
        return self._combine(other, lambda mine, theirs: mine[~torch.isin(mine, theirs)])

    def _combine(self, other: BlockSelection, pick) -> BlockSelection:
        grids = {**other.grids, **self.grids}
        for name in self.grids:
            if name in other.grids and self.grids[name] != other.grids[name]:
                raise ValueError(
                    f"{name}: the selections tile this module differently ({self.grids[name]} and "
                    f"{other.grids[name]}); make both with the same block_size"
                )
        none = torch.empty(0, dtype=torch.int64)
        combined = {}
        for name in dict.fromkeys((*self.blocks, *other.blocks)):
            grid = grids[name]
            mine, theirs = (grid.flatten(s.blocks[name].cpu()) if name in s.blocks else none for s in (self, other))
            chosen = pick(mine, theirs)
            if len(chosen):
                combined[name] = grid.unflatten(chosen)
        return BlockSelection(combined, grids, provenance=_of_both(self.provenance, other.provenance))

    def num_common(self, other: BlockSelection) -> int:
        """How many blocks are in both selections, whose tilings must be the same where both have blocks."""
        pairs = [(self.layout(name), other.layout(name)) for name in self.blocks if name in other.blocks]
        for mine, theirs in pairs:
            if mine.grid != theirs.grid:
                raise ValueError(f"blocks of {mine.grid} and of {theirs.grid} cannot be counted against each other")
        return sum(int(torch.isin(*(each.grid.flatten(each.blocks.cpu()) for each in pair)).sum()) for pair in pairs)

    def save(self, path: str | Path) -> None:
        """Write the selection as a safetensors file: blocks, kept scores, grids and provenance."""
        tensors = {f"blocks:{name}": blocks.cpu().contiguous() for name, blocks in self.blocks.items()}
        tensors |= {f"scores:{name}": score.float().cpu().contiguous() for name, score in self.scores.items()}
        header = {
            "format": _FORMAT,
            "grids": {name: asdict(grid) for name, grid in self.grids.items()},
            "provenance": self.provenance,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: a run killed here leaves the old file or the new one, never half of one.
        aside = path.with_name(path.name + ".part")
        save_file(tensors, aside, metadata={_HEADER: json.dumps(header)})
        aside.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> BlockSelection:
        """Read and check a file written by `save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, no selection, or holds blocks that cannot be; names the module.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no selection file at {path}; make one with select_blocks(...).save(...) "
                "or `smt select run.yaml`"
            )
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator of its own)
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} cannot be read as a selection ({error}); it is truncated or no safetensors file, "
                "make it again with select_blocks"
            ) from error
        if not isinstance(header, Mapping) or header.get("format") != _FORMAT:
            raise ValueError(
                f"{path} is no selection file of a format known here ({_FORMAT}); make it again with select_blocks"
            )
        try:
            grids = {name: BlockGrid(**grid) for name, grid in header["grids"].items()}
            return cls(
                _with_prefix(tensors, "blocks:"),
                grids,
                _with_prefix(tensors, "scores:"),
                dict(header.get("provenance") or {}),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error


_FORMAT = "smt-selection-1"
_HEADER = "smt_selection"


def _of_both(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a combination: its base, where nothing speaks for two, and which targets are experts."""
    known: dict[str, Any] = {"combined": True}
    bases = [record.get("base_fingerprint") or {} for record in (one, other)]
    if all(bases) and all(bases[0][name] == bases[1][name] for name in bases[0].keys() & bases[1].keys()):
        known["base_fingerprint"] = bases[1] | bases[0]
    if experts := {**other.get("experts", {}), **one.get("experts", {})}:
        known["experts"] = experts
    return known


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
