"""`Y = X (W + delta)^T + bias` with exact gradients of X and of the blocks, and nothing kept that no gradient needs."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import BlockLayout
from .reference import add_rounded, block_gather, block_grad, block_matmul_, block_product, block_scatter_
from .swap import run_with_blocks

# When the blocks touch more than this share of the columns, the input is kept whole: a reference costs nothing while
# the input is alive anyway, a copy of nearly all of it always does.
KEEP_WHOLE_SHARE = 0.75


def block_linear(
    x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, delta_Brc: Tensor, layout: BlockLayout, swap: bool
) -> Tensor:
    """A linear layer whose frozen weight carries a trained block-sparse delta.

    Args:
        x: `(..., K)`. Cast to the autocast dtype where autocast is on, else of the weight's dtype.
        weight_NK: frozen, contiguous or the transpose of a contiguous matrix.
        bias_N: frozen.
        delta_Brc: `(B, r, c)`, any float dtype.
        swap: True writes `round(W + delta)` into the weight for the GEMM and takes it out again, which gives exactly
            what a merged weight gives; False leaves the weight alone and adds the product of the blocks.

    Returns:
        `(..., N)` in the dtype of the (cast) input.
    """
    x = _autocast(x)
    keep = torch.is_grad_enabled()
    y_TN = _BlockLinear.apply(x.reshape(-1, x.shape[-1]), weight_NK, bias_N, delta_Brc, layout, swap, keep)
    return y_TN.view(*x.shape[:-1], y_TN.shape[-1])


def block_add(y: Tensor, x: Tensor, delta_Brc: Tensor, layout: BlockLayout) -> Tensor:
    """`y + X delta^T`, where `y` `(..., N)` is what an opaque base layer made of `x` `(..., K)`.

    Returns:
        `(..., N)` in the dtype of `y`; the products are summed in fp32 at least and rounded once.
    """
    y_TN, x_TK = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    return _BlockAdd.apply(y_TN, x_TK, delta_Brc, layout, torch.is_grad_enabled()).view(y.shape)


def block_add_traceable(y: Tensor, x: Tensor, delta_Brc: Tensor, layout: BlockLayout) -> Tensor:
    """`block_add` from differentiable operations alone, for tracers, `torch.func` and double backward."""
    product = block_product(x.reshape(-1, x.shape[-1]), delta_Brc, layout)
    return (y.reshape(-1, y.shape[-1]) + product).to(y.dtype).view(y.shape)


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK, weight_NK, bias_N, delta_Brc, layout, swap, keep):
        # `needs_input_grad` speaks of the inputs alone; `keep` is False where no graph is recorded.
        needs_x, needs_delta = keep and ctx.needs_input_grad[0], keep and ctx.needs_input_grad[3]
        ctx.layout, ctx.swap = layout, swap
        ctx.keeps_columns, kept = _keep(x_TK, layout) if needs_delta else (False, None)
        # Saved, not put on ctx: an optimizer step between forward and backward is noticed, and hooks that move or
        # recompute saved tensors see them.
        ctx.save_for_backward(kept, *((weight_NK, delta_Brc) if needs_x else (None, None)))
        with _no_autocast(x_TK):
            if not swap:
                y_TN = F.linear(x_TK, weight_NK.to(x_TK.dtype), _cast(bias_N, x_TK.dtype))
                return block_matmul_(y_TN, x_TK, delta_Brc, layout)
            return _with_weight(
                lambda w_NK: F.linear(x_TK, w_NK, _cast(bias_N, x_TK.dtype)), x_TK.dtype, weight_NK, delta_Brc, layout
            )

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TN):
        kept, weight_NK, delta_Brc = ctx.saved_tensors
        layout = ctx.layout
        dx_TK = d_delta = None
        with _no_autocast(dy_TN):
            if ctx.needs_input_grad[0]:
                if ctx.swap:
                    dx_TK = _with_weight(lambda w_NK: dy_TN @ w_NK, dy_TN.dtype, weight_NK, delta_Brc, layout)
                else:
                    dx_TK = dy_TN @ weight_NK.to(dy_TN.dtype)
                    block_matmul_(dx_TK, dy_TN, delta_Brc.transpose(1, 2), layout.transposed)
            if ctx.needs_input_grad[3]:
                d_delta = block_grad(dy_TN, kept, layout.packed if ctx.keeps_columns else layout)
        return dx_TK, None, None, d_delta, None, None, None


class _BlockAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_TN, x_TK, delta_Brc, layout, keep):
        needs_x, needs_delta = keep and ctx.needs_input_grad[1], keep and ctx.needs_input_grad[2]
        ctx.layout = layout
        ctx.keeps_columns, kept = _keep(x_TK, layout) if needs_delta else (False, None)
        ctx.save_for_backward(kept, delta_Brc if needs_x else None)
        ctx.x_dtype = x_TK.dtype
        with _no_autocast(x_TK):
            return block_matmul_(y_TN.clone(), x_TK, delta_Brc, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TN):
        kept, delta_Brc = ctx.saved_tensors
        dx_TK = d_delta = None
        with _no_autocast(dy_TN):
            if ctx.needs_input_grad[1]:
                product = block_product(dy_TN, delta_Brc.transpose(1, 2), ctx.layout.transposed)
                dx_TK = product.to(ctx.x_dtype)
            if ctx.needs_input_grad[2]:
                d_delta = block_grad(dy_TN, kept, ctx.layout.packed if ctx.keeps_columns else ctx.layout)
        return dy_TN, dx_TK, d_delta, None, None


def _keep(x_TK: Tensor, layout: BlockLayout) -> tuple[bool, Tensor]:
    """What the block gradient needs of X: a copy of the touched columns, or X itself when that is nearly all of it."""
    if layout.columns.numel() > KEEP_WHOLE_SHARE * layout.grid.cols:
        return False, x_TK
    return True, x_TK.index_select(1, layout.columns)


def _with_weight(gemm, dtype: torch.dtype, weight_NK: Tensor, delta_Brc: Tensor, layout: BlockLayout) -> Tensor:
    """`gemm(W + delta)`; where autocast copies the weight anyway, the copy is written and the weight is not."""
    if dtype == weight_NK.dtype:
        return run_with_blocks(lambda: gemm(weight_NK), weight_NK, delta_Brc, layout)
    # Rounded to the weight's own dtype first, as merging does, then to the dtype of the GEMM.
    blocks = add_rounded(block_gather(weight_NK, layout), delta_Brc)
    return gemm(block_scatter_(weight_NK.to(dtype), blocks, layout))


def _cast(bias_N: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias_N is None else bias_N.to(dtype)


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _no_autocast(x: Tensor):
    """The operations choose their own accumulation dtypes; autocast would round their fp32 operands to 16 bits."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
