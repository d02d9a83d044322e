"""One product per expert for rows sorted by expert, all in one call of PyTorch's grouped or batched product.

The blocks of all experts are written around that one call, as `block_linear` writes those of one matrix, so a kernel
launch does not become as many as there are experts. The block gradient is taken expert by expert: a dense gradient of
a weight never exists.

Shape suffixes: E experts, T tokens, N outputs and K inputs of the product, B blocks of r rows and c columns.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import BlockLayout
from .linear import kept_input, wants_columns
from .operations import block_grad, block_matmul_
from .saved import compressed, restored
from .swap import run_with_blocks

Gemm = Callable[[Tensor, Tensor], Tensor]


class Run(NamedTuple):
    """The rows of one expert.

    Args:
        rows: which rows of X and Y.
        blocks: which of the packed blocks.
        layout: of these blocks within the expert's matrix, seen as `(N, K)`.
    """

    rows: slice
    blocks: slice
    layout: BlockLayout


def grouped_linear(
    x_TK: Tensor,
    weight: Tensor,
    delta_Brc: Tensor,
    layout: BlockLayout,
    runs: list[Run],
    gemm: Gemm,
    flipped: bool,
    swap: bool,
    int8: bool = False,
) -> Tensor:
    """`Y[rows] = X[rows] (W[e] + delta[e])^T` for every expert, or `X (W + delta)` when `flipped`.

    Args:
        x_TK: in the dtype of the weight; autocast must be off.
        weight: `(E, N, K)`, or `(E, K, N)` when flipped; contiguous and frozen.
        delta_Brc: the blocks of all experts, in the order and orientation of `layout`.
        layout: of the matrices as stored, one below the other.
        runs: the rows of every expert that has blocks.
        gemm: `(T, K), (E, K, N) -> (T, N)`, the product of each expert's rows with its matrix.
        swap: as in `block_linear`; `int8` too.
    """
    keep = torch.is_grad_enabled()
    return _GroupedLinear.apply(x_TK, weight, delta_Brc, layout, runs, gemm, flipped, swap, keep, int8)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK, weight, delta_Brc, layout, runs, gemm, flipped, swap, keep, int8):
        needs_x, needs_delta = keep and ctx.needs_input_grad[0], keep and ctx.needs_input_grad[2]
        ctx.layout, ctx.runs, ctx.gemm, ctx.flipped, ctx.swap = layout, runs, gemm, flipped, swap
        trained = runs if needs_delta else ()
        inputs = (kept_input(x_TK[run.rows], run.layout, wants_columns(run.layout)) for run in trained)
        # Of each run its rows, or their codes and scales.
        kept = [compressed(x, int8, shared=False) for x in inputs]
        ctx.parts = [len(parts) for parts in kept]
        ctx.delta_like = torch.float64 if x_TK.dtype == torch.float64 else torch.float32, delta_Brc.shape
        ctx.save_for_backward(*((weight, delta_Brc) if needs_x else (None, None)), *chain.from_iterable(kept))
        return _product(x_TK, weight, delta_Brc, ctx, flipped)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TN):
        weight, delta_Brc, *kept = ctx.saved_tensors
        dx_TK = d_delta = None
        if ctx.needs_input_grad[0]:
            dx_TK = _product(dy_TN, weight, delta_Brc, ctx, not ctx.flipped)
        if ctx.needs_input_grad[2]:
            dtype, shape = ctx.delta_like
            d_delta = dy_TN.new_zeros(shape, dtype=dtype)
            parts = iter(kept)
            for run, number in zip(ctx.runs, ctx.parts, strict=True):
                x, *scales = islice(parts, number)
                x = restored(x, scales, run.rows.stop - run.rows.start, dy_TN.dtype)
                layout = run.layout.packed if wants_columns(run.layout) else run.layout
                grad = block_grad(dy_TN[run.rows], x, layout)
                d_delta[run.blocks] = grad.transpose(1, 2) if ctx.flipped else grad
        return dx_TK, None, d_delta, None, None, None, None, None, None, None


def _product(x, weight, delta_Brc, ctx, flipped) -> Tensor:
    """`x W` per expert when `flipped`, else `x W^T`."""
    operand = weight if flipped else weight.mT
    if ctx.swap:
        matrix = weight.view(ctx.layout.grid.shape)
        return run_with_blocks(lambda: ctx.gemm(x, operand), matrix, delta_Brc, ctx.layout)
    y = ctx.gemm(x, operand)
    for run in ctx.runs:
        # `layout` is that of the product forward; the one backward has the transposed matrix.
        layout = run.layout if flipped == ctx.flipped else run.layout.transposed
        delta = delta_Brc[run.blocks].transpose(1, 2) if flipped else delta_Brc[run.blocks]
        block_matmul_(y[run.rows], x[run.rows], delta, layout)
    return y
