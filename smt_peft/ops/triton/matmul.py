"""`Y += X delta^T` for a delta that is zero outside the chosen blocks, in place: kernel and launcher.

A program owns `BLOCK_T` tokens of one piece of a row stripe, or of `GROUP` narrow ones, and walks the blocks of that
stripe, so that each element of Y is read, added to in fp32 and rounded once by one writer:

    acc[t, i] = sum_b sum_c X[t, col(b, c)] * delta[b, i, c]          b over the blocks of the stripe, in order

The stripes of a group walk their blocks side by side: step j takes the j-th block of each, and multiplies the columns
of all of them with a block-diagonal delta. (A NaN in the columns of one stripe of a group reaches the rows of the
others in that token, as it does in the GEMM of the base weight.) Blocks that span a whole column or row of the matrix
make up a smaller dense matrix, so they are one GEMM over the touched columns of X or of Y.

Shape suffixes: T tokens, N out_features, K in_features, B blocks of r rows and c columns, U touched columns.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...blocks import BlockGrid, BlockLayout
from ..reference import dense
from .launch import VECTOR, Device, aligned, describe

_stripes: WeakKeyDictionary[BlockLayout, tuple[Tensor, Tensor, Tensor]] = WeakKeyDictionary()


@triton.jit(do_not_specialize=["tokens"])
def matmul_kernel(
    y,
    x,
    delta,
    order,
    offsets,
    longest,
    tokens,
    rows,
    cols_8,
    stripes,
    y_stride_t,
    y_stride_n,
    x_stride_8,
    delta_stride_b,
    delta_stride_r,
    delta_stride_c,
    R: tl.constexpr,
    C: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    GROUP: tl.constexpr,
    LANES_R: tl.constexpr,
    LANES_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    PIECES_R: tl.constexpr = (R + TILE_R - 1) // TILE_R
    STEPS_C: tl.constexpr = (C + TILE_C - 1) // TILE_C
    first = tl.program_id(0) // PIECES_R * GROUP
    piece = tl.program_id(0) % PIECES_R * TILE_R

    # Per row of Y: its stripe, its place in the block.
    lane_r = tl.arange(0, LANES_R)
    member_r = lane_r // TILE_R
    in_r = piece + lane_r % TILE_R
    ok_r = (member_r < GROUP) & (in_r < R) & (first + member_r < stripes)
    start_r = tl.load(offsets + first + member_r, mask=ok_r, other=0)
    count_r = tl.load(offsets + first + member_r + 1, mask=ok_r, other=0) - start_r

    # Per column of the product: the stripe whose block it comes from.
    lane_c = tl.arange(0, LANES_C)
    member_c = lane_c // TILE_C
    in_c = lane_c % TILE_C
    ok_c = (member_c < GROUP) & (first + member_c < stripes)
    start_c = tl.load(offsets + first + member_c, mask=ok_c, other=0)
    count_c = tl.load(offsets + first + member_c + 1, mask=ok_c, other=0) - start_c

    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = (t < tokens)[:, None]
    t = t.to(tl.int64)
    x_row = x + t[:, None] * (x_stride_8 * 8)
    same = member_c[:, None] == member_r[None, :]
    acc = tl.full((BLOCK_T, LANES_R), 0.0, dtype=tl.float32)
    for step in range(0, tl.load(longest + tl.program_id(0) // PIECES_R) * STEPS_C):
        nth = step // STEPS_C
        col_in_block = step % STEPS_C * TILE_C + in_c
        here_c = ok_c & (nth < count_c) & (col_in_block < C)
        here_r = ok_r & (nth < count_r)
        stripe_c = tl.load(order + 2 * (start_c + nth) + 1, mask=here_c, other=0)
        block_r = tl.load(order + 2 * (start_r + nth), mask=here_r, other=0).to(tl.int64)
        col = stripe_c * C + col_in_block
        x_TC = tl.load(x_row + col[None, :], mask=live & (here_c & (col < cols_8 * 8))[None, :], other=0.0)
        at_r = block_r * delta_stride_b + in_r * delta_stride_r
        delta_CR = tl.load(
            delta + at_r[None, :] + (col_in_block * delta_stride_c)[:, None],
            mask=same & here_c[:, None] & here_r[None, :],
            other=0.0,
        )
        acc = tl.dot(x_TC, delta_CR, acc, input_precision="ieee")

    row = (first + member_r) * R + in_r
    y_tile = y + t[:, None] * y_stride_t + row.to(tl.int64)[None, :] * y_stride_n
    mask = live & (ok_r & (count_r > 0) & (row < rows))[None, :]
    acc += tl.load(y_tile, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_tile, acc.to(y.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    """One program: `BLOCK_T` tokens by `TILE_R` rows of `GROUP` stripes, `TILE_C` columns of each block at a time."""

    TILE_R: int
    TILE_C: int
    GROUP: int
    LANES_R: int
    LANES_C: int
    BLOCK_T: int
    num_warps: int
    num_stages: int


def tile(tokens: int, grid: BlockGrid, device: Device) -> Tile:
    """Wide stripes by themselves, narrow ones in groups; a whole group's blocks fill 64 columns of a step."""
    # Where a thread cannot copy 16 bytes at a time it needs a pointer for each smaller piece, so it gets fewer.
    width, most = (64, 128) if grid.block_cols % VECTOR == 0 else (32, 64)
    tile_r, tile_c = min(grid.block_rows, 128), min(grid.block_cols, width)
    group = max(1, width // max(tile_r, tile_c))
    lanes = (max(16, triton.next_power_of_2(side * group)) for side in (tile_r, tile_c))
    block_t = 16 if tokens <= 16 else min(most, 64 if tokens <= 64 else 128)
    return Tile(tile_r, tile_c, group, *lanes, block_t, 4 if tokens <= 16 else 8, 2 if device.amd else 3)


def block_matmul_(y_TN: Tensor, x_TK: Tensor, blocks_Brc: Tensor, layout: BlockLayout) -> Tensor:
    """`reference.block_matmul_`: the blocks are rounded to the dtype of X, the products summed in fp32."""
    grid, tokens = layout.grid, x_TK.shape[0]
    if len(layout) == 0 or tokens == 0:
        return y_TN
    delta = blocks_Brc.to(x_TK.dtype)
    if 1 in grid.stripes and y_TN.dtype == x_TK.dtype:
        return _gathered_(y_TN, x_TK, delta, layout)
    x_TK = aligned(x_TK)
    chosen = tile(tokens, grid, describe(x_TK.device))
    programs = triton.cdiv(grid.row_stripes, chosen.GROUP) * triton.cdiv(grid.block_rows, chosen.TILE_R)
    with torch.cuda.device_of(x_TK):
        matmul_kernel[programs, triton.cdiv(tokens, chosen.BLOCK_T)](
            y_TN,
            x_TK,
            delta,
            *_by_stripe(layout, chosen.GROUP),
            tokens,
            grid.rows,
            x_TK.shape[1] // VECTOR,
            grid.row_stripes,
            *y_TN.stride(),
            x_TK.stride(0) // VECTOR,
            *delta.stride(),
            R=grid.block_rows,
            C=grid.block_cols,
            **chosen._asdict(),
        )
    return y_TN


def _gathered_(y_TN: Tensor, x_TK: Tensor, delta_Brc: Tensor, layout: BlockLayout) -> Tensor:
    if layout.grid.row_stripes == 1:
        weight_NU = dense(delta_Brc, layout.packed)
        return y_TN.addmm_(x_TK.index_select(1, layout.columns), weight_NU.t())
    rows = layout.transposed.columns.long()
    weight_KU = dense(delta_Brc.transpose(1, 2), layout.transposed.packed)
    return y_TN.index_copy_(1, rows, y_TN.index_select(1, rows).addmm_(x_TK, weight_KU))


def _by_stripe(layout: BlockLayout, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks by row stripe, computed once per layout, without a word from the GPU. All int32.

    Returns:
        `(B, 2)` of (block, column stripe) in the order of the row stripes; where in it each row stripe starts, and the
        end; per `group` of row stripes the most blocks that one of them has.
    """
    if layout not in _stripes:
        with torch.inference_mode(False):
            rows, order = torch.sort(layout.blocks[:, 0].clone(), stable=True)
            limits = torch.arange(layout.grid.row_stripes + 1, dtype=torch.int32, device=rows.device)
            offsets = torch.searchsorted(rows, limits, out_int32=True)
            counts = F.pad(offsets.diff(), (0, -layout.grid.row_stripes % group))
            table = torch.stack((order.to(torch.int32), layout.blocks[:, 1][order]), dim=1)
            _stripes[layout] = table, offsets, counts.view(-1, group).amax(1)
    return _stripes[layout]
