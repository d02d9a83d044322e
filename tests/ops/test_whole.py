"""Blocks of whole rows and columns: one dense GEMM, on every backend, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_no_worse_than_torch, random_layout
from torch.utils._python_dispatch import TorchDispatchMode

from smt_peft import ops
from smt_peft.blocks import BlockGrid
from smt_peft.ops.whole import is_whole, whole_product

# shape, block, how many: single lines, several at a time, all of them, one block that is the matrix.
WHOLE = {
    "columns": ((36, 40), (-1, 1), 7),
    "pairs of columns": ((36, 40), (-1, 2), 5),
    "rows": ((36, 40), (1, -1), 7),
    "heads": ((36, 40), (6, -1), 3),
    "every column": ((36, 40), (-1, 1), 40),
    "every row": ((36, 40), (1, -1), 36),
    "the matrix": ((36, 40), (-1, -1), 1),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Counted(TorchDispatchMode):
    """Counts the matrix products."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "block_grad_"):
            self.products.append(name)
        return func(*args, **(kwargs or {}))


def operands(case, dtype=torch.float32, tokens=33):
    torch.manual_seed(0)
    shape, size, count = WHOLE[case]
    layout = random_layout(BlockGrid.fit(shape, size), count)
    dy, x = (torch.randn(tokens, side).to(dtype) for side in shape)
    return layout, dy, x, torch.randn(count, *layout.grid.block_shape)


def dense(blocks, layout):
    return ops.dense(blocks.double(), layout)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", WHOLE)
def test_the_gradient_is_one_product(case, backend):
    layout, dy, x, _ = operands(case)
    with ops.use_backend(f"block_grad={backend}"), Counted() as counted:
        ops.block_grad(dy, x, layout)
    assert counted.products == ["mm"]


@pytest.mark.parametrize("case", WHOLE)
def test_the_added_product_is_one_product(case):
    layout, dy, x, delta = operands(case)
    with Counted() as counted:
        ops.block_matmul_(dy, x, delta, layout)
    assert len(counted.products) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WHOLE)
def test_kept_columns_give_the_gradient_of_all_of_them(case, dtype):
    layout, dy, x, _ = operands(case, dtype)
    truth = ops.block_gather((dy.double().t() @ x.double()), layout)
    plain = ops.block_gather(dy.t() @ x, layout)
    for kept, over in ((x, layout), (x.index_select(1, layout.columns), layout.packed)):
        grad = ops.block_grad(dy, kept, over)
        assert grad.is_contiguous() and grad.dtype == torch.float32
        assert_no_worse_than_torch(grad, plain, truth)


@pytest.mark.parametrize("case", WHOLE)
def test_the_product_is_differentiable_twice(case):
    layout, _, x, delta = operands(case, torch.float64, tokens=3)
    x, delta = x.requires_grad_(), delta.double().requires_grad_()
    torch.testing.assert_close(
        whole_product(x, delta, layout, torch.float64), x @ dense(delta, layout).t(), rtol=0, atol=1e-12
    )
    assert torch.autograd.gradgradcheck(lambda x, delta: whole_product(x, delta, layout, torch.float64), (x, delta))


@pytest.mark.parametrize("swap", [True, False], ids=["swap", "additive"])
@pytest.mark.parametrize("case", ["columns", "heads"])
def test_a_compiled_layer_gives_what_the_eager_one_gives(case, swap):
    layout, _, x, delta = operands(case)
    layout.prepare().columns, layout.packed.prepare()  # noqa: B018
    weight = torch.randn(layout.grid.shape)

    def step(x, delta):
        return ops.block_linear(x, weight, None, delta, layout, swap).square().sum()

    found = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaves = x.clone().requires_grad_(), delta.clone().requires_grad_()
        function(*leaves).backward()
        found.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


def test_ragged_stripes_take_the_general_route():
    assert not is_whole(BlockGrid(10, 8, 3, 8)) and not is_whole(BlockGrid(8, 10, 8, 3))
    assert is_whole(BlockGrid(9, 8, 3, 8)) and is_whole(BlockGrid(8, 9, 8, 3))
    assert not is_whole(BlockGrid(8, 8, 4, 4))
