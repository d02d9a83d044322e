"""A training whose blocks give way to others: what a step takes on average from one reselection to the next."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from torch import nn

from smt_peft.optim import SMTAdamW
from smt_peft.schedules import Regrowth

from .methods import Method
from .training import Note, Training


@dataclass
class RegrowingTraining(Training):
    """Its step is a whole period, of which the last step is noted: one that gathers scores and then reselects."""

    schedule: Regrowth = field(default_factory=Regrowth)
    done: int = 0

    def step(self, size: tuple[int, int], note: Note = lambda phase: None) -> float:
        """Seconds of a step on average."""
        if self.done == 0:
            # So long that the share of blocks that give way stays what it is at first.
            self.schedule.begin(self.model, self.optimizer, 10**9)
        seconds = 0.0
        for number in range(self.schedule.every):
            last = number == self.schedule.every - 1
            seconds += super().step(size, note if last else lambda phase: None)
        return seconds / self.schedule.every

    def _update(self) -> None:
        super()._update()
        self.done += 1
        self.schedule.after_update(self.done)


@dataclass(frozen=True)
class RegrowingMethod(Method):
    """SMT with the defaults of `Regrowth`."""

    def on(self, base: nn.Module) -> Training:
        training = super().on(base)
        return RegrowingTraining(training.model, training.optimizer, training.autocast)


def regrown(method: Method) -> Method:
    """The same, by `SMTAdamW`, with blocks that give way to others."""
    settings = {each.name: getattr(method, each.name) for each in fields(method)}
    return RegrowingMethod(**settings | {"optimizer": SMTAdamW})
