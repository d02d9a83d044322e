"""Experiments on the operations made of products: `block_grad`, `block_scores`, `block_matmul_`, the swap.

Shape suffixes: T tokens, N out_features, K in_features, B blocks of r rows and c columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..blocks import BlockGrid, BlockLayout
from .backends import ours
from .cases import Size, selections, touched
from .measure import Experiment, Route

# Tokens of a sequence, which the loop of the released code multiplies one by one.
SEQUENCE = 512
# Shared memory that one program can have on an H100 or H200; other GPUs have less.
SHARED_BYTES = 232448


def block_grad(size: Size, device: torch.device) -> Iterator[Experiment]:
    for case, tokens, layout in selections(size, device):
        dy_TN, x_TK = _operands(tokens, layout.grid, device)
        rows, cols = touched(layout)
        pick = partial(slices, layout=layout)
        routes = {
            **ours("block_grad", lambda dy, x, lay=layout: ops.block_grad(dy, x, lay), dy_TN, x_TK, layout),
            "dense mm": Route(lambda dy, x: dy.t() @ x, read=pick, flops=2 * tokens * layout.grid.numel),
            "dense mm + gather": Route(lambda dy, x, lay=layout: ops.block_gather(dy.t() @ x, lay)),
            "loop as released": Route(partial(_loop_as_released, index=layout.blocks.tolist(), layout=layout)),
            "addmm per block": Route(partial(_addmm_per_block, index=layout.blocks.tolist(), layout=layout)),
            "sampled_addmm (BSR)": _sampled(torch.sparse.sampled_addmm, layout, dy_TN.dtype),
            "sampled_addmm (BSR, Triton)": _sampled(_triton_sampled_addmm(layout), layout, dy_TN.dtype),
            "gather + grouped_mm": _grouped(layout),
        }
        yield Experiment(
            "block_grad",
            case,
            (dy_TN, x_TK),
            truth=lambda dy, x, pick=pick: pick(dy.double().t() @ x.double()),
            plain=lambda dy, x, pick=pick: pick(dy.t() @ x),
            routes=routes,
            baseline="dense mm",
            bytes=tokens * (rows + cols) * dy_TN.element_size() + 4 * layout.effective_numel,
            flops=2 * tokens * layout.effective_numel,
        )


def block_scores(size: Size, device: torch.device) -> Iterator[Experiment]:
    for tokens, grid in dict.fromkeys((n, layout.grid) for _, n, layout in _first_of_each_matrix(size, device)):
        dy_TN, x_TK = _operands(tokens, grid, device)
        for statistic in ("sum", "abs"):
            call = partial(_scores, grid=grid, statistic=statistic)
            reduced = {"sum": lambda grad: grad, "abs": torch.abs}[statistic]
            sums = lambda grad, reduced=reduced, grid=grid: ops.block_sums(reduced(grad), grid)  # noqa: E731
            flops = 2 * tokens * grid.numel
            yield Experiment(
                "block_scores",
                f"{grid.rows} x {grid.cols}, {tokens} tokens, blocks of {grid.block_rows}, {statistic}",
                (dy_TN, x_TK),
                truth=lambda dy, x, sums=sums: sums(dy.double().t() @ x.double()),
                plain=lambda dy, x, sums=sums: sums(dy.t() @ x),
                routes={
                    **ours("block_scores", call, [(x_TK, dy_TN)], grid),
                    "dense mm": Route(lambda dy, x: dy.t() @ x, read=sums, flops=flops),
                },
                baseline="dense mm",
                bytes=dy_TN.nbytes + x_TK.nbytes + 4 * grid.num_blocks,
                # The signed sum needs no product of the matrices: 2 T (R + C) sums and a product of those.
                flops=flops if statistic == "abs" else 2 * tokens * grid.num_blocks,
            )


def block_matmul_(size: Size, device: torch.device) -> Iterator[Experiment]:
    for case, tokens, layout in _first_of_each_matrix(size, device):
        y_TN, x_TK = _operands(tokens, layout.grid, device)
        delta_Brc = _delta(layout, device)
        dense_NK = ops.dense(delta_Brc, layout).to(x_TK.dtype)
        rows, cols = touched(layout)
        yield Experiment(
            "block_matmul_",
            case,
            (y_TN, x_TK, delta_Brc, dense_NK),
            truth=lambda y, x, delta, _, lay=layout: y.double() + x.double() @ ops.dense(delta.double(), lay).t(),
            plain=lambda y, x, _, dense: y.addmm(x, dense.t()),
            routes={
                **ours(
                    "block_matmul_",
                    lambda y, x, delta, _, lay=layout: ops.block_matmul_(y, x, delta, lay),
                    *(y_TN, x_TK, delta_Brc, layout),
                ),
                "dense mm": Route(lambda y, x, _, dense: y.addmm_(x, dense.t()), flops=2 * tokens * layout.grid.numel),
            },
            baseline="dense mm",
            bytes=tokens * (2 * rows + cols) * x_TK.element_size() + delta_Brc.nbytes,
            flops=2 * tokens * layout.effective_numel,
        )


def swap(size: Size, device: torch.device) -> Iterator[Experiment]:
    """`swap_linear` and `swap_matmul` against the same two GEMMs with a weight that was merged before."""
    for case, tokens, layout in _first_of_each_matrix(size, device):
        dy_TN, x_TK = _operands(tokens, layout.grid, device)
        delta_Brc = _delta(layout, device)
        weight_NK = torch.randn(layout.grid.shape, device=device).to(x_TK.dtype) / layout.grid.cols**0.5
        merged_NK = weight_NK.clone()
        ops.block_scatter_(merged_NK, ops.add_rounded(ops.block_gather(weight_NK, layout), delta_Brc), layout)
        numel = layout.grid.numel
        yield Experiment(
            "swap_linear",
            f"{case}, with swap_matmul",
            (x_TK, dy_TN, weight_NK, merged_NK, delta_Brc),
            truth=lambda x, dy, _, merged, delta: _gemms(x.double(), dy.double(), merged.double()),
            plain=lambda x, dy, _, merged, delta: _gemms(x, dy, merged),
            routes={
                **ours(
                    "swap_linear",
                    partial(_swapped_gemms, layout=layout),
                    *(x_TK, weight_NK, None, delta_Brc, layout),
                    also=("swap_matmul",),
                ),
                "F.linear + mm": Route(lambda x, dy, _, merged, delta: _gemms(x, dy, merged)),
            },
            baseline="F.linear + mm",
            bytes=2 * (x_TK.nbytes + dy_TN.nbytes + weight_NK.nbytes) + 4 * delta_Brc.nbytes,
            flops=4 * tokens * numel,
        )


def slices(matrix_NK: Tensor, layout: BlockLayout) -> Tensor:
    """The chosen blocks of a matrix, one slice at a time, padded with zeros: `(B, r, c)`."""
    rows, cols = layout.grid.block_shape
    blocks = matrix_NK.new_zeros(len(layout), rows, cols)
    for block, (row, col) in zip(blocks, layout.blocks.tolist(), strict=True):
        part = matrix_NK[row * rows : (row + 1) * rows, col * cols : (col + 1) * cols]
        block[: part.shape[0], : part.shape[1]] = part
    return blocks


def _loop_as_released(dy_TN: Tensor, x_TK: Tensor, index: list[list[int]], layout: BlockLayout) -> Tensor:
    """What the released SMT code does in the backward pass, block by block.

    Per block: a slice of dY and of X of every sequence, a batched product, the sum over the batch, a store in a slice.
    """
    rows, cols = layout.grid.block_shape
    length = min(SEQUENCE, len(x_TK))
    dy_SNL, x_SLK = dy_TN.view(-1, length, dy_TN.shape[1]).transpose(1, 2), x_TK.view(-1, length, x_TK.shape[1])
    grad = dy_TN.new_empty(len(index), rows, cols)
    for number, (row, col) in enumerate(index):
        dy_SrL = dy_SNL[:, row * rows : (row + 1) * rows]
        x_SLc = x_SLK[:, :, col * cols : (col + 1) * cols]
        grad[number] = torch.matmul(dy_SrL, x_SLc).sum(0)
    return grad


def _addmm_per_block(dy_TN: Tensor, x_TK: Tensor, index: list[list[int]], layout: BlockLayout) -> Tensor:
    """One GEMM per block on views, written to its place in fp32."""
    rows, cols = layout.grid.block_shape
    grad = torch.empty(len(index), rows, cols, device=x_TK.device)
    wide = {} if x_TK.dtype == torch.float32 else {"out_dtype": torch.float32}
    for out, (row, col) in zip(grad, index, strict=True):
        dy_Tr, x_Tc = dy_TN[:, row * rows : (row + 1) * rows], x_TK[:, col * cols : (col + 1) * cols]
        torch.addmm(out, dy_Tr.t(), x_Tc, **wide, beta=0, out=out)
    return grad


def _sampled(function: Callable | str, layout: BlockLayout, dtype: torch.dtype) -> Route | str:
    """A sampled product of PyTorch's for a block-sparse (BSR) pattern."""
    if layout.blocks.device.type == "cpu":
        return "PyTorch's sampled product takes a block-sparse (BSR) pattern on CUDA only"
    if isinstance(function, str):
        return function
    if layout.grid.is_ragged:
        return "a BSR tensor has no ragged blocks"
    counts = torch.bincount(layout.block_rows, minlength=layout.grid.row_stripes)
    pattern = torch.sparse_bsr_tensor(
        F.pad(counts.cumsum(0), (1, 0)),
        layout.block_cols,
        torch.zeros(len(layout), *layout.grid.block_shape, dtype=dtype, device=layout.blocks.device),
        size=layout.grid.shape,
        check_invariants=True,
    )
    return Route(lambda dy, x: function(pattern, dy.t(), x, beta=0.0), read=lambda result: result.values())


