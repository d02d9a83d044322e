"""The operations on the meta device: results of the right shape and dtype, no temporaries, as fused kernels have none.

Signatures and shape suffixes are those of `operations`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..blocks import BlockLayout
from .reference import accumulate_dtype


def block_gather(weight_NK: Tensor, layout: BlockLayout) -> Tensor:
    return weight_NK.new_empty(len(layout), *layout.grid.block_shape)


def block_scatter_(weight_NK: Tensor, blocks_Brc: Tensor, layout: BlockLayout) -> Tensor:
    return weight_NK


def block_grad(
    dy_TN: Tensor, x_TK: Tensor, layout: BlockLayout, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    if out is not None:
        return out
    return dy_TN.new_empty(len(layout), *layout.grid.block_shape, dtype=accumulate_dtype(dy_TN, x_TK))


def block_matmul_(y_TN: Tensor, x_TK: Tensor, blocks_Brc: Tensor, layout: BlockLayout) -> Tensor:
    return y_TN


def swap_linear(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, delta_Brc: Tensor, layout: BlockLayout
) -> Tensor:
    return x_TK.new_empty(len(x_TK), len(weight_NK))


def swap_matmul(dy_TN: Tensor, weight_NK: Tensor, delta_Brc: Tensor, layout: BlockLayout) -> Tensor:
    return dy_TN.new_empty(len(dy_TN), weight_NK.shape[1])


def block_adamw_(*lists: Sequence[Tensor], **numbers: object) -> None:
    """Nothing, as it gives nothing back."""
