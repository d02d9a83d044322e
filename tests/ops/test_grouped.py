"""grouped_linear against autograd through dense weights."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_no_worse_than_torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smt_peft import ops
from smt_peft.blocks import BlockGrid, BlockLayout
from smt_peft.ops import swap as swap_module

EXPERTS = 3


def loop(counts):
    """Each expert's rows times its matrix."""

    def gemm(x_TK, weight_EKN):
        parts = x_TK.split(counts)
        return torch.cat([x @ weight for x, weight in zip(parts, weight_EKN, strict=True)])

    return gemm


def runs_of(layout, counts, flipped):
    rows = layout.grid.rows // EXPERTS
    one = BlockGrid(rows, layout.grid.cols, *layout.grid.block_shape)
    expert = layout.block_rows // one.row_stripes
    runs, start = [], 0
    for e, count in enumerate(counts):
        chosen = (expert == e).nonzero().squeeze(1)
        if count and len(chosen):
            blocks = layout.blocks[chosen] - torch.tensor([e * one.row_stripes, 0], dtype=torch.int32)
            within = BlockLayout(one, blocks)
            first = int(chosen[0])
            runs.append(
                ops.Run(
                    slice(start, start + count),
                    slice(first, first + len(chosen)),
                    within.transposed if flipped else within,
                )
            )
        start += count
    return runs


@st.composite
def cases(draw):
    height, stripes = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    cols, width = draw(st.integers(1, 11)), draw(st.integers(1, 6))
    grid = BlockGrid(EXPERTS * height * stripes, cols, height, min(width, cols))
    chosen = draw(st.sets(st.integers(0, grid.num_blocks - 1), min_size=1, max_size=20))
    counts = draw(st.lists(st.integers(0, 4), min_size=EXPERTS, max_size=EXPERTS))
    return BlockLayout(grid, grid.unflatten(torch.tensor(sorted(chosen)))), counts


def setting(layout, counts, flipped, dtype=torch.float64):
    grid = layout.grid
    weight = torch.randn(EXPERTS, grid.rows // EXPERTS, grid.cols, dtype=torch.float64).to(dtype)
    delta = 0.1 * torch.randn(len(layout), *grid.block_shape, dtype=torch.float64) * layout.padding_mask()
    delta = delta.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    inputs = weight.shape[1] if flipped else weight.shape[2]
    x = torch.randn(sum(counts), inputs, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, delta


def truth(x, weight, delta, layout, counts, flipped, dy, dtype=torch.float64):
    x, delta = (t.detach().to(dtype).requires_grad_() for t in (x, delta))
    merged = weight.to(dtype) + ops.dense(delta, layout).view(weight.shape)
    y = loop(counts)(x, merged if flipped else merged.mT)
    return y.detach(), *torch.autograd.grad(y, (x, delta), dy.to(dtype))


@settings(max_examples=60)
@given(cases(), st.booleans(), st.booleans())
def test_forward_and_gradients_are_exact(case, flipped, swap):
    layout, counts = case
    x, weight, delta = setting(layout, counts, flipped)
    kept = weight.clone()
    runs = runs_of(layout, counts, flipped)
    y = ops.grouped_linear(x, weight, delta, layout, runs, loop(counts), flipped, swap)
    dy = torch.randn_like(y)
    found = y.detach(), *torch.autograd.grad(y, (x, delta), dy)
    for ours, expected in zip(found, truth(x, weight, delta, layout, counts, flipped, dy), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("swap", [False, True])
def test_rounding_is_no_worse_than_torchs(dtype, flipped, swap):
    grid = BlockGrid(EXPERTS * 32, 64, 8, 8)
    layout = BlockLayout(grid, grid.unflatten(torch.randperm(grid.num_blocks)[:30]))
    counts = [17, 0, 40]
    x, weight, delta = setting(layout, counts, flipped, dtype)
    runs = runs_of(layout, counts, flipped)
    y = ops.grouped_linear(x, weight, delta, layout, runs, loop(counts), flipped, swap)
    dy = torch.randn_like(y)
    found = y.detach(), *torch.autograd.grad(y, (x, delta), dy)
    same = truth(x, weight, delta, layout, counts, flipped, dy, dtype)
    exact = truth(x, weight, delta, layout, counts, flipped, dy)
    for ours, torchs, expected in zip(found, same, exact, strict=True):
        assert_no_worse_than_torch(ours, torchs, expected)
    assert found[2].dtype == torch.float32


def test_nothing_is_kept_or_computed_that_no_gradient_needs():
    grid = BlockGrid(EXPERTS * 8, 8, 4, 4)
    layout = BlockLayout(grid, grid.unflatten(torch.tensor([0, 5])))
    counts = [2, 2, 2]
    x, weight, delta = setting(layout, counts, False)
    arguments = layout, runs_of(layout, counts, False), loop(counts), False, True
    y = ops.grouped_linear(x, weight, delta.detach(), *arguments)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape
    y = ops.grouped_linear(x.detach(), weight, delta, *arguments)
    saved = [tensor for tensor in y.grad_fn.saved_tensors if tensor is not None]
    # Four of eight columns of the two rows of the first expert, and of the second, whose block lies beside.
    assert [tuple(tensor.shape) for tensor in saved] == [(2, 4), (2, 4)]
    assert not ops.grouped_linear(x.detach(), weight, delta.detach(), *arguments).requires_grad


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_weight_is_put_back_when_the_product_raises(interrupted):
    grid = BlockGrid(EXPERTS * 8, 8, 4, 4)
    layout = BlockLayout(grid, grid.unflatten(torch.tensor([0, 5])))
    x, weight, delta = setting(layout, [2, 2, 2], False)
    kept, seen = weight.clone(), []

    def gemm(x, operand):
        seen.append(torch.equal(weight, kept))
        raise KeyboardInterrupt if interrupted else ArithmeticError

    with pytest.raises(KeyboardInterrupt if interrupted else ArithmeticError):
        ops.grouped_linear(x, weight, delta, layout, runs_of(layout, [2, 2, 2], False), gemm, False, True)
    assert seen == [False] and torch.equal(weight, kept) and not len(swap_module._unrestored)
