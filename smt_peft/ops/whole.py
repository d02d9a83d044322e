"""Blocks that span whole rows or whole columns of a matrix: their products are one dense GEMM over the touched lines.

With U touched columns of X, the gradient is `X[:, columns]^T dY`, whose `(U, N)` result holds the blocks one after the
other; with U touched rows it is `dY[:, rows]^T X`, `(U, K)`. PaCA (Woo et al., ICLR 2025) takes the first, S2FT
(Yang et al., NeurIPS 2024) both.

Shape suffixes: T tokens, N out_features, K in_features, B blocks of r rows and c columns, U touched lines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import BlockGrid, BlockLayout


def is_whole(grid: BlockGrid) -> bool:
    """Whether the blocks span whole rows or columns; ragged stripes are left to the general routes."""
    if grid.block_cols == grid.cols:
        return grid.rows % grid.block_rows == 0
    return grid.block_rows == grid.rows and grid.cols % grid.block_cols == 0


def whole_grad(dy_TN: Tensor, x_TK: Tensor, layout: BlockLayout, dtype: torch.dtype) -> Tensor:
    """`block_grad` of such blocks by one GEMM in `dtype`; `(B, r, c)`, contiguous."""
    rows, cols = layout.grid.block_shape
    if cols == layout.grid.cols:
        dy_TU = _touched(dy_TN, layout.block_rows, rows)
        return (dy_TU.to(dtype).t() @ x_TK.to(dtype)).view(-1, rows, cols)
    x_TU = _touched(x_TK, layout.block_cols, cols)
    return (x_TU.to(dtype).t() @ dy_TN.to(dtype)).view(-1, cols, rows).transpose(1, 2).contiguous()


def whole_product(x_TK: Tensor, blocks_Brc: Tensor, layout: BlockLayout, dtype: torch.dtype) -> Tensor:
    """`X delta^T` for such blocks by one GEMM in `dtype`; `(T, N)`. Differentiable, also twice."""
    rows, cols = layout.grid.block_shape
    if cols != layout.grid.cols:
        return _from_columns(x_TK, layout, dtype) @ _columns(blocks_Brc, dtype)
    y_TU = x_TK.to(dtype) @ blocks_Brc.to(dtype).reshape(-1, cols).t()
    y_TRr = y_TU.new_zeros((x_TK.shape[0], layout.grid.row_stripes, rows))
    return y_TRr.index_copy(1, layout.block_rows.long(), y_TU.unflatten(1, (-1, rows))).flatten(1)


def whole_matmul_(y_TN: Tensor, x_TK: Tensor, blocks_Brc: Tensor, layout: BlockLayout, dtype: torch.dtype) -> Tensor:
    """`Y += X delta^T` in place for such blocks; summed in `dtype`, rounded once into `Y`."""
    rows, cols = layout.grid.block_shape
    if cols != layout.grid.cols:
        if y_TN.dtype != dtype:
            return y_TN.add_(whole_product(x_TK, blocks_Brc, layout, dtype))
        return y_TN.addmm_(_from_columns(x_TK, layout, dtype), _columns(blocks_Brc, dtype))
    y_TU = x_TK.to(dtype) @ blocks_Brc.to(dtype).reshape(-1, cols).t()
    # Only the touched rows of the delta reach Y.
    y_TRr, y_TBr, stripes = y_TN.unflatten(1, (-1, rows)), y_TU.unflatten(1, (-1, rows)), layout.block_rows.long()
    if y_TN.dtype == dtype:
        # No stripe comes twice, so the order of the additions is settled.
        y_TRr.index_add_(1, stripes, y_TBr)
    else:
        y_TRr.index_copy_(1, stripes, (y_TRr.index_select(1, stripes) + y_TBr).to(y_TN.dtype))
    return y_TN


def _from_columns(x_TK: Tensor, layout: BlockLayout, dtype: torch.dtype) -> Tensor:
    return _touched(x_TK, layout.block_cols, layout.grid.block_cols).to(dtype)


def _columns(blocks_BNc: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks of whole columns as the rows of one `(U, N)` matrix."""
    return blocks_BNc.to(dtype).transpose(1, 2).reshape(-1, blocks_BNc.shape[1])


def _touched(x_TK: Tensor, stripes_B: Tensor, width: int) -> Tensor:
    """The columns in these stripes, `(T, U)`; X itself where these are all of them, as in a layout of kept columns."""
    if len(stripes_B) * width == x_TK.shape[1]:
        return x_TK
    if width == 1:
        return x_TK.index_select(1, stripes_B)
    return x_TK.unflatten(1, (-1, width)).index_select(1, stripes_B).flatten(1)
