"""How the chosen blocks lie in their matrices: freely, capped per stripe, by rounds of matchings, or on diagonals.

A *scope* spends one budget on the blocks of one or more matrices. Every block has a cost in the budget's unit (its
weights without padding, or 1 when the budget counts blocks). Blocks are taken best first, skipping those that cost more
than what is left, until less is left than the dearest block that was not taken costs. Equal scores go by the order of
the matrices, then row-major.

Shape suffixes: R row stripes, C column stripes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..blocks import BlockGrid

# Candidates are filtered against the caps this many at a time before the exact check, which is a Python loop.
_CHUNK = 4096


@dataclass
class Matrix:
    """The candidate blocks of one weight: its score grid, or the rows and columns of it that the caps leave.

    Args:
        name: the module.
        grid: the tiling of the whole weight.
        scores: float64 `(R, C)`, finite.
        costs: int64 `(R, C)`.
        rows: int64 `(R,)`, row stripe of each row of `scores`.
        cols: int64 `(C,)`, column stripe of each column of `scores`.
        blocked: bool `(R, C)`, blocks that may not be taken; None: all may.
    """

    name: str
    grid: BlockGrid
    scores: np.ndarray
    costs: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    blocked: np.ndarray | None = None

    @classmethod
    def whole(
        cls, name: str, grid: BlockGrid, scores: np.ndarray, costs: np.ndarray, blocked: np.ndarray | None = None
    ) -> Matrix:
        return cls(name, grid, scores, costs, np.arange(grid.row_stripes), np.arange(grid.col_stripes), blocked)

    def keep_rows(self, index: np.ndarray) -> Matrix:
        blocked = None if self.blocked is None else self.blocked[index]
        return Matrix(self.name, self.grid, self.scores[index], self.costs[index], self.rows[index], self.cols, blocked)

    def keep_cols(self, index: np.ndarray) -> Matrix:
        blocked = None if self.blocked is None else self.blocked[:, index]
        scores, costs = self.scores[:, index], self.costs[:, index]
        return Matrix(self.name, self.grid, scores, costs, self.rows, self.cols[index], blocked)

    @property
    def closed(self) -> np.ndarray:
        """Blocks that may not be taken, bool `(R, C)`."""
        return np.zeros(self.scores.shape, dtype=bool) if self.blocked is None else self.blocked

    @property
    def open_cost(self) -> int:
        """What all blocks that may be taken cost."""
        return int(self.costs.sum() if self.blocked is None else self.costs[~self.blocked].sum())

    @property
    def open_scores(self) -> np.ndarray:
        """Scores, 0 where a block may not be taken."""
        return self.scores if self.blocked is None else np.where(self.blocked, 0.0, self.scores)

    def mass(self, axis: int) -> np.ndarray:
        """What the blocks of each stripe that may be taken score in all; of a stripe without any, least of all."""
        sums = self.open_scores.sum(axis)
        return sums if self.blocked is None else np.where(self.blocked.all(axis), -np.inf, sums)

    def flat(self, taken: np.ndarray) -> np.ndarray:
        """Row-major numbers in the whole grid of the blocks marked in `taken`, bool `(R, C)`."""
        rows, cols = np.nonzero(taken)
        return self.rows[rows] * self.grid.col_stripes + self.cols[cols]


def restrict(matrix: Matrix, max_column_share: float | None, max_lora_rank: int | None) -> Matrix:
    """What the caps leave of a matrix.

    `max_column_share` keeps the `floor(share * C)` column stripes, at least one, whose scores sum highest.
    `max_lora_rank` r keeps `floor(r / block_cols)` column stripes or `floor(r / block_rows)` row stripes, whichever
    holds the higher sum of scores: a delta that is zero outside so many columns, or rows, has rank r at most. A matrix
    whose shorter side is r or less needs no cap.

    Raises:
        ValueError: `max_lora_rank` is below both sides of a block.
    """
    if max_column_share is not None:
        count = math.floor(Fraction(repr(float(max_column_share))) * len(matrix.cols))
        matrix = matrix.keep_cols(_best(matrix.mass(0), max(1, count)))
    grid = matrix.grid
    if max_lora_rank is None or max_lora_rank >= min(grid.shape):
        return matrix
    options = []
    if columns := max_lora_rank // grid.block_cols:
        options.append(matrix.keep_cols(_best(matrix.mass(0), columns)))
    if rows := max_lora_rank // grid.block_rows:
        options.append(matrix.keep_rows(_best(matrix.mass(1), rows)))
    if not options:
        raise ValueError(
            f"{matrix.name}: max_lora_rank={max_lora_rank} is below the sides of its blocks ({grid}); a "
            f"single block can have a higher rank. Set block_size to {max_lora_rank} or less, or raise "
            f"max_lora_rank to {min(grid.block_shape)}"
        )
    return max(options, key=lambda option: option.open_scores.sum())


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def fit(costs: np.ndarray, budget: int) -> tuple[np.ndarray, int]:
    """Take in order, skipping what costs more than is left.

    Returns:
        Which are taken, bool, and what is left of the budget.
    """
    taken = np.zeros(len(costs), dtype=bool)
    waiting = np.arange(len(costs))
    # Every turn ends at an element that is too dear, so there are no more turns than distinct costs.
    while len(waiting):
        total = np.cumsum(costs[waiting])
        count = int(np.searchsorted(total, budget, side="right"))
        taken[waiting[:count]] = True
        budget -= int(total[count - 1]) if count else 0
        waiting = waiting[count:]
        waiting = waiting[costs[waiting] <= budget]
    return taken, budget


def free(matrices: list[Matrix], budget: int) -> list[np.ndarray]:
    """Best first over all matrices. Returns which blocks are taken, bool `(R, C)` per matrix."""
    scores, costs = _pool(matrices)
    order = _in_order(scores, matrices)
    taken = np.zeros(len(scores), dtype=bool)
    taken[order[fit(costs[order], budget)[0]]] = True
    return _split(taken, matrices)


def capped(matrices: list[Matrix], budget: int) -> list[np.ndarray]:
    """Best first, with at most so many blocks per stripe as an even spread of the budget needs.

    A matrix is expected to get the share of its blocks that the budget is of the scope, n; the cap is `ceil(n / R)`
    per row stripe and `ceil(n / C)` per column stripe. When nothing more fits, all caps rise by one.
    """
    scores, costs = _pool(matrices)
    share = min(Fraction(1), Fraction(budget, int(costs.sum())))
    stripes = _Stripes(matrices, share)
    waiting = _in_order(scores, matrices)
    taken = np.zeros(len(scores), dtype=bool)
    while True:
        for start in range(0, len(waiting), _CHUNK):
            part = waiting[start : start + _CHUNK]
            for block in part[stripes.open(part) & (costs[part] <= budget)]:
                if costs[block] <= budget and stripes.open(block):
                    stripes.add(block)
                    taken[block] = True
                    budget -= int(costs[block])
        waiting = waiting[~taken[waiting]]
        if not len(waiting) or budget < costs[waiting].max():
            return _split(taken, matrices)
        stripes.raise_caps()


class _Stripes:
    """How many blocks each row and column stripe of the pooled matrices holds, and may hold."""

    def __init__(self, matrices: list[Matrix], share: Fraction):
        rows, cols, row_caps, col_caps = [], [], [], []
        for matrix in matrices:
            height, width = matrix.scores.shape
            rows.append(np.repeat(np.arange(height), width) + sum(map(len, row_caps)))
            cols.append(np.tile(np.arange(width), height) + sum(map(len, col_caps)))
            row_caps.append(np.full(height, max(1, math.ceil(share * width))))
            col_caps.append(np.full(width, max(1, math.ceil(share * height))))
        self.rows, self.cols = np.concatenate(rows), np.concatenate(cols)
        self.row_room, self.col_room = np.concatenate(row_caps), np.concatenate(col_caps)

    def open(self, block: np.ndarray) -> np.ndarray:
        return (self.row_room[self.rows[block]] > 0) & (self.col_room[self.cols[block]] > 0)

    def add(self, block: int) -> None:
        self.row_room[self.rows[block]] -= 1
        self.col_room[self.cols[block]] -= 1

    def raise_caps(self) -> None:
        self.row_room += 1
        self.col_room += 1


def assignment(matrices: list[Matrix], budget: int) -> list[np.ndarray]:
    """Rounds of matchings: in a round every row stripe and every column stripe of a matrix gives at most one block.

    A round matches each matrix anew (`matching`), pools the matched blocks of all matrices and takes them best first;
    the next round begins when this one is used up.
    """
    taken = [np.zeros(matrix.scores.shape, dtype=bool) for matrix in matrices]
    # Of a matrix with blocked blocks another array, in which these count as taken from the start.
    gone = [
        done if matrix.blocked is None else matrix.blocked.copy() for matrix, done in zip(matrices, taken, strict=True)
    ]
    while True:
        matched = [matching(matrix.scores, out) for matrix, out in zip(matrices, gone, strict=True)]
        scores = np.concatenate([matrix.scores[cells] for matrix, cells in zip(matrices, matched, strict=True)])
        costs = np.concatenate([matrix.costs[cells] for matrix, cells in zip(matrices, matched, strict=True)])
        order = np.argsort(-scores, kind="stable")
        used, budget = fit(costs[order], budget)
        chosen = np.zeros(len(scores), dtype=bool)
        chosen[order[used]] = True
        first = 0
        for done, out, (rows, cols) in zip(taken, gone, matched, strict=True):
            part = chosen[first : first + len(rows)]
            done[rows[part], cols[part]] = out[rows[part], cols[part]] = True
            first += len(rows)
        left = [matrix.costs[~out].max(initial=0) for matrix, out in zip(matrices, gone, strict=True)]
        if max(left) == 0 or budget < max(left):
            return taken


def matching(scores: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The heaviest of the largest matchings of row stripes with column stripes over the blocks not taken.

    Args:
        scores: float `(R, C)`.
        taken: bool `(R, C)`.

    Returns:
        Row and column numbers of at most `min(R, C)` blocks, sorted by row; none only when every block is taken.
    """
    low, high = scores.min(), scores.max()
    # Scores lie in [0, 1] here, so that one block more always outweighs any choice among the others.
    value = (scores - low) / (high - low) if high > low else np.zeros_like(scores)
    value[taken] = -(min(scores.shape) + 1.0)
    rows, cols = linear_sum_assignment(value, maximize=True)
    new = ~taken[rows, cols]
    return rows[new], cols[new]


