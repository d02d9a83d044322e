"""Hot-swapping: the blocks of a saved adapter loaded in place of those of a loaded one.

`peft.utils.hotswap.hotswap_adapter` refuses every method but LoRA, since it sets LoRA's ranks and scalings; this is its
counterpart of the same name. Tensors are overwritten in place, so linear layers compiled for `torch.no_grad()` are not
compiled anew. Where gradients are recorded, a graph depends on how many columns the blocks touch; that of an embedding
always depends on how many blocks its fullest row stripe holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn

from ..blocks import BlockGrid
from ..config import SMTConfig
from .delta import SMTBlocks
from .layer import SMTLayer
from .low_rank import LowRank
from .plan import check_base

_PREFIX = "base_model.model."


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Put a saved adapter in the place of a loaded one, which keeps its name; the model is checked first and is left as
    it was when anything does not fit.

    The saved adapter may have fewer blocks in a module than the loaded one, or none; what is left over stays at its
    place and becomes zero. It may not have more, or other modules: see `make_room`. The state of an optimizer (moments)
    belongs to the old blocks: make a new optimizer before training on.

    Args:
        model: a `PeftModel` with an SMT adapter `adapter_name`, compiled or not.
        model_name_or_path: directory or repository of the saved adapter.
        adapter_name: name of the adapter to replace.
        torch_device: where the file is read to first; the CPU when not given.
        kwargs: passed on to PEFT's readers (`subfolder`, `revision`, `token`, ...).

    Raises:
        ValueError: either adapter is no SMT adapter or trains more than blocks, the loaded one is merged, or the saved
            one is damaged, belongs to another base, or needs room that is not there; names the module.
    """
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    model = getattr(model, "_orig_mod", model)
    layers = _layers(model, adapter_name)
    _check_configs(config, model.peft_config[adapter_name], str(model_name_or_path))
    tensors = load_peft_weights(str(model_name_or_path), device=torch_device or "cpu", **kwargs)
    saved = _blocks_by_module(tensors, model)
    _check_fit(saved, layers, adapter_name)
    check_base(config, {name: layer.evidence() for name, layer in layers.items() if not layer.merged})
    with torch.no_grad():
        for name, layer in layers.items():
            parts = saved.get(name)
            _overwrite(layer.smt_blocks[adapter_name], parts)
            if adapter_name in layer.smt_low_rank:
                _overwrite_pair(layer.smt_low_rank[adapter_name], parts)


def make_room(model: nn.Module, adapter_name: str, configs: Sequence[SMTConfig]) -> None:
    """Give a loaded adapter as many blocks in each of its modules as the largest of several adapters has there.

    Call it once, before the model is compiled and before an optimizer is built, with the configs of all adapters that
    are to be swapped in. The blocks added are zero and change no output.

    Args:
        model: a `PeftModel` with an SMT adapter `adapter_name`, not merged.
        configs: of saved adapters, as from `PeftConfig.from_pretrained`; their `block_pattern` counts.

    Raises:
        ValueError: the adapter is merged, the model is compiled, or an adapter has other modules, blocks of another
            shape or more than there can be; names the module. Nothing has been changed then.
    """
    layers = _layers(model, adapter_name)
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is compiled already, for the shapes it has; call make_room before torch.compile")
    wanted: dict[str, int] = {}
    for config in configs:
        for name, (count, *shape) in (config.block_pattern or {}).items():
            _check_shape(name, tuple(shape), layers, adapter_name)
            if count > (room := layers[name].smt_blocks[adapter_name].grid.num_blocks):
                raise ValueError(f"{name}: block_pattern asks for {count} blocks, and the weight has {room}")
            wanted[name] = max(wanted.get(name, 0), count)
    for name, count in wanted.items():
        layer, blocks = layers[name], layers[name].smt_blocks[adapter_name]
        if count > len(blocks.index):
            layer.smt_blocks[adapter_name] = _widened(blocks, count)


def _layers(model: nn.Module, adapter_name: str) -> dict[str, SMTLayer]:
    layers = {m.smt_name: m for m in model.modules() if isinstance(m, SMTLayer) and adapter_name in m.smt_blocks}
    if not layers:
        raise ValueError(f"the model has no SMT adapter {adapter_name!r}; load one with PeftModel.from_pretrained")
    if merged := [name for name, layer in layers.items() if adapter_name in layer.merged_adapters]:
        raise ValueError(
            f"{merged[0]}: adapter {adapter_name} is merged into the base weights; call unmerge_adapter() before it is "
            "swapped"
        )
    return layers


def _check_configs(config: PeftConfig, loaded: PeftConfig, path: str) -> None:
    if not isinstance(config, SMTConfig):
        raise ValueError(
            f"{path} is an adapter of another method ({config.peft_type.value}); only SMT adapters fit here"
        )
    for owner, which in ((config, "the saved adapter"), (loaded, "the loaded adapter")):
        for field in ("modules_to_save", "trainable_token_indices"):
            if value := getattr(owner, field):
                raise ValueError(
                    f"{which} has {field}={value}, which cannot be swapped in place; use load_adapter and set_adapter"
                )
    new, old = ((each.lora_rank, each.low_rank_scaling) for each in (config, loaded))
    if new != old:
        raise ValueError(
            f"the saved adapter has lora_rank={new[0]} with scaling {new[1]:g}, the loaded one lora_rank={old[0]} with "
            f"{old[1]:g}; use load_adapter and set_adapter"
        )


