"""How much of all scores the chosen blocks hold, and what any other budget could hold at best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..blocks import BlockSelection
from .words import percent

# What the sum over all weights is a sum of, by score; of any other, the selection's own word for it is used.
_SUMMED = {
    "grad_abs": "gradient, by absolute value",
    "grad_sq": "squared gradient",
    "taylor": "|weight x gradient|",
    "grad_sum_abs": "summed gradient, by absolute value",
    "mean_abs": "blocks' summed gradients, by absolute value",
    "activation": "input activations",
    "magnitude": "weights' magnitude",
    "low_rank_magnitude": "magnitude of the weights' low-rank part",
}
# Scores that say nothing of a block.
_EMPTY = ("random", "diagonal")
MAX_POINTS = 240


@dataclass(frozen=True)
class Mass:
    """Shares from 0 to 1; mass: a block's score, which is a mean over its weights, times how many weights it has.

    Args:
        what: the mass is of, in words.
        budget: share of the targeted weights that is chosen.
        held: share of the mass in the chosen blocks.
        best: what the best-scored blocks of no more weights hold; `held` falls short of it by what the spread and the
            scope of the budget cost.
        half: share of the weights that holds half of the mass, the best-scored first.
        points: `(share of weights, share of mass)`, the best-scored first, from the first block to all.
    """

    what: str
    budget: float
    held: float
    best: float
    half: float
    points: tuple[tuple[float, float], ...]

    def sentence(self) -> str:
        chosen = percent(self.budget)
        return (
            f"The chosen {chosen} of the weights hold {percent(self.held)} of the {self.what}; the best-scored "
            f"{chosen}, wherever they lie, would hold {percent(self.best)}; half of it lies in the "
            f"best-scored {percent(self.half)}."
        )


def mass(selection: BlockSelection) -> Mass | None:
    """None where no scores were kept for all matrices, or they are not such that shares of their sum mean something:
    random or a pattern, negative, or all zero."""
    score = str(selection.provenance.get("score", ""))
    if selection.scores.keys() != selection.grids.keys() or score in _EMPTY:
        return None
    sizes = {name: grid.effective_sizes().numpy() for name, grid in selection.grids.items()}
    score_N = np.concatenate([selection.scores[name].reshape(-1).float().cpu().numpy() for name in sizes])
    size_N = np.concatenate([size.reshape(-1) for size in sizes.values()])
    if (score_N < 0).any() or not (score_N > 0).any():
        return None
    # NumPy sorts fp32 several times faster than PyTorch does: of a large model there are millions of blocks.
    order = np.argsort(score_N)[::-1]
    weight_N, held_N = np.cumsum(size_N[order]), np.cumsum(score_N[order].astype(np.float64) * size_N[order])
    total = held_N[-1]
    held = sum(_held(selection, name, sizes[name]) for name in selection.blocks) / total
    within = int(np.searchsorted(weight_N, selection.effective_numel, side="right"))
    weight_N, held_N = weight_N / weight_N[-1], held_N / total
    return Mass(
        _SUMMED.get(score, f"sum of the score {score!r}"),
        selection.density,
        float(held),
        float(held_N[within - 1]) if within else 0.0,
        float(weight_N[np.searchsorted(held_N, 0.5)]),
        _thinned(weight_N, held_N),
    )


def _held(selection: BlockSelection, name: str, sizes: np.ndarray) -> float:
    rows, cols = selection.blocks[name].long().cpu().numpy().T
    scores = selection.scores[name].cpu().numpy()[rows, cols]
    return float((scores.astype(np.float64) * sizes[rows, cols]).sum())


def _thinned(weight_N: np.ndarray, held_N: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Points evenly spaced on a logarithmic axis of weights."""
    marks = np.geomspace(weight_N[0], 1.0, MAX_POINTS)
    at = np.unique(np.searchsorted(weight_N, marks).clip(max=len(weight_N) - 1))
    return tuple(zip(weight_N[at].tolist(), held_N[at].tolist(), strict=True))
