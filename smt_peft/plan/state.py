"""What lives from step to step: weights, trained parameters, index tables and the optimizer's moments."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.adamw import QUANT_BLOCK
from ..ops.linear import wants_columns
from ..tuner.delta import SMTBlocks
from .layers import Layers
from .packed import PackedLinear

Shapes = Sequence[Tensor]
# bitsandbytes keeps the moments of smaller tensors in fp32.
_BNB_SMALLEST = 4096


@dataclass(frozen=True)
class State:
    """Bytes that live from step to step.

    Args:
        weights: of the frozen model by how they are stored, `"bfloat16"`, `"nf4"`; with full fine-tuning, of all of it.
        trained: of the parameters that an adapter adds.
        tables: of the buffers that it adds: where the blocks lie.
        moments: of the optimizer.
        assumed: what the figure for the optimizer rests on, in words; empty when it is known.
    """

    weights: dict[str, int]
    trained: int
    tables: int
    moments: int
    assumed: str = ""

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.trained + self.tables + self.moments


def state_of(model: nn.Module, optimizer: Optimizer, layers: Layers | None = None) -> State:
    """Of a model on the meta device; what requires a gradient and is none of the base's own weights is an adapter's.

    Args:
        model: on the meta device.
        optimizer: of what it trains.
        layers: those that stand for others; None: there are none.
    """
    layers = layers or Layers()
    trained = layers.trained(model)
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapter = set() if whole is model else {id(parameter) for parameter in trained}
    weights: defaultdict[str, int] = defaultdict(int)
    seen: set[int] = set()
    for module, times in layers.counted(model):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            key = tensor.untyped_storage()._cdata
            shape_alone = isinstance(module, PackedLinear) and tensor is module.weight
            if key not in seen and id(tensor) not in adapter and not isinstance(module, SMTBlocks) and not shape_alone:
                seen.add(key)
                weights[_stored_as(tensor)] += times * tensor.untyped_storage().nbytes()
        if isinstance(module, PackedLinear):
            weights[module.packing.name] += times * module.packing.bytes(module.out_features, module.in_features)
    return State(
        dict(weights),
        sum(p.nbytes for p in (*(p for p in trained if id(p) in adapter), *layers.resting(model))),
        sum(times * _tables(module) for module, times in layers.counted(model) if isinstance(module, SMTBlocks)),
        sum(optimizer.moments(parameter) for parameter in trained),
        optimizer.assumed,
    )


def _stored_as(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tables(blocks: SMTBlocks) -> int:
    """The index, the copy that has been checked, and what a kept input is read by."""
    layout = blocks.layout()
    tables = [blocks.index, layout.blocks]
    if wants_columns(layout):
        tables += [layout.columns, layout.packed.blocks]
    return sum(table.nbytes for table in tables)


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps and takes.

    Args:
        name: as in `optim` of a run.
        moments: bytes kept for a parameter.
        temporaries: bytes taken for the time of an update of these parameters.
        assumed: what the figures rest on, where the optimizer itself is not known here.
    """

    name: str
    moments: Callable[[Tensor], int]
    temporaries: Callable[[Shapes], int] = lambda parameters: 0
    assumed: str = ""


def optimizer(name: str, device: str = "cpu") -> Optimizer:
    """The optimizer of that name in `optim`; one that is not known is taken for Adam, and says so.

    Args:
        device: the type that it runs on.
    """
    name = str(getattr(name, "value", name))
    plain = name.removeprefix("paged_")
    if plain in _KNOWN:
        moments, temporaries = _KNOWN[plain]
        paged = "paged to the CPU where the GPU has no room" if plain != name else ""
        return Optimizer(name, moments, temporaries, paged)
    if plain in ("adamw_torch", "adam"):
        # On a GPU tensor by tensor would be slow, so PyTorch updates all of them at once.
        return Optimizer(name, _copies(2, step=4), _all if device == "cuda" else _largest(2))
    return Optimizer(name, _copies(2, step=4), _largest(2), f"optim={name} is not known here: two moments, as of Adam")


def _copies(number: int, step: int = 0) -> Callable[[Tensor], int]:
    return lambda parameter: number * parameter.nbytes + step


def _of_width(width: int, scales: bool = False) -> Callable[[Tensor], int]:
    """`SMTAdamW`'s two moments, `width` bytes an element, and an fp32 step."""

    def moments(parameter: Tensor) -> int:
        per_moment = width * parameter.numel() + (4 * math.ceil(parameter.numel() / QUANT_BLOCK) if scales else 0)
        return 2 * per_moment + 4

    return moments


def _bnb(number: int) -> Callable[[Tensor], int]:
    def moments(parameter: Tensor) -> int:
        count = parameter.numel()
        return number * (4 * count if count < _BNB_SMALLEST else count + 4 * math.ceil(count / QUANT_BLOCK))

    return moments


def _factored(parameter: Tensor) -> int:
    """Adafactor (arXiv 1804.04235, Algorithm 4), as Transformers has it: fp32 row and column means, and one norm."""
    if parameter.ndim < 2:
        return 4 * parameter.numel() + 4
    return 4 * (parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2]) + 4


def _wide(parameter: Tensor) -> int:
    return 2 * parameter.numel() * torch.promote_types(parameter.dtype, torch.float32).itemsize + 4


def _largest(copies: int) -> Callable[[Shapes], int]:
    return lambda parameters: copies * max((parameter.nbytes for parameter in parameters), default=0)


def _all(parameters: Shapes) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def _none(parameters: Iterable[Tensor]) -> int:
    return 0


_KNOWN: dict[str, tuple[Callable[[Tensor], int], Callable[[Shapes], int]]] = {
    "smt_adamw": (_wide, _none),
    "smt_adamw_bf16": (_of_width(2), _none),
    "smt_adamw_8bit": (_of_width(1, scales=True), _none),
    "adamw_torch_fused": (_copies(2, step=4), _none),
    "adamw_apex_fused": (_of_width(4), _none),
    "adafactor": (_factored, _largest(2)),
    "sgd": (_copies(0), _none),
    "adagrad": (_copies(1, step=4), _largest(2)),
    "rmsprop": (_copies(1, step=4), _largest(2)),
    "adamw_8bit": (_bnb(2), _none),
    "adamw_bnb_8bit": (_bnb(2), _none),
    "adamw_32bit": (_of_width(4), _none),
    "lion": (_of_width(2), _none),
    "lion_32bit": (_of_width(2), _none),
    "lion_8bit": (_bnb(1), _none),
    "rmsprop_bnb": (_of_width(2), _none),
    "rmsprop_bnb_8bit": (_bnb(1), _none),
}
