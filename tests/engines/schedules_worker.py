"""Trains the lesson with schedules under DDP; started by `torchrun`, see test_schedules_ddp.py."""

from __future__ import annotations

import io
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

STEPS, PROCESSES = 7, 2
# After 4 a period has begun, some of the scores of the next reselection are gathered and others are not.
STOPS = (None, 4)


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


def start(make: Callable[[], Schedule], wrap: Callable, saved: dict | None = None) -> tuple:
    """What trains: the model as it is called and itself, its blocks, optimizer and schedule; or as they were saved."""
    inner = student().train()
    blocks = trained_blocks(inner)
    if saved:
        inner.load_state_dict(saved["model"])
    optimizer, schedule = smt_adamw(trainable(inner)), make()
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    model = wrap(inner)
    schedule.begin(inner, optimizer, STEPS, saved and saved["schedule"])
    return model, inner, blocks, optimizer, schedule


def of_first(saved: dict) -> dict:
    """What every process reads of what the first one has written."""
    file = io.BytesIO()
    torch.save(saved, file)
    found = [file.getvalue()]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return torch.load(io.BytesIO(found[0]), weights_only=True)


def learn(make: Callable[[], Schedule], wrap: Callable = lambda model: model, stop: int | None = None) -> Learned:
    """Train; blocks that rest neither move nor have a gradient when the update comes.

    Args:
        stop: the update after which all is saved, and gone on with anew.
    """
    model, inner, blocks, optimizer, schedule = start(make, wrap)
    losses, trained = [], []
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
        if step == stop:
            states = {"model": inner, "optimizer": optimizer, "schedule": schedule}
            saved = of_first({name: each.state_dict() for name, each in states.items()})
            model, inner, blocks, optimizer, schedule = start(make, wrap, saved)
    schedule.end()
    assert not isinstance(schedule, Regrowth) or schedule.replaced > 0
    places = torch.cat([module.index for module in blocks.values()])
    deltas = torch.cat([module.weight.detach().flatten() for module in blocks.values()])
    return Learned(losses, trained, places.tolist(), deltas.tolist())


#: By name: the schedule, and what DDP is made with.
CASES: dict[str, tuple[Callable[[], Schedule], dict[str, bool]]] = {
    "layers in turn": (partial(LayerSampling, layers=1, every=3, order="ascending"), {"find_unused_parameters": True}),
    "layers in turn, views": (
        partial(LayerSampling, layers=1, every=3, order="ascending"),
        {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    ),
    "freezing": (partial(Freezing, share=0.5, moments="drop"), {"find_unused_parameters": True}),
    # No parameter rests, so that DDP need not look for any.
    "regrowth": (partial(Regrowth, every=3, share=0.9, score_steps=3), {}),
    "regrowth, kept": (partial(Regrowth, every=3, share=0.9, score_steps=3, dropped="keep"), {}),
}


def told_as(name: str, stop: int | None) -> str:
    return name if stop is None else f"{name}, gone on after {stop}"


def under_ddp(name: str, stop: int | None, out: Path) -> dict:
    make, settings = CASES[name]
    learned = asdict(learn(make, partial(DistributedDataParallel, **settings), stop))
    found = [None, None]
    dist.all_gather_object(found, learned)
    assert found[0] == found[1]
    return learned


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    run_cases(
        {told_as(name, stop): partial(under_ddp, name, stop) for name in CASES for stop in STOPS}, Path(sys.argv[1])
    )
    dist.destroy_process_group()
