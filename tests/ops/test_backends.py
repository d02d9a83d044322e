"""Every backend of every operation against an fp64 truth by slices; copies bit for bit.

On a machine with a GPU the same cases run there too. Triton's kernels meet the same truth in test_triton.py, where they
are interpreted.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_torch, random_layout

from smt_peft import ops
from smt_peft.blocks import BlockGrid, BlockLayout
from smt_peft.ops.dispatch import FASTER

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ON_GPU = pytest.mark.gpu

# tokens, (out_features, in_features), block size, blocks: square, rectangular, ragged and whole-side blocks; matched
# and crowded selections; one block, all of them, none.
CASES = {
    "one token": (1, (40, 96), 8, 5),
    "three tokens, ragged": (3, (96, 257), 16, 20),
    "wide input": (63, (100, 1000), 32, 9),
    "ragged both ways": (100, (257, 257), 64, 7),
    "odd side": (2000, (96, 100), 24, 6),
    "fours": (100, (257, 100), 4, 90),
    "columns": (2000, (257, 40), (-1, 1), 5),
    "rows": (100, (1000, 96), (1, -1), 11),
    "several rows": (63, (40, 257), (3, -1), 4),
    "tall": (63, (257, 1000), (64, 16), 12),
    "wide": (63, (257, 1000), (16, 100), 12),
    "large": (100, (257, 300), 128, 3),
    "one block of a small matrix": (63, (40, 40), 256, 1),
    "all blocks": (63, (100, 96), 16, 42),
    "one block": (63, (100, 96), 16, 1),
    "no block": (63, (100, 96), 16, 0),
    "no token": (0, (40, 96), 8, 5),
}


def backends(operation):
    """`(backend, device)` pairs that must be able to run the operation here."""
    pairs = [("reference", "cpu")] + [(name, "cpu") for name in FASTER[operation] if name == "native"]
    marked = [pytest.param(*pair, id="-".join(pair)) for pair in pairs]
    for name in ("reference", *FASTER[operation]):
        if (name, operation) != ("native", "block_grad"):
            marked.append(pytest.param(name, "cuda", id=f"{name}-cuda", marks=ON_GPU))
    return pytest.mark.parametrize(("backend", "device"), marked)


def layout_of(case, device="cpu") -> BlockLayout:
    _, shape, size, count = CASES[case]
    layout = random_layout(BlockGrid.fit(shape, size), count, seed=len(case))
    return BlockLayout(layout.grid, layout.blocks.to(device))


def by_slices(matrix, layout):
    """The chosen blocks of a matrix, one slice at a time, padded with zeros: `(B, r, c)`."""
    rows, cols = layout.grid.block_shape
    padded = F.pad(matrix, (0, -layout.grid.cols % cols, 0, -layout.grid.rows % rows))
    blocks = [padded[r * rows : (r + 1) * rows, c * cols : (c + 1) * cols] for r, c in layout.blocks.tolist()]
    return torch.stack(blocks) if blocks else matrix.new_zeros(0, rows, cols)


def into_slices(matrix, blocks, layout):
    """A copy of the matrix with the chosen blocks overwritten, one slice at a time."""
    matrix = matrix.clone()
    rows, cols = layout.grid.block_shape
    for block, (r, c) in zip(blocks, layout.blocks.tolist(), strict=True):
        part = matrix[r * rows : (r + 1) * rows, c * cols : (c + 1) * cols]
        part.copy_(block[: part.shape[0], : part.shape[1]])
    return matrix


def operands(case, dtype, device):
    layout = layout_of(case, device)
    tokens, (rows, cols) = CASES[case][0], layout.grid.shape
    dy = torch.randn(tokens, rows, dtype=torch.float64).to(dtype).to(device)
    x = torch.randn(tokens, cols, dtype=torch.float64).to(dtype).to(device)
    weight = torch.randn(rows, cols, dtype=torch.float64).to(dtype).to(device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    delta = (torch.randn(len(layout), *layout.grid.block_shape, dtype=torch.float64).to(device) * 0.1).to(wide)
    return layout, dy, x, weight, delta * layout.padding_mask() if len(layout) else delta


def check(ours, same, truth):
    """fp64 is its own truth; below it the rule of `assert_no_worse_than_torch`."""
    if ours.dtype == torch.float64:
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
    elif ours.numel():
        assert_no_worse_than_torch(ours, same, truth)


def awkward(tensor):
    """The same values with strides that nobody would choose."""
    wide = torch.full((2 * tensor.shape[0], 3 * tensor.shape[1]), float("nan"), dtype=tensor.dtype)
    view = wide.to(tensor.device)[::2, 1::3]
    return view.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@backends("block_grad")
def test_block_grad(case, dtype, backend, device, poisoned):
    if backend == "triton" and dtype in (torch.float32, torch.float64):
        pytest.skip("cuBLAS serves these dtypes")
    layout, dy, x, _, _ = operands(case, dtype, device)
    truth = by_slices(dy.double().t() @ x.double(), layout)
    same = by_slices(dy.t() @ x, layout)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with ops.use_backend(f"block_grad={backend}"):
        grad = ops.block_grad(dy, x, layout)
        strided = ops.block_grad(awkward(dy), awkward(x), layout)
        out = torch.full_like(grad, float("nan"))
        assert ops.block_grad(dy, x, layout, out=out) is out
        summed = ops.block_grad(dy, x, layout, out=torch.ones_like(grad), accumulate=True)
        again = ops.block_grad(dy, x, layout)
    assert grad.dtype == wide and grad.shape == truth.shape
    assert torch.equal(grad, again) and torch.equal(grad, out)
    for ours, true, plain in ((grad, truth, same), (strided, truth, same), (summed, truth + 1, same.to(wide) + 1)):
        check(ours, plain, true)
    if len(layout):
        assert not grad[~layout.padding_mask()].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@backends("block_matmul_")
def test_block_matmul(case, dtype, backend, device, poisoned):
    if backend == "triton" and dtype in (torch.float32, torch.float64):
        pytest.skip("cuBLAS serves these dtypes")
    layout, dy, x, _, delta = operands(case, dtype, device)
    for inputs, target, blocks, lay in ((x, dy, delta, layout), (dy, x, delta.transpose(1, 2), layout.transposed)):
        dense = into_slices(torch.zeros(lay.grid.shape, dtype=torch.float64, device=device), blocks.double(), lay)
        truth = target.double() + inputs.double() @ dense.t()
        same = target + inputs @ dense.to(dtype).t()
        with ops.use_backend(f"block_matmul_={backend}"):
            y = target.clone()
            assert ops.block_matmul_(y, inputs, blocks, lay) is y
            strided = awkward(target)
            ops.block_matmul_(strided, awkward(inputs), blocks, lay)
        check(y, same, truth)
        check(strided, same, truth)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@backends("block_gather")
def test_gather_and_scatter_copy_bit_for_bit(case, dtype, transposed, backend, device, poisoned):
    layout, _, _, weight, delta = operands(case, dtype, device)
    if transposed:
        weight = weight.t().contiguous().t()
    with ops.use_backend(backend):
        blocks = ops.block_gather(weight, layout)
        written = ops.block_scatter_(weight.clone(), delta + 1, layout)
        back = ops.block_scatter_(written.clone(), blocks, layout)
    assert torch.equal(blocks, by_slices(weight, layout))
    assert torch.equal(written, into_slices(weight, (delta + 1).to(dtype), layout))
    assert torch.equal(back, weight)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@backends("swap_linear")
def test_a_swap_is_a_merge_that_leaves_no_trace(case, dtype, transposed, backend, device, poisoned):
    layout, dy, x, weight, delta = operands(case, dtype, device)
    if transposed:
        weight = weight.t().contiguous().t()
    bias = dy.new_ones(weight.shape[0])
    kept, version = weight.clone(), weight._version
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    merged = into_slices(weight, (by_slices(weight, layout).to(wide) + delta).to(dtype), layout)
    with ops.use_backend(backend):
        y = ops.swap_linear(x, weight, bias, delta, layout)
        unbiased = ops.swap_linear(x, weight, None, delta, layout)
        dx = ops.swap_matmul(dy, weight, delta, layout)
    assert torch.equal(y, F.linear(x, merged, bias))
    assert torch.equal(unbiased, F.linear(x, merged))
    assert torch.equal(dx, dy @ merged)
    assert torch.equal(weight, kept) and weight._version == version


@backends("block_grad")
def test_a_gradient_is_the_same_ten_times(backend, device):
    layout, dy, x, _, _ = operands("odd side", torch.bfloat16, device)
    with ops.use_backend(f"block_grad={backend}"):
        first = ops.block_grad(dy, x, layout)
        assert all(torch.equal(first, ops.block_grad(dy, x, layout)) for _ in range(9))
        if device == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                noise = [torch.randn(2048, 2048, device=device) @ torch.randn(2048, 2048, device=device)]
            assert all(torch.equal(first, ops.block_grad(dy, x, layout)) for _ in range(10))
            stream.synchronize()
            assert torch.isfinite(noise[0]).all()


ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def adamw_state(shapes, moments, device, params=torch.float32):
    """Parameters, moments and scales at zero, for `block_adamw_`."""
    values = [torch.randn(shape, dtype=torch.float64).to(params).to(device) for shape in shapes]
    dtype = {"float": torch.float64 if params == torch.float64 else torch.float32, "bfloat16": torch.bfloat16}
    averages = [
        [torch.zeros(shape, dtype=dtype.get(moments, torch.uint8), device=device) for shape in shapes] for _ in "mv"
    ]
    sizes = [-(-value.numel() // 256) if moments == "8bit" else 0 for value in values]
    scales = [[torch.zeros(size, device=device) for size in sizes] for _ in "mv"]
    return values, *averages, *scales, [torch.zeros((), device=device) for _ in shapes]


@backends("block_adamw_")
@pytest.mark.parametrize("extra", ["plain", "coefficient"])
def test_adamw_is_no_worse_than_torch(backend, device, extra, poisoned):
    shapes = [(7, 16, 16), (1, 257, 3), (0, 4, 4), (5,)]
    coefficient = torch.tensor(0.5, device=device) if extra == "coefficient" else None
    values, *state, steps = adamw_state(shapes, "float", device)
    torch_own = [value.clone().requires_grad_() for value in values]
    truth = [value.double().requires_grad_() for value in values]
    settings = {"lr": ADAMW["lr"], "weight_decay": ADAMW["weight_decay"]}
    optimizers = [torch.optim.AdamW(params, **settings) for params in (torch_own, truth)]
    for number in range(20):
        grads = [torch.randn_like(value) for value in values]
        for params in (torch_own, truth):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.to(param.dtype) * (0.5 if coefficient is not None else 1)
        for optimizer in optimizers:
            optimizer.step()
        for step in steps:
            step += 1
        with ops.use_backend(backend):
            ops.block_adamw_(values, grads, *state, steps, **ADAMW, coefficient=coefficient, seed=number)
    for ours, own, true in zip(values, torch_own, truth, strict=True):
        check(ours, own.detach(), true.detach())


@backends("block_adamw_")
@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("moments", ["float", "bfloat16", "8bit"])
def test_adamw_states_of_every_format_follow_the_reference(backend, device, moments, params):
    """Rounding is stochastic but hashed, so a backend may differ only where fp32 arithmetic tips a value over."""
    shapes = [(7, 16, 16), (1, 257, 3), (300,)]
    torch.manual_seed(0)
    mine = adamw_state(shapes, moments, device, params)
    theirs = [[tensor.clone() for tensor in part] for part in mine]
    for number in range(5):
        grads = [torch.randn(shape, device=device) for shape in shapes]
        for run, name in ((mine, backend), (theirs, "reference")):
            for step in run[-1]:
                step += 1
            with ops.use_backend(f"block_adamw_={name}"):
                ops.block_adamw_(run[0], grads, *run[1:], **ADAMW, seed=number)
    for ours, true in zip(sum(mine[:-1], []), sum(theirs[:-1], []), strict=True):
        if ours.numel():
            close = torch.isclose(ours.double(), true.double(), rtol=1e-5, atol=1e-7)
            assert close.double().mean() > 0.99, f"{(~close).sum()} of {ours.numel()} differ"
    for ours, true in zip(mine[0], theirs[0], strict=True):
        assert (ours.double() - true.double()).abs().max() <= 2e-2


@backends("block_adamw_")
def test_a_skipped_step_changes_nothing(backend, device):
    parts = adamw_state([(3, 8, 8)], "8bit", device)
    for step in parts[-1]:
        step += 1
    grads = [torch.randn(3, 8, 8, device=device)]
    with ops.use_backend(f"block_adamw_={backend}"):
        ops.block_adamw_(parts[0], grads, *parts[1:], **ADAMW)
        before = [[tensor.clone() for tensor in part] for part in parts]
        ops.block_adamw_(parts[0], grads, *parts[1:], **ADAMW, skip=torch.ones((), device=device))
    for part, kept in zip(parts, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, kept, strict=True))
