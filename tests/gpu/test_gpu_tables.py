"""Embedding tables on a GPU: the truth in fp64, and the same bits every time however often a token comes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_torch, random_layout

from smt_peft import ops
from smt_peft.blocks import BlockGrid, BlockLayout

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("tokens", [100, 3000, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_rows_and_gradients_are_right_and_the_same_every_time(tokens, dtype, padding_idx):
    on_cpu = random_layout(BlockGrid.fit((1000, 500), (16, 32)), 200)
    layout = BlockLayout(on_cpu.grid, on_cpu.blocks.to(CUDA)).prepare()
    weight = torch.randn(1000, 500, device=CUDA, dtype=dtype)
    delta = (torch.randn(200, 16, 32, device=CUDA) * layout.padding_mask()).requires_grad_()
    # A few tokens make up most of a text.
    ids = (torch.rand(tokens, device=CUDA) ** 4 * 1000).long()
    rows = ops.block_rows_add(F.embedding(ids, weight), ids, delta, layout, padding_idx)
    merged = ops.block_scatter_(
        weight.clone(), ops.add_rounded(ops.block_gather(weight, layout), delta.detach()), layout
    )
    assert torch.equal(rows, merged[ids])
    dy = torch.randn(rows.shape, device=CUDA, dtype=dtype)
    grads = [torch.autograd.grad(rows, delta, dy, retain_graph=True)[0] for _ in range(5)]
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    dense = []
    for wide in (torch.float32, torch.float64):
        table = weight.to(wide).requires_grad_()
        dense.append(torch.autograd.grad(F.embedding(ids, table, padding_idx), table, dy.to(wide))[0])
    same_dtype, truth = (ops.block_gather(grad, layout) for grad in dense)
    assert_no_worse_than_torch(grads[0], same_dtype, truth)
    scores = [ops.table_scores([(ids, dy)], layout.grid, "abs", padding_idx) for _ in range(5)]
    assert all(torch.equal(score, scores[0]) for score in scores)
