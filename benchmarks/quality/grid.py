"""Runs kept one by one, so that a grid can be stopped at any moment and go on, and the search for a learning rate."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import traceback
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from smt_peft.bench.environment import record

from ..commit import commit
from .studies import SEEDS, TASKS, Cell
from .task import Task
from .trial import Trial, run

#: Most runs that the search for one cell's learning rate may take; neighbours differ by a factor of two.
SEARCH_LIMIT = 7


class Store:
    """A directory with one JSON file per run."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, trial: Trial) -> Path:
        text = json.dumps(asdict(trial), sort_keys=True)
        return self.directory / f"{trial.task}-{trial.method}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def get(self, trial: Trial) -> dict[str, Any] | None:
        try:
            return json.loads(self.path(trial).read_text())
        except FileNotFoundError:
            return None

    def put(self, trial: Trial, result: dict[str, Any]) -> None:
        path = self.path(trial)
        # Written aside and renamed: a file that is there is whole.
        aside = path.with_suffix(f".{os.getpid()}.part")
        aside.write_text(json.dumps(result) + "\n")
        aside.replace(path)

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.directory.glob("*.json"))]


def better(result: dict[str, Any]) -> tuple[float, float]:
    """Sorts runs by what chooses a learning rate: accuracy on the validation rows, then their loss."""
    if result["validation"] is None:
        return -1.0, -math.inf
    return result["validation"]["accuracy"], -result["validation"]["loss"]


def rates(start: float) -> dict[int, float]:
    """Learning rates of the search by their place on the grid, 0 being where it starts."""
    return {place: float(f"{start * 2.0**place:.6g}") for place in range(-SEARCH_LIMIT, SEARCH_LIMIT + 1)}


def settle(cell: Cell, measure, seeds: int = SEEDS, tune: bool = True) -> list[dict[str, Any]]:
    """Tune the learning rate of a cell on the validation rows of seed 0, then run the other seeds at the best.

    The search starts with a rate and its two neighbours and goes on until the best has been tried on both sides.

    Args:
        cell: what to run.
        measure: trial to result.
        seeds: how many seeds, the one of the search included.
        tune: False runs `cell.start` only.

    Returns:
        The results of all seeds at the best rate.
    """
    grid = rates(cell.start)
    first = Trial(cell.task, cell.method, cell.budget, grid[0], 0, cell.settings)
    tried: dict[int, dict[str, Any]] = {}
    waiting = [0, 1, -1] if tune else [0]
    while waiting and len(tried) < SEARCH_LIMIT:
        place = waiting.pop(0)
        tried[place] = measure(replace(first, rate=grid[place]))
        best = max(tried, key=lambda at: better(tried[at]))
        if tune and not waiting:
            waiting = [at for at in (best + 1, best - 1) if at not in tried][:1]
    best = max(tried, key=lambda at: better(tried[at]))
    others = [measure(replace(first, rate=grid[best], seed=seed)) for seed in range(1, seeds)]
    return [tried[best], *others]


def run_cells(cells: list[Cell], directory: Path, workers: int, seeds: int = SEEDS) -> list[str]:
    """Run cells, several at once; a cell that fails is told and left out. Returns what failed."""
    context, failures = multiprocessing.get_context("spawn"), []
    with context.Pool(workers, initializer=_start, maxtasksperchild=40) as pool:
        jobs = pool.imap_unordered(_job, [(cell, directory, seeds) for cell in cells])
        for name, told, failed in tqdm(jobs, total=len(cells), unit="cell", mininterval=10):
            tqdm.write(f"{name:58s} {told}")
            if failed:
                failures.append(f"{name}: {told}")
    return failures


def _start() -> None:
    torch.set_num_threads(1)


@cache
def _task(name: str) -> Task:
    return TASKS[name]()


class _Tasks(dict):
    def __missing__(self, name: str) -> Task:
        return _task(name)


@cache
def _environment() -> dict[str, Any]:
    found = record("cpu") | {"commit": commit()}
    return {key: value for key, value in found.items() if key not in ("load_average", "build")}


def _job(job: tuple[Cell, Path, int]) -> tuple[str, str, bool]:
    cell, directory, seeds = job
    name = f"{cell.task} r{cell.budget:g} {cell.name}"
    try:
        results = settle(cell, lambda trial: measured(trial, Store(directory)), seeds)
    except Exception:
        return name, traceback.format_exc(), True
    scores = [result["test"]["accuracy"] if result["test"] else 0.0 for result in results]
    shown = " ".join(f"{100 * score:5.1f}" for score in scores)
    return name, f"{100 * sum(scores) / len(scores):5.1f} %  ({shown})  rate {results[0]['rate']:g}", False


def measured(trial: Trial, store: Store) -> dict[str, Any]:
    """From the store, or run now and kept there."""
    found = store.get(trial)
    if found is None:
        found = run(trial, _Tasks()) | {"environment": _environment(), "described": _task(trial.task).describe()}
        store.put(trial, found)
    return found


def collect(results: Iterable[dict[str, Any]], file: Path) -> None:
    """Many runs as one file: what they share once, then one run per line, in an order that does not change."""
    shared: dict[str, list] = {"environment": [], "described": []}
    lines = []
    for result in results:
        result = dict(result)
        for key, values in shared.items():
            value = result.pop(key)
            if value not in values:
                values.append(value)
            result[key] = values.index(value)
        lines.append(json.dumps(result))
    head = ",\n".join(f"{json.dumps(key)}: {json.dumps(values, indent=1)}" for key, values in shared.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{\n" + head + ',\n"runs": [\n' + ",\n".join(sorted(lines)) + "\n]}\n")


def collected(file: Path) -> list[dict[str, Any]]:
    """The runs of a file that `collect` wrote, each whole again."""
    found = json.loads(file.read_text())
    shared = ("environment", "described")
    return [run | {key: found[key][run[key]] for key in shared} for run in found["runs"]]
