"""The models that are counted: without values, each with one way to train it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ..bases.targets import find_targets
from ..blocks import BlockSelection
from ..config import SMTConfig
from ..selection.datafree import select_without_data
from ..training.compare import lora_config
from ..tuner.experts import ParameterLayer
from ..tuner.layer import SMTLayer
from ..tuner.products import sketch
from .layers import with_like_layers
from .packed import overlay

Build = Callable[[], nn.Module]
PutOn = Callable[[nn.Module, BlockSelection], nn.Module]


def assumed_selection(model: nn.Module, config: SMTConfig) -> BlockSelection:
    """Blocks that lie as chosen ones will, as far as `spread` and `budget` say it: drawn without data.

    What counts is how many columns they touch. Under `spread="assignment"` scores do not change that; with `"free"`
    they may crowd the blocks into fewer, which takes less memory than is told here. Layers that have as many blocks of
    the same matrices have them at the same places.
    """
    return with_like_layers(model, select_without_data(find_targets(model, config), config))


def smt(model: nn.Module, config: SMTConfig, selection: BlockSelection) -> nn.Module:
    """SMT on a model on the meta device, ready to take the forwards that it takes with values."""
    config = config.copy()
    # Avoided when the blocks were chosen; those of like layers, which are put in their place, may lie anywhere.
    config.avoid = None
    # What the blocks were chosen on cannot be compared with weights that are not there.
    config.selection = BlockSelection(
        selection.blocks, selection.grids, provenance=selection.provenance | {"base_fingerprint": None}
    )
    model = get_peft_model(model, config, low_cpu_mem_usage=True)
    for layer in model.modules():
        if isinstance(layer, SMTLayer):
            _sketch(layer, selection)
    overlay(model)
    return model.to("meta").train()


def _sketch(layer: SMTLayer, selection: BlockSelection) -> None:
    layout = selection.layout(layer.smt_name)
    experts = (
        layer.stored_weight().shape[0] if isinstance(layer, ParameterLayer) and layer.stored_weight().ndim == 3 else 1
    )
    for blocks in layer.smt_blocks.values():
        blocks.sketch = sketch(layout, experts) if isinstance(layer, ParameterLayer) else layout.sketch()


def lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    return get_peft_model(model, config, low_cpu_mem_usage=True).to("meta").train()


def full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True).train()


def rivals(
    selection: BlockSelection,
    modules_to_save: list[str] | None = None,
    task_type: str = "CAUSAL_LM",
    lora_rank: int | None = None,
) -> dict[str, PutOn]:
    """What else could train a model, with as many parameters as the selection where that can be.

    Args:
        selection: of the whole model.
        modules_to_save: what is trained besides.
        task_type: of the model, as PEFT calls it.
        lora_rank: of the low-rank pairs beside the blocks.

    Returns:
        By name, functions of a model, which may lack layers, and of what of the selection is left in it.
    """
    rank = lora_config(selection, modules_to_save, task_type, lora_rank).r

    def adapted(model: nn.Module, rest: BlockSelection, dora: bool) -> nn.Module:
        config = lora_config(rest, modules_to_save, task_type)
        config.r, config.lora_alpha, config.use_dora = rank, 2 * rank, dora
        return lora(model, config)

    found: dict[str, PutOn] = {f"LoRA r{rank}": partial(adapted, dora=False)}
    if not selection.provenance.get("experts"):
        # PEFT has no DoRA over the experts of a mixture.
        found[f"DoRA r{rank}"] = partial(adapted, dora=True)
    return found | {"full": lambda model, rest: full(model)}


def empty(build: Build) -> nn.Module:
    """A model on the meta device, frozen, whatever it takes to make it."""
    with torch.device("meta"):
        model = build()
    return model.to("meta").requires_grad_(False).train()
