"""The closing table of a run: before, after, LoRA beside it, and where the chosen blocks lie. Plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..blocks import BlockSelection
from .places import Place, places
from .words import percent


def report(metrics: Mapping[str, Any], selection: BlockSelection) -> str:
    """The report of a run in Markdown that reads well as plain text.

    Args:
        metrics: as in `metrics.json`: `before`, `after`, optionally `lora`, `trainable_parameters`, and
            optionally `effective_update`, and `seconds`, by part of the run.
        selection: the chosen blocks.
    """
    parts = ["## Result", results(metrics)]
    if "seconds" in metrics:
        laps = ", ".join(f"{name} {seconds:.0f}" for name, seconds in metrics["seconds"].items())
        parts.append(f"Seconds of the SMT run: {laps}.")
    parts += ["## Blocks chosen where", selection.summary() + ".", by_kind(selection)]
    layers = by_layer(selection)
    if layers:
        parts.append(layers)
    return "\n\n".join(parts) + "\n"


def results(metrics: Mapping[str, Any]) -> str:
    """One row per model: the base, the base with chosen blocks trained, the base with LoRA."""
    trainable = {"trainable_parameters": metrics["trainable_parameters"]}
    if "share" in metrics.get("effective_update", {}):
        trainable["effective_update"] = percent(metrics["effective_update"]["share"])
    rows = {"before": metrics["before"], "SMT": {**trainable, **metrics["after"]}}
    if "lora" in metrics:
        rows[f"LoRA, rank {metrics['lora']['rank']}"] = metrics["lora"]
    columns = {
        "exact_match": ("exact match", "{:.1%}"),
        "accuracy": ("accuracy", "{:.1%}"),
        "f1": ("F1", "{:.1%}"),
        "reward_accuracy": ("chosen preferred", "{:.1%}"),
        "reward_margin": ("reward margin", "{:.4f}"),
        "eval_loss": ("eval loss", "{:.4f}"),
        "trainable_parameters": ("trainable parameters", "{:,}"),
        "effective_update": ("of them changed", "{}"),
        "seconds": ("training seconds", "{:.0f}"),
    }
    shown = [key for key in columns if any(key in row for row in rows.values())]
    cells = [["model", *(columns[key][0] for key in shown)]]
    for name, row in rows.items():
        cells.append([name, *(columns[key][1].format(row[key]) if key in row else "-" for key in shown)])
    return table(cells)


def by_kind(selection: BlockSelection) -> str:
    """Per kind of module: matrices reached, blocks, and the chosen share of the weights."""
    rows = [["module", "reached", "blocks", "share of weights", "block"]]
    groups: dict[str, list[Place]] = {}
    for place in places(selection):
        groups.setdefault(place.kind, []).append(place)
    for kind, group in groups.items():
        shapes = dict.fromkeys("{} x {}".format(*selection.grids[place.name].block_shape) for place in group)
        rows.append(
            [
                kind,
                f"{sum(place.blocks > 0 for place in group)} of {len(group)}",
                f"{sum(place.blocks for place in group):,}",
                f"{_share(group, selection):.2%}",
                ", ".join(shapes),
            ]
        )
    return table(rows)


def by_layer(selection: BlockSelection) -> str:
    """Per layer the chosen share of its targeted weights; empty when no module belongs to a layer."""
    groups: dict[int, list[Place]] = {}
    for place in places(selection):
        if place.layer is not None:
            groups.setdefault(place.layer, []).append(place)
    rows = [["layer", "blocks", "share of weights"]]
    rows += [
        [str(layer), f"{sum(place.blocks for place in group):,}", f"{_share(group, selection):.2%}"]
        for layer, group in sorted(groups.items())
    ]
    return table(rows) if groups else ""


def _share(group: Sequence[Place], selection: BlockSelection) -> float:
    weights = sum(selection.grids[place.name].numel for place in group)
    return sum(place.share * selection.grids[place.name].numel for place in group) / weights


def table(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right.

    Args:
        cells: rows of equal length, the header first.
    """
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [_line(row, widths) for row in cells]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], _line(rule, widths), *lines[1:]])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(width) if position == 0 else cell.rjust(width)
        for position, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "| " + " | ".join([first, *others]) + " |"
