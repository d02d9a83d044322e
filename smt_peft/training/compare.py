"""PEFT's LoRA on the same modules with as many trainable weights, to compare a run with."""

from __future__ import annotations

from peft import LoraConfig

from ..blocks import BlockSelection


def lora_config(selection: BlockSelection, modules_to_save: list[str] | None = None) -> LoraConfig:
    """LoRA on every module that the selection could have chosen from, of the rank that comes nearest in size.

    A rank-r LoRA of a `(rows, cols)` weight has `r * (rows + cols)` weights. `lora_alpha` is twice the rank, so that
    the scale of the update does not depend on the rank; there is no dropout. `modules_to_save` are trained in full, as
    beside the blocks.
    """
    per_rank = sum(grid.rows + grid.cols for grid in selection.grids.values())
    rank = max(1, round(selection.effective_numel / per_rank))
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=list(selection.grids),
        modules_to_save=modules_to_save,
        task_type="CAUSAL_LM",
    )
