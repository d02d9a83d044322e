"""SMT over bare parameters, 2-D or 3-D, such as the experts of a mixture.

One `ParamWrapper` goes around the module that owns them, and holds one `ParameterLayer` per trained parameter under the
parameter's own name. So the blocks of `experts.down_proj` are `experts.down_proj.smt_blocks.<adapter>`, whichever other
parameters of the module are trained, by this adapter or by another: wrappers nested in one another would be named by
their order.

Shape suffixes: E experts, B blocks of r rows and c columns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import ops
from ..bases.stand_in import StandIn, replaced
from ..blocks import BlockGrid, BlockLayout
from ..config import SMTConfig
from ..say import once
from .delta import SMTBlocks
from .gate import is_traced, why_not_swap
from .layer import SMTLayer

_NOT_IN_A_GRAPH = "the experts of a mixture are routed by data, and their weights stand in for one another"


class ParameterLayer(nn.Module, SMTLayer):
    """The adapters of one parameter. It is never called: the wrapper that holds it runs the module."""

    def __init__(self, wrapper: ParamWrapper, parameter_name: str, name: str):
        super().__init__()
        self.parameter_name = parameter_name
        # In a tuple: registered here as well, the module would be saved twice.
        self._wrapper = (wrapper,)
        SMTLayer.__init__(self, wrapper.base_layer, name)
        del self._modules["base_layer"]

    @property
    def base_layer(self) -> nn.Module:
        return self._wrapper[0].base_layer

    def get_base_layer(self) -> nn.Module:
        return self._wrapper[0].get_base_layer()

    def _features(self) -> tuple[int, int]:
        rows, cols = self.stored_weight().shape[-2:]
        return rows, cols

    def stored_weight(self) -> Tensor:
        """The parameter, `(rows, cols)` or `(E, rows, cols)`.

        Raises:
            RuntimeError: a host has put something else in its place.
        """
        stored = self.get_base_layer()._parameters.get(self.parameter_name)
        if stored is None:
            raise RuntimeError(
                f"{self.smt_name} is no parameter of its module any more: it has been sharded, offloaded or "
                "parametrized, which SMT does not serve for bare parameters; keep this module whole"
            )
        return stored

    def weight_view(self) -> Tensor:
        """The matrices one below the other, `(E * rows, cols)`."""
        stored = self.stored_weight()
        return stored.view(-1, stored.shape[-1])

    def update_layer(
        self,
        adapter_name: str,
        grid: BlockGrid,
        num_blocks: int,
        index: Tensor,
        config: SMTConfig,
        inference_mode: bool = False,
    ) -> None:
        rows = self.stored_weight().shape[-2]
        if rows % grid.block_rows:
            raise ValueError(
                f"{self.smt_name}: blocks of {grid.block_rows} rows would reach from one expert into the next, as they "
                f"do not divide its {rows} rows; make the selection again with select_blocks"
            )
        super().update_layer(adapter_name, grid, num_blocks, index, config, inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        blocks = self.smt_blocks[adapter_name]
        if not blocks.weight.is_meta:
            self.smt_blocks[adapter_name] = blocks.to(device or self.stored_weight().device)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's delta as a dense tensor of the shape and on the device of the parameter, fp32."""
        blocks = self.smt_blocks[adapter]
        return ops.dense(blocks.weight.detach(), blocks.layout()).view(self.stored_weight().shape)

    def _why_not_merged(self) -> str | None:
        return _why_not_plain(self.stored_weight())

    def acting(self) -> list[str]:
        """The adapters that this call is to compute with."""
        self.heal()
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.smt_blocks]

    def products(self) -> _BlockProducts:
        """What computes with the parameter in this call.

        Raises:
            RuntimeError: the parameter is not to be had, or `forward='swap'` is set and cannot run.
        """
        active, weight = self.acting(), self.stored_weight()
        if reason := _why_not_plain(weight):
            raise RuntimeError(f"{self.smt_name}: {reason}, which SMT does not serve for bare parameters")
        forwards = {self.smt_forward[name] for name in active}
        wanted = "swap" if "swap" in forwards else self.smt_forward[active[0]]
        unswapped = "several adapters are active" if len(active) > 1 else _why_not_written(weight)
        if wanted == "swap" and unswapped:
            raise RuntimeError(f"{self.smt_name}: forward='swap' is set, but {unswapped}; use forward='auto'")
        swap = wanted == "swap" or (wanted == "auto" and self._wrapper[0].training and not unswapped)
        self._told = "swap" if swap else "additive"
        return _BlockProducts(self.smt_name, weight, [self.smt_blocks[name] for name in active], swap)

    def extra_repr(self) -> str:
        return f"forward={self._told or 'not yet chosen'}"


