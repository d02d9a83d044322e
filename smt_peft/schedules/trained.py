"""The blocks of a model that train, module by module, and which layer each belongs to."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..tuner.delta import SMTBlocks
from ..tuner.layer import SMTLayer


def trained_blocks(model: nn.Module) -> dict[str, SMTBlocks]:
    """The blocks that train, by the name of their module in the base model, in the model's order.

    Raises:
        ValueError: there are none.
    """
    found = {
        layer.smt_name: blocks
        for layer in model.modules()
        if isinstance(layer, SMTLayer)
        for blocks in layer.smt_blocks.values()
        if blocks.weight.requires_grad
    }
    if not found:
        raise ValueError(
            "the model has no SMT adapter that trains, so there is nothing to schedule; make one with "
            "get_peft_model(model, SMTConfig(...))"
        )
    return found


def by_layer(blocks: Mapping[str, SMTBlocks]) -> dict[str, list[str]]:
    """The modules of each layer: those with the same path up to its first number, `model.layers.3`.

    Modules without a number, as embeddings, belong to no layer and are left out.
    """
    layers: dict[str, list[str]] = {}
    for name in blocks:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            layers.setdefault(".".join(parts[: number + 1]), []).append(name)
    return layers


def train_only(blocks: Mapping[str, SMTBlocks], names: set[str]) -> None:
    """Let the blocks of these modules train and no others: those get no gradient, and save nothing for one."""
    for name, module in blocks.items():
        module.weight.requires_grad_(name in names)
        if name not in names:
            module.weight.grad = None
