"""Figures of docs/results.md about quality, each drawn from the committed runs.

    python -m benchmarks.quality.figures      # draws docs/figures/*.svg

A figure carries the checksum of the points that it shows, so that a test can tell whether it is up to date without
comparing pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import studies
from .studies import SKILLS, Cell, cell
from .tables import TITLES, mean, outcomes, runs

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "figures"
COLOURS = {
    "smt": "#0072b2",
    "random": "#56b4e9",
    "diagonal": "#009e73",
    "lora": "#d55e00",
    "dora": "#cc79a7",
    "shira": "#e69f00",
    "full": "#555555",
}
BUDGETS = {0.32: 0.2, 2: 1.26, 6: 3.8, 16: 10.1}
Points = dict[str, Any]


def rates() -> Points:
    """Per skill and method: learning rate and accuracy on the validation rows, of seed 0."""
    return {
        task: {
            name: [
                [rate, 100 * run["validation"]["accuracy"] if run["validation"] else 0.0]
                for rate, run in runs().search(cell(task, name, 2)).items()
            ]
            for name in COLOURS
        }
        for task in SKILLS
    }


def budgets() -> Points:
    """Per method: share of the weights and mean accuracy over the skills."""
    found: Points = {}
    for name in ("smt", "random", "diagonal", "lora"):
        found[name] = []
        for rank, share in BUDGETS.items():
            part = {"modules": "qvo"} if name == "lora" and rank < 1 else {}
            accuracy = mean(outcomes(name, SKILLS, rank, **part), lambda each: each.accuracy)
            if accuracy is not None:
                found[name].append([share, accuracy])
    return found


def reach() -> Points:
    """Every way to choose as many weights: mean share of rows and columns reached, and mean accuracy, by spread."""
    cells: dict[str, list[Cell]] = {}
    for each in studies.cells(["core", "scope", "spread", "blocks", "rivals"]):
        if each.method == "smt" and each.budget == 2:
            cells.setdefault(each.name, []).append(each)
    found: Points = {"free": [], "capped": [], "assignment": []}
    for name, those in cells.items():
        results = [runs().outcome(each) for each in those]
        if None not in results:
            reached = mean(results, lambda each: 50 * (each.shape("rows") + each.shape("cols")))
            found[those[0].settings["spread"]].append([reached, mean(results, lambda each: each.accuracy), name])
    return found


def draw_rates(points: Points, figure: Figure) -> None:
    axes = figure.subplots(1, len(points), sharey=True)
    for axis, (task, curves) in zip(axes, points.items(), strict=True):
        for name, curve in curves.items():
            axis.plot(*zip(*curve, strict=True), marker="o", markersize=3, color=COLOURS[name], label=label(name))
        finish(axis, "learning rate", "")
        axis.set_xscale("log")
        axis.set_title(task, fontsize=10)
    axes[0].set_ylabel("exact match on validation rows, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def draw_budgets(points: Points, figure: Figure) -> None:
    axis = figure.subplots()
    for name, curve in points.items():
        axis.plot(*zip(*curve, strict=True), marker="o", markersize=4, color=COLOURS[name], label=label(name))
    finish(axis, "trained share of the linear weights, %", "exact match, mean of three skills, %")
    axis.set_xscale("log")
    axis.set_xticks(list(BUDGETS.values()), [f"{share:g}" for share in BUDGETS.values()])
    axis.minorticks_off()
    axis.legend(fontsize=8, frameon=False)


def draw_reach(points: Points, figure: Figure) -> None:
    axis = figure.subplots()
    for (spread, found), colour in zip(points.items(), ("#d55e00", "#e69f00", "#0072b2"), strict=True):
        axis.scatter([x for x, _, _ in found], [y for _, y, _ in found], s=22, color=colour, label=spread)
    finish(axis, "rows and columns that a trained block touches, mean, %", "exact match, mean of three skills, %")
    axis.legend(fontsize=8, frameon=False)


def label(name: str) -> str:
    return TITLES[name].replace("*", "")


def finish(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_ylim(-3, 103)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


FIGURES: dict[str, tuple[Callable[[], Points], Callable[[Points, Figure], None], tuple[float, float]]] = {
    "rates": (rates, draw_rates, (9.5, 3.9)),
    "budgets": (budgets, draw_budgets, (5.5, 3.6)),
    "reach": (reach, draw_reach, (5.5, 3.6)),
}


def checksum(points: Points) -> str:
    return hashlib.sha256(json.dumps(points, sort_keys=True).encode()).hexdigest()[:16]


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    # The same points give the same file: no date in it, and names of parts that do not change.
    with matplotlib.rc_context({"svg.hashsalt": "smt-peft", "svg.fonttype": "none", "font.family": "sans-serif"}):
        for name, (collect, draw, size) in FIGURES.items():
            points = collect()
            figure = Figure(figsize=size, layout="constrained", facecolor="white")
            draw(points, figure)
            path = FOLDER / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None, "Description": f"points {checksum(points)}"})
            print(path.name)


if __name__ == "__main__":
    main()