class ParamWrapper(nn.Module, BaseTunerLayer):
    """A module some of whose own parameters carry blocks. PEFT knows the class by this name."""

    # The adapters are those of the layers below.
    adapter_layer_names = ()
    other_param_names = ()
    # PEFT asks which one parameter a wrapper is for.
    parameter_name = None

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self._lock = _Lock()

    @property
    def active_adapter(self) -> str | list[str]:
        return next((layer.active_adapter for layer in self.layers().values()), self._active_adapter)

    @property
    def merged_adapters(self) -> list[str]:
        return next((layer.merged_adapters for layer in self.layers().values()), [])

    @property
    def weight(self) -> Any:
        return self._modules.get("weight") or self.base_layer.weight

    def layers(self) -> dict[str, ParameterLayer]:
        """By name of the parameter."""
        return {name: layer for name, layer in self._modules.items() if isinstance(layer, ParameterLayer)}

    def layer(self, parameter_name: str, name: str, active_adapters: list[str]) -> ParameterLayer:
        """The layer of a parameter, made when there is none."""
        if parameter_name not in self.layers():
            layer = ParameterLayer(self, parameter_name, name)
            layer.set_adapter(active_adapters)
            # Not by add_module, which takes the property `weight` for an attribute in the way; and in a new dict, as
            # PEFT adds layers while it walks over the modules.
            self.__dict__["_modules"] = {**self._modules, parameter_name: layer}
        return self._modules[parameter_name]

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        acting = {name: layer for name, layer in self.layers().items() if layer.acting()}
        if adapter_names is not None and any(layer.merged for layer in self.layers().values()):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        # None of the adapters that rows ask for has blocks here (`check_rows`); those that are active are not meant.
        if not acting or adapter_names is not None:
            return self.base_layer(*args, **kwargs)
        if is_traced():
            merged = {name: layer.products().traceable() for name, layer in acting.items()}
            with replaced(self.get_base_layer(), merged):
                return self.base_layer(*args, **kwargs)
        return self._routed(acting, args, kwargs)

    # A compiler breaks its graph here: which expert sees which rows is known from the data alone.
    @torch.compiler.disable(reason=_NOT_IN_A_GRAPH)
    def _routed(self, acting: dict[str, ParameterLayer], args: tuple, kwargs: dict) -> Any:
        # Another thread in the same module would meet the stand-ins of this one.
        with self._lock.held:
            products = {name: layer.products() for name, layer in acting.items()}
            with replaced(self.get_base_layer(), {name: each.stand_in() for name, each in products.items()}):
                y = self.base_layer(*args, **kwargs)
            for each in products.values():
                y = each.close(y)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: PEFT reaches each layer by itself."""

    def unmerge(self) -> None:
        """Nothing, as `merge`."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        for layer in self.layers().values() if merge else ():
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    def take_out(self, adapter_name: str) -> bool:
        """Delete an adapter with the layers that have no other. Returns whether any is left."""
        for name, layer in self.layers().items():
            layer.delete_adapter(adapter_name)
            if not layer.smt_blocks:
                del self._modules[name]
        return bool(self.layers())

    def heal(self) -> None:
        for layer in self.layers().values():
            layer.heal()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.heal()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.heal()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> ParamWrapper:
        self.heal()
        return super()._apply(*args, **kwargs)

    def __repr__(self) -> str:
        return "smt." + super().__repr__()


