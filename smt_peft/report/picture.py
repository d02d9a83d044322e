"""A picture of the chosen blocks: which share of each matrix, and where in a few matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from ..blocks import BlockSelection
from .places import Place, places
from .shade import coarse, shade

MAX_PANELS, MAX_LABELLED_CELLS = 8, 200
# Distinct for every common form of colour blindness, and in grey.
CHOSEN, GRID_LINE, INK = "#D55E00", "#FFFFFF", "#222222"
BACKGROUND = "Greys"


def draw_selection(selection: BlockSelection, path: str | Path) -> None:
    """Write the picture of a selection as a PNG."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    selection_figure(selection).savefig(aside, format="png")
    aside.replace(path)


def selection_figure(selection: BlockSelection) -> Figure:
    """A heat map of layers by kinds of module, and the block grids of a few matrices.

    Args:
        selection: the chosen blocks; where scores were kept, they shade the grids.
    """
    found = places(selection)
    kinds = list(dict.fromkeys(place.kind for place in found))
    panels = _panels(found, kinds)
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    layers = sorted({_row(place) for place in found})
    map_height = max(2.0, 0.34 * len(layers) + 1.3)
    figure = Figure(figsize=(11, map_height + 2.9 * rows + 0.7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        "Chosen blocks: " + selection.summary().replace(", reaching", ",\nreaching"), fontsize=11, color=INK
    )
    top, bottom = figure.subfigures(2, 1, height_ratios=[map_height, 2.9 * rows])
    _heat_map(top, found, kinds, layers)
    axes = bottom.subplots(rows, columns, squeeze=False).ravel()
    for ax, place in zip(axes, panels, strict=False):
        _grid(ax, selection, place)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    what = "orange: chosen blocks" + ("; grey: score, dark is high, log scale" if selection.scores else "")
    bottom.suptitle(f"Where the blocks lie in {len(panels)} of {len(found)} matrices ({what})", fontsize=10, color=INK)
    return figure


def _row(place: Place) -> int:
    """Row of the heat map: the layer; -1 gathers what lies outside the layers."""
    return -1 if place.layer is None else place.layer


def _heat_map(figure, found: list[Place], kinds: list[str], layers: list[int]) -> None:
    shares = np.full((len(layers), len(kinds)), np.nan)
    for place in found:
        shares[layers.index(_row(place)), kinds.index(place.kind)] = 100 * place.share
    ax = figure.subplots()
    top = np.nanmax(shares)
    # Room above the largest share keeps the numbers legible and an even budget from shouting.
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1.4 * top, aspect="auto")
    ax.set_xticks(range(len(kinds)), kinds, fontsize=9)
    ax.set_yticks(range(len(layers)), ["-" if layer < 0 else str(layer) for layer in layers], fontsize=9)
    ax.set_xlabel("module")
    ax.set_ylabel("layer")
    ax.set_title("Share of each matrix's weights that is trained", fontsize=10, color=INK)
    _frame(ax, *shares.shape)
    if shares.size <= MAX_LABELLED_CELLS:
        for (row, column), share in np.ndenumerate(shares):
            if not np.isnan(share):
                ax.text(
                    column,
                    row,
                    f"{share:.1f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if share > 0.8 * top else INK,
                )
    figure.colorbar(image, ax=ax, label="% of weights", pad=0.01)


def _frame(ax, rows: int, columns: int) -> None:
    """White lines between cells, and no ticks or border."""
    ax.set_xticks(np.arange(-0.5, columns), minor=True)
    ax.set_yticks(np.arange(-0.5, rows), minor=True)
    ax.grid(which="minor", color=GRID_LINE, linewidth=1.2)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)


def _panels(found: list[Place], kinds: list[str]) -> list[Place]:
    """One matrix of each kind that has blocks, walking down the layers, so that the panels cover the depth."""
    chosen = []
    for position, kind in enumerate(kinds[:MAX_PANELS]):
        group = [place for place in found if place.kind == kind and place.blocks]
        if group:
            chosen.append(group[position * len(group) // min(len(kinds), MAX_PANELS)])
    return chosen


def _grid(ax, selection: BlockSelection, place: Place) -> None:
    grid = selection.grids[place.name]
    mask = torch.zeros(grid.stripes)
    blocks = selection.blocks[place.name].long().cpu()
    mask[blocks[:, 0], blocks[:, 1]] = 1
    extent = (0, grid.cols, grid.rows, 0)
    score = selection.scores.get(place.name)
    if score is not None and bool((score > 0).any()):
        ax.imshow(shade(score), cmap=BACKGROUND, vmin=0, vmax=1.6, extent=extent, interpolation="nearest")
    cells = coarse(mask).numpy()
    ax.imshow(np.ma.masked_equal(cells, 0), cmap=ListedColormap([CHOSEN]), extent=extent, interpolation="nearest")
    ax.set_title(f"layer {place.layer}, {place.kind}" if place.layer is not None else place.kind, fontsize=9, color=INK)
    ax.set_xlabel(f"input, {grid.cols}", fontsize=8)
    ax.set_ylabel(f"output, {grid.rows}", fontsize=8)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color("#999999")
