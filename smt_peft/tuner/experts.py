"""SMT over bare parameters, 2-D or 3-D, such as the experts of a mixture.

One `ParamWrapper` goes around the module that owns them, and holds one `ParameterLayer` per trained parameter under the
parameter's own name. So the blocks of `experts.down_proj` are `experts.down_proj.smt_blocks.<adapter>`, whichever other
parameters of the module are trained, by this adapter or by another: wrappers nested in one another would be named by
their order.

Shape suffixes: E experts, B blocks of r rows and c columns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .. import ops
from ..bases.stand_in import replaced
from ..blocks import BlockGrid
from .gate import is_traced, why_not_swap
from .healing import HealingModule
from .layer import SMTLayer
from .products import BlockProducts

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

    def check_grid(self, grid: BlockGrid) -> None:
        rows = self.stored_weight().shape[-2]
        if rows % grid.block_rows:
            raise ValueError(
                f"{self.smt_name}: blocks of {grid.block_rows} rows would reach from one expert into the next, as they "
                f"do not divide its {rows} rows; make the selection again with select_blocks"
            )

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        blocks = self.smt_blocks[adapter_name]
        if not blocks.weight.is_meta:
            # As PEFT does over modules; unless autocast_adapter_dtype=False is given, it casts to fp32 afterwards.
            stored = self.stored_weight()
            self.smt_blocks[adapter_name] = blocks.to(device or stored.device, stored.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's delta as a dense tensor of the shape and on the device of the parameter, fp32."""
        blocks = self.smt_blocks[adapter]
        return ops.dense(blocks.weight.detach(), blocks.layout()).view(self.stored_weight().shape)

    def _why_not_merged(self) -> str | None:
        return _why_not_plain(self.stored_weight())

    def products(self) -> BlockProducts:
        """What computes with the parameter in this call.

        Raises:
            RuntimeError: the parameter is not to be had, or `forward='swap'` is set and cannot run.
        """
        active, weight = self.acting(), self.stored_weight()
        sketched = all(self.smt_blocks[name].sketch is not None for name in active)
        if reason := _why_not_plain(weight, sketched):
            raise RuntimeError(f"{self.smt_name}: {reason}, which SMT does not serve for bare parameters")
        forwards = {self.smt_forward[name] for name in active}
        wanted = "swap" if "swap" in forwards else self.smt_forward[active[0]]
        unswapped = "several adapters are active" if len(active) > 1 else _why_not_written(weight)
        if wanted == "swap" and unswapped:
            raise RuntimeError(f"{self.smt_name}: forward='swap' is set, but {unswapped}; use forward='auto'")
        swap = wanted == "swap" or (wanted == "auto" and self._wrapper[0].training and not unswapped)
        self._told = "swap" if swap else "additive"
        return BlockProducts(self.smt_name, weight, [self.smt_blocks[name] for name in active], swap)

    def extra_repr(self) -> str:
        return f"forward={self._told or 'not yet chosen'}"


class ParamWrapper(HealingModule, BaseTunerLayer):
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
    def in_features(self) -> int:
        return self._only_layer().in_features

    @property
    def out_features(self) -> int:
        return self._only_layer().out_features

    def _only_layer(self) -> ParameterLayer:
        layers = list(self.layers().values())
        if len(layers) != 1:
            raise AttributeError(f"{len(layers)} parameters are trained here, each with features of its own")
        return layers[0]

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


class _Lock:
    """A lock that a copy or a pickle of its owner replaces by a new one."""

    def __init__(self):
        self.held = threading.RLock()

    def __reduce__(self) -> tuple:
        return _Lock, ()


def _why_not_plain(weight: Tensor, sketched: bool = False) -> str | None:
    if type(weight) is not nn.Parameter:
        return f"the parameter is a {type(weight).__name__}"
    if (weight.is_meta and not sketched) or hasattr(weight, "ds_id"):
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