def _blocks_by_module(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """`{module: {"weight": ..., "index": ...}}`, with `"lora_A"` and `"lora_B"` of a low-rank pair; what else is saved
    must be what the model holds already."""
    parameters = dict(model.named_parameters())
    merged = {f"{path}.base_layer.weight": m for path, m in model.named_modules() if getattr(m, "_merges", None)}
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, found, part = _split(key)
        if found:
            saved.setdefault(name.removeprefix(_PREFIX), {})[part] = tensor
            continue
        # PEFT saves an embedding that is a target whole.
        held = merged[key].unmerged_weight() if key in merged else parameters.get(key)
        if held is None or not torch.equal(held.detach().to(tensor), tensor):
            raise ValueError(
                f"{name}: the saved adapter brings a weight of its own for this, other than the model's; use "
                "load_adapter and set_adapter, or save it with save_embedding_layers=False"
            )
    return saved


def _split(key: str) -> tuple[str, str, str]:
    name, found, part = key.partition(".smt_low_rank.")
    return (name, found, part) if found else key.partition(".smt_blocks.")


def _check_fit(saved: dict[str, dict[str, Tensor]], layers: dict[str, SMTLayer], adapter_name: str) -> None:
    for name, parts in saved.items():
        weight, index = parts.get("weight"), parts.get("index")
        if weight is None or index is None or weight.ndim != 3 or len(weight) != len(index):
            raise ValueError(f"{name}: the saved adapter's blocks and their index do not go together; restore the file")
        _check_shape(name, tuple(weight.shape[1:]), layers, adapter_name)
        blocks = layers[name].smt_blocks[adapter_name]
        if len(weight) > len(blocks.weight):
            raise ValueError(
                f"{name}: the saved adapter has {len(weight)} blocks, but the loaded one has room for "
                f"{len(blocks.weight)}; load the larger adapter first, or call make_room before compiling"
            )
        blocks.check_values(weight, index)
        if adapter_name in layers[name].smt_low_rank:
            layers[name].smt_low_rank[adapter_name].check_loaded(parts.get("lora_A"), parts.get("lora_B"))


def _check_shape(name: str, shape: tuple[int, ...], layers: dict[str, SMTLayer], adapter_name: str) -> None:
    if name not in layers:
        raise ValueError(
            f"{name}: the saved adapter has blocks in this module, but adapter {adapter_name} has none; adapters that "
            "are swapped in place must stay within the modules of the first. Use load_adapter and set_adapter instead"
        )
    grid = layers[name].smt_blocks[adapter_name].grid
    if shape != grid.block_shape:
        raise ValueError(
            f"{name}: the saved adapter has blocks of {' x '.join(map(str, shape))}, the loaded one of "
            f"{grid.block_rows} x {grid.block_cols}; use load_adapter and set_adapter instead"
        )


def _overwrite(blocks: SMTBlocks, saved: dict[str, Tensor] | None) -> None:
    if saved is None:
        blocks.weight.zero_()
        return
    grid, device = blocks.grid, blocks.index.device
    new, old = grid.flatten(saved["index"].to(device)), grid.flatten(blocks.index)
    # Old places that the new adapter leaves free: at least as many as there are blocks left over.
    spare = old[~torch.isin(old, new)][: len(old) - len(new)]
    weight, index = _sorted(grid, new, saved["weight"].to(device), spare)
    blocks.index.copy_(index)
    blocks.weight.copy_(weight)
    # The index is checked and its derived tensors are made now, so that a compiled call finds them.
    blocks.layout()


def _overwrite_pair(pair: LowRank, saved: dict[str, Tensor] | None) -> None:
    if saved is None:
        pair.lora_B.zero_()
        return
    for part in pair.parts:
        getattr(pair, part).copy_(saved[part])


def _widened(blocks: SMTBlocks, count: int) -> SMTBlocks:
    grid = blocks.grid
    held = grid.flatten(blocks.index)
    free = torch.ones(grid.num_blocks, dtype=torch.bool, device=held.device)
    free[held] = False
    free = free.nonzero().squeeze(1)
    # Evenly spread, as chosen blocks are.
    spare = free[torch.linspace(0, len(free) - 1, count - len(held), device=free.device).round().long()]
    wide = SMTBlocks(blocks.name, grid, count, blocks.looked_up, blocks.int8).to(
        blocks.weight.device, blocks.weight.dtype
    )
    weight, index = _sorted(grid, held, blocks.weight.detach(), spare)
    with torch.no_grad():
        wide.index.copy_(index)
        wide.weight.copy_(weight)
    wide.weight.requires_grad_(blocks.weight.requires_grad)
    wide.layout()
    return wide.train(blocks.training)


def _sorted(grid: BlockGrid, numbers: Tensor, weight: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks with zero ones at the `spare` places: weight and int32 index, in the order of the places."""
    every, order = torch.cat((numbers, spare)).sort()
    zeros = weight.new_zeros(len(spare), *grid.block_shape)
    return torch.cat((weight, zeros))[order], grid.unflatten(every)
