"""Which blocks take the place of others: the count, what is held and closed, and the spread."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smt_peft.selection.replacement import regrown
from smt_peft.selection.spread import SPREAD


@st.composite
def cases(draw):
    rows, cols = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    scores = rng.random((rows, cols)) * draw(st.sampled_from([0.0, 1.0, 1e-12, 1e12]))
    held = rng.random((rows, cols)) < draw(st.sampled_from([0.0, 0.2, 0.6]))
    closed = (rng.random((rows, cols)) < 0.3) & ~held
    return scores, held, closed, draw(st.integers(0, int((~held & ~closed).sum())))


@given(case=cases(), spread=st.sampled_from(list(SPREAD)))
def test_as_many_as_asked_for_are_taken_and_none_that_is_held_or_closed(case, spread):
    scores, held, closed, count = case
    taken = regrown(scores, held, count, spread, closed)
    assert taken.shape == scores.shape and taken.sum() == count
    assert not (taken & (held | closed)).any()


@given(case=cases())
def test_freely_spread_they_are_the_best(case):
    scores, held, closed, count = case
    taken = regrown(scores, held, count, "free", closed)
    free = ~held & ~closed
    assert sorted(scores[taken], reverse=True) == sorted(scores[free], reverse=True)[:count]


@pytest.mark.parametrize("spread", ["assignment", "capped"])
def test_they_fill_the_stripes_that_the_held_ones_leave(spread):
    """Half of a diagonal is held; the best scores all lie in its rows, and yet the other half of the rows is taken."""
    scores = np.full((6, 6), 0.1)
    scores[:3] = 1.0
    held = np.zeros((6, 6), dtype=bool)
    held[[0, 1, 2], [0, 1, 2]] = True
    taken = regrown(scores, held, 3, spread)
    rows, cols = np.nonzero(taken)
    assert sorted(rows) == [3, 4, 5] and sorted(cols) == [3, 4, 5]
