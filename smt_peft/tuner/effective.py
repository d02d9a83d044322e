"""The effective update: how many of the trained entries really hold another value once they are stored.

A delta of an adapter is fp32, the weight it is for often bf16, which has 8 significant bits: base + delta, rounded as
merging and the `swap` forward round it, is the base again wherever the delta is below half a step of the base's value.
Where that is most entries, the learning rate is too low for the dtype, and the loss alone does not tell.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..bases.sharded import full, is_dtensor, present, why_absent
from .layer import SMTLayer


@dataclass(frozen=True)
class Effective:
    """The entries of the blocks of one module; padding is not among them. A low-rank pair trains every entry.

    Args:
        dtype: in which the base has them, `"bfloat16"`; of a packed base, that of the dequantised values.
        entries: how many there are.
        moved: how many have a delta other than zero, as the adapter keeps it.
        changed: how many differ from the base once base + delta is rounded to `dtype`.
    """

    dtype: str
    entries: int
    moved: int
    changed: int


@torch.no_grad()
def effective_update(model: nn.Module, adapter: str = "default") -> dict[str, Effective]:
    """Count, per module name, the entries of an adapter that changed since the adapter was put on the base.

    Reads the blocks of the base once and writes nothing. Of a sharded model every process must call it: one module's
    weight is gathered at a time.

    Raises:
        ValueError: the weights cannot be read where they are, as under FSDP1; names the module.
    """
    return {
        layer.smt_name: _count(layer, adapter)
        for layer in model.modules()
        if isinstance(layer, SMTLayer) and adapter in layer.smt_blocks
    }


def _count(layer: SMTLayer, adapter: str) -> Effective:
    pair = layer.pair(adapter)
    here = nullcontext() if pair is None else present(pair)
    with present(layer.get_base_layer()), present(layer.smt_blocks[adapter]), here:
        weight = _readable_weight(layer)
        layout, delta = layer.change(adapter)
        before = ops.block_gather(weight, layout)
        after = ops.add_rounded(before, delta)
        # Padding is zero in all of them.
        both = torch.stack((torch.count_nonzero(delta), torch.count_nonzero(before != after)))
    dtype = str(before.dtype).removeprefix("torch.")
    return Effective(dtype, layout.effective_numel, *both.tolist())


@torch.no_grad()
def covered_weights(layer: SMTLayer, adapter: str) -> Tensor:
    """The weights of the base that an adapter's blocks stand on, `(num_blocks, rows, cols)`; padding is zero.

    Raises:
        ValueError: they cannot be read where they are; names the module.
    """
    blocks = layer.smt_blocks[adapter]
    with present(layer.get_base_layer()), present(blocks):
        try:
            return ops.block_gather(_readable_weight(layer), blocks.layout())
        except ValueError as error:
            raise ValueError(f"{layer.smt_name}: the weights under its blocks cannot be read: {error}") from error


def _readable_weight(layer: SMTLayer) -> Tensor:
    stored = layer.stored_weight()
    if is_dtensor(stored):
        return full(layer.weight_view())
    if reason := why_absent(stored):
        raise ValueError(f"{layer.smt_name}: the weight is {reason}, so what changed in it cannot be counted here")
    return layer.readable_weight()