def _in_order(scores: np.ndarray, matrices: list[Matrix]) -> np.ndarray:
    """The pooled blocks that may be taken, best first."""
    order = np.argsort(-scores, kind="stable")
    if all(matrix.blocked is None for matrix in matrices):
        return order
    return order[~np.concatenate([matrix.closed.ravel() for matrix in matrices])[order]]


def _pool(matrices: list[Matrix]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.concatenate([matrix.scores.ravel() for matrix in matrices]),
        np.concatenate([matrix.costs.ravel() for matrix in matrices]),
    )


def _split(taken: np.ndarray, matrices: list[Matrix]) -> list[np.ndarray]:
    ends = np.cumsum([matrix.scores.size for matrix in matrices])[:-1]
    return [part.reshape(matrix.scores.shape) for part, matrix in zip(np.split(taken, ends), matrices, strict=True)]


SPREAD = {"free": free, "capped": capped, "assignment": assignment}


def diagonal_order(grid: BlockGrid, count: int) -> np.ndarray:
    """The first `count` blocks on the wrapped diagonals of a grid, as row-major numbers, int64.

    Diagonal k of a wide grid is `((i + k) % R, i)` for every column stripe i, of a tall one `(i, (i + k) % C)` for
    every row stripe i. It comes in rounds in which each stripe gives one block at most, and a part of a round is
    spread evenly over both sides.
    """
    height, width = grid.stripes
    short, long = min(height, width), max(height, width)
    steps = np.fromiter(_along(short, long), dtype=np.int64, count=long)
    number = np.arange(min(count, grid.num_blocks))
    along, across = steps[number % long], (steps[number % long] + number // long) % short
    rows, cols = (across, along) if height <= width else (along, across)
    return rows * width + cols


def _along(short: int, long: int) -> Iterator[int]:
    """`range(long)` in rounds with distinct remainders modulo `short`, each ordered by reversed bits."""
    order = evenly(short)
    turns = math.ceil(long / short)
    for turn in range(turns):
        for step in order:
            place = int(step) + short * ((int(step) + turn) % turns)
            if place < long:
                yield place


def evenly(length: int) -> np.ndarray:
    """`range(length)` in the order of reversed bits (van der Corput): every beginning of it is spread evenly."""
    bits = max(1, (length - 1).bit_length())
    numbers = np.arange(2**bits)
    turned = np.zeros_like(numbers)
    for bit in range(bits):
        turned |= ((numbers >> bit) & 1) << (bits - 1 - bit)
    return turned[turned < length]


def random_order(grid: BlockGrid, count: int, spread: str, seed: int) -> np.ndarray:
    """`count` distinct random blocks as row-major numbers, int64.

    Freely spread they are drawn uniformly. Otherwise they are the wrapped diagonals after a random permutation of the
    row and of the column stripes: rounds of random matchings.
    """
    generator = np.random.default_rng(seed)
    if spread == "free":
        return generator.choice(grid.num_blocks, min(count, grid.num_blocks), replace=False)
    height, width = grid.stripes
    rows, cols = generator.permutation(height), generator.permutation(width)
    order = diagonal_order(grid, count)
    return rows[order // width] * width + cols[order % width]
