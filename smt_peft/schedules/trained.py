"""The blocks of a model that train, module by module, and which layer each belongs to."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..tuner.delta import SMTBlocks
from ..tuner.layer import SMTLayer


def trained_blocks(model: nn.Module) -> dict[str, SMTBlocks]:
    """The blocks of the adapter that trains, by the name of their module in the base model, in the model's order.

    Raises:
        ValueError: no adapter trains, or several do, or one of which some blocks are frozen, or lie beside low-rank
            pairs.
    """
    adapters: dict[str, dict[str, SMTBlocks]] = {}
    for layer in model.modules():
        if isinstance(layer, SMTLayer):
            for adapter, blocks in layer.smt_blocks.items():
                adapters.setdefault(adapter, {})[layer.smt_name] = blocks
    trained = {name: found for name, found in adapters.items() if any(b.weight.requires_grad for b in found.values())}
    if not trained:
        raise ValueError(
            "the model has no SMT adapter that trains, so there is nothing to schedule; make one with "
            "get_peft_model(model, SMTConfig(...))"
        )
    if len(trained) > 1:
        raise ValueError(
            f"the SMT adapters {', '.join(trained)} all train, and a schedule is for one; leave one active with "
            "model.set_adapter(name)"
        )
    [(adapter, found)] = trained.items()
    if any(isinstance(layer, SMTLayer) and layer.pair(adapter) is not None for layer in model.modules()):
        raise ValueError(
            f"adapter {adapter!r} has low-rank pairs beside its blocks (lora_rank), which a schedule would leave "
            "training; leave lora_rank out, or the schedule"
        )
    frozen = [name for name, blocks in found.items() if not blocks.weight.requires_grad]
    if frozen:
        raise ValueError(
            f"the blocks of {frozen[0]} ({len(frozen)} of the {len(found)} modules of adapter {adapter!r}) require no "
            "gradient, as after a training that was cut off, and a schedule would leave them so; let them train again "
            f"with model.set_adapter({adapter!r}), or choose other modules for the adapter"
        )
    return found


def by_layer(blocks: Mapping[str, SMTBlocks]) -> dict[str, list[str]]:
    """The modules of each layer: those with the same path up to the number of the layer, `model.layers.3`.

    That is the first number whose path is not the same for all, so that a list around the whole model, as in
    `0.auto_model.layers.3`, is none of layers. Modules without a number, as embeddings, belong to no layer and are left
    out.
    """
    paths = {name: _numbered(name) for name in blocks}
    paths = {name: path for name, path in paths.items() if path}
    depth = min(map(len, paths.values()), default=0)
    first = next((n for n in range(depth) if len({path[n] for path in paths.values()}) > 1), 0)
    layers: dict[str, list[str]] = {}
    for name, path in paths.items():
        layers.setdefault(path[first], []).append(name)
    return layers


def _numbered(name: str) -> list[str]:
    """The paths within a name that end in a number, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]


def train_only(blocks: Mapping[str, SMTBlocks], names: set[str]) -> None:
    """Let the blocks of these modules train and no others: those get no gradient, and save nothing for one."""
    for name, module in blocks.items():
        module.resting = name not in names
        module.weight.requires_grad_(not module.resting)
        if module.resting:
            module.weight.grad = None
