"""SMT over embedding tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .healing import HealingModule
from .layer import SMTLayer


class Embedding(HealingModule, SMTLayer):
    """SMT over `torch.nn.Embedding` and its subclasses: blocks of the `(num_embeddings, embedding_dim)` table.

    Every look-up adds the blocks to the rows it has found, rounded as merging rounds, so that a merged table gives the
    same bit for bit. What a subclass makes of the rows (Gemma scales them) it makes of the changed rows. `padding_idx`
    and `scale_grad_by_freq` mean for the blocks what they mean for the table. The table itself is never written.
    """

    looked_up = True

    def __init__(self, base_layer: nn.Module, name: str, **kwargs: Any):
        super().__init__()
        SMTLayer.__init__(self, base_layer, name, **kwargs)

    def _features(self) -> tuple[int, int]:
        base = self.get_base_layer()
        return base.num_embeddings, base.embedding_dim

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        # This heals the weight, which a tied output head may have been swapping when an interrupt came.
        active = self.acting()
        if adapter_names is not None and not self.disable_adapters:
            return self._looked_up(x, lambda rows, ids: self._mixed_rows(rows, ids, adapter_names), *args, **kwargs)
        if not active:
            return self.base_layer(x, *args, **kwargs)
        return self._looked_up(x, lambda rows, ids: self._changed_rows(rows, ids, active), *args, **kwargs)

    def _looked_up(self, x: Tensor, change: Callable, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        if type(base).forward is nn.Embedding.forward:
            return change(self.base_layer(x, *args, **kwargs), x)
        with ops.LookUps(base, change) as look_ups:
            y = self.base_layer(x, *args, **kwargs)
        # Compilers cannot ask.
        if not torch.compiler.is_compiling() and look_ups.seen == 0:
            raise RuntimeError(
                f"{self.smt_name}: {type(base).__name__}.forward does not look its weight up with "
                "torch.nn.functional.embedding, so the blocks had no effect; add this module to exclude_modules, or "
                "merge the adapter"
            )
        return y

    def _changed_rows(self, rows: Tensor, ids: Tensor, active: list[str]) -> Tensor:
        base = self.get_base_layer()
        for name in active:
            blocks = self.smt_blocks[name]
            rows = ops.block_rows_add(
                rows, ids, blocks.weight, blocks.layout(), base.padding_idx, base.scale_grad_by_freq
            )
        return rows

    def _mixed_rows(self, rows: Tensor, ids: Tensor, adapter_names: list[str]) -> Tensor:
        """Each row of the batch with its own adapter; `"__base__"` rows with none."""
        rows = rows.clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.smt_blocks:
                which = [number for number, wanted in enumerate(adapter_names) if wanted == name]
                rows[which] = self._changed_rows(rows[which], ids[which], [name])
        return rows
