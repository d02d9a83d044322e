"""`Y = X (W + delta)^T + bias` with exact gradients of X and of the blocks, and nothing kept that no gradient needs."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import BlockLayout
from .operations import block_gather, block_grad, block_matmul_, block_scatter_, swap_linear, swap_matmul
from .reference import add_rounded, block_product
from .saved import compressed, restored

# When the blocks touch more than this share of the columns, the input is kept whole: a reference costs nothing while
# the input is alive anyway, a copy of nearly all of it always does.
KEEP_WHOLE_SHARE = 0.75


def block_linear(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    delta_Brc: Tensor,
    layout: BlockLayout,
    swap: bool,
    int8: bool = False,
) -> Tensor:
    """A linear layer whose frozen weight carries a trained block-sparse delta.

    Args:
        x: `(..., K)`. Cast to the autocast dtype where autocast is on, else of the weight's dtype.
        weight_NK: frozen, contiguous or the transpose of a contiguous matrix.
        bias_N: frozen.
        delta_Brc: `(B, r, c)`, any float dtype.
        swap: True writes `round(W + delta)` into the weight for the GEMM and takes it out again, which gives exactly
            what a merged weight gives; False leaves the weight alone and adds the product of the blocks.
        int8: keeps what the gradient of the blocks needs of `x` in 8 bits, see `saved`.

    Returns:
        `(..., N)` in the dtype of the (cast) input.
    """
    x = cast_input(x)
    x_TK, keep = x.reshape(-1, x.shape[-1]), torch.is_grad_enabled()
    # Asked for only where something is kept: a compiler holds its graph to the number of columns that it saw.
    columns_only = keep and wants_columns(layout)
    y_TN = _BlockLinear.apply(x_TK, weight_NK, bias_N, delta_Brc, layout, swap, keep, columns_only, int8)
    return y_TN.view(*x.shape[:-1], y_TN.shape[-1])


def block_add(y: Tensor, x: Tensor, delta_Brc: Tensor, layout: BlockLayout, int8: bool = False) -> Tensor:
    """`y + X delta^T`, where `y` `(..., N)` is what an opaque base layer made of `x` `(..., K)`; `int8` as above.

    Returns:
        `(..., N)` in the dtype of `y`; the products are summed in fp32 at least and rounded once.
    """
    y_TN, x_TK = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    keep = torch.is_grad_enabled()
    return _BlockAdd.apply(y_TN, x_TK, delta_Brc, layout, keep, keep and wants_columns(layout), int8).view(y.shape)


def block_add_traceable(y: Tensor, x: Tensor, delta_Brc: Tensor, layout: BlockLayout) -> Tensor:
    """`block_add` from differentiable operations alone, for tracers, `torch.func` and double backward."""
    product = block_product(x.reshape(-1, x.shape[-1]), delta_Brc, layout)
    return (y.reshape(-1, y.shape[-1]) + product).to(y.dtype).view(y.shape)


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK, weight_NK, bias_N, delta_Brc, layout, swap, keep, columns_only, int8):
        # `needs_input_grad` speaks of the inputs alone; `keep` is False where no graph is recorded.
        needs_x, needs_delta = keep and ctx.needs_input_grad[0], keep and ctx.needs_input_grad[3]
        ctx.layout, ctx.swap, ctx.columns_only = layout, swap, columns_only
        kept = kept_input(x_TK, layout, columns_only) if needs_delta else None
        kept, *scales = compressed(kept, int8, shared=not columns_only)
        # Saved, not put on ctx: an optimizer step between forward and backward is noticed, and hooks that move or
        # recompute saved tensors see them.
        ctx.save_for_backward(kept, *((weight_NK, delta_Brc) if needs_x else (None, None)), *scales)
        with without_autocast(x_TK):
            bias_N = None if bias_N is None else bias_N.to(x_TK.dtype)
            if not swap:
                y_TN = F.linear(x_TK, weight_NK.to(x_TK.dtype), bias_N)
                return block_matmul_(y_TN, x_TK, delta_Brc, layout)
            if x_TK.dtype == weight_NK.dtype:
                return swap_linear(x_TK, weight_NK, bias_N, delta_Brc, layout)
            return F.linear(x_TK, merged_copy(weight_NK, delta_Brc, layout, x_TK.dtype), bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TN):
        kept, weight_NK, delta_Brc, *scales = ctx.saved_tensors
        layout = ctx.layout
        dx_TK = d_delta = None
        with without_autocast(dy_TN):
            if ctx.needs_input_grad[0]:
                if ctx.swap and dy_TN.dtype == weight_NK.dtype:
                    dx_TK = swap_matmul(dy_TN, weight_NK, delta_Brc, layout)
                elif ctx.swap:
                    dx_TK = dy_TN @ merged_copy(weight_NK, delta_Brc, layout, dy_TN.dtype)
                else:
                    dx_TK = dy_TN @ weight_NK.to(dy_TN.dtype)
                    block_matmul_(dx_TK, dy_TN, delta_Brc, layout, transposed=True)
            if ctx.needs_input_grad[3]:
                kept = restored(kept, scales, len(dy_TN), dy_TN.dtype)
                d_delta = block_grad(dy_TN, kept, layout.packed if ctx.columns_only else layout)
        return dx_TK, None, None, d_delta, None, None, None, None, None


class _BlockAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_TN, x_TK, delta_Brc, layout, keep, columns_only, int8):
        needs_x, needs_delta = keep and ctx.needs_input_grad[1], keep and ctx.needs_input_grad[2]
        ctx.layout, ctx.columns_only = layout, columns_only
        kept = kept_input(x_TK, layout, columns_only) if needs_delta else None
        kept, *scales = compressed(kept, int8, shared=not columns_only)
        ctx.save_for_backward(kept, delta_Brc if needs_x else None, *scales)
        ctx.x_dtype = x_TK.dtype
        with without_autocast(x_TK):
            return block_matmul_(y_TN.clone(), x_TK, delta_Brc, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TN):
        kept, delta_Brc, *scales = ctx.saved_tensors
        dx_TK = d_delta = None
        with without_autocast(dy_TN):
            if ctx.needs_input_grad[1]:
                product = block_product(dy_TN, delta_Brc.transpose(1, 2), ctx.layout.transposed)
                dx_TK = product.to(ctx.x_dtype)
            if ctx.needs_input_grad[2]:
                kept = restored(kept, scales, len(dy_TN), ctx.x_dtype)
                d_delta = block_grad(dy_TN, kept, ctx.layout.packed if ctx.columns_only else ctx.layout)
        return dy_TN, dx_TK, d_delta, None, None, None, None


def wants_columns(layout: BlockLayout) -> bool:
    """Whether the block gradient is to keep a copy of the touched columns of X, not X itself."""
    return layout.num_columns <= KEEP_WHOLE_SHARE * layout.grid.cols


def kept_input(x_TK: Tensor, layout: BlockLayout, columns_only: bool) -> Tensor:
    return x_TK.index_select(1, layout.columns) if columns_only else x_TK


def merged_copy(weight_NK: Tensor, delta_Brc: Tensor, layout: BlockLayout, dtype: torch.dtype) -> Tensor:
    """A copy of the merged weight in another dtype: where autocast copies anyway, the weight itself is not written."""
    # Rounded to the weight's own dtype first, as merging does, then to the dtype of the GEMM.
    blocks = add_rounded(block_gather(weight_NK, layout), delta_Brc)
    return block_scatter_(weight_NK.to(dtype), blocks, layout)


def cast_input(x: Tensor) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def without_autocast(x: Tensor):
    """The operations choose their own accumulation dtypes; autocast would round their fp32 operands to 16 bits."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
