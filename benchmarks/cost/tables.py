"""The results as tables of plain data: a list of column heads, and rows of strings and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smt_peft.config import DATA_FREE_SCORES, SMTConfig
from smt_peft.selection.warmup import WARMUP_BATCHES

Table = tuple[list[str], list[list[Any]]]
MIB = 2**20
#: Steps of the runs whose whole cost is told.
RUNS = (100, 1000, 10000)


def steps(result: Mapping[str, Any], point: str) -> Table:
    """Time and memory of every method at one point of a result, memory in MiB and split."""
    head = [
        "method",
        "trained",
        "x frozen",
        "p20",
        "p80",
        "peak MiB",
        "x frozen peak",
        "weights",
        "training",
        "transient",
    ]
    return head, [
        [
            row["method"],
            row["trainable"],
            row["ratio"],
            *row["ratio_p20_p80"],
            row["peak_bytes"] / MIB,
            row["peak_ratio"],
            *(row[f"{part}_bytes"] / MIB for part in ("weights", "training", "transient")),
        ]
        for row in measured(result, point)
    ]


def runs(result: Mapping[str, Any]) -> Table:
    """Whole runs as ratios to as many frozen passes, of the suite `warmup`.

    N steps of SMT cost `WARMUP_BATCHES` batches of the default score's warm-up and one choice, then N steps; of a
    rival, N steps.
    """
    rows = {row["method"]: row for row in measured(result, "warm-up")}
    frozen, choosing = rows["frozen"]["seconds"], rows[f"warm-up, {SMTConfig.score}"]
    once = WARMUP_BATCHES * choosing["seconds"] + choosing["choice_seconds"]
    lines = [
        [name, row["ratio"], *((row["seconds"] + once * (name == "smt matched") / n) / frozen for n in RUNS)]
        for name, row in rows.items()
        if "score" not in row
    ]
    return ["method", "one step", *(f"{n} steps" for n in RUNS)], lines


def warm_ups(result: Mapping[str, Any]) -> Table:
    """The warm-up pass by score: a batch and the choice in training steps, and the peak of memory."""
    head = ["score", "batch in steps", "choice in steps", "peak MiB", "x frozen peak", "x full forward + backward"]
    return head, [
        [
            row["score"],
            # A score without data has no batches; its row times an empty pass.
            None if row["score"] in DATA_FREE_SCORES else row["batch_in_steps"],
            row["choice_in_steps"],
            row["peak_bytes"] / MIB,
            row["peak_ratio"],
            row["peak_to_full_backward"],
        ]
        for row in measured(result, "warm-up")
        if "score" in row
    ]


def growth(result: Mapping[str, Any], axis: str, figure: str = "ratio") -> Table:
    """A figure of every method (`ratio` or `peak_ratio`) along an axis; a row for each value."""
    rows = [row for row in measured(result) if row.get("axis") == axis and row["method"] != "frozen"]
    names = list(dict.fromkeys(row["method"] for row in rows))
    points = list(dict.fromkeys(row["point"] for row in rows))
    found = {(row["point"], row["method"]): row[figure] for row in rows}
    return [axis, *names], [
        [point.partition("=")[2], *(found.get((point, name)) for name in names)] for point in points
    ]


def freezing(result: Mapping[str, Any]) -> Table:
    """What a step holds by the share of modules that are frozen and how inputs are kept; memory in MiB."""
    head = ["model", "frozen", "inputs", "saved", "most saved", "gradients", "training", "peak MiB", "x peak", "x time"]
    return head, [
        [
            row["kind"],
            f"{row['share']:.0%}",
            row["saved_activations"],
            *(row[f"{part}_bytes"] / MIB for part in ("saved", "most_saved", "gradient", "training", "peak")),
            row["peak_ratio"],
            row["ratio"],
        ]
        for row in measured(result)
    ]


def measured(result: Mapping[str, Any], point: str | None = None) -> list[Mapping[str, Any]]:
    """The rows of one point, or of all, without those that only say why they are not there."""
    return [row for row in result["rows"] if point in (None, row["point"]) and "reason" not in row]
