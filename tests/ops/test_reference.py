"""The operations against dense matrix products: exact in fp64, no worse than PyTorch's own in lower precision."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_no_worse_than_torch, layouts, random_layout
from hypothesis import given
from hypothesis import strategies as st

from smt_peft import ops
from smt_peft.blocks import BlockGrid, BlockLayout
from smt_peft.ops import reference

# Blocks that take each of the three routes: gathered strips, a GEMM per block, one dense GEMM; regular and ragged.
ROUTES = {
    "strips": random_layout(BlockGrid.fit((256, 384), 16), 20),
    "strips ragged": random_layout(BlockGrid.fit((250, 381), 16), 20),
    "blocks": random_layout(BlockGrid.fit((256, 384), 64), 4),
    "blocks ragged": random_layout(BlockGrid.fit((250, 381), 64), 5, seed=3),
    "dense": random_layout(BlockGrid.fit((250, 384), 32), 60),
    "columns": random_layout(BlockGrid.fit((96, 200), (-1, 1)), 9),
    "rows": random_layout(BlockGrid.fit((96, 200), (1, -1)), 9),
}


def _operands(layout: BlockLayout, tokens: int, dtype: torch.dtype):
    dy = torch.randn(tokens, layout.grid.rows, dtype=torch.float64)
    x = torch.randn(tokens, layout.grid.cols, dtype=torch.float64)
    delta = torch.randn(len(layout), *layout.grid.block_shape, dtype=torch.float64) * layout.padding_mask()
    return dy.to(dtype), x.to(dtype), delta.to(dtype)


@given(layouts(), st.integers(0, 17))
def test_block_grad_is_the_dense_gradients_sub_block(layout, tokens):
    dy, x, _ = _operands(layout, tokens, torch.float64)
    truth = ops.block_gather(dy.t() @ x, layout)
    ours = ops.block_grad(dy, x, layout)
    assert ours.dtype == torch.float64
    assert torch.allclose(ours, truth, rtol=0, atol=1e-12)


@given(layouts(), st.integers(0, 17))
def test_block_product_is_the_dense_product(layout, tokens):
    _, x, delta = _operands(layout, tokens, torch.float64)
    truth = x @ ops.dense(delta, layout).t()
    assert torch.allclose(ops.block_product(x, delta, layout), truth, rtol=0, atol=1e-12)
    y = torch.randn_like(truth)
    assert torch.allclose(ops.block_matmul_(y.clone(), x, delta, layout), y + truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_each_route_is_no_worse_than_torch(route, dtype, poisoned):
    layout = ROUTES[route]
    dy, x, delta = _operands(layout, 63, dtype)
    grad_truth = ops.block_gather(dy.double().t() @ x.double(), layout)
    grad_torch = ops.block_gather(dy.t() @ x, layout)
    grad = ops.block_grad(dy, x, layout)
    assert grad.dtype == torch.float32
    assert_no_worse_than_torch(grad, grad_torch, grad_truth)

    y, weight = torch.randn(63, layout.grid.rows).to(dtype), ops.dense(delta, layout)
    assert_no_worse_than_torch(
        ops.block_matmul_(y.clone(), x, delta, layout),
        y + x @ weight.t(),
        y.double() + x.double() @ weight.double().t(),
    )


@pytest.mark.parametrize("route", ROUTES)
def test_strided_operands(route):
    layout = ROUTES[route]
    dy, x, delta = _operands(layout, 40, torch.float64)
    assert torch.equal(ops.block_grad(dy[::2], x[::2], layout), ops.block_grad(dy[::2].clone(), x[::2].clone(), layout))
    y = torch.zeros(layout.grid.rows, 20, dtype=torch.float64).t()
    ops.block_matmul_(y, x[::2], delta, layout)
    assert torch.allclose(y, x[::2] @ ops.dense(delta, layout).t(), rtol=0, atol=1e-12)


@given(layouts(max_side=24))
def test_transposed_layout_swaps_the_roles(layout):
    dy, x, delta = _operands(layout, 5, torch.float64)
    assert torch.allclose(ops.block_grad(x, dy, layout.transposed), ops.block_grad(dy, x, layout).transpose(1, 2))
    expected = dy @ ops.dense(delta, layout)
    assert torch.allclose(ops.block_matmul_(torch.zeros_like(expected), dy, delta, layout, transposed=True), expected)
    product = ops.block_product(dy, delta.transpose(1, 2), layout.transposed)
    assert torch.allclose(product, dy @ ops.dense(delta, layout), rtol=0, atol=1e-12)


def test_large_selections_are_gathered_in_chunks(monkeypatch):
    layout = ROUTES["strips ragged"]
    dy, x, delta = _operands(layout, 63, torch.float64)
    whole = ops.block_grad(dy, x, layout), ops.block_product(x, delta, layout)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 63 * 32 * 3)
    assert len(reference._chunks(layout, 63)) == 7
    assert torch.allclose(ops.block_grad(dy, x, layout), whole[0], rtol=0, atol=1e-12)
    assert torch.allclose(ops.block_product(x, delta, layout), whole[1], rtol=0, atol=1e-12)


def test_add_rounded_rounds_once():
    base = torch.randn(1000).to(torch.bfloat16)
    delta = torch.randn(1000) * 1e-2
    assert torch.equal(
        ops.add_rounded(base, delta), (base.double() + delta.double()).to(torch.float32).to(torch.bfloat16)
    )
    twice = base + delta.to(torch.bfloat16)
    assert not torch.equal(ops.add_rounded(base, delta), twice)
