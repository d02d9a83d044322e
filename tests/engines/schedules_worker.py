"""Trains the lesson with schedules under DDP; started by `torchrun`, see test_schedules_ddp.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from cases import run_cases
from helpers import batch
from lesson import ROWS, mean, part, smt_adamw, student, trainable
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from smt_peft.schedules import Freezing, LayerSampling, Regrowth, Schedule
from smt_peft.schedules.trained import trained_blocks

STEPS, PROCESSES = 6, 2


@dataclass
class Learned:
    """What a training came to.

    Args:
        losses: of every update, the mean over processes.
        trained: the modules that moved, update by update.
        places: where every block lies at the end.
        deltas: all of them in a row.
    """

    losses: list[float]
    trained: list[list[str]]
    places: list[list[int]]
    deltas: list[float]


def micro_batches(step: int) -> list[dict[str, Tensor]]:
    """The rows of this process; one process alone takes those of two, one after the other, as scores do."""
    if dist.is_initialized():
        return [part(step)]
    whole = batch(rows=ROWS, seed=step)
    return [{name: tensor[process::PROCESSES] for name, tensor in whole.items()} for process in range(PROCESSES)]


def learn(schedule: Schedule, wrap: Callable = lambda model: model) -> Learned:
    """Train; blocks that rest neither move nor have a gradient when the update comes."""
    inner = student().train()
    blocks = trained_blocks(inner)
    optimizer = smt_adamw(trainable(inner))
    model, losses, trained = wrap(inner), [], []
    schedule.begin(inner, optimizer, STEPS)
    for step in range(1, STEPS + 1):
        before = {name: module.weight.detach().clone() for name, module in blocks.items()}
        micro = micro_batches(step)
        mine = [model(**rows).loss / len(micro) for rows in micro]
        for loss in mine:
            loss.backward()
        schedule.before_update(step)
        reached = [name for name, module in blocks.items() if module.weight.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        trained.append([name for name, module in blocks.items() if not torch.equal(module.weight, before[name])])
        assert trained[-1] == reached == [name for name, module in blocks.items() if module.weight.requires_grad]
        schedule.after_update(step)
        losses.append(mean(sum(loss.double() for loss in mine)))
    schedule.end()
    places = torch.cat([module.index for module in blocks.values()])
    deltas = torch.cat([module.weight.detach().flatten() for module in blocks.values()])
    return Learned(losses, trained, places.tolist(), deltas.tolist())


#: By name: the schedule, and what DDP is made with.
CASES: dict[str, tuple[Callable[[], Schedule], dict[str, bool]]] = {
    "layers in turn": (partial(LayerSampling, layers=1, every=2, order="ascending"), {"find_unused_parameters": True}),
    "layers in turn, views": (
        partial(LayerSampling, layers=1, every=2, order="ascending"),
        {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    ),
    "freezing": (partial(Freezing, share=0.5, moments="drop"), {"find_unused_parameters": True}),
    # No parameter rests, so that DDP need not look for any.
    "regrowth": (partial(Regrowth, every=2, share=0.9, score_steps=2), {}),
    "regrowth, kept": (partial(Regrowth, every=2, share=0.9, score_steps=2, dropped="keep"), {}),
}


def under_ddp(name: str, out: Path) -> dict:
    make, settings = CASES[name]
    learned = asdict(learn(make(), partial(DistributedDataParallel, **settings)))
    found = [None, None]
    dist.all_gather_object(found, learned)
    assert found[0] == found[1]
    return learned


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    run_cases({name: partial(under_ddp, name) for name in CASES}, Path(sys.argv[1]))
    dist.destroy_process_group()
