"""Layers that train in turn: a step while the lowest of them trains, and while the highest does, beside all at once.

Blocks and optimizer are those of `step`. Who trains next is decided once in many updates, which is no part of a step.
"""

from __future__ import annotations

from dataclasses import replace

from . import methods
from .model import Case
from .result import Result
from .step import compare


def suite(result: Result, case: Case, rounds: int, warmup: int) -> None:
    """Without and with activation checkpointing."""
    for point, variant in (("plain", case), ("checkpointed", replace(case, checkpointing=True))):
        if not result.has(point):
            result.add(point, compare(methods.in_turn(variant), variant, rounds, warmup))
