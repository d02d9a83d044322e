"""Two matrices of ragged grids with blocks of a few, and a training of them that regrows."""

from __future__ import annotations

import copy

import torch
from helpers import Mlp
from peft import get_peft_model
from torch import nn

from smt_peft import SMTConfig

STEPS = 24
SETTINGS = {"every": 6, "share": 0.5, "score_steps": 3}
NUMBERS = {"lr": 3e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(16, size, generator=generator) for size in (20, 12))
    return x.to(dtype), y.to(dtype)


def trainable(model) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def small(**settings):
    """Two matrices of ragged grids, and the blocks of a few."""
    torch.manual_seed(0)
    base = Mlp()
    before = copy.deepcopy(base)
    config = {"target_modules": ["up", "down"], "block_size": 3, "density": 0.3, "score": "random", "spread": "free"}
    return before, get_peft_model(base, SMTConfig(**config | settings))


def run(model, schedule, optimizer, steps: int = STEPS, each=lambda step: None, first: int = 1, state=None) -> None:
    schedule.begin(model, optimizer, STEPS, state)
    for step in range(first, steps + 1):
        x, y = batch(step)
        (model(x) - y).square().mean().backward()
        schedule.before_update(step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_update(step)
        each(step)
