"""How much of all scores the chosen blocks hold, and what any other budget could hold at best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
    sizes = {name: grid.effective_sizes() for name, grid in selection.grids.items()}
    scores_N = torch.cat([selection.scores[name].reshape(-1).double().cpu() for name in sizes])
    sizes_N = torch.cat([size.reshape(-1) for size in sizes.values()]).double()
    mass_N = scores_N * sizes_N
    total = float(mass_N.sum())
    if bool((scores_N < 0).any()) or total <= 0:
        return None
    order = torch.argsort(scores_N, descending=True, stable=True)
    weight_N, held_N = sizes_N[order].cumsum(0) / sizes_N.sum(), mass_N[order].cumsum(0) / total
    held = sum(_held(selection, name, sizes[name]) for name in selection.blocks) / total
    within = int(torch.searchsorted(weight_N, selection.density * (1 + 1e-9), right=True))
    return Mass(
        _SUMMED.get(score, f"sum of the score {score!r}"),
        selection.density,
        held,
        float(held_N[within - 1]) if within else 0.0,
        float(weight_N[min(int(torch.searchsorted(held_N, 0.5)), len(weight_N) - 1)]),
        _thinned(weight_N, held_N),
    )


def _held(selection: BlockSelection, name: str, sizes: torch.Tensor) -> float:
    rows, cols = selection.blocks[name].long().cpu().unbind(1)
    return float((selection.scores[name].double().cpu()[rows, cols] * sizes[rows, cols]).sum())


def _thinned(weight_N: torch.Tensor, held_N: torch.Tensor) -> tuple[tuple[float, float], ...]:
    """Points evenly spaced on a logarithmic axis of weights."""
    low = weight_N[0].log10()
    marks = torch.logspace(float(low), 0, MAX_POINTS, dtype=torch.float64)
    at = torch.searchsorted(weight_N, marks).clamp(max=len(weight_N) - 1).unique()
    return tuple(zip(weight_N[at].tolist(), held_N[at].tolist(), strict=True))
