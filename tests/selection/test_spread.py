"""Spreads and patterns against their definitions, on matrices of any shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from smt_peft.blocks import BlockGrid
from smt_peft.selection.spread import (
    SPREAD,
    Matrix,
    assignment,
    capped,
    diagonal_order,
    evenly,
    fit,
    free,
    matching,
    random_order,
    restrict,
)

grids = st.builds(BlockGrid, st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(1, 8)).filter(
    lambda grid: grid.block_rows <= grid.rows and grid.block_cols <= grid.cols
)


def matrix(grid, seed=0, name="m", in_blocks=False, levels=None):
    generator = np.random.default_rng(seed)
    scores = generator.random(grid.stripes) if levels is None else generator.integers(0, levels, grid.stripes) * 1.0
    costs = np.ones(grid.stripes, dtype=np.int64) if in_blocks else grid.effective_sizes().numpy()
    return Matrix.whole(name, grid, scores, costs)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(grids, min_size=1, max_size=3),
    st.sampled_from(sorted(SPREAD)),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 5),
    st.sampled_from([None, 2]),
)
def test_every_spread_spends_its_budget(several, spread, share, in_blocks, seed, levels):
    matrices = [matrix(grid, seed + i, f"m{i}", in_blocks, levels) for i, grid in enumerate(several)]
    total = sum(int(m.costs.sum()) for m in matrices)
    budget = int(share * total)
    taken = SPREAD[spread](matrices, budget)
    spent = sum(int(m.costs[mask].sum()) for m, mask in zip(matrices, taken, strict=True))
    left = [m.costs[~mask].max(initial=0) for m, mask in zip(matrices, taken, strict=True)]
    assert spent <= budget
    assert all(mask.all() for mask in taken) or budget - spent < max(left)
    if share == 1.0:
        assert all(mask.all() for mask in taken)
    for mine, again in zip(taken, SPREAD[spread](matrices, budget), strict=True):
        assert np.array_equal(mine, again)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 144), st.integers(0, 9))
def test_free_takes_the_best(rows, cols, count, seed):
    m = matrix(BlockGrid(rows, cols, 1, 1), seed)
    count = min(count, rows * cols)
    [taken] = free([m], count)
    expected = np.sort(m.scores.ravel())[::-1][:count]
    assert np.array_equal(np.sort(m.scores[taken])[::-1], expected)


def test_equal_scores_go_by_module_then_row_major():
    flat = [
        Matrix.whole(name, BlockGrid(3, 4, 1, 1), np.zeros((3, 4)), np.ones((3, 4), dtype=np.int64)) for name in "ab"
    ]
    first, second = free(flat, 14)
    assert first.all()
    assert np.flatnonzero(second).tolist() == [0, 1]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.sampled_from([None, 3]))
def test_assignment_rounds_are_matchings(rows, cols, seed, levels):
    """Take one block more each time: what a round adds lies in distinct row and column stripes."""
    m = matrix(BlockGrid(rows, cols, 1, 1), seed, levels=levels)
    order = []
    before = np.zeros((rows, cols), dtype=bool)
    for count in range(1, rows * cols + 1):
        [taken] = assignment([m], count)
        assert taken.sum() == count
        assert not (before & ~taken).any(), "a larger budget keeps the blocks of a smaller one"
        order.append(tuple(np.argwhere(taken & ~before)[0]))
        before = taken
    first = order[: min(rows, cols)]
    assert len({r for r, _ in first}) == len({c for _, c in first}) == min(rows, cols)
    best = linear_sum_assignment(m.scores, maximize=True)
    assert sum(m.scores[cell] for cell in first) == pytest.approx(m.scores[best].sum())
    values = [m.scores[cell] for cell in first]
    assert values == sorted(values, reverse=True)
    if rows == cols:
        for start in range(0, rows * cols, rows):
            part = order[start : start + rows]
            assert len({r for r, _ in part}) == len({c for _, c in part}) == rows


def test_assignment_pools_the_matrices_of_a_round():
    low, high = matrix(BlockGrid(4, 4, 1, 1), 0, "low"), matrix(BlockGrid(4, 4, 1, 1), 1, "high")
    high.scores += 10
    a, b = assignment([low, high], 6)
    assert b.sum() == 4, "the better matrix gives its whole first round"
    assert a.sum() == 2, "and no second one before the other matrix has used its first"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 5), st.floats(0, 1))
def test_matching_is_a_largest_one_of_the_blocks_not_taken(rows, cols, seed, share):
    generator = np.random.default_rng(seed)
    scores, taken = generator.random((rows, cols)) - 0.5, generator.random((rows, cols)) < share
    r, c = matching(scores, taken)
    assert not taken[r, c].any()
    assert len(set(r.tolist())) == len(r) and len(set(c.tolist())) == len(c)
    largest = maximum_bipartite_matching(csr_matrix(~taken), perm_type="column")
    assert len(r) == (largest >= 0).sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 144), st.integers(0, 9))
def test_capped_keeps_the_lowest_cap_that_fits(rows, cols, count, seed):
    count = min(count, rows * cols)
    m = matrix(BlockGrid(rows, cols, 1, 1), seed)
    [taken] = capped([m], count)
    row_cap, col_cap = -(-count // rows), -(-count // cols)
    raised = max(0, taken.sum(1).max() - row_cap, taken.sum(0).max() - col_cap)
    # A cap that was raised means that the cap below it was used up everywhere a block was left.
    if raised:
        full_rows = taken.sum(1) >= row_cap + raised - 1
        full_cols = taken.sum(0) >= col_cap + raised - 1
        assert (taken | full_rows[:, None] | full_cols[None, :]).all()
    assert taken.sum() == count
    best = np.unravel_index(m.scores.argmax(), m.scores.shape)
    assert taken[best]


def test_capped_beats_free_on_a_hot_stripe():
    m = matrix(BlockGrid(8, 8, 1, 1), 3)
    m.scores[2] += 100
    assert free([m], 8)[0].sum(1).tolist()[2] == 8
    assert capped([m], 8)[0].sum(1).tolist() == [1] * 8


@settings(max_examples=60, deadline=None)
@given(grids, st.sampled_from([None, 0.01, 0.3, 0.5, 1.0]), st.integers(1, 40), st.integers(0, 5))
def test_caps_hold(grid, column_share, rank, seed):
    m = matrix(grid, seed)
    if rank < min(grid.block_shape) and rank < min(grid.shape):
        with pytest.raises(ValueError, match="m: max_lora_rank.*block_size"):
            restrict(m, column_share, rank)
        return
    kept = restrict(m, column_share, rank)
    everything = kept.flat(np.ones(kept.scores.shape, dtype=bool))
    if column_share is not None:
        assert len(kept.cols) <= max(1, int(column_share * grid.col_stripes))
    touched_rows = int(grid.heights()[np.unique(everything // grid.col_stripes)].sum())
    touched_cols = int(grid.widths()[np.unique(everything % grid.col_stripes)].sum())
    assert min(touched_rows, touched_cols) <= rank
    assert np.array_equal(m.scores.ravel()[np.sort(everything)], kept.scores.ravel())


def test_caps_keep_the_best_stripes():
    m = matrix(BlockGrid(8, 8, 2, 2), 0)
    m.scores[:, 3] += 5
    assert restrict(m, 0.25, None).cols.tolist() == [3]
    assert restrict(m, None, 2).cols.tolist() == [3]
    m.scores[1] += 9
    assert restrict(m, None, 2).rows.tolist() == [1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=30), st.integers(0, 120))
def test_fit_is_the_greedy_loop(costs, budget):
    left, expected = budget, []
    for cost in costs:
        expected.append(cost <= left)
        left -= cost if expected[-1] else 0
    taken, rest = fit(np.array(costs, dtype=np.int64), budget)
    assert taken.tolist() == expected
    assert rest == left


@settings(max_examples=60, deadline=None)
@given(grids, st.integers(0, 3))
def test_patterns_reach_every_block_once_and_stripes_first(grid, seed):
    for order in (
        diagonal_order(grid, grid.num_blocks),
        random_order(grid, grid.num_blocks, "assignment", seed),
        random_order(grid, grid.num_blocks, "free", seed),
    ):
        assert sorted(order.tolist()) == list(range(grid.num_blocks))
    height, width = grid.stripes
    for order in (diagonal_order(grid, max(height, width)), random_order(grid, max(height, width), "assignment", seed)):
        assert len(set((order // width).tolist())) == height
        assert len(set((order % width).tolist())) == width
    first = diagonal_order(grid, max(height, width))
    assert all(
        block // width % height == i % height and block % width == i % width
        for i, block in ((max(b // width, b % width), b) for b in first.tolist())
    )
    assert np.array_equal(diagonal_order(grid, 3), diagonal_order(grid, grid.num_blocks)[:3])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (12, 4), (5, 13)])
def test_rounds_of_a_pattern_are_matchings(height, width):
    grid = BlockGrid(height, width, 1, 1)
    order = diagonal_order(grid, min(height, width))
    assert len(set((order // width).tolist())) == len(set((order % width).tolist())) == min(height, width)


def test_a_part_of_the_diagonal_is_spread_evenly():
    assert sorted(evenly(8)[:4].tolist()) == [0, 2, 4, 6]
    assert sorted(evenly(7).tolist()) == list(range(7))
    half = diagonal_order(BlockGrid(16, 16, 1, 1), 4)
    assert sorted((half // 16).tolist()) == [0, 4, 8, 12]
