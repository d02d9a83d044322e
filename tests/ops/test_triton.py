"""The Triton kernels against the fp64 truth: in Triton's interpreter on a CPU, compiled where there is a GPU.

The interpreter checks indices, masks and logic, not speed, races or rounding to bf16. Kernels are interpreted when
their module is imported under TRITON_INTERPRET=1, which is set for that moment only: other tests see an untouched
environment.
"""

from __future__ import annotations

import os
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import assert_no_worse_than_torch, layouts, random_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from smt_peft.blocks import BlockGrid, BlockLayout
from smt_peft.ops import reference
from smt_peft.ops import triton as backend
from smt_peft.ops.triton.launch import Device, aligned
from smt_peft.ops.triton.plan import Plan, dense_share, plan

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with patch.dict(os.environ, {"TRITON_INTERPRET": "1"} if DEVICE == "cpu" else {}):
    from smt_peft.ops.triton import grad, matmul  # noqa: F401 (interpreted from here on)

A100, H100, AMD = Device((8, 0), 108), Device((9, 0), 132), Device((9, 4), 304, amd=True)
# `make gpu` runs these too, compiled.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
# fp32 is never sent to the kernels on a GPU; in the interpreter it shows an error that fp16 would hide.
DTYPES = [torch.float16, torch.float32] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]

# Matrix, block and number of blocks. Few enough blocks that no GEMM takes over, but in the last three.
CASES = {
    "4": ((100, 257), 4, 11),
    "8": ((96, 1000), 8, 40),
    "16 matched": ((256, 256), 16, 16),
    "16 ragged": ((257, 1000), 16, 21),
    "24 x 40": ((257, 1000), (24, 40), 9),
    "32 x 8": ((1000, 100), (32, 8), 7),
    "5": ((100, 96), 5, 13),
    "64": ((257, 384), 64, 6),
    "100": ((1000, 257), 100, 3),
    "128": ((1000, 1000), 128, 4),
    "96 x 300": ((257, 1000), (96, 300), 2),
    "16 x 256": ((96, 1000), (16, 256), 3),
    "256 x 512": ((520, 1000), (256, 512), 2),
    "one": ((1000, 1000), 64, 1),
    "all": ((40, 96), 16, 18),
    "columns": ((100, 1000), (-1, 3), 9),
    "rows": ((1000, 40), (24, -1), 7),
}


def _layout(case: str) -> BlockLayout:
    matrix, block, num_blocks = CASES[case]
    layout = random_layout(BlockGrid.fit(matrix, block), num_blocks)
    if case == "16 matched":
        stripes = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        layout = BlockLayout(layout.grid, torch.stack((torch.arange(16), stripes), dim=1).to(torch.int32))
    return BlockLayout(layout.grid, layout.blocks.to(DEVICE))


def _operands(layout: BlockLayout, tokens: int, dtype: torch.dtype):
    dy = torch.randn(tokens, layout.grid.rows).to(DEVICE, dtype)
    x = torch.randn(tokens, layout.grid.cols).to(DEVICE, dtype)
    delta = torch.randn(len(layout), *layout.grid.block_shape).to(DEVICE) * layout.padding_mask()
    return dy, x, delta


def _check_grad(ours, dy, x, layout, before=0.0):
    truth = reference.block_gather(dy.double().t() @ x.double(), layout) + before
    torch_fp32 = reference.block_gather(dy.float().t() @ x.float(), layout) + before
    assert ours.dtype == torch.float32
    assert_no_worse_than_torch(ours, torch_fp32, truth)
    assert not ours[~layout.padding_mask()].any() or torch.is_tensor(before)


def _check_product(ours, y, x, delta, layout):
    weight = reference.dense(delta.to(x.dtype), layout)
    truth = y.double() + x.double() @ weight.double().t()
    assert_no_worse_than_torch(ours, y + (x @ weight.t()).to(y.dtype), truth)


@pytest.fixture
def bf16_dot(monkeypatch):
    """The interpreter multiplies bit patterns of bf16; widened first, as the hardware does, the product is right."""
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: plain(self, widened(a), widened(b), *rest)
    )


@pytest.fixture(params=[A100, H100], ids=["pointers", "bulk"])
def gpu(request, monkeypatch):
    """The kernels of both kinds of GPU, wherever the test runs; a GPU without bulk copies skips them."""
    if DEVICE == "cuda" and request.param.has_bulk_copies and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no bulk tensor copies")
    monkeypatch.setattr(grad, "describe", lambda _: request.param)
    return request.param


