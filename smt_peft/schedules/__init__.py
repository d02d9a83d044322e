"""Schedules: which of the chosen blocks train changes while a model trains.

Each is a dataclass of settings that runs by itself in a hand-written loop, in any trainer of Transformers with
`ScheduleCallback`, and as a block of its name in a YAML.
"""

from .callback import ScheduleCallback
from .freezing import Freezing
from .regrowth import Regrowth
from .sampling import LayerSampling
from .schedule import Schedule

#: By the name of their block in a YAML.
SCHEDULES: dict[str, type[Schedule]] = {schedule.name: schedule for schedule in (LayerSampling, Freezing, Regrowth)}

__all__ = ["SCHEDULES", "Freezing", "LayerSampling", "Regrowth", "Schedule", "ScheduleCallback"]
