"""Bases and adapters on disk, small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from smt_peft import SMTConfig

SETTINGS = {
    "score": "random",
    "density": 0.15,
    "block_size": 8,
    "init_weights": False,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


def save(
    directory: Path,
    build: Callable[[], PreTrainedModel],
    dtype: torch.dtype = torch.float32,
    shard: str = "50GB",
    **settings,
) -> PeftModel:
    """Write `base` and `adapter` into a directory; returns the model with the adapter, in evaluation mode."""
    model = build().to(dtype)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(model.config, name):
            # So that training mode, in which the blocks are swapped into the weight, computes the same at each call.
            setattr(model.config, name, 0.0)
    model.save_pretrained(directory / "base", max_shard_size=shard)
    base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype="auto")
    model = get_peft_model(base, SMTConfig(**SETTINGS | settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory / "adapter")
    return model