class _BlockProducts:
    """`X (W + delta)^T` for one parameter, expert by expert, during one call of its module."""

    def __init__(self, name: str, weight: nn.Parameter, blocks: list[SMTBlocks], swap: bool):
        self.name, self.weight, self.blocks, self.swap = name, weight, blocks, swap
        self._open, self._reached, self._unrecorded = False, False, False
        self._dense: dict[bool, Tensor] = {}

    def stand_in(self) -> StandIn:
        experts = self.weight.shape[0] if self.weight.ndim == 3 else 1
        self._recording = torch.is_grad_enabled() and any(blocks.weight.requires_grad for blocks in self.blocks)
        self._split = [_by_expert(blocks.layout(), experts) for blocks in self.blocks]
        self._deltas: list[tuple[Tensor, ...]] = []
        self._open = True
        return StandIn(self)

    def close(self, y: Any) -> Any:
        """End of the call, whose result is returned.

        Raises:
            RuntimeError: blocks that train were used where no gradient is recorded.
        """
        self._open = False
        self._dense.clear()
        if self._unrecorded:
            raise RuntimeError(
                f"{self.name}: the module computes with the weight where no gradient is recorded, so its blocks would "
                "silently stay frozen; use experts_implementation='eager', 'batched_mm' or 'grouped_mm'"
            )
        if self._recording and not self._reached and isinstance(y, Tensor):
            # No expert with blocks saw a row. Without a gradient DDP would wait for one.
            y = _Unreached.apply(y, *(blocks.weight for blocks in self.blocks))
        return y

    def _used(self) -> None:
        if not self._open:
            raise RuntimeError(f"{self.name}: the weight is used after the call of its module, where its blocks end")
        self._unrecorded |= self._recording and not torch.is_grad_enabled()

    def product(self, x: Tensor, expert: int | None, flipped: bool, bias: Tensor | None) -> Tensor:
        self._used()
        weight = self.weight if expert is None else self.weight[expert]
        weight_NK = weight.t() if flipped else weight
        parts = self._parts(expert or 0, flipped)
        self._reached |= bool(parts)
        if not parts or self.weight.requires_grad:
            y = F.linear(x, weight_NK, bias)
            for delta_Brc, layout in parts:
                y = ops.block_add(y, x, delta_Brc, layout)
            return y
        (delta_Brc, layout), *others = parts
        trained = bias is not None and bias.requires_grad
        y = ops.block_linear(x, weight_NK, None if trained else bias, delta_Brc, layout, self.swap)
        for delta_Brc, layout in others:
            y = ops.block_add(y, x, delta_Brc, layout)
        return y + bias if trained else y

    def _parts(self, expert: int, flipped: bool) -> list[tuple[Tensor, BlockLayout]]:
        """The blocks in one expert and their layout, adapter by adapter."""
        if not self._deltas:
            # One split, whose backward writes the gradients of all experts once.
            self._deltas = [
                blocks.weight.split(counts) for blocks, (counts, _) in zip(self.blocks, self._split, strict=True)
            ]
        parts = [
            (deltas[expert], layouts[expert]) for deltas, (_, layouts) in zip(self._deltas, self._split, strict=True)
        ]
        parts = [(delta_Brc, layout) for delta_Brc, layout in parts if layout is not None]
        return [(delta.transpose(1, 2), layout.transposed) for delta, layout in parts] if flipped else parts

    def grouped(self, x_TK: Tensor, counts: list[int], flipped: bool, gemm: Callable) -> Any:
        weight = self.weight
        plain = x_TK.dtype == weight.dtype and not torch.is_autocast_enabled(x_TK.device.type)
        if len(self.blocks) > 1 or weight.requires_grad or not plain or not len(x_TK):
            return NotImplemented
        self._used()
        self._reached = True
        (blocks,), ((held, layouts),) = self.blocks, self._split
        runs, row, block = [], 0, 0
        for rows, number, layout in zip(counts, held, layouts, strict=True):
            if rows and number:
                layout = layout.transposed if flipped else layout
                runs.append(ops.Run(slice(row, row + rows), slice(block, block + number), layout))
            row, block = row + rows, block + number
        return ops.grouped_linear(x_TK, weight, blocks.weight, blocks.layout(), runs, gemm, flipped, self.swap)

    def dense(self, operation: str) -> Tensor:
        self._used()
        self._reached = True
        once(
            f"{self.name}: no way is known to compute '{operation}' by blocks, so a dense copy of the weight is made "
            "at every call; experts_implementation='eager', 'batched_mm' or 'grouped_mm' need none"
        )
        recording = torch.is_grad_enabled()
        if recording not in self._dense:
            merged = self.weight
            for blocks in self.blocks:
                merged = _Merged.apply(merged, blocks.weight, blocks.layout())
            self._dense[recording] = merged
        return self._dense[recording]

    def traceable(self) -> Tensor:
        """The merged weight from differentiable operations alone."""
        merged = self.weight
        for blocks in self.blocks:
            delta = ops.dense(blocks.weight, blocks.layout()).view(merged.shape)
            merged = (merged.to(torch.promote_types(merged.dtype, delta.dtype)) + delta).to(merged.dtype)
        return merged


