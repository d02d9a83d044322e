"""What holds of schedules of every kind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers import batch
from scheduled import adapted, optimizer_of, train

from smt_peft import SMTConfig
from smt_peft.optim import SMTAdamW
from smt_peft.schedules import Freezing, LayerSampling, Regrowth
from smt_peft.schedules.trained import trained_blocks


@pytest.mark.parametrize(
    "schedule", [LayerSampling(layers=1, every=3), Freezing(share=0.5, every=3)], ids=lambda s: s.name
)
def test_an_adapter_that_is_switched_away_and_back_does_not_wake_what_rests(schedule):
    model = adapted(layers=2)
    blocks = trained_blocks(model)
    model.add_adapter("other", SMTConfig(block_size=4, density=0.05, score="random"))
    others = {name: p.detach().clone() for name, p in model.named_parameters() if "smt_blocks.other" in name}
    before = {name: module.weight.detach().clone() for name, module in blocks.items()}
    optimizer = optimizer_of(model)
    schedule.begin(model, optimizer, 3)
    active = {name for name, module in blocks.items() if module.weight.requires_grad}
    for step in (1, 2):
        model.set_adapter("other")
        model.set_adapter("default")
        model(**batch(seed=step)).loss.backward()
        schedule.before_update(step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_update(step)
    assert {name for name, module in blocks.items() if not torch.equal(module.weight, before[name])} == active
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if name in others)


@pytest.mark.parametrize(
    "schedule",
    [
        LayerSampling(layers=1, every=1, moments="drop"),
        LayerSampling(layers=1, every=1, moments="move"),
        Freezing(share=0.5, moments="keep"),
        Freezing(share=0.5, moments="drop"),
        Freezing(share=0.5, moments="move"),
        Regrowth(every=2, share=0.9, score_steps=2, dropped="revert"),
        Regrowth(every=2, share=0.9, score_steps=2, dropped="keep"),
    ],
    ids=str,
)
def test_one_that_has_ended_keeps_neither_model_nor_optimizer(schedule):
    model = adapted(layers=2)
    optimizer = optimizer_of(model, SMTAdamW)
    train(model, schedule, 4, optimizer)
    gone = weakref.ref(next(iter(trained_blocks(model).values()))), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
