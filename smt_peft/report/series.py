"""What a training has logged, as curves and as a rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Entry = Mapping[str, Any]
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        name: for the legend.
        points: `(step, value)`, by step.
        kind: `"main"`, `"other"` or `"rival"`, which says how it is drawn.
    """

    name: str
    points: tuple[Point, ...]
    kind: str = "main"


@dataclass(frozen=True)
class Curve:
    """One chart over the steps.

    Args:
        title: what is drawn.
        lines: at least one, none of them empty.
        form: format of a value, as of `format`.
        zero: whether the axis is to start at 0.
    """

    title: str
    lines: tuple[Line, ...]
    form: str = ".3g"
    zero: bool = False


def curves(history: Sequence[Entry], rival: Sequence[Entry] = (), rival_name: str = "LoRA") -> list[Curve]:
    """The charts for which something was logged: losses, learning rate, gradient norm, tokens per second, update.

    Args:
        history: `log_history` of the trainer.
        rival: that of the run it is compared with.
        rival_name: its name.
    """
    charts = [
        Curve(
            "Loss",
            (
                Line("training", _points(history, "loss")),
                Line("evaluation", _points(history, "eval_loss"), "other"),
                Line(f"{rival_name}, training", _points(rival, "loss"), "rival"),
            ),
        ),
        Curve("Learning rate", (Line("learning rate", _points(history, "learning_rate")),), ".2g", zero=True),
        Curve("Gradient norm", (Line("gradient norm", _points(history, "grad_norm")),), zero=True),
        Curve("Tokens per second", (Line("tokens per second", rates(history)),), ",.0f", zero=True),
        Curve("Effective update", (Line("share of entries", _points(history, "effective_update")),), ".0%", zero=True),
    ]
    drawn = []
    for chart in charts:
        lines = tuple(line for line in chart.lines if line.points)
        if any(len(line.points) > 1 for line in lines):
            drawn.append(Curve(chart.title, lines, chart.form, chart.zero))
    return drawn


def tokens_per_second(history: Sequence[Entry]) -> float | None:
    """Tokens of all processes by the time between the first step and the last entry, evaluations and saving within it.

    A resumed training counts from where its process began: what is between the last entry before and that is not known.
    None where the entries do not say.
    """
    spans = _spans(history)
    seconds = sum(span for _, _, span in spans)
    return round(sum(tokens for _, tokens, _ in spans) / seconds, 1) if seconds else None


def rates(history: Sequence[Entry]) -> tuple[Point, ...]:
    """Tokens per second from entry to entry."""
    return tuple((step, tokens / span) for step, tokens, span in _spans(history))


def _spans(history: Sequence[Entry]) -> list[tuple[float, float, float]]:
    """`(step, tokens, seconds)` from entry to entry; both counts begin anew with each process that trained."""
    found, tokens, elapsed = [], 0.0, 0.0
    for entry in history:
        if "num_tokens" not in entry or "elapsed" not in entry or "loss" not in entry:
            continue
        if entry["elapsed"] < elapsed:
            tokens = elapsed = 0.0
        if entry["elapsed"] > elapsed and entry["num_tokens"] >= tokens:
            found.append((entry["step"], entry["num_tokens"] - tokens, entry["elapsed"] - elapsed))
        tokens, elapsed = entry["num_tokens"], entry["elapsed"]
    return found


def _points(history: Sequence[Entry], key: str) -> tuple[Point, ...]:
    return tuple(
        (entry["step"], float(entry[key]))
        for entry in history
        if "step" in entry and isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key])
    )