class _Merged(torch.autograd.Function):
    """A copy of the weight with the blocks written in, rounded as merging does; backward reads theirs alone."""

    @staticmethod
    def forward(ctx, weight, delta_Brc, layout):
        ctx.layout, ctx.dtype = layout, delta_Brc.dtype
        merged = weight.clone()
        matrix = merged.view(layout.grid.shape)
        ops.block_scatter_(matrix, ops.add_rounded(ops.block_gather(matrix, layout), delta_Brc), layout)
        return merged

    @staticmethod
    def backward(ctx, grad):
        d_delta = None
        if ctx.needs_input_grad[1]:
            d_delta = ops.block_gather(grad.reshape(ctx.layout.grid.shape), ctx.layout).to(ctx.dtype)
        return grad if ctx.needs_input_grad[0] else None, d_delta, None


class _Unreached(torch.autograd.Function):
    """The identity on a result that does not depend on these blocks; their gradient is zero."""

    @staticmethod
    def forward(ctx, y, *deltas):
        ctx.deltas = [(delta.shape, delta.dtype) for delta in deltas]
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        return grad, *(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.deltas)


class _Lock:
    """A lock that a copy or a pickle of its owner replaces by a new one."""

    def __init__(self):
        self.held = threading.RLock()

    def __reduce__(self) -> tuple:
        return _Lock, ()


# Derived from a layout, and gone with it.
_split: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _by_expert(layout: BlockLayout, experts: int) -> tuple[list[int], list[BlockLayout | None]]:
    """How many blocks lie in each expert, and their layout within it, None where there are none."""
    found = _split.get(layout)
    if found is None:
        with torch.inference_mode(False):
            found = _split[layout] = _split_layout(layout, experts)
    return found


def _split_layout(layout: BlockLayout, experts: int) -> tuple[list[int], list[BlockLayout | None]]:
    whole = layout.grid
    grid = BlockGrid(whole.rows // experts, whole.cols, *whole.block_shape)
    counts = torch.bincount(layout.block_rows // grid.row_stripes, minlength=experts).tolist()
    layouts = []
    for expert, blocks in enumerate(layout.blocks.split(counts)):
        first = torch.tensor([expert * grid.row_stripes, 0], dtype=torch.int32, device=blocks.device)
        layouts.append(BlockLayout(grid, blocks - first).prepare() if len(blocks) else None)
    return counts, layouts


def _why_not_plain(weight: Tensor) -> str | None:
    if type(weight) is not nn.Parameter:
        return f"the parameter is a {type(weight).__name__}"
    if weight.is_meta or hasattr(weight, "ds_id"):
        return "the parameter is offloaded or partitioned"
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"the parameter is stored as {weight.dtype}"
    if not weight.is_contiguous():
        return "the parameter is not contiguous"
    return None


def _why_not_written(weight: Tensor) -> str | None:
    return "the parameter is trained too" if weight.requires_grad else why_not_swap(weight)


def check_rows(layers: Iterable[SMTLayer], adapter_names: list[str]) -> None:
    """Raise `ValueError` when rows of a batch ask for adapters on experts, which see rows no more, but tokens."""
    for layer in layers:
        if isinstance(layer, ParameterLayer) and set(adapter_names) & set(layer.smt_blocks):
            raise ValueError(
                f"{layer.smt_name}: a bare parameter cannot serve several adapters in one batch (adapter_names); call "
                "set_adapter and run the rows of each adapter by themselves"
            )
