"""Trains the lesson with layers in turn under DDP; started by `torchrun`, see test_layers_in_turn.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from cases import run_cases
from lesson import adamw, mean, part, student, trainable
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smt_peft.schedules import LayerSampling
from smt_peft.schedules.trained import trained_blocks

STEPS = 6


def learn(wrap: Callable[[nn.Module], nn.Module], dtype: torch.dtype = torch.float32) -> tuple[list[float], Tensor]:
    """The losses, and all deltas in a row; resting blocks neither move nor have a gradient when the update comes."""
    inner = student(dtype).to(dtype).train()
    blocks = trained_blocks(inner)
    model, optimizer = wrap(inner), adamw(trainable(inner))
    schedule, losses = LayerSampling(layers=1, every=2, order="ascending"), []
    schedule.begin(inner, optimizer, STEPS)
    for step in range(1, STEPS + 1):
        before = {name: module.weight.detach().clone() for name, module in blocks.items()}
        loss = model(**part(step)).loss
        loss.backward()
        schedule.before_update(step)
        active = schedule.active((step - 1) // 2)
        assert {name for name, module in blocks.items() if module.weight.grad is not None} == active
        optimizer.step()
        optimizer.zero_grad()
        assert {name for name, module in blocks.items() if not torch.equal(module.weight, before[name])} == active
        schedule.after_update(step)
        losses.append(mean(loss))
    schedule.end()
    return losses, torch.cat([module.weight.detach().flatten() for module in blocks.values()])


def under_ddp(out: Path, **settings) -> dict:
    losses, deltas = learn(partial(DistributedDataParallel, find_unused_parameters=True, **settings))
    mine = deltas.clone()
    dist.broadcast(mine, src=0)
    assert torch.equal(mine, deltas)
    return {"losses": losses, "deltas": deltas.tolist()}


CASES = {"ddp": under_ddp, "ddp_views": partial(under_ddp, gradient_as_bucket_view=True)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    run_cases(CASES, Path(sys.argv[1]))
    dist.destroy_process_group()
