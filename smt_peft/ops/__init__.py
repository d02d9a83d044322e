"""Operations on tensors and a block layout; they know nothing of PEFT or Transformers.

block_grad      dW[b] = dY[:, rows_b]^T X[:, cols_b]
block_scores    sums over every block of dY^T X, |dY^T X| or its square
block_matmul_   Y += X delta^T
block_gather    packed blocks <- weight
block_scatter_  weight <- packed blocks
swap_linear     Y = X round(W + delta)^T + bias, the blocks in the weight for one GEMM only
swap_matmul     dX = dY round(W + delta)
block_adamw_    AdamW on all blocks of a model
block_linear    Y = X (W + delta)^T + bias, with the gradients of X and delta
grouped_linear  the same for rows sorted by expert, one matrix per expert, in one GEMM call
block_add       Y = base output + X delta^T, for a base layer that is opaque
block_rows_add  rows of W + delta from those of W, for an embedding table
block_overlay   Y = X round(W + delta)^T + bias, where W is packed and dequantised for each pass

`operations` has the first eight, `dispatch` says which backend serves them, `library` shows them to compilers.
"""

from . import library
from .dispatch import explain, served, use_backend
from .grouped import Run, grouped_linear
from .linear import block_add, block_add_traceable, block_linear
from .operations import (
    block_adamw_,
    block_gather,
    block_grad,
    block_matmul_,
    block_scatter_,
    block_scores,
    swap_linear,
    swap_matmul,
)
from .overlay import block_overlay
from .reference import add_rounded, block_product, dense
from .rows import LookUps, block_rows_add, table_grad, table_scores
from .scores import block_sums, dense_grad, stripe_sums
from .swap import heal

__all__ = [
    "LookUps",
    "Run",
    "add_rounded",
    "block_adamw_",
    "block_add",
    "block_add_traceable",
    "block_gather",
    "block_grad",
    "block_linear",
    "block_matmul_",
    "block_overlay",
    "block_product",
    "block_rows_add",
    "block_scatter_",
    "block_scores",
    "block_sums",
    "dense",
    "dense_grad",
    "explain",
    "grouped_linear",
    "heal",
    "library",
    "served",
    "stripe_sums",
    "swap_linear",
    "swap_matmul",
    "table_grad",
    "table_scores",
    "use_backend",
]
