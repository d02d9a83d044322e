"""block_linear and block_add against autograd through a dense weight."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_torch, layouts, random_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from smt_peft import ops
from smt_peft.blocks import BlockGrid
from smt_peft.ops import linear, swap


def _setting(layout, dtype=torch.float64, lead=(7,), scale=0.1):
    grid = layout.grid
    weight = torch.randn(grid.shape, dtype=torch.float64).to(dtype)
    bias = torch.randn(grid.rows, dtype=torch.float64).to(dtype)
    delta = (
        (scale * torch.randn(len(layout), *grid.block_shape) * layout.padding_mask())
        .to(torch.float64 if dtype == torch.float64 else torch.float32)
        .requires_grad_()
    )
    x = torch.randn(*lead, grid.cols, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, bias, delta


def _truth(x, weight, bias, delta, layout, dy, dtype=torch.float64):
    x, delta = (t.detach().to(dtype).requires_grad_() for t in (x, delta))
    y = F.linear(x, weight.to(dtype) + ops.dense(delta, layout), bias.to(dtype))
    return y.detach(), *torch.autograd.grad(y, (x, delta), dy.to(dtype))


def _run(route, x, weight, bias, delta, layout):
    if route == "add":
        return ops.block_add(F.linear(x, weight, bias), x, delta, layout)
    if route == "traceable":
        return ops.block_add_traceable(F.linear(x, weight, bias), x, delta, layout)
    return ops.block_linear(x, weight, bias, delta, layout, swap=route == "swap")


ROUTES = ["swap", "additive", "add", "traceable"]


@settings(max_examples=40)
@given(
    layouts(max_side=24),
    st.sampled_from([(), (0,), (7,), (2, 3), (2, 0, 3), (2, 2, 3)]),
    st.sampled_from(ROUTES),
    st.booleans(),
)
def test_forward_and_gradients_are_exact(layout, lead, route, transposed):
    x, weight, bias, delta = _setting(layout, lead=lead)
    if transposed:
        weight = weight.t().contiguous().t()
    kept = weight.clone()
    y = _run(route, x, weight, bias, delta, layout)
    dy = torch.randn_like(y)
    truth = _truth(x, weight, bias, delta, layout, dy)
    for ours, true in zip((y.detach(), *torch.autograd.grad(y, (x, delta), dy)), truth, strict=True):
        assert ours.shape == true.shape
        assert torch.allclose(ours, true, rtol=0, atol=1e-12)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("size", [8, (-1, 1), 64], ids=str)
def test_gradcheck(route, size):
    layout = random_layout(BlockGrid.fit((10, 13), size), 1 if size == 64 else 2)
    x, weight, bias, delta = _setting(layout, lead=(3,))
    # Padding is no parameter: its gradient is zero whatever the finite difference says, so it is masked out.
    mask = layout.padding_mask()
    assert torch.autograd.gradcheck(lambda x, d: _run(route, x, weight, bias, d * mask, layout), (x, delta))


def test_double_backward_of_the_traceable_form_and_a_clear_refusal_of_the_others():
    layout = random_layout(BlockGrid.fit((10, 13), 4), 3)
    x, weight, bias, delta = _setting(layout, lead=(3,))
    mask = layout.padding_mask()
    assert torch.autograd.gradgradcheck(lambda x, d: _run("traceable", x, weight, bias, d * mask, layout), (x, delta))
    y = _run("swap", x, weight, bias, delta, layout)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 64, (-1, 1)], ids=str)
def test_low_precision_is_no_worse_than_torch(route, dtype, size):
    layout = random_layout(BlockGrid.fit((130, 200), size), 5)
    x, weight, bias, delta = _setting(layout, dtype, lead=(3, 21), scale=0.05)
    y = _run(route, x, weight, bias, delta, layout)
    dy = torch.randn_like(y)
    ours = (y.detach(), *torch.autograd.grad(y, (x, delta), dy))
    same = _truth(x, weight, bias, delta, layout, dy, dtype)
    true = _truth(x, weight, bias, delta, layout, dy)
    for got, torch_own, truth in zip(ours, same, true, strict=True):
        assert_no_worse_than_torch(got, torch_own, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_swap_equals_a_merged_weight_bit_for_bit(dtype):
    layout = random_layout(BlockGrid.fit((40, 50), 8), 9)
    x, weight, bias, delta = _setting(layout, dtype, scale=0.01)
    merged = weight.clone()
    ops.block_scatter_(merged, ops.add_rounded(ops.block_gather(weight, layout), delta.detach()), layout)
    with torch.no_grad():
        assert torch.equal(ops.block_linear(x, weight, bias, delta, layout, swap=True), F.linear(x, merged, bias))


@pytest.mark.parametrize("swap_blocks", [True, False])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(swap_blocks, autocast):
    layout = random_layout(BlockGrid.fit((40, 50), 8), 9)
    x, weight, bias, delta = _setting(layout, torch.float32, scale=0.05)
    kept = weight.clone()
    with torch.autocast("cpu", dtype=autocast):
        y = ops.block_linear(x, weight, bias, delta, layout, swap=swap_blocks)
        dense = F.linear(x.detach(), weight + ops.dense(delta.detach(), layout), bias)
    assert y.dtype == autocast
    dy = torch.randn_like(y)
    # Backward under autocast too: the accumulation stays wide there as well.
    with torch.autocast("cpu", dtype=autocast):
        dx, d_delta = torch.autograd.grad(y, (x, delta), dy)
    assert dx.dtype == torch.float32 and d_delta.dtype == torch.float32
    true = _truth(x, weight, bias, delta, layout, dy)
    same = _truth(x, weight, bias, delta, layout, dy, autocast)
    for ours, torch_own, truth in zip((y.detach(), dx, d_delta), (dense, *same[1:]), true, strict=True):
        assert_no_worse_than_torch(ours, torch_own, truth)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("route", ["swap", "additive", "add"])
def test_only_the_touched_columns_are_kept_for_backward(route):
    grid = BlockGrid.fit((128, 256), 16)
    layout = random_layout(grid, 3, seed=1)
    x, weight, bias, delta = _setting(layout, torch.float32, lead=(64,))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _run(route, x, weight, bias, delta, layout)
    mine = {delta.untyped_storage().data_ptr(), weight.untyped_storage().data_ptr()}
    # Storage, not shape: a slice that is a view would keep the whole input alive.
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in saved
        if t.untyped_storage().data_ptr() not in mine
    }
    assert sum(kept.values()) == 64 * layout.columns.numel() * 4 < x.untyped_storage().nbytes() / 4


def test_an_input_needed_nearly_whole_is_kept_by_reference():
    layout = random_layout(BlockGrid.fit((64, 64), 16), 12, seed=2)
    assert layout.columns.numel() == 64
    x, weight, bias, delta = _setting(layout, torch.float32, lead=(9,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.block_linear(x, weight, bias, delta, layout, swap=True)
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


@pytest.mark.parametrize("route", ["swap", "additive"])
def test_nothing_is_computed_or_kept_for_gradients_nobody_wants(route, monkeypatch):
    layout = random_layout(BlockGrid.fit((32, 32), 8), 3)
    x, weight, bias, delta = _setting(layout, torch.float32)
    monkeypatch.setattr(linear, "swap_matmul", None)
    y = _run(route, x.detach(), weight, bias, delta, layout)
    assert [t is None for t in y.grad_fn.next_functions[0][0].saved_tensors] == [False, True, True]
    y.sum().backward()
    assert delta.grad is not None
    y = _run(route, x, weight, bias, delta.detach(), layout)
    assert y.grad_fn.next_functions[0][0].saved_tensors[0] is None


@pytest.mark.parametrize("route", ["swap", "additive", "add"])
def test_nothing_is_copied_where_no_graph_is_recorded(route, monkeypatch):
    layout = random_layout(BlockGrid.fit((32, 32), 8), 3)
    x, weight, bias, delta = _setting(layout, torch.float32)
    monkeypatch.setattr(linear, "kept_input", None)
    with torch.no_grad():
        _run(route, x, weight, bias, delta, layout)


def test_optimizer_step_between_forward_and_backward_is_noticed():
    layout = random_layout(BlockGrid.fit((32, 32), 8), 3)
    x, weight, bias, delta = _setting(layout, torch.float32)
    y = _run("swap", x, weight, bias, delta, layout)
    with torch.no_grad():
        delta.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class TestSwap:
    def test_base_comes_back_when_the_gemm_raises(self):
        layout = random_layout(BlockGrid.fit((32, 32), 8), 3)
        _, weight, _, delta = _setting(layout, torch.bfloat16)
        kept, version = weight.clone(), weight._version

        def gemm():
            assert not torch.equal(weight, kept)
            raise MemoryError("no room")

        with pytest.raises(MemoryError):
            swap.run_with_blocks(gemm, weight, delta.detach(), layout)
        assert torch.equal(weight, kept) and weight._version == version

    @staticmethod
    def interrupt(monkeypatch, times):
        """Ctrl-C in the first `times` attempts to restore."""
        calls = []

        def interrupted(*args):
            calls.append(1)
            if 2 <= len(calls) < 2 + times:
                raise KeyboardInterrupt
            return ops.block_scatter_(*args)

        monkeypatch.setattr(swap, "block_scatter_", interrupted)

    @pytest.mark.parametrize("healed_by", ["itself", "heal", "the next call"])
    def test_an_interrupted_restore_is_made_good(self, monkeypatch, healed_by):
        layout = random_layout(BlockGrid.fit((32, 32), 8), 3)
        _, weight, _, delta = _setting(layout, torch.float32)
        kept = weight.clone()
        self.interrupt(monkeypatch, 1 if healed_by == "itself" else 2)
        with pytest.raises(KeyboardInterrupt):
            swap.run_with_blocks(lambda: weight.sum(), weight, delta.detach(), layout)
        assert torch.equal(weight, kept) == (healed_by == "itself")
        if healed_by == "heal":
            ops.heal(weight)
        elif healed_by == "the next call":
            swap.run_with_blocks(lambda: weight.sum(), weight, delta.detach(), layout)
        assert torch.equal(weight, kept)

    def test_nothing_is_restored_twice_or_over_new_weights(self, monkeypatch):
        layout = random_layout(BlockGrid.fit((32, 32), 8), 3)
        _, weight, _, delta = _setting(layout, torch.float32)
        swap.run_with_blocks(lambda: weight.sum(), weight, delta.detach(), layout)
        weight.zero_()
        ops.heal(weight)
        assert not weight.any()
        self.interrupt(monkeypatch, 2)
        with pytest.raises(KeyboardInterrupt):
            swap.run_with_blocks(lambda: weight.sum(), weight, delta.detach(), layout)
        weight.data = torch.ones(32, 32)
        ops.heal(weight)
        assert bool((weight == 1).all())

    def test_threads_in_one_layer_do_not_disturb_each_other(self):
        layout = random_layout(BlockGrid.fit((64, 64), 8), 9)
        x, weight, bias, delta = _setting(layout, torch.float32)
        kept = weight.clone()
        expected = ops.block_linear(x, weight, bias, delta, layout, swap=True)
        results = []

        def work():
            results.extend(
                torch.equal(ops.block_linear(x, weight, bias, delta, layout, swap=True), expected) for _ in range(50)
            )

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 200 and all(results)
        assert torch.equal(weight, kept)
