"""Schedules in a trainer of Transformers, checkpoints included."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from .schedule import Schedule

FILE = "schedules.pt"


class ScheduleError(ValueError):
    """A schedule cannot run on the model, with the optimizer, or from the checkpoint that the training begins with."""


class ScheduleCallback(TrainerCallback):
    """Runs schedules around the updates of a trainer, and saves their state in its checkpoints.

    Args:
        schedules: each of another kind.

    Raises:
        ValueError: no schedule, two of a kind, or two that both decide what trains; from `train`, a `ScheduleError`: a
            schedule cannot run on the model, the training is sharded or distributed in a way that wants a gradient of
            every parameter, or the checkpoint that is resumed from was saved without these schedules.
    """

    def __init__(self, *schedules: Schedule):
        names = [schedule.name for schedule in schedules]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"ScheduleCallback takes one or more schedules, each of another kind, got {names}")
        check_together(schedules)
        # Those that let blocks rest come last, so that the others begin with all of them.
        self.schedules = sorted(schedules, key=lambda schedule: schedule.decides_what_trains)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        try:
            self._begin(args, state, model, optimizer)
        except ValueError as error:
            raise ScheduleError(str(error)) from error

    def _begin(self, args: TrainingArguments, state: TrainerState, model: nn.Module, optimizer: Any) -> None:
        check_engine(args, self.schedules)
        for schedule in self.schedules:
            schedule.check_arguments(args)
        saved = self._saved(args, state) if state.global_step else {}
        for schedule in self.schedules:
            schedule.begin(model, optimizer, state.max_steps, saved.get(schedule.name))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for schedule in self.schedules:
            schedule.before_update(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        for schedule in self.schedules:
            schedule.after_update(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        checkpoint = _checkpoint(args, state)
        # A trainer that publishes whole checkpoints has asked for the file before; one that searches for settings saves
        # in directories of its own, from which nothing is resumed.
        if args.should_save and checkpoint.is_dir() and not (checkpoint / FILE).exists():
            self.save(checkpoint)

    def on_train_end(self, args, state, control, **kwargs):
        for schedule in self.schedules:
            schedule.end()

    def save(self, checkpoint: Path) -> None:
        """Write the state of the schedules into the directory of a checkpoint."""
        aside = checkpoint / f"{FILE}.part"
        torch.save({schedule.name: schedule.state_dict() for schedule in self.schedules}, aside)
        aside.replace(checkpoint / FILE)

    def finish(self, model: nn.Module, checkpoint: Path) -> None:
        """Bring a model with the adapter of a training's last checkpoint to where the training would leave it.

        A directory without the state of schedules holds what came out of the training; there is nothing to do then.
        """
        if (checkpoint / FILE).is_file():
            saved = self._read(checkpoint)
            for schedule in self.schedules:
                schedule.finish(model, saved[schedule.name])

    def _saved(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        named = args.resume_from_checkpoint
        return self._read(Path(named) if isinstance(named, str) else _checkpoint(args, state))

    def _read(self, checkpoint: Path) -> dict[str, Any]:
        if not (checkpoint / FILE).is_file():
            raise ValueError(
                f"{checkpoint} has no {FILE}, so it was saved without a schedule; resume without one or start anew, or "
                "name the checkpoint that was meant in TrainingArguments(resume_from_checkpoint=...) as well"
            )
        saved = torch.load(checkpoint / FILE, weights_only=True, map_location="cpu")
        if saved.keys() != {schedule.name for schedule in self.schedules}:
            raise ValueError(
                f"{checkpoint} was saved with the schedules {sorted(saved)}, not "
                f"{sorted(schedule.name for schedule in self.schedules)}; resume with those, or start anew"
            )
        return saved


def check_together(schedules: Sequence[Schedule]) -> None:
    """Raise `ValueError` where two schedules both decide what trains."""
    deciding = [schedule.name for schedule in schedules if schedule.decides_what_trains]
    if len(deciding) > 1:
        raise ValueError(f"{' and '.join(deciding)} both decide which blocks train; leave one of them out")


def check_engine(args: TrainingArguments, schedules: Sequence[Schedule]) -> None:
    """Raise `ValueError` where an engine holds every parameter to the gradient that it had at the start."""
    engines = {
        "DeepSpeed": getattr(args, "deepspeed", None) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true",
        "FSDP": getattr(args, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP") == "true",
    }
    if engine := next((engine for engine, used in engines.items() if used), None):
        raise ValueError(
            f"{schedules[0].name} changes what trains, which {engine} does not follow; leave one of them out"
        )
    resting = [schedule.name for schedule in schedules if schedule.lets_rest]
    if resting and args.world_size > 1 and not args.ddp_find_unused_parameters:
        raise ValueError(
            f"{resting[0]} lets parameters rest, for which DDP would wait; set ddp_find_unused_parameters: true"
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
