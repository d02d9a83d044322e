"""What every schedule answers to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

#: What a generator takes of a seed.
SEEDS = 2**64 - 1


def check_whole(schedule: Schedule, **least: int | None) -> None:
    """Raise `ValueError` unless each of these settings is a whole number of at least so much (None: any)."""
    for name, bound in least.items():
        value = getattr(schedule, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if bound is not None and value < bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}")


def check_share(schedule: Schedule, most: float) -> None:
    """Raise `ValueError` unless `share` is a number above 0 and at most so much."""
    share = schedule.share
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= most:
        raise ValueError(f"share must be above 0 and at most {most:g}, got {share!r}")


class Schedule(ABC):
    """Something about the trained blocks that changes while they train. Subclasses are dataclasses of settings.

    A loop calls `begin` once, then around every update `before_update` and `after_update`, at last `end`:

        schedule.begin(model, optimizer, total_steps)
        for step, batch in enumerate(batches, start=1):
            model(**batch).loss.backward()
            schedule.before_update(step)
            optimizer.step()
            optimizer.zero_grad()
            schedule.after_update(step)
        schedule.end()

    To go on from a checkpoint, restore model and optimizer, then call `begin` with the checkpoint's state.
    """

    #: Of its block in a YAML, and in a checkpoint.
    name: ClassVar[str]
    #: Whether it says which blocks train; of two that do, neither would know what the other has decided.
    decides_what_trains: ClassVar[bool] = False
    #: Whether parameters that require a gradient at the start do without one for a while.
    lets_rest: ClassVar[bool] = False
    #: What a plan of the memory leaves out, in words.
    uncounted: ClassVar[str] = ""

    def check_arguments(self, args: Any) -> None:  # noqa: B027
        """Raise `ValueError` where the arguments of a trainer do not go with it; names one and the repair."""

    @abstractmethod
    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Before the first update.

        Args:
            model: with one SMT adapter that trains.
            optimizer: of its parameters; made while all of them required a gradient, which they still do.
            total_steps: updates of the whole training.
            state: what `state_dict` returned, to go on from there.

        Raises:
            ValueError: the schedule cannot run on this model; names the setting and the repair.
        """

    def before_update(self, step: int) -> None:  # noqa: B027 (nothing to do for some)
        """The gradients of update `step` (from 1) are there and clipped."""

    def after_update(self, step: int) -> None:  # noqa: B027
        """Update `step` is done, and the gradients are cleared."""

    def end(self) -> None:  # noqa: B027
        """After the last update: what was changed in the model for the training alone is put back."""

    def finish(self, model: nn.Module, state: dict[str, Any]) -> None:  # noqa: B027
        """Bring a model, loaded from the checkpoint of the last update, to where `end` would leave it.

        Args:
            model: with the checkpoint's adapter.
            state: what `state_dict` returned.
        """

    def state_dict(self) -> dict[str, Any]:
        """What going on takes besides the model and the optimizer: tensors and plain data."""
        return {}