def test_the_cases_take_every_route():
    for gpu, kernels in ((A100, {"pointers"}), (H100, {"pointers", "bulk"})):
        routes = {plan(100, _layout(case).grid, len(_layout(case)), gpu).route for case in CASES}
        assert routes == kernels | {"dense", "gathered"}


@pytest.mark.parametrize("case", CASES)
def test_block_grad_is_the_dense_gradients_sub_block(case, gpu, poisoned):
    layout = _layout(case)
    for tokens, dtype in zip((100, 63), DTYPES, strict=True):
        dy, x, _ = _operands(layout, tokens, dtype)
        _check_grad(backend.block_grad(dy, x, layout), dy, x, layout)


@pytest.mark.parametrize("tokens", [1, 3, 2000])
@pytest.mark.parametrize("case", ["24 x 40", "one"])
def test_any_number_of_tokens(case, tokens, gpu, poisoned):
    layout = _layout(case)
    dy, x, delta = _operands(layout, tokens, torch.float16)
    _check_grad(backend.block_grad(dy, x, layout), dy, x, layout)
    _check_product(backend.block_matmul_(dy.clone(), x, delta, layout), dy, x, delta, layout)


@settings(max_examples=25)
@given(layouts(), st.integers(1, 17))
def test_any_layout_is_exact_for_integers(layout, tokens):
    layout = BlockLayout(layout.grid, layout.blocks.to(DEVICE))
    dy, x, delta = (each.mul(2).round() for each in _operands(layout, tokens, torch.float16))
    # Planned as for AMD, which never takes a GEMM instead.
    tiled = replace(plan(tokens, layout.grid, len(layout), AMD), warps=4)
    ours = grad._tiled(aligned(dy), aligned(x), layout, None, False, tiled)
    assert torch.equal(ours.double(), reference.block_gather(dy.double().t() @ x.double(), layout))
    y = backend.block_matmul_(dy.float(), x, delta, layout)
    assert torch.equal(y.double(), dy.double() + x.double() @ reference.dense(delta.double(), layout).t())


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", ["16 ragged", "100", "all", "columns", "rows"])
def test_into_an_existing_gradient(case, splits, gpu, monkeypatch, poisoned):
    layout = _layout(case)
    # 100 tokens in steps of 16: splits of 48, 48 and 4.
    monkeypatch.setattr(grad, "plan", lambda *call: replace(plan(*call), splits=splits, block_tokens=16))
    dy, x, _ = _operands(layout, 100, torch.float16)
    out = torch.empty(len(layout), *layout.grid.block_shape, device=DEVICE)
    assert grad.block_grad(dy, x, layout, out) is out
    _check_grad(out, dy, x, layout)
    before = torch.randn_like(out)
    out.copy_(before)
    assert grad.block_grad(dy, x, layout, out, accumulate=True) is out
    _check_grad(out, dy, x, layout, before)


def test_a_split_without_tokens_adds_nothing(monkeypatch, gpu, poisoned):
    layout = _layout("128")
    monkeypatch.setattr(grad, "plan", lambda *call: replace(plan(*call), splits=5, block_tokens=32))
    dy, x, _ = _operands(layout, 70, torch.float16)
    _check_grad(grad.block_grad(dy, x, layout), dy, x, layout)


@pytest.mark.parametrize("case", ["24 x 40", "64"])
def test_operands_of_any_strides_and_alignment(case, gpu):
    layout = _layout(case)
    dy, x, delta = _operands(layout, 40, torch.float16)
    dy_strided = torch.randn(layout.grid.rows, 40).to(dy).t().copy_(dy)
    x_shifted = torch.full((41, layout.grid.cols + 11), torch.nan, device=DEVICE, dtype=x.dtype)
    x_shifted = x_shifted[1:, 3 : 3 + layout.grid.cols].copy_(x)
    assert torch.equal(backend.block_grad(dy_strided, x_shifted, layout), backend.block_grad(dy, x, layout))
    ones = torch.ones(1, 1, device=DEVICE, dtype=dy.dtype).expand(40, layout.grid.rows)
    assert torch.equal(backend.block_grad(ones, x, layout), backend.block_grad(ones.contiguous(), x, layout))
    y = torch.randn(layout.grid.rows, 40).to(dy).t()
    delta_strided = delta.transpose(1, 2).contiguous().transpose(1, 2)
    expected = backend.block_matmul_(y.contiguous(), x, delta, layout)
    assert torch.equal(backend.block_matmul_(y, x_shifted, delta_strided, layout), expected)


