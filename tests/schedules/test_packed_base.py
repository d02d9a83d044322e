"""Schedules over a quantised base: what trains, and what it learns, is that of the dequantised one."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers import tiny_llama
from packing import DEQUANTISABLE, packed_linear, plain_linear, same_storage, storage
from peft import PeftModel, get_peft_model
from scheduled import train
from torch import nn

from smt_peft import SMTConfig
from smt_peft.optim import SMTAdamW
from smt_peft.schedules import Freezing, LayerSampling, Regrowth
from smt_peft.schedules.trained import trained_blocks

SCHEDULES = {
    "layers in turn": lambda: LayerSampling(layers=1, every=2),
    "freezing": lambda: Freezing(share=0.75, moments="drop"),
    "regrowth": lambda: Regrowth(every=3, share=0.9, score_steps=2),
    "regrowth, kept": lambda: Regrowth(every=3, share=0.9, score_steps=2, dropped="keep"),
}


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def changed(model: nn.Module, change) -> nn.Module:
    """A copy with `change` of every linear layer but the head in its place."""
    model = copy.deepcopy(model)
    for name, layer in list(model.model.named_modules()):
        if name.endswith("_proj"):
            model.model.set_submodule(name, change(layer))
    return model


def learned(base: nn.Module, name: str, **settings) -> tuple[PeftModel, list[float]]:
    """The base with blocks that a schedule of this name has trained, and the losses."""
    model = get_peft_model(base, SMTConfig(block_size=8, density=0.1, score="random", **settings)).train()
    schedule = SCHEDULES[name]()
    optimizer = SMTAdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = train(model, schedule, 8, optimizer)
    assert not isinstance(schedule, Regrowth) or schedule.replaced > 0
    return model, losses


@pytest.mark.parametrize("saved", ["full", "int8"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", DEQUANTISABLE)
def test_blocks_are_those_over_the_dequantised_base_bit_for_bit(kind, name, saved):
    torch.manual_seed(0)
    packed = changed(tiny_llama(hidden=64, layers=2), lambda linear: packed_linear(linear, kind))
    plain, before = changed(packed, plain_linear), storage(packed)
    ours, our_losses = learned(packed, name, saved_activations=saved)
    theirs, their_losses = learned(plain, name, saved_activations=saved, forward="swap")
    assert our_losses == their_losses
    found = trained_blocks(ours)
    for module, blocks in trained_blocks(theirs).items():
        assert torch.equal(found[module].index, blocks.index) and torch.equal(found[module].weight, blocks.weight)
    assert same_storage(before, storage(ours.unload()))
