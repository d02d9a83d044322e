"""What SMT layers have in common: a frozen base layer, the adapters over it, and merging them."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..bases.fingerprint import Weight
from ..bases.sharded import execution_device, full, is_offloaded, present
from ..bases.target import evidence_of
from ..blocks import BlockGrid, BlockLayout
from ..config import SMTConfig
from ..say import once
from .delta import SMTBlocks
from .gate import why_not_merged
from .low_rank import LowRank, dense_sum, whole


class SMTLayer(BaseTunerLayer):
    """What SMT layers have in common: their adapters, and merging them."""

    adapter_layer_names = ("smt_blocks", "smt_low_rank")
    other_param_names = ("smt_forward",)
    # Whether rows of the weight are looked up instead of multiplied with.
    looked_up = False
    # Whether a low-rank pair may stand beside the blocks.
    takes_low_rank = False

    def __init__(self, base_layer: nn.Module, name: str, **kwargs: Any):
        self.base_layer = base_layer
        self.smt_name = name
        self.smt_blocks = nn.ModuleDict()
        self.smt_low_rank = nn.ModuleDict()
        self.smt_forward: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        # Per merged adapter the blocks of the weight as they were and where, so that unmerging restores them bit for
        # bit, whatever has been loaded into the adapter since. A low-rank pair changes all of the weight: one block.
        self._originals: dict[str, tuple[BlockLayout, Tensor]] = {}
        # What has been merged into the weight, in order: by this layer and, where the weight is tied, by others.
        self._merges: list[tuple[SMTLayer, str]] = []
        self._told: str | None = None
        self.out_features, self.in_features = self._features()

    def _features(self) -> tuple[int, int]:
        base = self.get_base_layer()
        return (base.nf, base.nx) if isinstance(base, Conv1D) else (base.out_features, base.in_features)

    def weight_view(self) -> Tensor:
        """The base weight as an `(out_features, in_features)` view."""
        base = self.get_base_layer()
        return base.weight.t() if isinstance(base, Conv1D) else base.weight

    def stored_weight(self) -> Tensor:
        """The base weight as it is stored."""
        return self.get_base_layer().weight

    def evidence(self) -> Weight:
        """What a fingerprint of the base is taken of."""
        return evidence_of(self.get_base_layer(), self.weight_view())

    def check_forward(self, forward: str) -> None:
        """Raise `ValueError`, naming the module, when `SMTConfig.forward` asks for what this layer can never do."""
        if forward == "overlay":
            raise ValueError(
                f"{self.smt_name}: forward='overlay' serves quantised base layers and this one is a plain "
                f"{type(self.get_base_layer()).__name__}; use forward='auto'"
            )

    def check_grid(self, grid: BlockGrid) -> None:
        """Raise `ValueError`, naming the module, when the weight cannot be tiled so."""

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
        self.check_forward(config.forward)
        self.check_grid(grid)
        self._check_low_rank(config.lora_rank)
        int8 = config.saved_activations == "int8"
        blocks = SMTBlocks(self.smt_name, grid, num_blocks, self.looked_up, int8)
        # Whole, also where DeepSpeed has partitioned it at birth.
        with torch.no_grad(), present(blocks, modify=True):
            blocks.place(index)
            if not config.init_weights and not blocks.weight.is_meta:
                # As large as the weights themselves, so that tests see the delta act.
                mask = BlockLayout(grid, blocks.index).padding_mask() if grid.is_ragged else 1
                blocks.weight.normal_(std=0.02).mul_(mask)
        self.smt_blocks[adapter_name] = blocks
        if config.lora_rank is not None:
            self.smt_low_rank[adapter_name] = LowRank(self.smt_name, grid.shape, config)
        elif adapter_name in self.smt_low_rank:
            del self.smt_low_rank[adapter_name]
        self.smt_forward[adapter_name] = config.forward
        base = self.get_base_layer()
        if is_offloaded(base):
            self._move_adapter_to_device_of_base_layer(adapter_name, execution_device(base))
        elif not self.stored_weight().is_meta:
            self._move_adapter_to_device_of_base_layer(adapter_name)
        if not blocks.index.is_meta:
            # Made now, so that a compiler or tracer finds it made.
            self.smt_blocks[adapter_name].layout()
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _check_low_rank(self, rank: int | None) -> None:
        if rank is not None and not self.takes_low_rank:
            raise ValueError(
                f"{self.smt_name}: lora_rank={rank} puts a low-rank pair beside the blocks of linear layers, and a "
                f"{type(self.get_base_layer()).__name__} is none; add this module to exclude_modules, or leave "
                "lora_rank out"
            )

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        # PEFT hands one list to all layers; a compiler notes which of them share it, and would compile anew once
        # switching adapters has changed that.
        self._active_adapter = list(self._active_adapter)
        for blocks in self.smt_blocks.values():
            blocks.resting = False

    def enable_adapters(self, enabled: bool) -> None:
        resting = [blocks for blocks in self.smt_blocks.values() if blocks.resting]
        super().enable_adapters(enabled)
        # PEFT lets all of the active adapters train then, in the middle of a step where a reference is computed without
        # them.
        for blocks in resting:
            blocks.resting = True
            blocks.weight.requires_grad_(False)

    def acting(self) -> list[str]:
        """The adapters that a call is to compute with, after an interrupted swap is put right."""
        self.heal()
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.smt_blocks]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's delta as a dense matrix of the shape and on the device of the base weight, fp32."""
        delta = ops.dense(*reversed(self.change(adapter)))
        retired = self.smt_blocks[adapter].retired
        if retired is not None:
            delta += ops.dense(retired.weight, retired.layout())
        return delta.t() if isinstance(self.get_base_layer(), Conv1D) else delta

    def pair(self, adapter: str) -> LowRank | None:
        """The low-rank pair beside the adapter's blocks, where it has one."""
        return self.smt_low_rank[adapter] if adapter in self.smt_low_rank else None  # noqa: SIM401 (no such method)

    def change(self, adapter: str) -> tuple[BlockLayout, Tensor]:
        """Where an adapter changes the weight, and what it adds there: its blocks, or, with a low-rank pair, the whole
        matrix as one block."""
        blocks = self.smt_blocks[adapter]
        layout, delta = blocks.layout(), full(blocks.weight)
        pair = self.pair(adapter)
        if pair is None:
            return layout, delta
        delta = dense_sum(delta, layout, full(pair.lora_A), full(pair.lora_B), pair.scaling)
        return whole(layout.grid, delta.device), delta[None]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # A block-sparse delta is of high rank: a low-rank copy would silently lose most of it.
        once("smt_peft.export.lora.convert_to_lora makes the LoRA form of an SMT adapter and tells how much it keeps")
        return False

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write `round(base + delta)` into the base weight, keeping the blocks it replaces.

        Raises:
            ValueError: the base layer does not compute with its weight alone, or `safe_merge` is set and a merged block
                is not finite; nothing has been written then.
        """
        adapter_names = self._to_merge(adapter_names)
        self.heal()
        self.check_merge(adapter_names, safe_merge)
        for adapter in adapter_names:
            layout, original, merged = self._merged_blocks(adapter)
            ops.block_scatter_(self.weight_view().data, merged, layout)
            self._originals[adapter] = layout, original
            self._merges.append((self, adapter))
            self.merged_adapters.append(adapter)

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        return [name for name in check_adapters_to_merge(self, adapter_names) if name in self.smt_blocks]

    def check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise what `merge` would raise; nothing is written."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.smt_blocks]
        if names and (reason := self._why_not_merged()):
            raise ValueError(
                f"{self.smt_name}: the blocks cannot be merged, because {reason}; use the adapter unmerged"
            )
        for adapter in names:
            # Refuses an impossible index.
            self.smt_blocks[adapter].layout()
            if self.smt_blocks[adapter].retired is not None:
                raise ValueError(
                    f"{self.smt_name}: blocks that a schedule has retired would be left out; merge after the training, "
                    "once the schedule's end() was called"
                )
        for adapter in names if safe_merge else ():
            if not bool(torch.isfinite(self._merged_blocks(adapter)[-1]).all()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken (layer "
                    f"{self.smt_name}); the base weights were left as they were"
                )

    def _why_not_merged(self) -> str | None:
        return why_not_merged(self.get_base_layer())

    def _merged_blocks(self, adapter: str) -> tuple[BlockLayout, Tensor, Tensor]:
        """Where an adapter changes the weight, what stands there, and what merging makes of it."""
        layout, delta = self.change(adapter)
        original = ops.block_gather(self.readable_weight(), layout)
        return layout, original, ops.add_rounded(original, delta)

    def readable_weight(self) -> Tensor:
        """The base weight in floats, `(out_features, in_features)`."""
        return self.weight_view().data

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit.

        What a layer with the same (tied) weight has merged since is taken out too: it was merged on top of this.
        """
        while self.merged_adapters:
            layer, adapter = self._merges.pop()
            layer._unmerge_one(adapter)

    def _unmerge_one(self, adapter: str) -> None:
        self._put_originals(self.weight_view().data, adapter)
        del self._originals[adapter]
        self.merged_adapters.remove(adapter)

    def _put_originals(self, weight: Tensor, adapter: str) -> None:
        layout, original = self._originals[adapter]
        if layout.blocks.device != weight.device:
            layout = BlockLayout(layout.grid, layout.blocks.to(weight.device))
        ops.block_scatter_(weight, original.to(weight.device), layout)

    def unmerged_weight(self) -> Tensor:
        """A copy of the base weight, `(out_features, in_features)`, without what is merged into it."""
        weight = self.weight_view().detach().clone()
        for layer, adapter in reversed(self._merges):
            layer._put_originals(weight, adapter)
        return weight

    def heal(self) -> None:
        """Put the base back if an interrupt cut a swap off; see `ops.swap`."""
        ops.heal(self.stored_weight())

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
