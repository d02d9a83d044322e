"""Gradient of the chosen blocks, `dW[b] = dY[:, rows_b]^T X[:, cols_b]`: kernels and launcher.

A program computes one tile, or one group of narrow blocks, over one split of the tokens:

    acc[i, j] = sum_t dY[t, row(i)] * X[t, col(j)]                 fp32, tensor cores, t over the split in order

`row` and `col` come from the block index alone. Consecutive programs are consecutive blocks, which are sorted by row
stripe, over the same tokens: those in flight walk the same stretch of dY and X, so that it is read from memory once
and after that from the L2. Ragged blocks and any number of tokens are masked, or zero-filled by the bulk copies. No
atomics: a result repeats bit for bit.

Shape suffixes: T tokens, N out_features, K in_features, B blocks of r rows and c columns, S splits, U touched columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...blocks import BlockGrid, BlockLayout
from ..reference import block_gather
from .launch import VECTOR, aligned, describe
from .plan import Plan, plan


@triton.jit
def _lanes(
    blocks,
    first,
    tiles,
    AXIS: tl.constexpr,
    SIDE: tl.constexpr,
    TILE: tl.constexpr,
    TILES_R: tl.constexpr,
    TILES_C: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Of each lane: its tile, its place in the block and in the matrix along one axis, and whether the tile exists."""
    lane = tl.arange(0, LANES)
    tile = first + lane // TILE
    exists = (lane < GROUP * TILE) & (tile < tiles)
    block = tile // (TILES_R * TILES_C)
    piece = tile % (TILES_R * TILES_C)
    within = (piece % TILES_C if AXIS == 1 else piece // TILES_C) * TILE + lane % TILE
    exists = exists & (within < SIDE)
    stripe = tl.load(blocks + 2 * block + AXIS, mask=exists, other=0)
    return tile, within, stripe * SIDE + within, exists


@triton.jit
def _store(pointers, acc, mask, ACCUMULATE: tl.constexpr):
    if ACCUMULATE:
        acc += tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, acc, mask=mask)


