"""How a block gradient is computed: one closed-form rule, no autotuning, so nothing stalls and results repeat.

`dense` forms the whole product with one GEMM and picks the blocks; `gathered` is the same over the touched columns
(rows) where a block spans a whole column (row) of the matrix; otherwise a kernel runs over *tiles*. A tile is a block,
or a piece of one that is too large for one program. Blocks narrower than a tile of the tensor cores are taken `group`
at a time: a program multiplies all their row stripes with all their column stripes and keeps the diagonal.

    blocks of 16, each row and column touched once, per token and group of 8: 2 * 128 * 128 flop take 6.7 ns of one
    multiprocessor, 2 * 128 * 2 bytes take 17 ns of its share of the memory: the eightfold product costs nothing.

Few tiles are split over tokens: each split writes an fp32 partial, and a second kernel adds them in a fixed order.
The result depends on the shapes, the number of blocks and the device alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from ...blocks import BlockGrid
from .launch import VECTOR, Device

# The tensor cores of a multiprocessor (flop/ns), its share of the L2 and of the memory (bytes/ns): an H100 or H200 at
# 650 TFLOP/s, 8 TB/s, 4 TB/s. Only their ratios decide, and those of other cards are alike.
FLOP_RATE, L2_RATE, MEMORY_RATE = 4900, 60, 30
# A second kernel, launched and drained.
LAUNCH_NS = 5000
# A dense gradient larger than this is never formed.
DENSE_BYTES = 256 << 20
# From this side on a block makes tiles of its own.
TILE_SIDE = 64
# Rows or columns that a group of narrow blocks fills: one product of the tensor cores of two groups of four warps.
GROUP_SIDE = 128


@dataclass(frozen=True)
class Plan:
    """Route, tile and launch numbers of one block gradient.

    Args:
        route: `"dense"`, `"gathered"`, `"bulk"` (tiles by bulk tensor copies) or `"pointers"` (tiles of any kind).
        tile: rows and columns of a block that one program computes.
        group: tiles that one program takes.
        block_tokens: tokens per step of the inner loop.
        at_once: programs that fit on one multiprocessor together.
        splits: programs that share the tokens of one tile.
    """

    route: Literal["dense", "gathered", "bulk", "pointers"]
    tile: tuple[int, int] = (0, 0)
    group: int = 1
    block_tokens: int = 0
    warps: int = 4
    stages: int = 3
    at_once: int = 1
    splits: int = 1

    @property
    def lanes(self) -> tuple[int, int]:
        """Rows and columns of the product of one program: powers of two, as the tensor cores want them."""
        return tuple(max(16, 1 << (side * self.group - 1).bit_length()) for side in self.tile)

    def pieces(self, grid: BlockGrid) -> tuple[int, int]:
        """Tiles along the rows and along the columns of one block."""
        return tuple(-(-side // tile) for side, tile in zip(grid.block_shape, self.tile, strict=True))

    def programs(self, grid: BlockGrid, num_blocks: int) -> int:
        """Programs of one split."""
        return -(-num_blocks * math.prod(self.pieces(grid)) // self.group)


@lru_cache(maxsize=4096)
def plan(tokens: int, grid: BlockGrid, num_blocks: int, device: Device) -> Plan:
    """The route of the gradient of `num_blocks` blocks from 16-bit operands of `tokens` rows."""
    if not device.amd and grid.numel * 4 <= DENSE_BYTES and num_blocks >= dense_share(grid) * grid.num_blocks:
        return Plan("dense")
    if not device.amd and 1 in grid.stripes:
        return Plan("gathered")
    chosen = (_tiles if min(grid.block_shape) >= TILE_SIDE else _groups)(grid, device)
    return replace(chosen, splits=_splits(chosen, chosen.programs(grid, num_blocks), tokens, device))


def dense_share(grid: BlockGrid) -> float:
    """From this share of the blocks on, one GEMM over the whole matrix is faster than the kernels.

    It is the rate of the kernels over that of a GEMM: bound by the L2, it grows with the side of a block (0.075 at 16,
    0.15 at 32, 0.3 at 64); bound by the tensor cores, it levels off (0.5 at 128, 0.75 from 256 on).
    """
    side = 2 * grid.block_rows * grid.block_cols / (grid.block_rows + grid.block_cols)
    return min(0.3 * side / 64, 0.25 + side / 512, 0.75)


# Warps, stages and `at_once` below: what fits in registers without a spill and in shared memory, read back from the
# machine code (Triton 3.7.1, 2026-11; tests/ops/test_triton_compile.py holds them).


def _tiles(grid: BlockGrid, device: Device) -> Plan:
    # A bulk copy starts at a multiple of 16 bytes.
    bulk = device.has_bulk_copies and _vector(grid) == VECTOR
    rows = _tile_side(grid.block_rows, (128, 64))
    cols = _tile_side(grid.block_cols, (256, 128, 64) if bulk and rows == 128 else (128, 64))
    warps = 4 if rows == cols == 64 else 8
    if bulk:
        stages, at_once = (4, 3) if warps == 4 else (3, 1 if cols == 256 else 2)
        return Plan("bulk", (rows, cols), 1, 64, warps, stages, at_once)
    if device.amd:
        return Plan("pointers", (rows, cols), 1, 32, warps, 2)
    return Plan("pointers", (rows, cols), 1, _tokens(grid, 64), warps, 3)


def _groups(grid: BlockGrid, device: Device) -> Plan:
    # Pieces of less than 8 bytes cannot be copied asynchronously; they pass through registers, of which half the lanes
    # need half.
    side = GROUP_SIDE if _vector(grid) >= VECTOR // 2 else GROUP_SIDE // 2
    tile = tuple(min(each, side) for each in grid.block_shape)
    group = side // max(tile)
    if device.amd:
        return Plan("pointers", tile, group, 32, 8, 2)
    if device.has_bulk_copies:
        return Plan("pointers", tile, group, _tokens(grid, 64), 8, 3, 2)
    return Plan("pointers", tile, group, _tokens(grid, 32), 8, 4, 1)


def _vector(grid: BlockGrid) -> int:
    """Elements that a thread copies at a time: every block starts at a multiple of them."""
    return math.gcd(VECTOR, *grid.block_shape)


def _tokens(grid: BlockGrid, most: int) -> int:
    """Fewer tokens per step where pieces are small, as a thread needs a pointer for each."""
    return min(most, {VECTOR: 64, VECTOR // 2: 32}.get(_vector(grid), 16))


def _tile_side(side: int, sizes: tuple[int, ...]) -> int:
    """The size that pads `side` least; of equals the largest."""
    return min(sizes, key=lambda size: (-(-side // size) * size, -size))


def _splits(chosen: Plan, programs: int, tokens: int, device: Device) -> int:
    """The number of splits that is estimated to finish first.

    Time is the waves of programs times a program's tokens and its partial written, and then all partials read and
    added. (9 blocks of 256 x 256 and 8,192 tokens on 132 multiprocessors: 18 tiles, 7 splits, 126 programs.)
    """
    rows, cols = chosen.lanes
    slots = device.multiprocessors * chosen.at_once
    token_ns = chosen.at_once * max(2 * rows * cols / FLOP_RATE, 2 * (rows + cols) / L2_RATE)
    write_ns = chosen.at_once * 4 * math.prod(chosen.tile) * chosen.group / MEMORY_RATE

    def estimate(splits: int) -> float:
        steps = -(-tokens // (splits * chosen.block_tokens))
        time = -(-programs * splits // slots) * (steps * chosen.block_tokens * token_ns + write_ns)
        if splits > 1:
            time += LAUNCH_NS + (splits + 1) * write_ns * programs / slots
        return time

    most = max(1, min(tokens // (4 * chosen.block_tokens), slots))
    return min(range(1, most + 1), key=estimate)
