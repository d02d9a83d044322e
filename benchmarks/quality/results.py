"""Committed runs, and what a cell came to: the same search for a rate as when they were run, over what is there."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .grid import settle
from .studies import SEEDS, Cell
from .trial import Trial

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quality"


@dataclass(frozen=True)
class Outcome:
    """The runs of all seeds of a cell at its best learning rate."""

    cell: Cell
    runs: list[dict[str, Any]]

    @cached_property
    def accuracies(self) -> list[float]:
        """Of the test rows, in percent; 0 for a run that diverged."""
        return [100 * run["test"]["accuracy"] if run["test"] else 0.0 for run in self.runs]

    @property
    def accuracy(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds, in points."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    @property
    def rate(self) -> float:
        return self.runs[0]["rate"]

    @property
    def trainable(self) -> int:
        return self.runs[0]["trainable"]

    @property
    def remembered(self) -> float | None:
        """Mean loss on the text of pre-training, in nats per byte; None where the task has none."""
        found = [run["remembered"] for run in self.runs]
        return None if None in found else statistics.mean(found)

    @property
    def warmup_share(self) -> float:
        """Seconds of the selection as a share of selection and training."""
        seconds = [run["seconds"] for run in self.runs]
        chosen = sum(each["selection"] for each in seconds)
        return chosen / (chosen + sum(each["training"] for each in seconds))

    def shape(self, key: str) -> float | None:
        """Mean of a figure of `trial.shape_of`."""
        found = [run.get("selection", {}).get(key) for run in self.runs]
        return None if None in found else statistics.mean(found)


class Runs:
    """Runs of all tasks, found by the trial that they are of."""

    def __init__(self, runs: list[dict[str, Any]]):
        self.runs = {_key(run): run for run in runs}

    @classmethod
    def read(cls, directory: Path = RESULTS) -> Runs:
        return cls([run for file in sorted(directory.glob("*.json")) for run in json.loads(file.read_text())["runs"]])

    def outcome(self, cell: Cell, seeds: int = SEEDS) -> Outcome | None:
        """None where a run of the cell is missing."""
        try:
            return Outcome(cell, settle(cell, lambda trial: self.runs[_key(asdict(trial))], seeds))
        except KeyError:
            return None

    def search(self, cell: Cell) -> dict[float, dict[str, Any]]:
        """Runs of seed 0 by learning rate, sorted."""
        wanted = _key(asdict(Trial(cell.task, cell.method, cell.budget, 0.0, 0, cell.settings)))
        found = {run["rate"]: run for run in self.runs.values() if _key(run | {"rate": 0.0}) == wanted}
        return dict(sorted(found.items()))


def _key(run: Mapping[str, Any]) -> str:
    return json.dumps({key: run[key] for key in Trial.__dataclass_fields__}, sort_keys=True)
