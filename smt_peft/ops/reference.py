"""The operations in plain PyTorch: the truth that every faster backend is compared with, and what runs anywhere.

Shape suffixes: T tokens, N out_features, K in_features, B blocks, R row and C column stripes of
r rows and c columns.
16-bit inputs are accumulated in fp32 and rounded once; fp64 stays fp64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import BlockLayout
from .whole import is_whole, whole_grad, whole_matmul_, whole_product

# From this share of a matrix's blocks on, one dense GEMM is cheaper than gathering strips for each block
# (CPU, 512 tokens, 1024 x 1024, blocks of 8 to 128, 2026-11).
DENSE_SHARE = 0.25
# From this side on a block is worth a GEMM of its own on views, which copies nothing.
LARGE_SIDE = 64
# Below this side a stripe of a row is less than a cache line, so stripes are gathered from a transposed copy, where
# each is one run of memory (blocks of 8: a step 3 % faster; blocks of 32: 2 % slower; two cores, 2026-11).
NARROW_SIDE = 16
# Elements of strips gathered at a time: keeps the temporaries of a large selection in bounds.
CHUNK_ELEMENTS = 1 << 24


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 when any operand is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def block_gather(weight_NK: Tensor, layout: BlockLayout) -> Tensor:
    """Copy the chosen blocks out of a matrix.

    Args:
        weight_NK: any float dtype, contiguous or the transpose of a contiguous matrix.

    Returns:
        `(B, r, c)` in the dtype of the weight; the padding of ragged blocks is zero.
    """
    if not weight_NK.is_contiguous() and weight_NK.t().is_contiguous():
        return block_gather(weight_NK.t(), layout.transposed).transpose(1, 2).contiguous()
    rows, cols = layout.grid.block_shape
    if not layout.grid.is_ragged:
        return weight_NK.reshape(-1, cols).index_select(0, layout.segments).view(-1, rows, cols)
    row_Br, col_Bc = layout.lines()
    row_Br, col_Bc = row_Br.clamp_(max=layout.grid.rows - 1), col_Bc.clamp_(max=layout.grid.cols - 1)
    return torch.where(layout.padding_mask(), weight_NK[row_Br[:, :, None], col_Bc[:, None, :]], 0)


def block_scatter_(weight_NK: Tensor, blocks_Brc: Tensor, layout: BlockLayout) -> Tensor:
    """Overwrite the chosen blocks of a matrix in place, rounding once to its dtype; padding is ignored.

    Args:
        weight_NK: contiguous, or the transpose of a contiguous matrix.

    Raises:
        ValueError: the matrix is neither.
    """
    if not weight_NK.is_contiguous():
        if not weight_NK.t().is_contiguous():
            raise ValueError("block_scatter_ writes in place and needs a contiguous matrix or the transpose of one")
        block_scatter_(weight_NK.t(), blocks_Brc.transpose(1, 2), layout.transposed)
        return weight_NK
    rounded = blocks_Brc.to(weight_NK.dtype)
    rows, cols = layout.grid.block_shape
    if not layout.grid.is_ragged:
        weight_NK.view(-1, cols).index_copy_(0, layout.segments, rounded.reshape(-1, cols))
        return weight_NK
    # Padding is made a copy of the last element before it and goes to the same place: so no shape depends on where the
    # blocks lie, and no GPU has to be waited for.
    row_Br, col_Bc = layout.lines()
    past_Br, past_Bc = (row_Br - layout.grid.rows + 1).clamp_(min=0), (col_Bc - layout.grid.cols + 1).clamp_(min=0)
    block_B, in_r, in_c = (torch.arange(size, device=row_Br.device) for size in rounded.shape)
    values = rounded[block_B[:, None, None], (in_r - past_Br)[:, :, None], (in_c - past_Bc)[:, None, :]]
    weight_NK[(row_Br - past_Br)[:, :, None], (col_Bc - past_Bc)[:, None, :]] = values
    return weight_NK


def add_rounded(base_Brc: Tensor, delta_Brc: Tensor) -> Tensor:
    """`base + delta`, summed in the wider of both dtypes (at least fp32) and rounded once to the dtype of `base`."""
    wide = accumulate_dtype(base_Brc, delta_Brc)
    return (base_Brc.to(wide) + delta_Brc.to(wide)).to(base_Brc.dtype)


def block_grad(
    dy_TN: Tensor, x_TK: Tensor, layout: BlockLayout, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """Gradient of the chosen blocks: `dW[b] = dY[:, rows_b]^T X[:, cols_b]`, a sampled dense-dense product."""
    return deliver(_block_grad(dy_TN, x_TK, layout), out, accumulate)


def deliver(grad: Tensor, out: Tensor | None, accumulate: bool) -> Tensor:
    """A gradient as it is, or written or added to `out`."""
    if out is None:
        return grad
    return out.add_(grad) if accumulate else out.copy_(grad)


def _block_grad(dy_TN: Tensor, x_TK: Tensor, layout: BlockLayout) -> Tensor:
    dtype = accumulate_dtype(dy_TN, x_TK)
    if is_whole(layout.grid):
        return whole_grad(dy_TN, x_TK, layout, dtype)
    rows, cols = layout.grid.block_shape
    if len(layout) >= DENSE_SHARE * layout.grid.num_blocks:
        return block_gather(dy_TN.to(dtype).t() @ x_TK.to(dtype), layout)
    grad = dy_TN.new_zeros((len(layout), rows, cols), dtype=dtype)
    if min(rows, cols) >= LARGE_SIDE:
        for out, (row, col) in zip(grad, layout.blocks.tolist(), strict=True):
            dy_Tr = dy_TN[:, row * rows : (row + 1) * rows].to(dtype)
            x_Tc = x_TK[:, col * cols : (col + 1) * cols].to(dtype)
            torch.mm(dy_Tr.t(), x_Tc, out=out[: dy_Tr.shape[1], : x_Tc.shape[1]])
        return grad
    dy_RrT, x_CcT = _stripes(dy_TN, rows, dtype), _stripes(x_TK, cols, dtype)
    for part in _chunks(layout, dy_TN.shape[0]):
        dy_BrT = _take(dy_RrT, layout.block_rows[part])
        x_BcT = _take(x_CcT, layout.block_cols[part])
        torch.bmm(dy_BrT, x_BcT.transpose(1, 2), out=grad[part])
    return grad


def block_product(x_TK: Tensor, blocks_Brc: Tensor, layout: BlockLayout) -> Tensor:
    """`X delta^T` for a delta that is zero outside the chosen blocks. Differentiable, also twice.

    Returns:
        `(T, N)`, fp32 (fp64 when an operand is fp64).
    """
    dtype = accumulate_dtype(x_TK, blocks_Brc)
    if is_whole(layout.grid):
        return whole_product(x_TK, blocks_Brc, layout, dtype)
    rows, cols = layout.grid.block_shape
    if len(layout) >= DENSE_SHARE * layout.grid.num_blocks:
        return x_TK.to(dtype) @ dense(blocks_Brc.to(dtype), layout).t()
    x_CcT = _stripes(x_TK, cols, dtype)
    y_RrT = x_CcT.new_zeros((layout.grid.row_stripes, rows, x_TK.shape[0]))
    for part in _chunks(layout, x_TK.shape[0]):
        y_BrT = torch.bmm(blocks_Brc[part].to(dtype), _take(x_CcT, layout.block_cols[part]))
        y_RrT = y_RrT.index_add(0, layout.block_rows[part], y_BrT)
    return y_RrT.flatten(0, 1)[: layout.grid.rows].t()


def block_matmul_(y_TN: Tensor, x_TK: Tensor, blocks_Brc: Tensor, layout: BlockLayout) -> Tensor:
    """`Y += X delta^T` in place for the chosen blocks; the products are summed wide and rounded once into `Y`."""
    rows, cols = layout.grid.block_shape
    wide = accumulate_dtype(x_TK, blocks_Brc)
    if is_whole(layout.grid):
        return whole_matmul_(y_TN, x_TK, blocks_Brc, layout, wide)
    if y_TN.dtype != wide or min(rows, cols) < LARGE_SIDE or len(layout) >= DENSE_SHARE * layout.grid.num_blocks:
        return y_TN.add_(block_product(x_TK, blocks_Brc, layout))
    for block, (row, col) in zip(blocks_Brc.to(wide), layout.blocks.tolist(), strict=True):
        x_Tc = x_TK[:, col * cols : (col + 1) * cols].to(wide)
        y_Tr = y_TN[:, row * rows : (row + 1) * rows]
        y_Tr.addmm_(x_Tc, block[: y_Tr.shape[1], : x_Tc.shape[1]].t())
    return y_TN


def dense(blocks_Brc: Tensor, layout: BlockLayout) -> Tensor:
    """The `(N, K)` matrix that holds the blocks and is zero elsewhere. Differentiable."""
    grid, (rows, cols) = layout.grid, layout.grid.block_shape
    segments = blocks_Brc.new_zeros((grid.row_stripes * rows * grid.col_stripes, cols))
    padded = segments.index_copy(0, layout.segments, blocks_Brc.reshape(-1, cols)).view(grid.row_stripes * rows, -1)
    return padded[: grid.rows, : grid.cols].contiguous() if grid.is_ragged else padded


def _stripes(x_TK: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """`(stripes, width, T)`, padded with zeros when the last stripe is ragged; copied only when stripes are narrow."""
    missing = -x_TK.shape[1] % width
    if missing:
        x_TK = F.pad(x_TK, (0, missing))
    x_KT = x_TK.to(dtype).t()
    if width < NARROW_SIDE:
        x_KT = x_KT.contiguous()
    return x_KT.unflatten(0, (x_TK.shape[1] // width, width))


def _take(stripes_SwT: Tensor, index_B: Tensor) -> Tensor:
    """Stripes by number, `(B, width, T)`, gathered in the order they lie in memory."""
    if stripes_SwT.is_contiguous():
        return stripes_SwT.index_select(0, index_B)
    return stripes_SwT.permute(2, 0, 1).index_select(1, index_B).permute(1, 2, 0)


def _chunks(layout: BlockLayout, tokens: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, tokens * sum(layout.grid.block_shape)))
    return [slice(start, start + step) for start in range(0, len(layout), step)]
