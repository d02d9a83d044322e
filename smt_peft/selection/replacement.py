"""Which blocks take the place of others in a module whose remaining blocks stay where they are."""

from __future__ import annotations

import numpy as np

from ..blocks import BlockGrid
from .spread import SPREAD, Matrix


def regrown(
    scores: np.ndarray, held: np.ndarray, count: int, spread: str, closed: np.ndarray | None = None
) -> np.ndarray:
    """The best `count` blocks that are not held, spread as the held ones leave room for.

    The spread chooses all blocks anew with the held ones ahead of any others; what it adds to them is taken best first.

    Args:
        scores: fp64 `(R, C)`, finite.
        held: bool `(R, C)`, blocks that stay.
        count: at most as many as are neither held nor closed.
        spread: of `SPREAD`.
        closed: bool `(R, C)`, blocks that may not be taken; None: all may.

    Returns:
        Which are taken, bool `(R, C)`.
    """
    low, high = scores.min(), scores.max()
    scale = (high - low) or 1.0
    ranked = np.where(held, high + scale, scores)
    if closed is not None:
        ranked = np.where(closed & ~held, low - scale, ranked)
    grid = BlockGrid(*scores.shape, 1, 1)
    matrix = Matrix.whole("", grid, ranked, np.ones(scores.shape, dtype=np.int64))
    [chosen] = SPREAD[spread]([matrix], int(held.sum()) + count)
    open_ = ~held if closed is None else ~held & ~closed
    # Ahead of the rest, which serves where the spread took closed ones.
    order = np.lexsort((-scores.ravel(), ~(chosen & open_).ravel(), ~open_.ravel()))
    taken = np.zeros(scores.size, dtype=bool)
    taken[order[:count]] = True
    return taken.reshape(scores.shape)
