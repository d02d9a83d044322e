"""Where blocks hold elements of a weight, for what writes into them without a gradient that is zero elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .delta import SMTBlocks


def padding_masks(model: nn.Module) -> Callable[[Tensor], Tensor | None]:
    """A function of a parameter of the model, for `MeZO`: where it stands for elements of a weight.

    Blocks at the edge of a matrix that they do not tile reach over it. What lies outside is stored as zero and has to
    stay so.

    Args:
        model: with SMT's blocks in it.

    Returns:
        Gives a bool tensor of the parameter's shape, made anew at each call, or None for a parameter without padding.
    """
    ragged = {
        module.weight: module for module in model.modules() if isinstance(module, SMTBlocks) and module.grid.is_ragged
    }

    def mask(param: Tensor) -> Tensor | None:
        blocks = ragged.get(param)
        return None if blocks is None else blocks.layout().padding_mask()

    return mask
