"""SMT over linear layers, and which of its forwards a call takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops
from .delta import SMTBlocks
from .gate import is_traced, why_not_fused, why_not_swap
from .healing import HealingModule
from .layer import SMTLayer


class Linear(HealingModule, SMTLayer):
    """SMT over `torch.nn.Linear` or GPT-2's `Conv1D`. The class name is what PEFT's `all-linear` recognises."""

    takes_low_rank = True

    def __init__(self, base_layer: nn.Module, name: str, **kwargs: Any):
        super().__init__()
        SMTLayer.__init__(self, base_layer, name, **kwargs)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        active = self.acting()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_forward(x, adapter_names, *args, **kwargs)
        if not active:
            return self.base_layer(x, *args, **kwargs)
        opaque = args or kwargs
        y = self._opaque_forward(x, active, *args, **kwargs) if opaque else self._chosen_forward(x, active)
        return self.add_low_rank(y, x, active) if self.smt_low_rank else y

    def add_low_rank(self, y: Tensor, x: Tensor, active: list[str]) -> Tensor:
        """What low-rank pairs of these adapters add to the layer's output, where there are any."""
        for name in active:
            if name in self.smt_low_rank:
                y = self.smt_low_rank[name](y, x)
        return y

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
        blocks = self.smt_blocks[active[0]]
        y = self._fused_forward(x, blocks, swap)
        return y if blocks.retired is None else blocks.retired(y, x)

    def _why_not_fused(self, x: Tensor, active: list[str]) -> str | None:
        if len(active) > 1:
            return "several adapters are active"
        if is_traced():
            return "the call is traced or transformed"
        if type(blocks := self.smt_blocks[active[0]]) is not SMTBlocks:
            return f"the blocks are wrapped in a {type(blocks).__name__}"
        return why_not_fused(self.base_layer, blocks, x)

    def _fused_forward(self, x: Tensor, blocks: SMTBlocks, swap: bool) -> Tensor:
        self._told = "swap" if swap else "additive"
        bias = self.get_base_layer().bias
        return ops.block_linear(x, self.weight_view(), bias, blocks.weight, blocks.layout(), swap, blocks.int8)

    def _opaque_forward(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        self._told = "additive"
        y = self._base_output(x, *args, **kwargs)
        for name in active:
            y = self.smt_blocks[name](y, x)
        return y

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(x, *args, **kwargs)

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Each row of the batch with its own adapter; `"__base__"` rows with none."""
        y = self.base_layer(x, *args, **kwargs).clone()
        for name in dict.fromkeys(adapter_names):
            if name not in self.smt_blocks:
                continue
            rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
            y[rows] = self.add_low_rank(self.smt_blocks[name](y[rows], x[rows]), x[rows], [name])
        return y

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            # Nothing takes this merge back, and with low-rank pairs they are as large as the model.
            self._originals.clear()
        return self.get_base_layer()

    def extra_repr(self) -> str:
        return f"forward={self._told or 'not yet chosen'}"
