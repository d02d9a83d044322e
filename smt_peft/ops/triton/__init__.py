"""Triton kernels for GPUs: one file per operation, with its mathematics, its kernels and their launcher.

Importing this package imports no Triton; the first call that needs a kernel does. On a CPU the kernels run only in
Triton's interpreter, which wants `TRITON_INTERPRET=1` before Triton is first imported.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from ...blocks import BlockLayout

OLDEST = (3, 6)


def block_grad(
    dy_TN: Tensor, x_TK: Tensor, layout: BlockLayout, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """Gradient of the chosen blocks, fp32 `(B, r, c)`; see `operations.block_grad`."""
    from . import grad

    return grad.block_grad(dy_TN, x_TK, layout, out, accumulate)


def block_matmul_(y_TN: Tensor, x_TK: Tensor, blocks_Brc: Tensor, layout: BlockLayout) -> Tensor:
    """`Y += X delta^T` in place; see `operations.block_matmul_`."""
    from . import matmul

    return matmul.block_matmul_(y_TN, x_TK, blocks_Brc, layout)


def why_not_block_grad(dy_TN: Tensor, x_TK: Tensor, layout: BlockLayout) -> str | None:
    """Why these kernels cannot compute this gradient, or None. Does not wait for the GPU."""
    return _why_not(dy_TN, x_TK)


def why_not_block_matmul_(y_TN: Tensor, x_TK: Tensor, blocks_Brc: Tensor, layout: BlockLayout) -> str | None:
    """Why these kernels cannot run this product, or None. Does not wait for the GPU."""
    if y_TN.dtype == torch.float64 or blocks_Brc.dtype == torch.float64:
        return "the kernels sum in float32, and an operand is float64"
    return _why_not(x_TK)


def available(device: str) -> str | None:
    """Why no kernel can run on a type of device (`"cuda"`, `"cpu"`), or None."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton compiles for GPUs only (TRITON_INTERPRET=1 interprets the kernels, slowly)"
    if device not in ("cpu", "cuda"):
        return f"the kernels are not made for the device {device}"
    return _triton_missing()


def _why_not(*operands: Tensor) -> str | None:
    first = operands[0]
    if reason := available(first.device.type):
        return reason
    served = [torch.float16, torch.bfloat16]
    if first.device.type == "cpu":
        served.append(torch.float32)
    elif (reason := _too_old(first.device)) is not None:
        return reason
    for operand in operands:
        if operand.dtype not in served:
            return f"the kernels multiply float16 and bfloat16; {operand.dtype} is left to cuBLAS and its TF32 setting"
        if operand.dtype != first.dtype:
            return f"the operands differ in dtype: {first.dtype} and {operand.dtype}"
    return None


@cache
def _triton_missing() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"Triton {triton.__version__} is installed, the kernels need {OLDEST[0]}.{OLDEST[1]} or newer"
    return None


@cache
def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or newer"
    return None
