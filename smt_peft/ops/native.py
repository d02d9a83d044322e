"""The compiled backend: C++ for CPU tensors (`smt_peft._C`), CUDA C++ for CUDA tensors (`smt_peft._C_cuda`).

`setup.py` builds the libraries from csrc/. They are loaded on the first call that may use them, never on import; a
library that is missing or does not load is a reason in words, never an exception. Both speak PyTorch's stable C++ ABI,
so one build serves every PyTorch from 2.10 on, and register raw operations as `torch.ops.smt_native.*`. These check
their operands themselves, on a CPU the index too; on a GPU that would wait for the device, so there the index is the
one that `BlockLayout.check` has looked at, and what lies out of range is masked.

Signatures, results and shape suffixes are those of `operations`. Environment: `SMT_CPU_ISA` = avx512, avx2 or baseline
forces the instruction set of the CPU kernels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..blocks import BlockLayout
from .adamw import check_hyper_parameters, check_tensors, dynamic_code
from .reference import accumulate_dtype, deliver
from .whole import is_whole, whole_grad

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FOLDER = Path(__file__).resolve().parent.parent
_LIBRARIES = {"cpu": "_C", "cuda": "_C_cuda"}
_INSTALL = "install with a C++ compiler: pip install --no-build-isolation smt-peft"
_INSTALL_CUDA = "install where nvcc is: SMT_EXT=all pip install --no-build-isolation smt-peft"


def available(device_type: str) -> str | None:
    """Why the library for a type of device cannot be used, or None when it is loaded. Loads it on the first call."""
    if device_type not in _LIBRARIES:
        return f"the native backend serves CPU and CUDA tensors, not {device_type}"
    # `_C` defines the operations; `_C_cuda` adds to them.
    return _load("_C") or (_load("_C_cuda") if device_type == "cuda" else None)


def build_info() -> dict:
    """What the libraries were built with: PyTorch, compiler, CUDA, architectures, flags. Empty when none was built."""
    try:
        return json.loads((_FOLDER / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


@cache
def _load(name: str) -> str | None:
    paths = sorted(path for path in _FOLDER.glob(f"{name}.*") if path.suffix in (".so", ".dylib", ".pyd"))
    if not paths:
        return f"not built: there is no {name} beside {_FOLDER.name}; {_INSTALL if name == '_C' else _INSTALL_CUDA}"
    try:
        torch.ops.load_library(paths[0])
    except Exception as error:
        built = ", ".join(f"{key} {value}" for key, value in build_info().items() if isinstance(value, str))
        return (
            f"{paths[0].name} does not load: {str(error).strip()}; it was built with [{built or 'unknown'}], this is "
            f"torch {torch.__version__}; build it again: {_INSTALL if name == '_C' else _INSTALL_CUDA}"
        )
    return None


def _raw(operand: Tensor):
    """The raw operations, with the library for this operand loaded."""
    if reason := available(operand.device.type):
        raise RuntimeError(f"the native backend cannot run: {reason}")
    return torch.ops.smt_native


def block_gather(weight_NK: Tensor, layout: BlockLayout) -> Tensor:
    return _raw(weight_NK).block_gather(weight_NK, layout.blocks, *layout.grid.block_shape)


def why_not_block_gather(weight_NK: Tensor, layout: BlockLayout) -> str | None:
    return _why_not(weight_NK) or _why_not_weight(weight_NK)


def block_scatter_(weight_NK: Tensor, blocks_Brc: Tensor, layout: BlockLayout) -> Tensor:
    _raw(weight_NK).block_scatter_(weight_NK, blocks_Brc, layout.blocks)
    _written(weight_NK)
    return weight_NK


def why_not_block_scatter_(weight_NK: Tensor, blocks_Brc: Tensor, layout: BlockLayout) -> str | None:
    return _why_not(weight_NK, blocks_Brc) or _why_not_weight(weight_NK)


def block_grad(
    dy_TN: Tensor, x_TK: Tensor, layout: BlockLayout, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    wide = accumulate_dtype(dy_TN, x_TK)
    if is_whole(layout.grid):
        # One GEMM of PyTorch's own takes 0.4 to 1.0 of the time of the blocks' kernel (2026-11).
        return deliver(whole_grad(dy_TN, x_TK, layout, wide), out, accumulate)
    if out is None:
        out = torch.empty((len(layout), *layout.grid.block_shape), dtype=wide)
        _raw(dy_TN).block_grad_(out, dy_TN, x_TK, layout.blocks, False)
        return out
    _raw(dy_TN).block_grad_(out, dy_TN, x_TK, layout.blocks, accumulate)
    _written(out)
    return out


def why_not_block_grad(
    dy_TN: Tensor, x_TK: Tensor, layout: BlockLayout, out: Tensor | None = None, accumulate: bool = False
) -> str | None:
    if dy_TN.device.type == "cuda":
        return "native block_grad serves CPU tensors only"
    return _why_not(dy_TN, x_TK)


def swap_linear(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, delta_Brc: Tensor, layout: BlockLayout
) -> Tensor:
    return _raw(weight_NK).swap_linear(x_TK, weight_NK, bias_N, delta_Brc, layout.blocks)


def why_not_swap_linear(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, delta_Brc: Tensor, layout: BlockLayout
) -> str | None:
    operands = (x_TK, weight_NK, delta_Brc) if bias_N is None else (x_TK, weight_NK, delta_Brc, bias_N)
    return _why_not(*operands) or _why_not_weight(weight_NK) or _why_not_gemm(x_TK, weight_NK, bias_N)


def swap_matmul(dy_TN: Tensor, weight_NK: Tensor, delta_Brc: Tensor, layout: BlockLayout) -> Tensor:
    return _raw(weight_NK).swap_matmul(dy_TN, weight_NK, delta_Brc, layout.blocks)


def why_not_swap_matmul(dy_TN: Tensor, weight_NK: Tensor, delta_Brc: Tensor, layout: BlockLayout) -> str | None:
    return _why_not(dy_TN, weight_NK, delta_Brc) or _why_not_weight(weight_NK) or _why_not_gemm(dy_TN, weight_NK, None)


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
    check_hyper_parameters(lr, beta1, beta2, eps, weight_decay)
    if not params:
        return
    lists = (params, grads, exp_avgs, exp_avg_sqs, avg_scales, sq_scales, steps)
    codes = (None, None)
    if any(exp_avg.dtype == torch.uint8 for exp_avg in exp_avgs):
        codes = _codes(params[0].device)
    numbers = (lr, beta1, beta2, eps, weight_decay, seed)
    if params[0].is_cuda:
        lists = (*lists[:-1], [by_block(step, lr, beta1, beta2) if step.ndim == 1 else step for step in steps])
    try:
        _raw(params[0]).block_adamw_(*map(list, lists), coefficient, skip, *codes, *numbers)
    except RuntimeError:
        # Refused with nothing written; the reference's checks say the same of the same operands as a ValueError.
        check_tensors(*lists[:-1], steps, coefficient=coefficient, skip=skip)
        raise
    _written(*params, *exp_avgs, *exp_avg_sqs, *avg_scales, *sq_scales)


def by_block(steps: Tensor, lr: float, beta1: float, beta2: float) -> Tensor:
    """What hangs on the steps of blocks `(num_blocks,)`: `lr / (1 - beta1^step)` and `1 / sqrt(1 - beta2^step)`, fp32
    `(num_blocks, 2)`. The CUDA kernel takes it ready made."""
    steps = steps.double()
    return torch.stack((lr / (1 - beta1**steps), (1 - beta2**steps).rsqrt()), dim=1).float()


def why_not_block_adamw_(params: Sequence[Tensor], grads: Sequence[Tensor], *_: object) -> str | None:
    if not params:
        return None
    device_type = params[0].device.type
    if device_type == "cuda" and any(tensor.dtype == torch.float64 for tensor in (*params, *grads)):
        return "native block_adamw_ computes in float32 on CUDA, not in float64"
    return available(device_type)


def _why_not(*operands: Tensor) -> str | None:
    device = operands[0].device
    if reason := available(device.type):
        return reason
    for operand in operands:
        if operand.device != device:
            return f"operands are on {device} and {operand.device}"
        if operand.dtype not in FLOATS:
            return f"an operand is {operand.dtype}, not a float of 16 to 64 bits"
    return None


def _why_not_weight(weight_NK: Tensor) -> str | None:
    if weight_NK.is_contiguous() or weight_NK.t().is_contiguous():
        return None
    return f"the weight has strides {weight_NK.stride()}: neither contiguous nor the transpose of a contiguous matrix"


def _why_not_gemm(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> str | None:
    for operand in (x,) if bias_N is None else (x, bias_N):
        if operand.dtype != weight_NK.dtype:
            return f"an operand is {operand.dtype} but the weight is {weight_NK.dtype}"
    return None


@cache
def _codes(device: torch.device) -> tuple[Tensor, Tensor]:
    return dynamic_code(True).to(device), dynamic_code(False).to(device)


def _written(*tensors: Tensor) -> None:
    """Tells autograd of writes that it did not see, so that a backward that needs the old values objects."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])
