"""`Y = X round(W + delta)^T + bias` where W is packed: the blocks go into the dequantised temporary of each pass.

Nothing as large as the weight is kept for the backward pass; it dequantises anew. The results are those of
`block_linear(..., swap=True)` on the dequantised weight, bit for bit: the same GEMM on the same operands.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import BlockLayout
from .linear import cast_input, kept_input, merged_copy, wants_columns, without_autocast
from .operations import block_grad
from .saved import compressed, restored


def block_overlay(
    x: Tensor,
    dequantise: Callable[[], Tensor],
    bias_N: Tensor | None,
    delta_Brc: Tensor,
    layout: BlockLayout,
    int8: bool = False,
) -> Tensor:
    """A linear layer whose frozen, packed weight carries a trained block-sparse delta.

    Args:
        x: `(..., K)`. Cast to the autocast dtype where autocast is on.
        dequantise: gives the weight, `(N, K)`, in any float dtype: a new contiguous tensor, which is written. Called
            once in forward, and once in backward where the gradient of `x` is asked for; it must give the same then.
        bias_N: frozen.
        delta_Brc: `(B, r, c)`, any float dtype. The sum is rounded to the dtype of the dequantised weight, then the
            weight to that of `x`.
        int8: as in `block_linear`.

    Returns:
        `(..., N)` in the dtype of the (cast) input.
    """
    x = cast_input(x)
    x_TK, keep = x.reshape(-1, x.shape[-1]), torch.is_grad_enabled()
    columns_only = keep and wants_columns(layout)
    y_TN = _BlockOverlay.apply(x_TK, dequantise, bias_N, delta_Brc, layout, keep, columns_only, int8)
    return y_TN.view(*x.shape[:-1], y_TN.shape[-1])


class _BlockOverlay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK, dequantise, bias_N, delta_Brc, layout, keep, columns_only, int8):
        # `needs_input_grad` speaks of the inputs alone; `keep` is False where no graph is recorded.
        needs_x, needs_delta = keep and ctx.needs_input_grad[0], keep and ctx.needs_input_grad[3]
        ctx.dequantise, ctx.layout, ctx.columns_only = dequantise, layout, columns_only
        kept = kept_input(x_TK, layout, columns_only) if needs_delta else None
        kept, *scales = compressed(kept, int8, shared=not columns_only)
        ctx.save_for_backward(kept, delta_Brc if needs_x else None, *scales)
        with without_autocast(x_TK):
            bias_N = None if bias_N is None else bias_N.to(x_TK.dtype)
            return F.linear(x_TK, merged_copy(dequantise(), delta_Brc, layout, x_TK.dtype), bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TN):
        kept, delta_Brc, *scales = ctx.saved_tensors
        dx_TK = d_delta = None
        with without_autocast(dy_TN):
            if ctx.needs_input_grad[0]:
                dx_TK = dy_TN @ merged_copy(ctx.dequantise(), delta_Brc, ctx.layout, dy_TN.dtype)
            if ctx.needs_input_grad[3]:
                kept = restored(kept, scales, len(dy_TN), dy_TN.dtype)
                d_delta = block_grad(dy_TN, kept, ctx.layout.packed if ctx.columns_only else ctx.layout)
        return dx_TK, None, None, d_delta, None, None, None, None
