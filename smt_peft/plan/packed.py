"""A base in 4 or 8 bits, on the meta device: the library that packs it needs values, its memory does not.

bitsandbytes dequantises a 4-bit weight for each pass, forward and backward, and frees it; of an 8-bit one it keeps the
codes and the scales, and dequantises it where blocks are trained in it or its input has a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..tuner.linear import Linear


@dataclass(frozen=True)
class Packing:
    """How the weights are packed.

    Args:
        name: `"nf4"`, `"fp4"` or `"int8"`.
        bits: of a weight.
        double: whether the scales of a 4-bit weight are in 8 bits themselves.
    """

    name: str
    bits: int
    double: bool = False

    def bytes(self, rows: int, cols: int) -> int:
        """Codes and scales: one fp32 for 64 weights of 4 bits, or for a row of 8 bits.

        With scales in 8 bits, an fp32 for 256 of them besides, their mean, and the two codes of 16 and 256 values.
        """
        if self.bits == 8:
            return rows * cols + 4 * rows
        scales = math.ceil(rows * cols / 64)
        scales_bytes = scales + 4 * math.ceil(scales / 256) + 4 + 4 * 256 if self.double else 4 * scales
        return math.ceil(rows * cols / 2) + scales_bytes + 4 * 16


class PackedLinear(nn.Linear):
    """Stands in for a packed layer. Its weight is a shape without memory.

    Args:
        linear: what it replaces, on the meta device.
        packing: how it would be packed.
    """

    def __init__(self, linear: nn.Linear, packing: Packing):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.packing = linear.bias, packing
        # One element, shown as many: its storage is as good as none.
        shape = (self.out_features, self.in_features)
        self.weight = nn.Parameter(linear.weight.new_empty(1).expand(shape), requires_grad=False)

    def dequantise(self) -> Tensor:
        """The weight as SMT reads it for one pass, see `bases.formats`; of 8 bits in fp32."""
        if self.packing.bits == 8:
            # bitsandbytes 0.50 multiplies by the scales and then by a constant: two of them for a moment.
            return self.weight.new_empty(self.out_features, self.in_features, dtype=torch.float32) * 1.0
        return self.weight.new_empty(self.out_features, self.in_features)

    def floats(self, dtype: torch.dtype) -> Tensor:
        """The weight as the library itself reads it for one pass."""
        return self.weight.new_empty(self.out_features, self.in_features, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.bias, self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        if layer.packing.bits == 8 and ctx.needs_input_grad[0]:
            # As bitsandbytes 0.50 does, past `save_for_backward`: a checkpoint does not drop it.
            ctx.input = x
        return F.linear(x, layer.floats(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        return dy @ ctx.layer.floats(dy.dtype) if ctx.needs_input_grad[0] else None, None, None


def pack(model: nn.Module, packing: Packing) -> nn.Module:
    """The model, on the meta device, with its linear layers packed, but for the one that makes the logits."""
    kept = {id(module) for module in (model.get_output_embeddings(),) if module is not None}
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is nn.Linear and id(child) not in kept:
                setattr(owner, name, PackedLinear(child, packing))
    return model.requires_grad_(False)


def stored_bytes(module: nn.Module) -> int:
    """Of the weights of a module and of all below it, packed ones as they are packed."""
    packed = [layer for layer in module.modules() if isinstance(layer, PackedLinear)]
    shapes = {id(layer.weight) for layer in packed}
    plain = sum(p.untyped_storage().nbytes() for p in module.parameters() if id(p) not in shapes)
    return plain + sum(layer.packing.bytes(layer.out_features, layer.in_features) for layer in packed)


def overlay(model: nn.Module) -> None:
    """Let the SMT layers over packed ones compute as they would: the blocks in the dequantised temporary."""
    for layer in model.modules():
        if isinstance(layer, Linear) and isinstance(layer.get_base_layer(), PackedLinear):
            layer.forward = _Overlay(layer)


class _Overlay:
    def __init__(self, layer: Linear):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        base, blocks = self.layer.get_base_layer(), self.layer.smt_blocks[self.layer.active_adapters[0]]
        y = ops.block_overlay(x, base.dequantise, base.bias, blocks.weight, blocks.layout(), blocks.int8)
        return self.layer.add_low_rank(y, x, self.layer.active_adapters)
