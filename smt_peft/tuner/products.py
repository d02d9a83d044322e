"""Products with one bare parameter and its blocks, expert by expert, during one call of its module.

Shape suffixes: E experts, T rows, B blocks of r rows and c columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import ops
from ..bases.stand_in import StandIn
from ..blocks import BlockGrid, BlockLayout
from ..say import once
from .delta import SMTBlocks


class BlockProducts:
    """`X (W + delta)^T` for one parameter, expert by expert, during one call of its module."""

    def __init__(self, name: str, weight: nn.Parameter, blocks: list[SMTBlocks], swap: bool):
        self.name, self.weight, self.blocks, self.swap = name, weight, blocks, swap
        self._int8 = any(each.int8 for each in blocks)
        self._open, self._reached, self._unrecorded = False, False, False
        self._dense: dict[bool, Tensor] = {}

    def stand_in(self) -> StandIn:
        experts = self.weight.shape[0] if self.weight.ndim == 3 else 1
        self._recording = torch.is_grad_enabled() and any(blocks.weight.requires_grad for blocks in self.blocks)
        self._split = [_by_expert(blocks.layout(), experts) for blocks in self.blocks]
        self._deltas: list[tuple[Tensor, ...]] = []
        self._open = True
        return StandIn(self)

    def close(self, y: Any) -> Any:
        """End of the call, whose result is returned.

        Raises:
            RuntimeError: blocks that train were used where no gradient is recorded.
        """
        self._open = False
        self._dense.clear()
        if self._unrecorded:
            raise RuntimeError(
                f"{self.name}: the module computes with the weight where no gradient is recorded, so its blocks would "
                "silently stay frozen; use experts_implementation='eager', 'batched_mm' or 'grouped_mm'"
            )
        if self._recording and not self._reached and isinstance(y, Tensor):
            # No expert with blocks saw a row. Without a gradient DDP would wait for one.
            y = _Unreached.apply(y, *(blocks.weight for blocks in self.blocks))
        return y

    def _used(self) -> None:
        if not self._open:
            raise RuntimeError(f"{self.name}: the weight is used after the call of its module, where its blocks end")
        self._unrecorded |= self._recording and not torch.is_grad_enabled()

    def product(self, x: Tensor, expert: int | None, flipped: bool, bias: Tensor | None) -> Tensor:
        self._used()
        weight = self.weight if expert is None else self.weight[expert]
        weight_NK = weight.t() if flipped else weight
        parts = self._parts(expert or 0, flipped)
        self._reached |= bool(parts)
        if not parts or self.weight.requires_grad:
            y = F.linear(x, weight_NK, bias)
            for delta_Brc, layout in parts:
                y = ops.block_add(y, x, delta_Brc, layout, self._int8)
            return y
        (delta_Brc, layout), *others = parts
        trained = bias is not None and bias.requires_grad
        y = ops.block_linear(x, weight_NK, None if trained else bias, delta_Brc, layout, self.swap, self._int8)
        for delta_Brc, layout in others:
            y = ops.block_add(y, x, delta_Brc, layout, self._int8)
        return y + bias if trained else y

    def _parts(self, expert: int, flipped: bool) -> list[tuple[Tensor, BlockLayout]]:
        """The blocks in one expert and their layout, adapter by adapter."""
        if not self._deltas:
            # One split, whose backward writes the gradients of all experts once.
            self._deltas = [
                blocks.weight.split(counts) for blocks, (counts, _) in zip(self.blocks, self._split, strict=True)
            ]
        parts = [
            (deltas[expert], layouts[expert]) for deltas, (_, layouts) in zip(self._deltas, self._split, strict=True)
        ]
        parts = [(delta_Brc, layout) for delta_Brc, layout in parts if layout is not None]
        return [(delta.transpose(1, 2), layout.transposed) for delta, layout in parts] if flipped else parts

    def grouped(self, x_TK: Tensor, counts: list[int], flipped: bool, gemm: Callable) -> Any:
        weight = self.weight
        plain = x_TK.dtype == weight.dtype and not torch.is_autocast_enabled(x_TK.device.type)
        if len(self.blocks) > 1 or weight.requires_grad or not plain or not len(x_TK):
            return NotImplemented
        self._used()
        self._reached = True
        (blocks,), ((held, layouts),) = self.blocks, self._split
        runs, row, block = [], 0, 0
        for rows, number, layout in zip(counts, held, layouts, strict=True):
            if rows and number:
                layout = layout.transposed if flipped else layout
                runs.append(ops.Run(slice(row, row + rows), slice(block, block + number), layout))
            row, block = row + rows, block + number
        layout, swap = blocks.layout(), self.swap
        return ops.grouped_linear(x_TK, weight, blocks.weight, layout, runs, gemm, flipped, swap, blocks.int8)

    def dense(self, operation: str) -> Tensor:
        self._used()
        self._reached = True
        once(
            f"{self.name}: no way is known to compute '{operation}' by blocks, so a dense copy of the weight is made "
            "at every call; experts_implementation='eager', 'batched_mm' or 'grouped_mm' need none"
        )
        recording = torch.is_grad_enabled()
        if recording not in self._dense:
            merged = self.weight
            for blocks in self.blocks:
                merged = _Merged.apply(merged, blocks.weight, blocks.layout())
            self._dense[recording] = merged
        return self._dense[recording]

    def traceable(self) -> Tensor:
        """The merged weight from differentiable operations alone."""
        merged = self.weight
        for blocks in self.blocks:
            delta = ops.dense(blocks.weight, blocks.layout()).view(merged.shape)
            merged = (merged.to(torch.promote_types(merged.dtype, delta.dtype)) + delta).to(merged.dtype)
        return merged


class _Merged(torch.autograd.Function):
    """A copy of the weight with the blocks written in, rounded as merging does; backward reads theirs alone."""

    @staticmethod
    def forward(ctx, weight, delta_Brc, layout):
        ctx.layout, ctx.dtype = layout, delta_Brc.dtype
        merged = weight.clone()
        matrix = merged.view(layout.grid.shape)
        ops.block_scatter_(matrix, ops.add_rounded(ops.block_gather(matrix, layout), delta_Brc), layout)
        return merged

    @staticmethod
    def backward(ctx, grad):
        d_delta = None
        if ctx.needs_input_grad[1]:
            d_delta = ops.block_gather(grad.reshape(ctx.layout.grid.shape), ctx.layout).to(ctx.dtype)
        return grad if ctx.needs_input_grad[0] else None, d_delta, None


class _Unreached(torch.autograd.Function):
    """The identity on a result that does not depend on these blocks; their gradient is zero."""

    @staticmethod
    def forward(ctx, y, *deltas):
        ctx.deltas = [(delta.shape, delta.dtype) for delta in deltas]
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        return grad, *(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.deltas)


# Derived from a layout, and gone with it.
_split: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _by_expert(layout: BlockLayout, experts: int) -> tuple[list[int], list[BlockLayout | None]]:
    """How many blocks lie in each expert, and their layout within it, None where there are none."""
    found = _split.get(layout)
    if found is None:
        with torch.inference_mode(False):
            found = _split[layout] = _split_layout(layout, experts)
    return found


def sketch(layout: BlockLayout, experts: int) -> BlockLayout:
    """`layout.sketch()` for a parameter of that many experts, which its products can be split by."""
    sketched = layout.sketch()
    counts, layouts = _split_layout(layout, experts)
    _split[sketched] = counts, [each and each.sketch() for each in layouts]
    return sketched


def _split_layout(layout: BlockLayout, experts: int) -> tuple[list[int], list[BlockLayout | None]]:
    whole = layout.grid
    grid = BlockGrid(whole.rows // experts, whole.cols, *whole.block_shape)
    counts = torch.bincount(layout.block_rows // grid.row_stripes, minlength=experts).tolist()
    layouts = []
    for expert, blocks in enumerate(layout.blocks.split(counts)):
        first = torch.tensor([expert * grid.row_stripes, 0], dtype=torch.int32, device=blocks.device)
        layouts.append(BlockLayout(grid, blocks - first) if len(blocks) else None)
    return counts, layouts
