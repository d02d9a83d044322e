"""The operations as `torch.library` ops of the namespace `smt_peft`: what compilers, tracers and exporters see.

Each takes the block index as a plain tensor and the block shape as integers, and has a fake implementation that gives
the shape and dtype of its result. Eager code calls `operations` and never comes through here.

`swap_linear` and `swap_matmul` are declared to change nothing: the weight is as it was when they return. That is true
for every reader on the same stream, which is why no compiler may move a read of the weight into them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..blocks import BlockGrid, BlockLayout
from . import operations

_library = torch.library.Library("smt_peft", "DEF")
# Layouts by index tensor, so that derived index tensors are computed once, as in eager code.
_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _layout(blocks: Tensor, shape: tuple[int, int], block_shape: tuple[int, int]) -> BlockLayout:
    known = _layouts.setdefault(blocks, {})
    key = (*shape, *block_shape, 0 if blocks.is_inference() else blocks._version)
    if key not in known:
        known.clear()
        # An alias: the tensor itself would be kept alive by its own entry.
        known[key] = BlockLayout(BlockGrid(*shape, *block_shape), blocks.detach())
    return known[key]


def _op(schema: str, fake: Callable = lambda *operands, **numbers: None) -> Callable:
    """Registers the decorated function as an op on every device; `fake` gives an empty result of the right shape."""
    _library.define(schema)

    def register(function: Callable) -> Callable:
        _library.impl(function.__name__, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"smt_peft::{function.__name__}", fake, lib=_library)
        return function

    return register


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@_op(
    "block_gather(Tensor weight, Tensor blocks, SymInt block_rows, SymInt block_cols) -> Tensor",
    fake=lambda weight, blocks, rows, cols: weight.new_empty(blocks.shape[0], rows, cols),
)
def block_gather(weight, blocks, block_rows, block_cols):
    return operations.block_gather(weight, _layout(blocks, weight.shape, (block_rows, block_cols)))


@_op("block_scatter_(Tensor(a!) weight, Tensor packed, Tensor blocks) -> ()")
def block_scatter_(weight, packed, blocks):
    operations.block_scatter_(weight, packed, _layout(blocks, weight.shape, packed.shape[1:]))


@_op(
    "block_grad(Tensor dy, Tensor x, Tensor blocks, SymInt block_rows, SymInt block_cols) -> Tensor",
    fake=lambda dy, x, blocks, rows, cols: dy.new_empty((blocks.shape[0], rows, cols), dtype=_wide(dy, x)),
)
def block_grad(dy, x, blocks, block_rows, block_cols):
    return operations.block_grad(dy, x, _layout(blocks, (dy.shape[1], x.shape[1]), (block_rows, block_cols)))


@_op("block_grad_(Tensor(a!) grad, Tensor dy, Tensor x, Tensor blocks, bool accumulate) -> ()")
def block_grad_(grad, dy, x, blocks, accumulate):
    layout = _layout(blocks, (dy.shape[1], x.shape[1]), grad.shape[1:])
    operations.block_grad(dy, x, layout, out=grad, accumulate=accumulate)


@_op(
    "block_scores(Tensor[] xs, Tensor[] dys, SymInt block_rows, SymInt block_cols, str statistic) -> Tensor",
    fake=lambda xs, dys, rows, cols, statistic: dys[0].new_empty(
        (-(-dys[0].shape[-1] // rows), -(-xs[0].shape[-1] // cols)), dtype=_wide(xs[0], dys[0])
    ),
)
def block_scores(xs, dys, block_rows, block_cols, statistic):
    grid = BlockGrid(dys[0].shape[-1], xs[0].shape[-1], block_rows, block_cols)
    return operations.block_scores(list(zip(xs, dys, strict=True)), grid, statistic)


@_op("block_matmul_(Tensor(a!) y, Tensor x, Tensor packed, Tensor blocks, bool transposed=False) -> ()")
def block_matmul_(y, x, packed, blocks, transposed=False):
    shape = (x.shape[1], y.shape[1]) if transposed else (y.shape[1], x.shape[1])
    operations.block_matmul_(y, x, packed, _layout(blocks, shape, packed.shape[1:]), transposed)


@_op(
    "swap_linear(Tensor x, Tensor weight, Tensor? bias, Tensor delta, Tensor blocks) -> Tensor",
    fake=lambda x, weight, bias, delta, blocks: x.new_empty(x.shape[0], weight.shape[0]),
)
def swap_linear(x, weight, bias, delta, blocks):
    return operations.swap_linear(x, weight, bias, delta, _layout(blocks, weight.shape, delta.shape[1:]))


@_op(
    "swap_matmul(Tensor dy, Tensor weight, Tensor delta, Tensor blocks) -> Tensor",
    fake=lambda dy, weight, delta, blocks: dy.new_empty(dy.shape[0], weight.shape[1]),
)
def swap_matmul(dy, weight, delta, blocks):
    return operations.swap_matmul(dy, weight, delta, _layout(blocks, weight.shape, delta.shape[1:]))


@_op(
    "block_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] avg_scales, Tensor(e!)[] sq_scales, Tensor[] steps, Tensor? coefficient, Tensor? skip, *, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, int seed) -> ()"
)
def block_adamw_(params, grads, exp_avgs, exp_avg_sqs, avg_scales, sq_scales, steps, coefficient, skip, **numbers):
    lists = (params, grads, exp_avgs, exp_avg_sqs, avg_scales, sq_scales, steps)
    operations.block_adamw_(*lists, coefficient=coefficient, skip=skip, **numbers)
