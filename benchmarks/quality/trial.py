"""One run: a method, a budget, a learning rate and a seed on a task, trained and scored."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from smt_peft import BlockSelection
from smt_peft.optim import MeZO, SMTAdamW
from smt_peft.schedules import Regrowth
from smt_peft.tuner.padding import padding_masks

from .methods import Prepared, of_head, prepare
from .task import Task

#: Of a classifier's head, under every method alike.
HEAD_RATE = 2e-3
BETAS = (0.9, 0.98)
CLIP = 1.0
WARMUP_SHARE = 0.1
#: For every skill another one.
NEXT = "next"
_AFTER = {"reverse": "sort", "sort": "shift", "shift": "reverse"}


@dataclass(frozen=True)
class Trial:
    """What defines a run; two that are equal give the same result.

    Args:
        task: name of the task.
        method: as `methods.prepare` takes it.
        budget: rank of the LoRA with as many trainable weights.
        rate: peak learning rate.
        seed: of everything random.
        settings: as `methods.prepare` takes them; `warmup_task` and `avoid_task` are names here, or `NEXT`, and
            `optimizer` may be `"mezo"`.
    """

    task: str
    method: str
    budget: float
    rate: float
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)


def run(trial: Trial, tasks: dict[str, Task]) -> dict[str, Any]:
    """Train and score; plain data, ready for JSON.

    Seconds of the selection and of the training stand apart; a total is their sum. A run whose loss is no longer finite
    ends there: accuracy 0, `diverged` true.
    """
    task, settings = tasks[trial.task], dict(trial.settings)
    for key in ("warmup_task", "avoid_task"):
        if key in settings:
            settings[key] = tasks[_AFTER[trial.task] if settings[key] == NEXT else settings[key]]
    train_by = TRAIN[settings.pop("optimizer", "adamw")]
    start = time.perf_counter()
    prepared = prepare(task, trial.method, trial.budget, settings, trial.seed)
    chosen = time.perf_counter()
    loss = train_by(prepared, task, trial.rate, trial.seed)
    seconds = {"selection": round(chosen - start, 2), "training": round(time.perf_counter() - chosen, 2)}
    result = asdict(trial) | {"trainable": prepared.trainable, "seconds": seconds, "diverged": not math.isfinite(loss)}
    if prepared.selection is not None:
        result["selection"] = shape_of(prepared.selection)
    if result["diverged"]:
        return result | {"validation": None, "test": None, "remembered": None}
    return result | {
        "train_loss": loss,
        "validation": asdict(task.score(prepared.model, "validation")),
        "test": asdict(task.score(prepared.model, "test")),
        "remembered": task.remembered(prepared.model),
    }


def train(prepared: Prepared, task: Task, rate: float, seed: int) -> float:
    """AdamW without weight decay, linear warm-up, constant to the middle, then linear to zero; the last loss."""
    model = prepared.model
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[of_head(name, task.head)].append(parameter)
    # The same numbers; blocks that are regrown need steps of their own.
    regrown = any(isinstance(schedule, Regrowth) for schedule in prepared.schedules)
    optimizer = (SMTAdamW if regrown else torch.optim.AdamW)(
        [
            {"params": parameters, "peak": HEAD_RATE if head else rate}
            for head, parameters in groups.items()
            if parameters
        ],
        betas=BETAS,
        weight_decay=0.0,
    )
    for schedule in prepared.schedules:
        schedule.begin(model, optimizer, task.steps)
    model.train()
    loss, batches = torch.zeros(()), task.batches(seed)
    for step in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor(step, task.steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=task.autocast):
            loss = model(**next(batches)).loss
        if not torch.isfinite(loss):
            break
        loss.backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], CLIP)
        for schedule in prepared.schedules:
            schedule.before_update(step + 1)
        optimizer.step()
        optimizer.zero_grad()
        for schedule in prepared.schedules:
            schedule.after_update(step + 1)
    for schedule in prepared.schedules:
        schedule.end()
    return loss.item()


def train_forward_only(prepared: Prepared, task: Task, rate: float, seed: int) -> float:
    """As `train`, without schedules, by `MeZO`: as many steps of two forward passes each; the last loss."""
    model = prepared.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = MeZO(trained, seed=seed, masks=padding_masks(model))
    model.train()
    loss, batches = torch.zeros(()), task.batches(seed)
    for step in range(task.steps):
        optimizer.param_groups[0]["lr"] = rate * factor(step, task.steps)
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=task.autocast):
            loss = optimizer.step(lambda batch=batch: model(**batch).loss)
        if not torch.isfinite(loss):
            break
    return loss.item()


#: By the `optimizer` of a trial's settings.
TRAIN = {"adamw": train, "mezo": train_forward_only}


def factor(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / (WARMUP_SHARE * steps), (steps - step) / (0.5 * steps))


def shape_of(selection: BlockSelection) -> dict[str, float]:
    """How the chosen blocks lie.

    `modules`: share of the modules that hold any; `rows`, `cols`: share of all output rows, and input columns, of the
    targets that a block touches (columns are what must be kept for the backward pass); `top_module`: share of the
    trained weights in the fullest module; `lowest`: number of the first layer that trains, below which no backward pass
    is needed; `mass`: share of the sum of all scores that the chosen blocks hold.
    """
    rows = cols = 0
    numel, layers, mass, total = [], [], 0.0, 0.0
    for name, blocks in selection.blocks.items():
        grid, layout = selection.grids[name], selection.layout(name)
        rows += int(grid.heights()[layout.block_rows.unique()].sum())
        cols += layout.columns.numel()
        numel.append(layout.effective_numel)
        layers += [int(part) for part in name.split(".") if part.isdigit()][:1]
        if name in selection.scores:
            mass += float(selection.scores[name][blocks[:, 0].long(), blocks[:, 1].long()].double().sum())
    total = sum(float(scores.double().sum()) for scores in selection.scores.values())
    found = {
        "modules": len(selection.blocks) / len(selection.grids),
        "rows": rows / sum(grid.rows for grid in selection.grids.values()),
        "cols": cols / sum(grid.cols for grid in selection.grids.values()),
        "top_module": max(numel) / sum(numel),
        "lowest": min(layers, default=0),
    }
    return {key: round(value, 4) for key, value in found.items()} | ({"mass": round(mass / total, 4)} if total else {})
