"""The operations, each served by the backend that `dispatch` picks; under a compiler each is one `torch.library` op.

Shape suffixes: T tokens, N out_features, K in_features, B blocks of r rows and c columns, R and C row and column
stripes. `layout` says which blocks of the `(N, K)` matrix are meant. 16-bit operands are accumulated in fp32 and
rounded once; fp64 stays fp64. Results are deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks import BlockGrid, BlockLayout
from .dispatch import pick


def block_gather(weight_NK: Tensor, layout: BlockLayout) -> Tensor:
    """Copy the chosen blocks out of a matrix.

    Args:
        weight_NK: any float dtype, contiguous or the transpose of a contiguous matrix.

    Returns:
        `(B, r, c)` in the dtype of the weight; the padding of ragged blocks is zero.
    """
    if torch.compiler.is_compiling():
        return torch.ops.smt_peft.block_gather(weight_NK, layout.blocks, *layout.grid.block_shape)
    _check(layout, weight_NK=(weight_NK, layout.grid.shape))
    return pick("block_gather", weight_NK, layout)(weight_NK, layout)


def block_scatter_(weight_NK: Tensor, blocks_Brc: Tensor, layout: BlockLayout) -> Tensor:
    """Overwrite the chosen blocks of a matrix in place, rounding once to its dtype; padding is ignored.

    Args:
        weight_NK: contiguous, or the transpose of a contiguous matrix.
        blocks_Brc: `(B, r, c)`, any float dtype.

    Returns:
        The matrix.

    Raises:
        ValueError: the matrix is neither; an operand does not fit the layout.
    """
    if torch.compiler.is_compiling():
        torch.ops.smt_peft.block_scatter_(weight_NK, blocks_Brc, layout.blocks)
        return weight_NK
    _check(layout, weight_NK=(weight_NK, layout.grid.shape), blocks_Brc=(blocks_Brc, _packed(layout)))
    return pick("block_scatter_", weight_NK, blocks_Brc, layout)(weight_NK, blocks_Brc, layout)


def block_grad(
    dy_TN: Tensor, x_TK: Tensor, layout: BlockLayout, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """Gradient of the chosen blocks: `dW[b] = dY[:, rows_b]^T X[:, cols_b]`, a sampled dense-dense product.

    Args:
        dy_TN: gradient of the output; any strides.
        x_TK: the input; any strides.
        out: where to write: `(B, r, c)`, contiguous, in the dtype returned.
        accumulate: add to what `out` holds instead of overwriting it.

    Returns:
        `(B, r, c)`, fp32 (fp64 for fp64 inputs); the padding of ragged blocks is zero.
    """
    if torch.compiler.is_compiling():
        if out is None:
            return torch.ops.smt_peft.block_grad(dy_TN, x_TK, layout.blocks, *layout.grid.block_shape)
        torch.ops.smt_peft.block_grad_(out, dy_TN, x_TK, layout.blocks, accumulate)
        return out
    tokens = dy_TN.shape[0]
    _check(layout, dy_TN=(dy_TN, (tokens, layout.grid.rows)), x_TK=(x_TK, (tokens, layout.grid.cols)))
    if out is not None:
        _check_out(out, dy_TN, x_TK, layout)
    elif accumulate:
        raise ValueError("block_grad: accumulate=True adds to `out`, but no `out` was given")
    return pick("block_grad", dy_TN, x_TK, layout)(dy_TN, x_TK, layout, out, accumulate)


def block_scores(pairs: Sequence[tuple[Tensor, Tensor]], grid: BlockGrid, statistic: str) -> Tensor:
    """Sums over each block of the gradient `g = sum of dY^T X over the pairs`, of `|g|`, or of `g^2`.

    Args:
        pairs: `(x, dY)` of every use of one matrix, `(..., K)` and `(..., N)`.
        statistic: `"sum"`, which never forms `dY^T X`; `"abs"` or `"square"`, which form it and free it.

    Returns:
        `(R, C)`, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: no such statistic.
    """
    if statistic not in ("sum", "abs", "square"):
        raise ValueError(f"block_scores: statistic must be 'sum', 'abs' or 'square', got {statistic!r}")
    if torch.compiler.is_compiling():
        xs, dys = zip(*pairs, strict=True)
        return torch.ops.smt_peft.block_scores(list(xs), list(dys), *grid.block_shape, statistic)
    return pick("block_scores", pairs, grid)(pairs, grid, statistic)


def block_matmul_(
    y_TN: Tensor, x_TK: Tensor, blocks_Brc: Tensor, layout: BlockLayout, transposed: bool = False
) -> Tensor:
    """`Y += X delta^T` in place, for a delta that is zero outside the chosen blocks.

    Args:
        y_TN: any strides; the products are summed wide and rounded once into it.
        x_TK: any strides.
        blocks_Brc: the delta, any float dtype.
        transposed: `Y += X delta` instead, with Y `(T, K)` and X `(T, N)`.

    Returns:
        `y_TN`.
    """
    if torch.compiler.is_compiling():
        torch.ops.smt_peft.block_matmul_(y_TN, x_TK, blocks_Brc, layout.blocks, transposed)
        return y_TN
    if transposed:
        blocks_Brc, layout = blocks_Brc.transpose(1, 2), layout.transposed
    tokens, grid = x_TK.shape[0], layout.grid
    _check(
        layout,
        y_TN=(y_TN, (tokens, grid.rows)),
        x_TK=(x_TK, (tokens, grid.cols)),
        blocks_Brc=(blocks_Brc, _packed(layout)),
    )
    return pick("block_matmul_", y_TN, x_TK, blocks_Brc, layout)(y_TN, x_TK, blocks_Brc, layout)


def swap_linear(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, delta_Brc: Tensor, layout: BlockLayout
) -> Tensor:
    """`X (W + delta)^T + bias`: the blocks of the weight hold `round(W + delta)` for the length of one GEMM.

    Outside the call the weight is as it was, bit for bit, also when the GEMM raises; another thread that reads it
    during the call sees the blocks. Two calls on one weight wait for each other.

    Args:
        x_TK: in the dtype of the weight.
        weight_NK: contiguous or the transpose of a contiguous matrix; its version counter does not move.
        delta_Brc: `(B, r, c)`, any float dtype.

    Returns:
        `(T, N)`, exactly what `torch.nn.functional.linear` gives for a merged weight.
    """
    if torch.compiler.is_compiling():
        return torch.ops.smt_peft.swap_linear(x_TK, weight_NK, bias_N, delta_Brc, layout.blocks)
    _check(layout, weight_NK=(weight_NK, layout.grid.shape), delta_Brc=(delta_Brc, _packed(layout)))
    return pick("swap_linear", x_TK, weight_NK, bias_N, delta_Brc, layout)(x_TK, weight_NK, bias_N, delta_Brc, layout)


def swap_matmul(dy_TN: Tensor, weight_NK: Tensor, delta_Brc: Tensor, layout: BlockLayout) -> Tensor:
    """`dY (W + delta)`, the input gradient of `swap_linear`, in the same manner. Returns `(T, K)`."""
    if torch.compiler.is_compiling():
        return torch.ops.smt_peft.swap_matmul(dy_TN, weight_NK, delta_Brc, layout.blocks)
    _check(layout, weight_NK=(weight_NK, layout.grid.shape), delta_Brc=(delta_Brc, _packed(layout)))
    return pick("swap_matmul", dy_TN, weight_NK, delta_Brc, layout)(dy_TN, weight_NK, delta_Brc, layout)


def block_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    avg_scales: Sequence[Tensor],
    sq_scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    coefficient: Tensor | None = None,
    skip: Tensor | None = None,
    seed: int = 0,
) -> None:
    """One AdamW step (arXiv 1711.05101, Algorithm 2) on many tensors in one call; see `adamw.block_adamw_`."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, avg_scales, sq_scales, steps)
    numbers = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "seed": seed}
    if torch.compiler.is_compiling():
        torch.ops.smt_peft.block_adamw_(*map(list, lists), coefficient, skip, **numbers)
        return
    pick("block_adamw_", *lists)(*lists, coefficient=coefficient, skip=skip, **numbers)


def _packed(layout: BlockLayout) -> tuple[int, int, int]:
    return len(layout), *layout.grid.block_shape


def _check(layout: BlockLayout, **operands: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raise `ValueError` unless every operand has its shape, is of a float dtype, and lies where the index lies."""
    layout.check()
    device = layout.blocks.device
    for name, (tensor, shape) in operands.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but {len(layout)} blocks of a matrix of {layout.grid} want "
                f"{tuple(shape)}; pass the operands of one and the same layer"
            )
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the block index on {device}; move them to one device")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; the operations compute in float16, bfloat16, float32, float64")


def _check_out(out: Tensor, dy_TN: Tensor, x_TK: Tensor, layout: BlockLayout) -> None:
    dtype = torch.float64 if torch.float64 in (dy_TN.dtype, x_TK.dtype) else torch.float32
    _check(layout, out=(out, _packed(layout)))
    if out.dtype != dtype or not out.is_contiguous():
        state = "contiguous" if out.is_contiguous() else "not contiguous"
        raise ValueError(f"block_grad: out is {out.dtype} and {state}; it must be {dtype} and contiguous")
