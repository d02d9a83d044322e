"""The blocks of an embedding table at the rows of a batch, against a dense table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_torch, layouts, random_layout
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smt_peft import ops
from smt_peft.blocks import BlockGrid

GRIDS = {
    "even": ((48, 24), (8, 8)),
    "ragged": ((50, 22), (8, 4)),
    "rows": ((37, 10), (1, -1)),
    "cols": ((37, 10), (-1, 1)),
}


def merged(weight, delta, layout):
    blocks = ops.add_rounded(ops.block_gather(weight, layout), delta.detach())
    return ops.block_scatter_(weight.clone(), blocks, layout)


def delta_of(layout, dtype=torch.float32):
    mask = layout.padding_mask() if layout.grid.is_ragged else 1
    return torch.randn(len(layout), *layout.grid.block_shape).mul(mask).to(dtype).requires_grad_()


DTYPES = [torch.float32, torch.bfloat16]


@given(layouts(max_side=24), st.lists(st.integers(0, 10**6), max_size=30), st.sampled_from(DTYPES))
def test_rows_are_those_of_a_merged_table_and_gradients_those_of_a_dense_one(layout, numbers, dtype):
    ids = torch.tensor(numbers, dtype=torch.int64) % layout.grid.rows
    weight, delta = torch.randn(layout.grid.shape).to(dtype), delta_of(layout)
    rows = ops.block_rows_add(F.embedding(ids, weight), ids, delta, layout)
    assert torch.equal(rows, merged(weight, delta, layout)[ids])
    dy = torch.randn(rows.shape).to(dtype)
    rows.backward(dy)
    dense = torch.zeros(layout.grid.shape, dtype=torch.float64).index_add(0, ids, dy.double())
    same_dtype = torch.zeros(layout.grid.shape).index_add(0, ids, dy.float())
    assert_no_worse_than_torch(delta.grad, ops.block_gather(same_dtype, layout), ops.block_gather(dense, layout))


@pytest.mark.parametrize("shape, side", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
def test_padding_idx_and_scale_grad_by_freq_are_those_of_torch(shape, side, padding_idx, scale_grad_by_freq):
    layout = random_layout(BlockGrid.fit(shape, side), 5)
    ids = torch.randint(0, shape[0], (4, 9))
    ids[:, :3] = 3
    rules = {"padding_idx": padding_idx, "scale_grad_by_freq": scale_grad_by_freq}
    weight, delta = torch.randn(shape), delta_of(layout)
    rows = ops.block_rows_add(F.embedding(ids, weight), ids, delta, layout, **rules)
    dy = torch.randn(rows.shape)
    rows.backward(dy)
    table = weight.double().requires_grad_()
    F.embedding(ids, table, **rules).backward(dy.double())
    single = weight.clone().requires_grad_()
    F.embedding(ids, single, **rules).backward(dy)
    truth, same_dtype = (ops.block_gather(grad, layout) for grad in (table.grad, single.grad))
    assert_no_worse_than_torch(delta.grad, same_dtype, truth)
    assert_no_worse_than_torch(ops.table_grad([(ids, dy)], layout.grid, **rules), single.grad, table.grad)
    for statistic, of in (("sum", lambda g: g), ("abs", torch.abs), ("square", torch.square)):
        scores = ops.table_scores([(ids, dy)], layout.grid, statistic, **rules)
        expected = ops.block_sums(of(single.grad), layout.grid)
        assert_no_worse_than_torch(scores, expected, ops.block_sums(of(table.grad), layout.grid))


@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
def test_two_look_ups_of_one_table_are_one_gradient(scale_grad_by_freq):
    grid = BlockGrid.fit((20, 8), 4)
    uses = [(torch.randint(0, 20, (7,)), torch.randn(7, 8)) for _ in range(2)]
    table = torch.zeros(20, 8, dtype=torch.float64, requires_grad=True)
    for ids, dy in uses:
        F.embedding(ids, table, scale_grad_by_freq=scale_grad_by_freq).backward(dy.double())
    grad = ops.table_grad(uses, grid, scale_grad_by_freq=scale_grad_by_freq)
    torch.testing.assert_close(grad.double(), table.grad, rtol=1e-6, atol=1e-6)


def test_a_batch_of_no_tokens():
    layout = random_layout(BlockGrid.fit((20, 8), 4), 3)
    delta, ids = delta_of(layout), torch.zeros(0, 5, dtype=torch.int64)
    ops.block_rows_add(torch.zeros(0, 5, 8), ids, delta, layout).sum().backward()
    assert delta.grad.shape == delta.shape and not delta.grad.any()
    assert not ops.table_scores([(ids, torch.zeros(0, 5, 8))], layout.grid, "abs").any()


def test_nothing_uninitialised_is_read(poisoned):
    layout = random_layout(BlockGrid.fit((50, 22), (8, 4)), 9)
    delta, ids = delta_of(layout), torch.randint(0, 50, (40,))
    rows = ops.block_rows_add(torch.randn(40, 22), ids, delta, layout)
    rows.sum().backward()
    assert torch.isfinite(rows).all() and torch.isfinite(delta.grad).all()


def test_a_compiler_keeps_one_graph_and_functional_transforms_work():
    layout = random_layout(BlockGrid.fit((50, 22), (8, 4)), 9).prepare()
    weight, delta, ids = torch.randn(50, 22), delta_of(layout), torch.randint(0, 50, (3, 6))

    def loss(delta, ids):
        return ops.block_rows_add(F.embedding(ids, weight), ids, delta, layout).square().sum()

    expected = torch.autograd.grad(loss(delta, ids), delta)[0]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(delta, ids), delta)[0], expected)
    torch.testing.assert_close(torch.func.grad(loss)(delta.detach(), ids), expected)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(delta.detach(), ids)
    torch.testing.assert_close(each.sum(0), expected)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3.0


def test_look_ups_are_changed_before_the_layer_scales_them():
    table, other = Scaled(10, 4), nn.Embedding(10, 4)
    ids = torch.arange(6)
    with ops.LookUps(table, lambda rows, ids: rows + ids[:, None]) as look_ups:
        changed, untouched = table(ids), other(ids)
    assert look_ups.seen == 1 and torch.equal(untouched, other(ids))
    assert torch.equal(changed, (table.weight[:6] + ids[:, None]) * 3)
    with ops.LookUps(table, lambda rows, ids: rows * 0):
        assert not F.embedding(weight=table.weight, input=ids).any()
