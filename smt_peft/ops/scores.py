"""Scores of blocks from what a module saw: `block_scores` in plain PyTorch.

Shape suffixes: T tokens, N out_features, K in_features, R row and C column stripes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks import BlockGrid
from .reference import accumulate_dtype

# 16-bit operands are widened to fp32 this many tokens at a time.
WIDENED_TOKENS = 4096


def block_scores(pairs: Sequence[tuple[Tensor, Tensor]], grid: BlockGrid, statistic: str) -> Tensor:
    """Sums over each block of `g = sum of dY^T X`, of `|g|` or of `g^2`, `(R, C)`; see `operations.block_scores`."""
    if statistic != "sum":
        grad_NK = dense_grad(pairs, grid.shape)
        return block_sums(grad_NK.abs_() if statistic == "abs" else grad_NK.square_(), grid)
    # The sum over a block of dY^T X is the product of the sums over its rows of dY^T and over its columns of X.
    sums_RC = torch.zeros(grid.stripes, dtype=accumulate_dtype(*pairs[0]), device=pairs[0][1].device)
    for x, dy in pairs:
        dy_TR = stripe_sums(dy.reshape(-1, grid.rows), grid.block_rows)
        # In place, which the caller's autocast leaves alone.
        sums_RC.addmm_(dy_TR.t(), stripe_sums(x.reshape(-1, grid.cols), grid.block_cols))
    return sums_RC


def dense_grad(pairs: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, int]) -> Tensor:
    """The whole gradient of a matrix, the sum of `dY^T X` over its uses, `(N, K)`, fp32 (fp64 for fp64 inputs).

    Args:
        pairs: `(x, dY)` of every use of the matrix, `(..., K)` and `(..., N)`.
        shape: `(N, K)`.
    """
    dtype = accumulate_dtype(*pairs[0])
    grad_NK = torch.zeros(shape, dtype=dtype, device=pairs[0][1].device)
    for x, dy in pairs:
        x_TK, dy_TN = x.reshape(-1, shape[1]), dy.reshape(-1, shape[0])
        if x.is_cuda and x.dtype == dy.dtype != dtype:
            torch.addmm(grad_NK, dy_TN.t(), x_TK, out_dtype=dtype, out=grad_NK)
            continue
        for dy_part, x_part in zip(dy_TN.split(WIDENED_TOKENS), x_TK.split(WIDENED_TOKENS), strict=True):
            grad_NK.addmm_(dy_part.to(dtype).t(), x_part.to(dtype))
    return grad_NK


def block_sums(matrix: Tensor, grid: BlockGrid) -> Tensor:
    """The sum of each block of a `(rows, cols)` float matrix, `(R, C)`, without a padded or second dense matrix."""
    return stripe_sums(stripe_sums(matrix, grid.block_cols).t(), grid.block_rows).t().contiguous()


def stripe_sums(matrix: Tensor, step: int) -> Tensor:
    """Sums over runs of `step` columns, the last run maybe shorter: `(rows, stripes)`, fp32 at least."""
    rows, cols = matrix.shape
    dtype = accumulate_dtype(matrix)
    full = cols // step * step
    sums = matrix[:, :full].unflatten(1, (-1, step)).sum(-1, dtype=dtype) if full else matrix.new_empty(rows, 0)
    if full == cols:
        return sums
    return torch.cat((sums.to(dtype), matrix[:, full:].sum(1, keepdim=True, dtype=dtype)), 1)