@pytest.mark.parametrize("case", CASES)
def test_block_matmul_is_the_dense_product(case):
    layout = _layout(case)
    for tokens, dtype in zip((100, 63), DTYPES, strict=True):
        dy, x, delta = _operands(layout, tokens, dtype)
        y = backend.block_matmul_(dy.clone(), x, delta, layout)
        _check_product(y, dy, x, delta, layout)
        untouched = torch.ones(layout.grid.rows, dtype=torch.bool)
        untouched[layout.transposed.columns.cpu()] = False
        assert torch.equal(y[:, untouched], dy[:, untouched])
        dx = backend.block_matmul_(x.clone(), dy, delta.transpose(1, 2), layout.transposed)
        _check_product(dx, x, dy, delta.transpose(1, 2), layout.transposed)


def test_bf16(bf16_dot, gpu):
    for case in ("16 ragged", "128"):
        layout = _layout(case)
        dy, x, delta = _operands(layout, 63, torch.bfloat16)
        _check_grad(backend.block_grad(dy, x, layout), dy, x, layout)
        # The interpreter cuts bf16 off instead of rounding: there the sum is left in fp32.
        y = dy.float() if DEVICE == "cpu" else dy.clone()
        ours = backend.block_matmul_(y.clone(), x, delta, layout)
        weight = reference.dense(delta.bfloat16(), layout)
        truth = y.double() + x.double() @ weight.double().t()
        assert_no_worse_than_torch(ours, (y.float() + x.float() @ weight.float().t()).to(y.dtype), truth)


@pytest.mark.parametrize("case", ["16 ragged", "128"])
def test_results_repeat_bit_for_bit(case, gpu):
    layout = _layout(case)
    dy, x, delta = _operands(layout, 600, torch.float16)
    for run in (lambda: backend.block_grad(dy, x, layout), lambda: backend.block_matmul_(dy.clone(), x, delta, layout)):
        first = run()
        assert all(torch.equal(run(), first) for _ in range(2 if DEVICE == "cpu" else 10))


def test_nothing_to_do():
    layout = BlockLayout(BlockGrid.fit((64, 96), 16), torch.empty(0, 2, dtype=torch.int32, device=DEVICE))
    dy, x = torch.randn(5, 64, device=DEVICE).half(), torch.randn(5, 96, device=DEVICE).half()
    assert backend.block_grad(dy, x, layout).shape == (0, 16, 16)
    assert torch.equal(backend.block_matmul_(dy.clone(), x, torch.empty(0, 16, 16, device=DEVICE), layout), dy)

    layout = _layout("16 ragged")
    dy, x, delta = _operands(layout, 0, torch.float16)
    out = torch.ones(len(layout), 16, 16, device=DEVICE)
    assert backend.block_grad(dy, x, layout, out, accumulate=True).eq(1).all()
    assert backend.block_grad(dy, x, layout, out).eq(0).all()
    assert backend.block_grad(dy, x, layout).eq(0).all()
    assert backend.block_matmul_(dy.clone(), x, delta, layout).shape == dy.shape


LLAMA = (4096, 4096)


