"""Charts as coordinates for the template, which draws them as SVG with the colours of the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.image import imsave

from ..blocks import BlockSelection
from .mass import Mass
from .places import Place, places
from .series import Curve
from .shade import coarse, shade
from .words import percent

WIDTH, HEIGHT = 360, 196
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 12, 26
# Of the scores in a grid; reads on white and on black.
_INK = (58, 112, 176)
# Side of the longer edge of a grid, and of a cell from which on an outline leaves something to see inside.
GRID_SIDE, OUTLINED = 480, 5


@dataclass(frozen=True)
class Drawn:
    """One line: `path` for SVG, and its `dots`; `kind` and `name` as in `series.Line`."""

    name: str
    kind: str
    path: str
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """A chart of `WIDTH` x `HEIGHT`; ticks are `(position, label)`, `mark` a point to be seen, and its label."""

    title: str
    text: str
    lines: tuple[Drawn, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_name: str
    mark: tuple[float, float, str] | None = None


@dataclass(frozen=True)
class Panel:
    """The grid of one matrix: `width` x `height`, of `cols` x `rows` cells.

    Args:
        title: which matrix.
        text: what it is, in words.
        image: data URI of the scores, a PNG that is the more opaque the higher they are; empty without scores.
        chosen: SVG path in cells.
        filled: whether cells are too small to be outlined.
    """

    title: str
    text: str
    width: int
    height: int
    cols: int
    rows: int
    image: str
    chosen: str
    filled: bool


def line_chart(curve: Curve) -> Chart:
    """A curve over the steps."""
    values = [value for line in curve.lines for _, value in line.points]
    steps = [step for line in curve.lines for step, _ in line.points]
    low, high = min(values), max(values)
    y_ticks = ticks(min(0.0, low) if curve.zero else low, high)
    x_ticks = [tick for tick in ticks(min(steps), max(steps)) if tick == int(tick)]
    bottom, top = min(low, y_ticks[0]), max(high, y_ticks[-1])
    x, y = _scale(min(steps), max(steps), LEFT, WIDTH - RIGHT), _scale(bottom, top, HEIGHT - BOTTOM, TOP)
    drawn = tuple(
        Drawn(line.name, line.kind, *_path([(x(step), y(value)) for step, value in line.points]))
        for line in curve.lines
    )
    told = "; ".join(
        f"{line.name} from {line.points[0][1]:{curve.form}} to {line.points[-1][1]:{curve.form}}"
        for line in curve.lines
    )
    return Chart(
        curve.title,
        f"{curve.title} over {max(steps):g} steps: {told}",
        drawn,
        tuple((x(tick), f"{tick:,.0f}") for tick in x_ticks if min(steps) <= tick <= max(steps)),
        tuple((y(tick), _label(tick, y_ticks, curve.form)) for tick in y_ticks),
        "step",
    )


def mass_chart(mass: Mass) -> Chart:
    """Share of the mass against the share of the weights, on a logarithmic axis, and where the run lies."""
    # The decade below the budget and what is above it: far below, every curve is flat.
    low = 10.0 ** math.floor(math.log10(mass.budget / 3))
    x = _scale(math.log10(low), 0.0, LEFT, WIDTH - RIGHT)
    y = _scale(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    even = [10 ** (math.log10(low) * (1 - i / 60)) for i in range(61)]
    best = [(x(math.log10(weight)), y(held)) for weight, held in mass.points if weight >= low]
    decades = range(round(math.log10(low)), 1)
    # At most some five labels fit.
    every = -(-len(decades) // 5)
    return Chart(
        "Score held against budget",
        f"Share of the {mass.what} by share of the weights, the best-scored first. {mass.sentence()}",
        (
            Drawn("best-scored first", "main", _path(best)[0], ()),
            Drawn("if all were alike", "rival", _path([(x(math.log10(share)), y(share)) for share in even])[0], ()),
        ),
        tuple((x(decade), f"{100 * 10.0**decade:.10g}%") for decade in decades if decade % every == 0),
        tuple((y(share), f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
        "share of the weights",
        (x(math.log10(mass.budget)), y(mass.held), f"this run, {percent(mass.budget)}: {percent(mass.held)}"),
    )


def panels(selection: BlockSelection) -> list[tuple[str, Panel]]:
    """The matrix with most blocks, and a typical one of another kind: `(why it is shown, panel)`."""
    found = [place for place in places(selection) if place.blocks]
    most = max(found, key=lambda place: (place.blocks, place.share))
    others = [place for place in found if place.kind != most.kind] or [place for place in found if place is not most]
    shown = [("most blocks" if len(found) > 1 else "the only matrix", most)]
    if others:
        middle = sorted(others, key=lambda place: place.share)[len(others) // 2].share
        # The first that has the median share would be of the first layer, which is seldom like the others.
        alike = [place for place in others if place.share == middle]
        shown.append(("a typical one", alike[len(alike) // 2]))
    return [(why, panel(selection, place)) for why, place in shown]


def panel(selection: BlockSelection, place: Place) -> Panel:
    grid, blocks = selection.grids[place.name], selection.blocks[place.name].long().cpu()
    mask = torch.zeros(grid.stripes)
    mask[blocks[:, 0], blocks[:, 1]] = 1
    cells = coarse(mask)
    rows, cols = cells.shape
    # Very long matrices are drawn shorter, so that they can be seen.
    aspect = min(2.5, max(0.4, grid.rows / grid.cols))
    width, height = (GRID_SIDE, round(GRID_SIDE * aspect)) if aspect <= 1 else (round(GRID_SIDE / aspect), GRID_SIDE)
    score = selection.scores.get(place.name)
    image = _png(shade(score)) if score is not None and bool((score > 0).any()) else ""
    told = f"{grid.rows:,} outputs x {grid.cols:,} inputs, {place.blocks:,} of {grid.num_blocks:,} blocks of "
    told += f"{grid.block_rows} x {grid.block_cols} chosen, {percent(place.share)} of the weights"
    if (rows, cols) != grid.stripes:
        told += f"; a cell of the picture stands for up to {-(-grid.row_stripes // rows)} x "
        told += f"{-(-grid.col_stripes // cols)} blocks, and is marked when one of them is chosen"
    return Panel(
        place.name,
        told,
        width,
        height,
        cols,
        rows,
        image,
        "".join(f"M{col} {row}h1v1h-1z" for row, col in torch.nonzero(cells).tolist()),
        min(width / cols, height / rows) < OUTLINED,
    )


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers about `wanted` in number, the first at or below `low`, the last at or above `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _label(tick: float, among: Sequence[float], form: str) -> str:
    """As short as keeps the ticks apart."""
    if form != ".3g":
        return f"{tick:{form}}"
    return f"{tick:g}" if len({f"{other:g}" for other in among}) == len(among) else f"{tick:.3g}"


def _scale(low: float, high: float, start: float, end: float):
    span = (high - low) or 1.0
    return lambda value: round(start + (value - low) / span * (end - start), 1)


def _path(points: Sequence[tuple[float, float]]) -> tuple[str, tuple[tuple[float, float], ...]]:
    """The path through the points, and the points themselves where they are few enough to be seen."""
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points) if len(points) > 1 else ""
    return path, tuple(points) if len(points) <= 15 else ()


def _png(opacity: np.ndarray) -> str:
    """A picture in one colour as a data URI; `opacity` from 0 to 1, `(rows, cols)`."""
    pixels = np.empty((*opacity.shape, 4), dtype=np.uint8)
    pixels[..., :3] = _INK
    pixels[..., 3] = np.rint(8 + 222 * opacity)
    file = io.BytesIO()
    # Without a version of the library in it, so that the same run gives the same page.
    imsave(file, pixels, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
