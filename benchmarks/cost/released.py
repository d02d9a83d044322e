"""The layer of the SMT paper's released code, written anew from a description of what it does, as a baseline.

He et al. (ICLR 2025, arXiv 2405.15525) released a layer that costs more than the method must. What is re-expressed:

- A block is trained as absolute values, in the weight's dtype, and copied into the weight at every forward, one copy
  per block in a Python loop; so the weight, once it has been trained, is no longer the base model's.
- Each block keeps a slice of the input for backward. A slice is a view, so the whole input stays. It is kept on the
  context, where the hooks of activation checkpointing do not see it.
- Backward makes each block's gradient by one product per sequence, summed over the sequences afterwards.
- The gradient of the input is always made, asked for or not.

Two gaps are closed here, so that more can be compared: a bias is added, and an input without a batch dimension is one
sequence. Blocks must tile the weight; the released ones are 256 x 256, here they are those of a selection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smt_peft import BlockSelection
from smt_peft.blocks import BlockLayout


class ReleasedLinear(nn.Module):
    """A linear layer that trains the blocks of a layout.

    Args:
        base: frozen here; its weight is written at every call.
        layout: blocks of the weight.

    Attributes:
        blocks: absolute values, `(B * r, c)`, one block below the other.

    Raises:
        ValueError: the weight is no multiple of the blocks.
    """

    def __init__(self, base: nn.Linear, layout: BlockLayout):
        super().__init__()
        if layout.grid.is_ragged:
            raise ValueError(f"the released layer needs blocks that tile the weight, got {layout.grid}")
        self.base = base.requires_grad_(False)
        height, width = layout.grid.block_shape
        self.places = [
            (slice(r * height, (r + 1) * height), slice(c * width, (c + 1) * width)) for r, c in layout.blocks.tolist()
        ]
        self.blocks = nn.Parameter(torch.cat([base.weight.detach()[place] for place in self.places]))

    def forward(self, x: Tensor) -> Tensor:
        height = len(self.blocks) // len(self.places)
        for i, place in enumerate(self.places):
            self.base.weight.data[place] = self.blocks.data[i * height : (i + 1) * height]
        return _Released.apply(x, self.base.weight, self.base.bias, self.blocks, self.places)


class _Released(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_NK, bias_N, blocks, places):
        ctx.slices = [x[..., columns] for _, columns in places]
        ctx.places, ctx.block_shape = places, (len(blocks) // len(places), blocks.shape[1])
        ctx.save_for_backward(weight_NK)
        return nn.functional.linear(x, weight_NK, bias_N)

    @staticmethod
    def backward(ctx, dy):
        (weight_NK,) = ctx.saved_tensors
        height, width = ctx.block_shape
        grad = weight_NK.new_empty(len(ctx.places) * height, width)
        for i, ((rows, _), x) in enumerate(zip(ctx.places, ctx.slices, strict=True)):
            dy_rows = dy[..., rows]
            if dy_rows.ndim == 2:
                dy_rows, x = dy_rows.unsqueeze(0), x.unsqueeze(0)
            grad[i * height : (i + 1) * height] = torch.bmm(dy_rows.transpose(1, 2), x).sum(0)
        return dy @ weight_NK, None, None, grad, None


def put_on(base: nn.Module, selection: BlockSelection) -> nn.Module:
    """Replace the linear layers of a selection by released ones, which train its blocks. Returns `base`."""
    for name in selection.blocks:
        parent, _, child = name.rpartition(".")
        owner = base.get_submodule(parent)
        setattr(owner, child, ReleasedLinear(getattr(owner, child), selection.layout(name)))
    return base


def take_off(base: nn.Module) -> nn.Module:
    """Put the linear layers back; their weights are those that have been trained. Returns `base`."""
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ReleasedLinear):
                setattr(module, name, child.base)
    return base
