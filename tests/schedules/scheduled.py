"""A tiny model of several layers with an SMT adapter, and a hand-written training of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import batch, tiny_llama
from peft import PeftModel, get_peft_model

from smt_peft import SMTConfig
from smt_peft.schedules import Schedule


def adapted(layers: int = 4, **settings) -> PeftModel:
    torch.manual_seed(0)
    model = tiny_llama(layers=layers)
    return get_peft_model(model, SMTConfig(**{"block_size": 4, "density": 0.05, "score": "random", **settings}))


def train(
    model: PeftModel, schedule: Schedule, steps: int, optimizer: torch.optim.Optimizer, each: Callable[[int], None]
) -> None:
    """As `Schedule` says; `each` is called with the step before its update, gradients there."""
    schedule.begin(model, optimizer, steps)
    for step in range(1, steps + 1):
        model(**batch(seed=step)).loss.backward()
        schedule.before_update(step)
        each(step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_update(step)
    schedule.end()
