"""The layers of a model: of many that are alike, a few are counted and stand for all.

A deep model repeats itself. Three rounds of what it repeats are kept; the middle one, with one like it before and one
after, stands for those that are left out. What a round adds to the bytes alive, in forward and in backward, it adds
each time, so the moments of a round that is left out are those of the middle one, moved.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..blocks import BlockGrid, BlockSelection
from ..tuner.delta import SMTBlocks
from .packed import PackedLinear, stored_bytes

_ROUNDS = 3
# Attributes that differ from layer to layer and say nothing but which one it is.
_NUMBERS = {"layer_idx", "layer_id", "layer_number"}
_PLAIN = (bool, int, float, str, tuple, torch.dtype, type(None))


@dataclass(frozen=True, eq=False)
class Layers:
    """The stack of layers that is watched, of which some may stand for more than themselves.

    Args:
        stack: None in a model without one.
        first: position of the layers that stand for others.
        length: how many they are.
        copies: how many more of each there are in the model that is meant.
    """

    stack: nn.ModuleList | None = None
    first: int = 0
    length: int = 0
    copies: int = 0

    @property
    def repeated(self) -> list[nn.Module]:
        return list(self.stack[self.first : self.first + self.length]) if self.copies else []

    def counted(self, model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
        """Every module of the model, and how many of the model that is meant it stands for."""
        repeated = {id(module) for layer in self.repeated for module in layer.modules()}
        for module in model.modules():
            yield module, 1 + self.copies * (id(module) in repeated)

    def trained(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that are trained, one that stands for several as often."""
        times = {id(p): count for module, count in self.counted(model) for p in module.parameters(recurse=False)}
        return [p for p in model.parameters() if p.requires_grad for _ in range(times[id(p)])]

    def resting(self, model: nn.Module) -> list[nn.Parameter]:
        """The blocks that train at another time, one that stands for several as often."""
        counted = [(module.weight, times) for module, times in self.counted(model) if isinstance(module, SMTBlocks)]
        return [weight for weight, times in counted if not weight.requires_grad for _ in range(times)]


def stack_of(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The list of layers that holds most of the weights."""
    stacks = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    return max(stacks.items(), key=lambda item: stored_bytes(item[1]), default=None)


def abridge(model: nn.Module, selection: BlockSelection, apart: Collection[str] = ()) -> tuple[Layers, BlockSelection]:
    """Take layers out of a model on the meta device that others can stand for.

    Args:
        model: without an adapter; changed.
        selection: of the whole model.
        apart: names of layers that are like none of the others.

    Returns:
        The layers, and what of the selection is left. Both are whole where layers are not alike, or are few.
    """
    found = stack_of(model)
    if found is None:
        return Layers(), selection
    name, stack = found
    alike = [
        (f"{name}.{number}" in apart, *likeness)
        for number, likeness in enumerate(_likenesses(model, name, stack, selection))
    ]
    kept, period = _kept(alike)
    total = len(stack)
    if kept == total:
        return Layers(stack), selection
    gone = tuple(f"{name}.{number}." for number in range(kept, total))
    del stack[kept:]
    rest = {module: blocks for module, blocks in selection.blocks.items() if not module.startswith(gone)}
    grids = {module: grid for module, grid in selection.grids.items() if not module.startswith(gone)}
    layers = Layers(stack, kept - 2 * period, period, (total - kept) // period)
    return layers, BlockSelection(rest, grids, provenance=selection.provenance)


def with_like_layers(model: nn.Module, selection: BlockSelection) -> BlockSelection:
    """A selection whose layers have the blocks of the first one that has as many of the same matrices.

    For blocks that were drawn: one draw is as good as another, and so layers of a model are alike.
    """
    found = stack_of(model)
    if found is None:
        return selection
    first: dict[Any, int] = {}
    blocks = dict(selection.blocks)
    for number, grids in enumerate(_by_layer(selection, *found)):
        names = {rest: f"{found[0]}.{number}.{rest}" for rest in grids}
        taken = sum(len(blocks[name]) for name in names.values() if name in blocks)
        like = first.setdefault((tuple(grids.items()), taken), number)
        for rest, name in names.items():
            blocks.pop(name, None)
            if (chosen := selection.blocks.get(f"{found[0]}.{like}.{rest}")) is not None:
                blocks[name] = chosen
    return BlockSelection(blocks, selection.grids, selection.scores, selection.provenance)


def _by_layer(selection: BlockSelection, name: str, stack: nn.ModuleList) -> list[dict[str, BlockGrid]]:
    """The grids of every layer, by their names inside of it."""
    layers: list[dict[str, BlockGrid]] = [{} for _ in stack]
    for module, grid in selection.grids.items():
        number, _, rest = module.removeprefix(f"{name}.").partition(".")
        if module.startswith(f"{name}.") and number.isdigit():
            layers[int(number)][rest] = grid
    return layers


def _kept(likenesses: Sequence[Any]) -> tuple[int, int]:
    """How many of the first layers have to be there, and after how many they repeat themselves."""
    total = len(likenesses)
    best = total, 1
    for period in range(1, total // (_ROUNDS + 1) + 1):
        odd = [i for i in range(total - period) if likenesses[i] != likenesses[i + period]]
        least = (odd[-1] + 1 if odd else 0) + _ROUNDS * period
        kept = least + (total - least) % period
        best = min(best, (kept, period))
    return best


def _likenesses(model: nn.Module, name: str, stack: nn.ModuleList, selection: BlockSelection) -> list[Any]:
    """For every layer all that decides what it takes; equal where layers are alike."""
    settings = vars(model.config).values() if hasattr(model, "config") else ()
    listed = [value for value in settings if isinstance(value, list) and len(value) == len(stack)]
    blocks = [
        [(rest, grid, *_shape(selection, f"{name}.{number}.{rest}")) for rest, grid in grids.items()]
        for number, grids in enumerate(_by_layer(selection, name, stack))
    ]
    return [
        (*(str(values[number]) for values in listed), *_structure(layer), *blocks[number])
        for number, layer in enumerate(stack)
    ]


def _shape(selection: BlockSelection, module: str) -> tuple[Any, ...]:
    """What of the blocks of a module decides its memory."""
    if module not in selection.blocks:
        return (0,)
    layout = selection.layout(module)
    if module in selection.provenance.get("experts", {}):
        # Each expert computes by itself, so it counts how they are spread over the experts.
        return len(layout.blocks), layout.blocks.numpy().tobytes()
    return len(layout.blocks), layout.num_columns


def _structure(layer: nn.Module) -> Iterator[Any]:
    for name, module in layer.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN) and key not in _NUMBERS}
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        packing = module.packing if isinstance(module, PackedLinear) else None
        yield name, type(module), sorted(plain.items()), packing, [(n, x.shape, x.dtype) for n, x in tensors]
