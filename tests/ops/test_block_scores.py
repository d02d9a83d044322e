"""block_scores against the dense gradient."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_no_worse_than_torch, layouts
from hypothesis import given
from hypothesis import strategies as st

from smt_peft import ops
from smt_peft.blocks import BlockGrid

STATISTICS = {"sum": lambda g: g, "abs": torch.abs, "square": torch.square}


def _pairs(grid, leads, dtype):
    return [(torch.randn(*lead, grid.cols).to(dtype), torch.randn(*lead, grid.rows).to(dtype)) for lead in leads]


def _grad(pairs, grid, dtype):
    return sum(dy.to(dtype).reshape(-1, grid.rows).t() @ x.to(dtype).reshape(-1, grid.cols) for x, dy in pairs)


def _by_slices(matrix, grid):
    rows = matrix.split(grid.block_rows)
    return torch.stack([torch.stack([block.sum() for block in row.split(grid.block_cols, 1)]) for row in rows])


@given(layouts(max_side=24), st.lists(st.sampled_from([(), (0,), (5,), (2, 3)]), min_size=1, max_size=3))
def test_sums_over_blocks_are_those_of_the_dense_gradient(layout, leads):
    grid = layout.grid
    pairs = _pairs(grid, leads, torch.float64)
    for statistic, of in STATISTICS.items():
        truth = _by_slices(of(_grad(pairs, grid, torch.float64)), grid)
        ours = ops.block_scores(pairs, grid, statistic)
        assert ours.dtype == torch.float64
        assert torch.allclose(ours, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_torch(statistic, dtype, poisoned):
    grid = BlockGrid.fit((100, 257), 32)
    pairs = _pairs(grid, [(3, 21), (40,)], dtype)
    of = STATISTICS[statistic]
    truth = _by_slices(of(_grad(pairs, grid, torch.float64)), grid)
    same = _by_slices(of(_grad(pairs, grid, dtype).float()), grid)
    ours = ops.block_scores(pairs, grid, statistic)
    assert ours.dtype == torch.float32
    assert_no_worse_than_torch(ours, same, truth)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours, ops.block_scores(pairs, grid, statistic))


def test_the_signed_sum_never_forms_the_dense_gradient(monkeypatch):
    grid = BlockGrid.fit((512, 512), 64)
    monkeypatch.setattr(ops.scores, "dense_grad", None)
    assert ops.block_scores(_pairs(grid, [(9,)], torch.float32), grid, "sum").shape == (8, 8)


def test_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match="statistic must be 'sum', 'abs' or 'square', got 'max'"):
        ops.block_scores([], BlockGrid(4, 4, 2, 2), "max")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3), (2, 2, 3), (5000,)])
def test_dense_grad(dtype, lead):
    torch.manual_seed(0)
    pairs = [(torch.randn(*lead, 6).to(dtype), torch.randn(*lead, 4).to(dtype)) for _ in range(2)]
    grad = ops.dense_grad(pairs, (4, 6))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grad, ops.dense_grad(pairs, (4, 6)))
    truth = sum(dy.double().reshape(-1, 4).t() @ x.double().reshape(-1, 6) for x, dy in pairs)
    assert grad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    plain = sum(dy.float().reshape(-1, 4).t() @ x.float().reshape(-1, 6) for x, dy in pairs).double()
    allowed = 2 * (plain - truth).abs().max() + 1e-6 * truth.abs().max() + 1e-12
    assert (grad.double() - truth).abs().max() <= allowed
