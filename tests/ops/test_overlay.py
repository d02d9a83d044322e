"""The overlay forward: what a plain layer with the dequantised weight gives, and nothing of a weight's size is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_torch, layouts, random_layout
from hypothesis import given
from torch.autograd.graph import saved_tensors_hooks

from smt_peft import ops
from smt_peft.blocks import BlockGrid

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Weight:
    """A weight that is dequantised on demand, and counts how often."""

    def __init__(self, weight):
        self.weight, self.calls = weight, 0

    def __call__(self):
        self.calls += 1
        return self.weight.clone()


def operands(layout, shape=(7,), weight_dtype=torch.float32, x_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, cols = layout.grid.shape
    weight = torch.randn(rows, cols, generator=generator).to(weight_dtype)
    x = torch.randn(*shape, cols, generator=generator).to(x_dtype).requires_grad_()
    bias = torch.randn(rows, generator=generator).to(x_dtype)
    delta = 0.1 * torch.randn(len(layout), *layout.grid.block_shape, generator=generator)
    if layout.grid.is_ragged:
        delta *= layout.padding_mask()
    return x, weight, bias, delta.requires_grad_()


def run(function, x, delta):
    y = function()
    grads = torch.autograd.grad(y.float().square().sum(), (x, delta))
    return y, *grads


def both(x, weight, bias, delta, layout):
    ours = run(lambda: ops.block_overlay(x, Weight(weight), bias, delta, layout), x, delta)
    plain = run(lambda: ops.block_linear(x, weight, bias, delta, layout, swap=True), x, delta)
    return ours, plain


@given(layouts())
def test_equals_swap_on_the_dequantised_weight_bit_for_bit(layout):
    ours, plain = both(*operands(layout), layout)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 2, 3), (0,), (2, 0)])
def test_every_dtype_and_number_of_dimensions(dtype, shape):
    layout = random_layout(BlockGrid.fit((48, 40), 8), 9)
    ours, plain = both(*operands(layout, shape, dtype, dtype), layout)
    assert ours[0].shape == (*shape, 48) and ours[0].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("enabled", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_it_gives_a_plain_layer(enabled):
    layout = random_layout(BlockGrid.fit((48, 40), 8), 9)
    with torch.autocast("cpu", dtype=enabled):
        ours, plain = both(*operands(layout), layout)
    assert ours[0].dtype == enabled
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("x_dtype", DTYPES)
def test_a_weight_of_another_dtype_is_rounded_to_its_own_before_it_is_cast(x_dtype):
    layout = random_layout(BlockGrid.fit((48, 40), 8), 9)
    x, weight, bias, delta = operands(layout, weight_dtype=torch.bfloat16, x_dtype=x_dtype)
    merged = weight.float() + ops.dense(delta.detach(), layout)
    expected = F.linear(x, merged.bfloat16().to(x_dtype), bias)
    assert torch.equal(ops.block_overlay(x, Weight(weight), bias, delta, layout), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_fp64(dtype):
    layout = random_layout(BlockGrid.fit((48, 40), 8), 9)
    x, weight, bias, delta = operands(layout, (33,), dtype, dtype)
    merged = (weight.float() + ops.dense(delta.detach(), layout)).to(dtype).requires_grad_()
    torch_y = F.linear(x, merged, bias)
    torch_grads = torch.autograd.grad(torch_y.sum(), (x, merged))
    wide = merged.detach().double().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    true_y = F.linear(x64, wide, bias.double())
    true_grads = torch.autograd.grad(true_y.sum(), (x64, wide))
    y = ops.block_overlay(x, Weight(weight), bias, delta, layout)
    dx, d_delta = torch.autograd.grad(y.sum(), (x, delta))
    assert_no_worse_than_torch(y.detach(), torch_y.detach(), true_y.detach())
    assert_no_worse_than_torch(dx, torch_grads[0], true_grads[0])
    gathered = [ops.block_gather(grad, layout) for grad in (torch_grads[1], true_grads[1])]
    assert_no_worse_than_torch(d_delta, *gathered)


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("needs_delta", [True, False])
def test_only_what_is_asked_for_is_computed_and_kept(needs_x, needs_delta):
    layout = random_layout(BlockGrid.fit((48, 400), 8), 3)
    x, weight, bias, delta = operands(layout, (6,))
    x.requires_grad_(needs_x)
    delta.requires_grad_(needs_delta)
    kept, dequantise = [], Weight(weight)
    with saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        y = ops.block_overlay(x, dequantise, bias, delta, layout)
    assert dequantise.calls == 1
    expected = ([(6, 3 * 8)] if needs_delta else []) + ([tuple(delta.shape)] if needs_x else [])
    assert [tuple(shape) for shape in kept] == expected
    if needs_x or needs_delta:
        y.sum().backward()
    assert dequantise.calls == 1 + needs_x
    assert (x.grad is not None) == needs_x and (delta.grad is not None) == needs_delta


def test_nothing_is_kept_without_gradients():
    layout = random_layout(BlockGrid.fit((48, 40), 8), 3)
    x, weight, bias, delta = operands(layout)
    with torch.no_grad(), saved_tensors_hooks(lambda t: pytest.fail("kept"), lambda t: t):
        ops.block_overlay(x, Weight(weight), bias, delta, layout)


def test_double_backward_is_refused():
    layout = random_layout(BlockGrid.fit((48, 40), 8), 3)
    x, weight, bias, delta = operands(layout)
    y = ops.block_overlay(x, Weight(weight), bias, delta, layout)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_an_optimizer_step_between_forward_and_backward_is_noticed():
    layout = random_layout(BlockGrid.fit((48, 40), 8), 3)
    x, weight, bias, delta = operands(layout)
    y = ops.block_overlay(x, Weight(weight), bias, delta, layout)
    with torch.no_grad():
        delta.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
