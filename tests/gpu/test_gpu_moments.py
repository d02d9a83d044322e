"""Moments of resting layers on a GPU: none on the device, pinned on the host, and back where they were, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import batch, tiny_llama
from peft import get_peft_model

from smt_peft import SMTConfig
from smt_peft.optim import SMTAdamW
from smt_peft.schedules import LayerSampling
from smt_peft.schedules.trained import by_layer, trained_blocks

pytestmark = pytest.mark.gpu
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {}),
    "adamw, fused": (torch.optim.AdamW, {"fused": True}),
    "smt_adamw_8bit": (SMTAdamW, {"state_dtype": "8bit"}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moved_moments_wait_in_pinned_memory_and_come_back_to_their_device(name):
    kind, settings = OPTIMIZERS[name]
    model = get_peft_model(tiny_llama(layers=2), SMTConfig(block_size=4, density=0.05, score="random")).cuda()
    blocks = trained_blocks(model)
    optimizer = kind([module.weight for module in blocks.values()], lr=1e-2, **settings)
    schedule = LayerSampling(layers=1, every=1, order="ascending", moments="move")
    schedule.begin(model, optimizer, 3)
    lower = by_layer(blocks)["model.layers.0"]
    for step in (1, 2):
        model(**{key: ids.cuda() for key, ids in batch(seed=step).items()}).loss.backward()
        schedule.before_update(step)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            before = {each: copy.deepcopy(optimizer.state[blocks[each].weight]) for each in lower}
        schedule.after_update(step)
        if step == 1:
            away = schedule.state_dict()["moments"]
            assert set(away) == set(lower) and not optimizer.state
            assert all(value.is_pinned() for state in away.values() for value in state["moved"].values())
    for each in lower:
        back = optimizer.state[blocks[each].weight]
        assert back.keys() == before[each].keys()
        for key, value in before[each].items():
            assert back[key].device == value.device and torch.equal(back[key], value), (each, key)
