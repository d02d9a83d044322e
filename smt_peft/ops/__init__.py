"""Operations on tensors and a block layout; they know nothing of PEFT or Transformers.

block_grad      dW[b] = dY[:, rows_b]^T X[:, cols_b]
block_matmul_   Y += X delta^T
block_gather    packed blocks <- weight
block_scatter_  weight <- packed blocks
block_linear    Y = X (W + delta)^T + bias, with the gradients of X and delta
block_add       Y = base output + X delta^T, for a base layer that is opaque
"""

from .linear import block_add, block_add_traceable, block_linear
from .reference import (
    add_rounded,
    block_gather,
    block_grad,
    block_matmul_,
    block_product,
    block_scatter_,
    dense,
)
from .swap import heal

__all__ = [
    "add_rounded",
    "block_add",
    "block_add_traceable",
    "block_gather",
    "block_grad",
    "block_linear",
    "block_matmul_",
    "block_product",
    "block_scatter_",
    "dense",
    "heal",
]