@pytest.mark.parametrize(
    ("matrix", "block", "num_blocks", "tokens", "device", "expected"),
    [
        # The paper's blocks: 18 tiles of a module's 9 blocks fill 132 multiprocessors seven at a time.
        (LLAMA, 256, 9, 8192, H100, Plan("bulk", (128, 256), 1, 64, 8, 3, 1, 7)),
        (LLAMA, 256, 64, 8192, H100, Plan("bulk", (128, 256), 1, 64, 8, 3, 1, 1)),
        (LLAMA, 128, 64, 8192, H100, Plan("bulk", (128, 128), 1, 64, 8, 3, 2, 4)),
        (LLAMA, 256, 9, 8192, A100, Plan("pointers", (128, 128), 1, 64, 8, 3, 1, 3)),
        (LLAMA, 256, 9, 8192, AMD, Plan("pointers", (128, 128), 1, 32, 8, 2, 1, 8)),
        # Matched: each row and column stripe once, 128 rows and columns at a time.
        (LLAMA, 64, 64, 8192, H100, Plan("bulk", (64, 64), 1, 64, 4, 4, 3, 6)),
        (LLAMA, 32, 128, 8192, H100, Plan("pointers", (32, 32), 4, 64, 8, 3, 2, 8)),
        (LLAMA, 16, 256, 8192, H100, Plan("pointers", (16, 16), 8, 64, 8, 3, 2, 8)),
        (LLAMA, 16, 256, 8192, A100, Plan("pointers", (16, 16), 8, 32, 8, 4, 1, 10)),
        (LLAMA, (24, 40), 60, 64, H100, Plan("pointers", (24, 40), 3, 64, 8, 3, 2, 1)),
        (LLAMA, 5, 100, 64, H100, Plan("pointers", (5, 5), 12, 16, 8, 3, 2, 1)),
        # A GEMM: dense enough, or whole columns or rows; never on AMD, whose GEMM cannot leave its sum in fp32.
        (LLAMA, 256, 192, 8192, H100, Plan("dense")),
        (LLAMA, 16, 4916, 8192, A100, Plan("dense")),
        (LLAMA, (-1, 16), 9, 8192, H100, Plan("gathered")),
        (LLAMA, (16, -1), 9, 8192, A100, Plan("gathered")),
        # A dense gradient of 2.1 GB is never formed.
        ((128256, 4096), 256, 7000, 8192, H100, Plan("bulk", (128, 256), 1, 64, 8, 3, 1, 1)),
    ],
)
def test_plan(matrix, block, num_blocks, tokens, device, expected):
    assert plan(tokens, BlockGrid.fit(matrix, block), num_blocks, device) == expected


def test_dense_share_grows_with_the_side():
    shares = [dense_share(BlockGrid.fit(LLAMA, side)) for side in (16, 32, 64, 128, 256, 512)]
    assert shares == pytest.approx([0.075, 0.15, 0.3, 0.5, 0.75, 0.75])


@pytest.mark.parametrize("tokens", [1, 100, 2048, 8192, 131072])
@pytest.mark.parametrize("num_blocks", [1, 9, 28, 84])
def test_splits_never_leave_a_multiprocessor_waiting_for_long(num_blocks, tokens):
    grid = BlockGrid.fit(LLAMA, 256)
    chosen = plan(tokens, grid, num_blocks, H100)
    programs = chosen.programs(grid, num_blocks) * chosen.splits
    assert chosen.splits == 1 or tokens // chosen.splits >= 4 * chosen.block_tokens
    if tokens >= 8192 and num_blocks >= 9:
        waves = -(-programs // 132)
        assert programs / (132 * waves) >= 0.8


def test_why_not():
    x = torch.zeros(32, 64, device=DEVICE, dtype=torch.float16)
    delta, layout = torch.zeros(1, 16, 16, device=DEVICE), random_layout(BlockGrid.fit((64, 64), 16), 1)
    with patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        assert backend.why_not_block_grad(x, x, layout) is None
        assert backend.why_not_block_matmul_(x, x, delta, layout) is None
        assert backend.why_not_block_matmul_(x.float(), x, delta, layout) is None
        assert "cuBLAS" in backend.why_not_block_grad(x.double(), x.double(), layout)
        assert "differ in dtype" in backend.why_not_block_grad(x, x.to(torch.bfloat16), layout)
        assert "float64" in backend.why_not_block_matmul_(x.double(), x, delta, layout)
        assert "float64" in backend.why_not_block_matmul_(x, x, delta.double(), layout)
    cpu, meta = torch.zeros(2, 2, dtype=torch.float16), torch.zeros(2, 2, device="meta")
    with patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        assert "GPUs only" in backend.why_not_block_grad(cpu, cpu, layout)
    assert "meta" in backend.why_not_block_grad(meta, meta, layout)


def test_why_not_without_a_fitting_triton(monkeypatch):
    import triton

    backend._triton_missing.cache_clear()
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "3.5.1 is installed" in backend._triton_missing()
    backend._triton_missing.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    assert "cannot be imported" in backend._triton_missing()
    monkeypatch.undo()
    backend._triton_missing.cache_clear()
    assert backend._triton_missing() is None