@triton.jit(do_not_specialize=["tokens", "chunk", "tiles"])
def pointer_kernel(
    dy,
    x,
    blocks,
    out,
    tokens,
    chunk,
    tiles,
    rows_8,
    cols_8,
    dy_stride_8,
    x_stride_8,
    R: tl.constexpr,
    C: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    TILES_R: tl.constexpr,
    TILES_C: tl.constexpr,
    GROUP: tl.constexpr,
    LANES_R: tl.constexpr,
    LANES_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    first = tl.program_id(0) * GROUP
    split = tl.program_id(1).to(tl.int64)
    tile_r, in_r, row, ok_r = _lanes(blocks, first, tiles, 0, R, TILE_R, TILES_R, TILES_C, GROUP, LANES_R)
    tile_c, in_c, col, ok_c = _lanes(blocks, first, tiles, 1, C, TILE_C, TILES_R, TILES_C, GROUP, LANES_C)
    load_r, load_c = ok_r & (row < rows_8 * 8), ok_c & (col < cols_8 * 8)
    dy_stride, x_stride = dy_stride_8 * 8, x_stride_8 * 8

    start = split * chunk
    count = tl.minimum(tokens - start, chunk).to(tl.int32)
    t = tl.arange(0, BLOCK_T)
    dy_tile = dy + start * dy_stride + t[None, :] * dy_stride + row[:, None]
    x_tile = x + start * x_stride + t[:, None] * x_stride + col[None, :]
    acc = tl.full((LANES_R, LANES_C), 0.0, dtype=tl.float32)
    for done in range(0, count, BLOCK_T):
        live = t < count - done
        dy_RT = tl.load(dy_tile, mask=load_r[:, None] & live[None, :], other=0.0)
        x_TC = tl.load(x_tile, mask=live[:, None] & load_c[None, :], other=0.0)
        acc = tl.dot(dy_RT, x_TC, acc, input_precision="ieee")
        dy_tile += BLOCK_T * dy_stride
        x_tile += BLOCK_T * x_stride

    TILES: tl.constexpr = TILES_R * TILES_C
    block_r = split * (tiles // TILES) + tile_r // TILES
    pointers = out + (block_r * (R * C) + in_r * C)[:, None] + in_c[None, :]
    _store(pointers, acc, (tile_r[:, None] == tile_c[None, :]) & ok_r[:, None] & ok_c[None, :], ACCUMULATE)


@triton.jit(do_not_specialize=["tokens", "chunk", "tiles"])
def bulk_kernel(
    dy,
    x,
    blocks,
    out,
    tokens,
    chunk,
    tiles,
    R: tl.constexpr,
    C: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    TILES_R: tl.constexpr,
    TILES_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """As `pointer_kernel` for one tile; `dy` and `x` are tensor descriptors, which fill with zeros out of range."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    block = tile // (TILES_R * TILES_C)
    in_r = (tile // TILES_C) % TILES_R * TILE_R
    in_c = tile % TILES_C * TILE_C
    row = tl.load(blocks + 2 * block) * R + in_r
    col = tl.load(blocks + 2 * block + 1) * C + in_c

    start = split * chunk
    acc = tl.full((TILE_R, TILE_C), 0.0, dtype=tl.float32)
    for t in range(start, tl.minimum(start + chunk, tokens), BLOCK_T):
        acc = tl.dot(tl.trans(dy.load([t, row])), x.load([t, col]), acc, input_precision="ieee")

    lane_r, lane_c = in_r + tl.arange(0, TILE_R), in_c + tl.arange(0, TILE_C)
    out += (split.to(tl.int64) * (tiles // (TILES_R * TILES_C)) + block) * (R * C)
    pointers = out + lane_r[:, None] * C + lane_c[None, :]
    _store(pointers, acc, (lane_r < R)[:, None] & (lane_c < C)[None, :], ACCUMULATE)


# Elements of the gradient that one program of `sum_kernel` adds.
SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["splits"])
def sum_kernel(partials, out, size, splits, BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr):
    """`out (+)= partials[0] + partials[1] + ...`, in that order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.full((BLOCK,), 0.0, dtype=tl.float32)
    for _ in range(splits):
        total += tl.load(partials + at, mask=inside, other=0.0)
        partials += size
    if ACCUMULATE:
        total += tl.load(out + at, mask=inside, other=0.0)
    tl.store(out + at, total, mask=inside)


def block_grad(
    dy_TN: Tensor, x_TK: Tensor, layout: BlockLayout, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """`reference.block_grad` by the route that `plan` names; operands as `operations.block_grad` checks them."""
    grid, tokens = layout.grid, dy_TN.shape[0]
    if len(layout) == 0 or tokens == 0:
        zeros = torch.zeros((len(layout), *grid.block_shape), device=dy_TN.device)
        return _deliver(zeros, out, accumulate)
    chosen = plan(tokens, grid, len(layout), describe(dy_TN.device))
    if chosen.route == "dense":
        return _deliver(block_gather(_matmul(dy_TN.t(), x_TK), layout), out, accumulate)
    if chosen.route == "gathered":
        return _deliver(_gathered(dy_TN, x_TK, layout), out, accumulate)
    return _tiled(aligned(dy_TN), aligned(x_TK), layout, out, accumulate, chosen)


def _gathered(dy_TN: Tensor, x_TK: Tensor, layout: BlockLayout) -> Tensor:
    if layout.grid.row_stripes > 1:
        return _gathered(x_TK, dy_TN, layout.transposed).transpose(1, 2)
    x_TU = x_TK.index_select(1, layout.columns)
    return block_gather(_matmul(dy_TN.t(), x_TU), layout.packed)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of 16-bit operands, left in the fp32 it was summed in."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _deliver(grad_Brc: Tensor, out: Tensor | None, accumulate: bool) -> Tensor:
    if out is None:
        return grad_Brc.contiguous()
    return out.add_(grad_Brc) if accumulate else out.copy_(grad_Brc)


def _tiled(
    dy_TN: Tensor, x_TK: Tensor, layout: BlockLayout, out: Tensor | None, accumulate: bool, chosen: Plan
) -> Tensor:
    grid, tokens = layout.grid, dy_TN.shape[0]
    if out is None:
        out = torch.empty((len(layout), *grid.block_shape), dtype=torch.float32, device=dy_TN.device)
    split = chosen.splits > 1
    target = out.new_empty((chosen.splits, *out.shape)) if split else out
    pieces = chosen.pieces(grid)
    chunk = -(-tokens // (chosen.splits * chosen.block_tokens)) * chosen.block_tokens
    numbers = (layout.blocks, target, tokens, chunk, len(layout) * pieces[0] * pieces[1])
    options = {
        **tile_constants(grid, chosen),
        "ACCUMULATE": accumulate and not split,
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }
    programs = chosen.programs(grid, len(layout)), chosen.splits
    with torch.cuda.device_of(dy_TN):
        if chosen.route == "bulk":
            operands = (
                TensorDescriptor.from_tensor(each, [chosen.block_tokens, side])
                for each, side in zip((dy_TN, x_TK), chosen.tile, strict=True)
            )
            bulk_kernel[programs](*operands, *numbers, **options)
        else:
            sizes = (dy_TN.shape[1], x_TK.shape[1], dy_TN.stride(0), x_TK.stride(0))
            pointer_kernel[programs](dy_TN, x_TK, *numbers, *(size // VECTOR for size in sizes), **options)
        if split:
            sum_kernel[(triton.cdiv(out.numel(), SUM_BLOCK),)](
                target, out, out.numel(), chosen.splits, BLOCK=SUM_BLOCK, ACCUMULATE=accumulate
            )
    return out


def tile_constants(grid: BlockGrid, chosen: Plan) -> dict[str, int]:
    """The compile-time numbers that tell a kernel its tile."""
    (rows, cols), (pieces_r, pieces_c), (lanes_r, lanes_c) = chosen.tile, chosen.pieces(grid), chosen.lanes
    constants = {
        "R": grid.block_rows,
        "C": grid.block_cols,
        "TILE_R": rows,
        "TILE_C": cols,
        "TILES_R": pieces_r,
        "TILES_C": pieces_c,
        "BLOCK_T": chosen.block_tokens,
    }
    if chosen.route == "pointers":
        constants |= {"GROUP": chosen.group, "LANES_R": lanes_r, "LANES_C": lanes_c}
    return constants