def _triton_sampled_addmm(layout: BlockLayout) -> Callable | str:
    rows, cols = layout.grid.block_shape
    # Compiled in vain, it would take a minute to say so.
    if (needed := 2 * (rows + cols) * max(rows, cols)) > SHARED_BYTES:
        return f"its tile is the whole block, which needs {needed:,} of {SHARED_BYTES:,} bytes of shared memory"
    try:
        from torch.sparse._triton_ops import sampled_addmm
    except ImportError as error:
        return f"this PyTorch has no such kernel ({error})"
    return sampled_addmm or "PyTorch finds no Triton for this kernel"


def _grouped(layout: BlockLayout) -> Route | str:
    grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped_mm is None:
        return "this PyTorch has no grouped_mm"
    if layout.grid.is_ragged:
        return "blocks of one size only; the ragged ones would have to be padded first"

    def run(dy_TN: Tensor, x_TK: Tensor) -> Tensor:
        rows, cols = layout.grid.block_shape
        dy_BrT = dy_TN.unflatten(1, (-1, rows)).index_select(1, layout.block_rows).permute(1, 2, 0)
        x_BTc = x_TK.unflatten(1, (-1, cols)).index_select(1, layout.block_cols).permute(1, 0, 2)
        return grouped_mm(dy_BrT, x_BTc)

    return Route(run)


