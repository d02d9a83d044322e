"""Step time and peak memory of every method as a ratio to the frozen pass, all in one process.

The frozen pass is forward plus the gradient of the inputs through the same frozen model: what any adapter must pay.
A step of a method is forward, backward, AdamW step and zero_grad. All models live side by side and take turns in a
shuffled order, so that a slow spell of the machine falls on every method; the figure is the median of the per-round
ratios. Memory is traced before, one model at a time, as tracing costs time. What SMT costs once, its warm-up pass, is
no part of a step: `warmup` has it, and whole runs that include it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from smt_peft.bench.measure import ratios, spread

from . import methods
from .memory import step_memory
from .methods import Method
from .model import Case
from .result import Result
from .training import Training

# What is measured with checkpointing too: one of each kind.
CHECKPOINTED = ("frozen", "smt matched", "smt clustered", "released, clustered", "lora", "dora", "shira", "full")


def suite(result: Result, case: Case, rounds: int, warmup: int) -> None:
    """Every method, without and with activation checkpointing."""
    chosen = methods.small(case)
    plain, checkpointed = f"{case.density:.2%}", f"{case.density:.2%}, checkpointed"
    if not result.has(plain):
        result.add(plain, compare(chosen, case, rounds, warmup))
    if not result.has(checkpointed):
        few = {name: method for name, method in chosen.items() if name.partition(" r")[0] in CHECKPOINTED}
        result.add(checkpointed, compare(few, replace(case, checkpointing=True), rounds, warmup))


def compare(
    chosen: Mapping[str, Method], case: Case, rounds: int, warmup: int, build: Callable[[], nn.Module] | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each method; `"frozen"`, what ratios are taken to, must be among them.

    Args:
        build: makes the frozen model anew; by default `case.build`.
    """
    build = build or case.build
    memory = {
        name: step_memory(lambda note, method=method: method.started(build, note), case.batch)
        for name, method in chosen.items()
    }
    built = {name: method.started(build) for name, method in chosen.items()}
    seconds = interleaved(
        {name: lambda t=training: t.step(case.batch) for name, training in built.items()}, rounds, warmup
    )
    weights = methods.targeted(built["frozen"].model, case.targets)
    for name, training in built.items():
        yield row(name, case, training, seconds[name], seconds["frozen"]) | {
            **memory[name],
            "trained_share": training.trainable / weights,
            "peak_ratio": memory[name]["peak_bytes"] / memory["frozen"]["peak_bytes"],
        }


def interleaved(steps: Mapping[str, Callable[[], Any]], rounds: int, warmup: int) -> dict[str, list]:
    """The seconds that each step says it took, round by round, in an order that is shuffled anew every round."""
    rng = random.Random(0)
    seconds: dict[str, list] = {name: [] for name in steps}
    for index in range(warmup + rounds):
        order = list(steps)
        rng.shuffle(order)
        for name in order:
            taken = steps[name]()
            if index >= warmup:
                seconds[name].append(taken)
    return seconds


def row(name: str, case: Case, training: Training, seconds: list[float], frozen: list[float]) -> dict[str, Any]:
    median, percentiles = spread(seconds)
    ratio, ratio_percentiles = spread(ratios(seconds, frozen))
    return {
        "method": name,
        **vars(case),
        "seconds": median,
        "seconds_p20_p80": percentiles,
        "ratio": ratio,
        "ratio_p20_p80": ratio_percentiles,
        "trainable": training.trainable,
        "trained_modules": training.modules,
    }
