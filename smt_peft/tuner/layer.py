"""The SMT layers: a frozen linear layer plus, per adapter, a trained block-sparse delta."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..blocks import BlockGrid, BlockLayout
from ..config import SMTConfig
from .gate import is_traced, why_not_fused, why_not_merged, why_not_swap


class SMTBlocks(nn.Module):
    """The blocks of one adapter in one layer.

    Attributes:
        weight: trainable delta from the base weight, `(num_blocks, rows, cols)`, fp32, zero at the start.
        index: `(row, col)` block coordinates, int32 `(num_blocks, 2)`, sorted and unique; saved with the weight.
    """

    def __init__(self, name: str, grid: BlockGrid, num_blocks: int):
        super().__init__()
        self.name = name
        self.grid = grid
        self.weight = nn.Parameter(torch.zeros(num_blocks, *grid.block_shape))
        self.register_buffer("index", torch.zeros(num_blocks, 2, dtype=torch.int32))
        self._layout: tuple[tuple, BlockLayout] | None = None

    def layout(self) -> BlockLayout:
        """The layout of the current index, checked whenever it has changed, so that no operation meets a bad one.

        Raises:
            ValueError: the index is out of range, duplicated or unsorted; names the module.
        """
        if self._layout is not None and torch.compiler.is_compiling():
            # The index is a symbol there, whose values cannot be checked; loading another drops this layout.
            return self._layout[1]
        version = 0 if self.index.is_inference() else self.index._version
        key = (id(self.index), version, self.index.device)
        if self._layout is None or self._layout[0] != key:
            self.grid.check_blocks(self.index, self.name)
            # Not every road into a model passes `check_loaded`; here they all meet, once per index.
            if type(self.weight) is nn.Parameter:
                self._check_finite(self.weight)
            with torch.inference_mode(False):
                index = self.index.detach().clone()
            self._layout = (key, BlockLayout(self.grid, index).prepare())
        return self._layout[1]

    def padding(self) -> int:
        """Entries of `weight` that lie outside the matrix: stored as zero, never trained, never counted."""
        return self.weight.numel() - self.grid.effective_numel(self.index)

    def check_loaded(self, weight: Tensor | None, index: Tensor | None) -> None:
        """Check tensors read from a file before they are copied in.

        Raises:
            ValueError: a tensor is missing, of the wrong shape or dtype, the index is impossible, or a value is not
                finite; names the module.
        """
        repair = "the adapter file is damaged or belongs to another model; restore it or save the adapter again"
        for part, tensor, expected in (("weight", weight, self.weight), ("index", index, self.index)):
            if tensor is None:
                raise ValueError(f"{self.name}: the adapter file has no smt_blocks.{part} for this module; {repair}")
            if tensor.shape != expected.shape:
                raise ValueError(
                    f"{self.name}: smt_blocks.{part} has shape {tuple(tensor.shape)} in the file, but "
                    f"block_pattern says {tuple(expected.shape)}; {repair}"
                )
        self.grid.check_blocks(index, self.name)
        if not weight.is_floating_point():
            raise ValueError(f"{self.name}: smt_blocks.weight is {weight.dtype}, not a float type; {repair}")
        self._check_finite(weight)

    def _check_finite(self, weight: Tensor) -> None:
        if not weight.is_meta and not bool(torch.isfinite(weight.detach()).all()):
            raise ValueError(
                f"{self.name}: smt_blocks.weight holds NaN or infinity; restore the adapter, or train it "
                "anew with a lower learning rate"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "index" in state_dict:
            self._layout = None

    def __getstate__(self):
        # Derived from the index; dropped so that copies and pickles stay as small as the adapter.
        return {**self.__dict__, "_layout": None}

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} blocks, {self.grid}"


class SMTLayer(BaseTunerLayer):
    """What SMT layers have in common: their adapters, and merging them."""

    adapter_layer_names = ("smt_blocks",)
    other_param_names = ("smt_forward",)

    def __init__(self, base_layer: nn.Module, name: str, **kwargs: Any):
        self.base_layer = base_layer
        self.smt_name = name
        self.smt_blocks = nn.ModuleDict()
        self.smt_forward: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        # Per merged adapter the blocks of the weight as they were and where, so that unmerging restores them bit for
        # bit, whatever has been loaded into the adapter since.
        self._originals: dict[str, tuple[BlockLayout, Tensor]] = {}
        self._told: str | None = None
        base = self.get_base_layer()
        is_conv1d = isinstance(base, Conv1D)
        self.out_features = base.nf if is_conv1d else base.out_features
        self.in_features = base.nx if is_conv1d else base.in_features

    def weight_view(self) -> Tensor:
        """The base weight as an `(out_features, in_features)` view."""
        base = self.get_base_layer()
        return base.weight.t() if isinstance(base, Conv1D) else base.weight

    def update_layer(
        self,
        adapter_name: str,
        grid: BlockGrid,
        num_blocks: int,
        index: Tensor,
        config: SMTConfig,
        inference_mode: bool = False,
    ) -> None:
        """Add or replace an adapter of `num_blocks` blocks at the positions `index`, int32 `(num_blocks, 2)`."""
        if config.forward == "overlay":
            raise ValueError(
                f"{self.smt_name}: forward='overlay' serves quantised base layers and this one is a plain "
                f"{type(self.get_base_layer()).__name__}; use forward='auto'"
            )
        blocks = SMTBlocks(self.smt_name, grid, num_blocks)
        with torch.no_grad():
            if not blocks.index.is_meta:
                blocks.index.copy_(index)
            if not config.init_weights and not blocks.weight.is_meta:
                # As large as the weights themselves, so that tests see the delta act.
                mask = BlockLayout(grid, blocks.index).padding_mask() if grid.is_ragged else 1
                blocks.weight.normal_(std=0.02).mul_(mask)
        self.smt_blocks[adapter_name] = blocks
        self.smt_forward[adapter_name] = config.forward
        if not self.get_base_layer().weight.is_meta:
            self._move_adapter_to_device_of_base_layer(adapter_name)
        if not blocks.index.is_meta:
            # Made now, so that a compiler or tracer finds it made.
            self.smt_blocks[adapter_name].layout()
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's delta as a dense matrix of the shape and on the device of the base weight, fp32."""
        blocks = self.smt_blocks[adapter]
        delta = ops.dense(blocks.weight.detach(), blocks.layout())
        return delta.t() if isinstance(self.get_base_layer(), Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # A block-sparse delta is of high rank: a low-rank copy would silently lose most of it.
        return False

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write `round(base + delta)` into the base weight, keeping the blocks it replaces.

        Raises:
            ValueError: the base layer does not compute with its weight alone, or `safe_merge` is set and a merged block
                is not finite; nothing has been written then.
        """
        adapter_names = [a for a in check_adapters_to_merge(self, adapter_names) if a in self.smt_blocks]
        self.heal()
        self.check_merge(adapter_names, safe_merge)
        for adapter in adapter_names:
            layout = self.smt_blocks[adapter].layout()
            original, merged = self._merged_blocks(adapter)
            ops.block_scatter_(self.weight_view().data, merged, layout)
            self._originals[adapter] = layout, original
            self.merged_adapters.append(adapter)

    def check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise what `merge` would raise; nothing is written."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.smt_blocks]
        if names and (reason := why_not_merged(self.get_base_layer())):
            raise ValueError(
                f"{self.smt_name}: the blocks cannot be merged, because {reason}; use the adapter unmerged"
            )
        for adapter in names if safe_merge else ():
            if not bool(torch.isfinite(self._merged_blocks(adapter)[1]).all()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken (layer "
                    f"{self.smt_name}); the base weights were left as they were"
                )

    def _merged_blocks(self, adapter: str) -> tuple[Tensor, Tensor]:
        blocks = self.smt_blocks[adapter]
        original = ops.block_gather(self.weight_view().data, blocks.layout())
        return original, ops.add_rounded(original, blocks.weight.detach())

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        for adapter in list(reversed(self.merged_adapters)):
            self._unmerge_one(adapter)

    def _unmerge_one(self, adapter: str) -> None:
        weight = self.weight_view().data
        layout, original = self._originals.pop(adapter)
        if layout.blocks.device != weight.device:
            layout = BlockLayout(layout.grid, layout.blocks.to(weight.device))
        ops.block_scatter_(weight, original.to(weight.device), layout)
        self.merged_adapters.remove(adapter)

    def heal(self) -> None:
        """Put the base back if an interrupt cut a swap off; see `ops.swap`."""
        ops.heal(self.get_base_layer().weight)


class Linear(nn.Module, SMTLayer):
    """SMT over `torch.nn.Linear` or GPT-2's `Conv1D`. The class name is what PEFT's `all-linear` recognises."""

    def __init__(self, base_layer: nn.Module, name: str, **kwargs: Any):
        super().__init__()
        SMTLayer.__init__(self, base_layer, name, **kwargs)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        self.heal()
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_forward(x, adapter_names, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.smt_blocks]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if args or kwargs:
            return self._opaque_forward(x, active, *args, **kwargs)
        return self._chosen_forward(x, active)

    def _chosen_forward(self, x: Tensor, active: list[str]) -> Tensor:
        forwards = {self.smt_forward[name] for name in active}
        wanted = "swap" if "swap" in forwards else self.smt_forward[active[0]]
        unfused = self._why_not_fused(x, active)
        unswapped = unfused or why_not_swap(self.get_base_layer().weight)
        if wanted == "swap" and unswapped:
            raise RuntimeError(f"{self.smt_name}: forward='swap' is set, but {unswapped}; use forward='auto'")
        if unfused:
            return self._opaque_forward(x, active)
        # In evaluation other threads may read the weight at the same time, so it is written in training only.
        swap = wanted == "swap" or (wanted == "auto" and self.training and not unswapped)
        return self._fused_forward(x, self.smt_blocks[active[0]], swap)

    def _why_not_fused(self, x: Tensor, active: list[str]) -> str | None:
        if len(active) > 1:
            return "several adapters are active"
        if is_traced():
            return "the call is traced or transformed"
        return why_not_fused(self.base_layer, self.smt_blocks[active[0]], x)

    def _fused_forward(self, x: Tensor, blocks: SMTBlocks, swap: bool) -> Tensor:
        self._told = "swap" if swap else "additive"
        bias = self.get_base_layer().bias
        return ops.block_linear(x, self.weight_view(), bias, blocks.weight, blocks.layout(), swap)

    def _opaque_forward(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        self._told = "additive"
        y = self.base_layer(x, *args, **kwargs)
        add = ops.block_add_traceable if is_traced() else ops.block_add
        for name in active:
            blocks = self.smt_blocks[name]
            y = add(y, x, blocks.weight, blocks.layout())
        return y

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.heal()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.heal()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Linear:
        self.heal()
        return super()._apply(*args, **kwargs)

    def _check_mixed_batch(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Each row of the batch with its own adapter; `"__base__"` rows with none."""
        y = self.base_layer(x, *args, **kwargs).clone()
        for name in dict.fromkeys(adapter_names):
            if name not in self.smt_blocks:
                continue
            rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
            blocks = self.smt_blocks[name]
            y[rows] = ops.block_add(y[rows], x[rows], blocks.weight, blocks.layout())
        return y

    def extra_repr(self) -> str:
        return f"forward={self._told or 'not yet chosen'}"

    def __repr__(self) -> str:
        return "smt." + super().__repr__()