def _scores(dy_TN: Tensor, x_TK: Tensor, grid: BlockGrid, statistic: str) -> Tensor:
    return ops.block_scores([(x_TK, dy_TN)], grid, statistic)


def _gemms(x_TK: Tensor, dy_TN: Tensor, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x_TK, weight_NK), dy_TN @ weight_NK


def _swapped_gemms(x_TK, dy_TN, weight_NK, merged_NK, delta_Brc, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    y_TN = ops.swap_linear(x_TK, weight_NK, None, delta_Brc, layout)
    return y_TN, ops.swap_matmul(dy_TN, weight_NK, delta_Brc, layout)


def _first_of_each_matrix(size: Size, device: torch.device) -> Iterator[tuple[str, int, BlockLayout]]:
    """Of every matrix with its first number of tokens, the first matched and the first clustered selection."""
    for shape, tokens in size.matrices:
        one = Size(((shape, tokens[:1]),), size.matched[-1:], size.clustered[-1:], (), size.count_side)
        yield from selections(one, device)


def _operands(tokens: int, grid: BlockGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """dY `(T, N)` and X `(T, K)`: normal numbers, fp32 on a CPU and bf16 elsewhere."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(1)
    return tuple(torch.randn(tokens, side, device=device, generator=generator).to(dtype) for side in grid.shape)


def _delta(layout: BlockLayout, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(2)
    delta = 0.01 * torch.randn(len(layout), *layout.grid.block_shape, device=device, generator=generator)
    return delta * layout.padding_mask() if layout.grid.is_ragged else delta
