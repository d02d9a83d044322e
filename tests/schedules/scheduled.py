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


def optimizer_of(model: torch.nn.Module, kind: Callable = torch.optim.AdamW, lr: float = 1e-3, **settings):
    return kind([p for p in model.parameters() if p.requires_grad], lr=lr, **settings)


def train(
    model: PeftModel,
    schedule: Schedule,
    steps: int,
    optimizer: torch.optim.Optimizer,
    each: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """As `Schedule` says; `each` is called with the step before its update, gradients there. Returns the losses."""
    losses = []
    schedule.begin(model, optimizer, steps)
    for step in range(1, steps + 1):
        loss = model(**batch(seed=step)).loss
        loss.backward()
        schedule.before_update(step)
        each(step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_update(step)
        losses.append(loss.item())
    schedule.end()
    return losses
