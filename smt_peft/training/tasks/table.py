"""The tasks by the names that `task` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .classification import Classification
from .dpo import Dpo
from .sft import Sft
from .task import Task

if TYPE_CHECKING:
    from ..yaml.schema import Run

TASKS: dict[str, Task] = {"sft": Sft(), "dpo": Dpo(), "classification": Classification()}


def task_of(run: Run) -> Task:
    return TASKS[run.config.task]
