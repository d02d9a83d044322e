"""`optim: mezo`: runs without a backward pass, of every task."""

from __future__ import annotations

import pytest
import torch
from runs import Workshop, assert_resumed_alike, losses
from transformers import TrainerCallback

from smt_peft.optim import MeZO
from smt_peft.training.errors import ConfigError
from smt_peft.training.run import train
from smt_peft.training.yaml.schema import load_run

MEZO = {"optim": "mezo", "learning_rate": 1e-3, "gradient_checkpointing": None, "seed": 3}
SMT = {"block_size": 8, "density": 0.1, "score": "random"}


class Watch(TrainerCallback):
    """Keeps the optimizer, and looks for what a backward pass leaves."""

    def __init__(self):
        self.rates, self.norms, self.gradients = [], [], 0

    def on_train_begin(self, args, state, control, optimizer=None, model=None, **others):
        self.optimizer, self.model = getattr(optimizer, "optimizer", optimizer), model

    def on_pre_optimizer_step(self, args, state, control, **others):
        self.gradients += sum(p.grad is not None for p in self.model.parameters())
        self.norms.append(self.optimizer.projected.square().mean().sqrt().item())

    def on_step_end(self, args, state, control, **others):
        self.rates.append(self.optimizer.param_groups[0]["lr"])


def test_a_run_of_everything(workshop):
    watch = Watch()
    path = workshop.write("mezo", **MEZO, compare_lora=True, verify=True, smt=SMT)
    metrics = train(load_run(path), [watch])
    print({k: v for k, v in metrics.items() if k in ("before", "after", "lora", "memory")})
    print(losses(metrics))
    assert type(watch.optimizer) is MeZO
    assert watch.gradients == 0
    assert [norm for _, norm in losses(metrics).values()] == pytest.approx(watch.norms)


def test_resume(workshop):
    assert_resumed_alike(workshop, **MEZO, smt=SMT)
