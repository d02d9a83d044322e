"""PEFT's LoRA on the same modules with as many trainable weights, to compare a run with."""

from __future__ import annotations

from peft import LoraConfig

from ..blocks import BlockSelection


def lora_config(
    selection: BlockSelection,
    modules_to_save: list[str] | None = None,
    task_type: str = "CAUSAL_LM",
    lora_rank: int | None = None,
) -> LoraConfig:
    """LoRA on every weight that the selection could have chosen from, of the rank that comes nearest in size.

    A rank-r LoRA of a `(rows, cols)` weight has `r * (rows + cols)` weights, and each expert has its own.
    `lora_alpha` is twice the rank, so that the scale of the update does not depend on the rank; there is no dropout.
    `modules_to_save` are trained in full, as beside the blocks; `lora_rank` is that of the low-rank pairs beside the
    blocks, which count, too.
    """
    experts = selection.provenance.get("experts", {})
    per_rank = sum(grid.rows + grid.cols * experts.get(name, 1) for name, grid in selection.grids.items())
    pairs = sum((lora_rank or 0) * sum(selection.grids[name].shape) for name in selection.blocks)
    rank = max(1, round((selection.effective_numel + pairs) / per_rank))
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=[name for name in selection.grids if name not in experts],
        target_parameters=list(experts) or None,
        modules_to_save=modules_to_save,
        task_type=task_type,
    )
