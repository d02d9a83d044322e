"""Inputs kept in 8 bits: the block gradient within the bound that follows from the steps, all else bit for bit."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from helpers import layouts, random_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from smt_peft import ops
from smt_peft.blocks import BlockGrid
from smt_peft.ops import saved
from smt_peft.ops.saved import FEW, GROUP, LARGEST


def linear(route, x, weight, delta, layout, int8):
    if route == "add":
        return ops.block_add(F.linear(x, weight), x, delta, layout, int8)
    if route == "overlay":
        return ops.block_overlay(x, weight.clone, None, delta, layout, int8)
    if route == "grouped":
        run = ops.Run(slice(0, len(x)), slice(0, len(layout)), layout)
        gemm = lambda x, operand: x @ operand[0]  # noqa: E731
        return ops.grouped_linear(x, weight[None], delta, layout, [run], gemm, False, True, int8)
    return ops.block_linear(x, weight, None, delta, layout, route == "swap", int8)


ROUTES = ["swap", "additive", "add", "overlay", "grouped"]


def setting(layout, tokens, dtype=torch.float64, scale=1.0):
    grid = layout.grid
    weight = torch.randn(grid.shape, dtype=torch.float64).to(dtype)
    delta = 0.1 * torch.randn(len(layout), *grid.block_shape, dtype=torch.float64) * layout.padding_mask()
    x = (scale * torch.randn(tokens, grid.cols, dtype=torch.float64)).to(dtype)
    dy = torch.randn(tokens, grid.rows, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), weight, delta.to(torch.promote_types(dtype, torch.float32)).requires_grad_(), dy


def results(route, x, weight, delta, dy, layout, int8):
    y = linear(route, x, weight, delta, layout, int8)
    return y.detach(), *torch.autograd.grad(y, (x, delta), dy)


def steps(x_TK):
    """The step of every value, `(T, K)` in fp64, from the definition: groups of equal size, the last one shorter."""
    tokens = len(x_TK)
    if tokens < FEW:
        return torch.zeros_like(x_TK, dtype=torch.float64)
    size = -(-tokens // -(-tokens // GROUP))
    groups = [group.double().abs().amax(0).expand(len(group), -1) for group in x_TK.detach().split(size)]
    return torch.cat(groups) / LARGEST


def bound(x, dy, layout):
    """`|dY|^T (s / 2 + u |x|)` at the blocks, and what the dtype of the scales adds to it."""
    s, u = steps(x), torch.finfo(x.dtype).eps / 2
    off = s / 2 * (1 + 1e-5) + (u if x.dtype != torch.float64 else 0) * (x.detach().double().abs() + s)
    return ops.block_gather(dy.double().abs().T @ off, layout)


@settings(max_examples=40)
@given(layouts(max_side=24), st.sampled_from([0, 1, FEW - 1, FEW, GROUP, GROUP + 1, 300]), st.sampled_from(ROUTES))
def test_the_gradient_of_the_blocks_is_within_the_bound_and_the_rest_is_untouched(layout, tokens, route):
    x, weight, delta, dy = setting(layout, tokens)
    y, dx, exact = results(route, x, weight, delta, dy, layout, False)
    y_8bit, dx_8bit, found = results(route, x, weight, delta, dy, layout, True)
    assert torch.equal(y, y_8bit) and torch.equal(dx, dx_8bit)
    assert bool(((found - exact).abs() <= bound(x, dy, layout) + 1e-12).all())
    assert tokens >= FEW or torch.equal(found, exact)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [16, (-1, 1), 64], ids=str)
def test_low_precision_adds_no_more_than_its_own_rounding(route, dtype, size, poisoned):
    torch.manual_seed(0)
    layout = random_layout(BlockGrid.fit((130, 200), size), 5)
    x, weight, delta, dy = setting(layout, 150, dtype)
    y, dx, exact = results(route, x, weight, delta, dy, layout, False)
    y_8bit, dx_8bit, found = results(route, x, weight, delta, dy, layout, True)
    assert torch.equal(y, y_8bit) and torch.equal(dx, dx_8bit)
    truth = ops.block_gather(dy.double().T @ x.detach().double(), layout)
    own = (exact.double() - truth).abs().max()
    assert bool(((found - truth).abs() <= bound(x, dy, layout) + 2 * own).all())
    # It is 8 bits that were kept, not the input.
    assert not torch.equal(found, exact)


def back_and_forth(x):
    codes, scales = saved.quantised(x)
    return saved.restored(codes, [scales], len(x), x.dtype)


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-30, 1e30, 1e38])
def test_the_ends_of_the_range_come_back(scale):
    x = torch.linspace(-1, 1, 64)[:, None].expand(64, 3) * scale
    assert bool(((back_and_forth(x) - x).abs() <= x.abs().amax() / LARGEST / 2 * (1 + 1e-5) + 2e-43).all())
    assert bool(back_and_forth(x.bfloat16()).isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_in_the_gradient_of_its_column_alone(bad):
    layout = random_layout(BlockGrid.fit((64, 64), 16), 3, seed=1)
    x, weight, delta, dy = setting(layout, 40, torch.float32)
    clean = results("additive", x, weight, delta, dy, layout, True)[2]
    first = int(layout.columns[0])
    with torch.no_grad():
        x[7, first] = bad
        # Not among the columns that the blocks touch.
        x[9, next(col for col in range(64) if col not in layout.columns)] = bad
    found = results("additive", x, weight, delta, dy, layout, True)[2]
    at = ops.block_gather(torch.arange(64.0).expand(64, 64).contiguous(), layout) == first
    assert bool(found[at].isnan().all()) and torch.equal(found[~at], clean[~at])


def bytes_saved(run):
    """Of storages that are saved for backward, by their address, and what `run` returned."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return kept, result


@pytest.mark.parametrize("route", ["swap", "additive", "add", "overlay", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("blocks", "columns_only"), [(3, True), (60, False)])
def test_a_byte_per_value_and_a_scale_per_group_are_kept(route, dtype, blocks, columns_only):
    layout = random_layout(BlockGrid.fit((128, 256), 16), blocks, seed=1)
    columns = layout.columns.numel() if columns_only else 256
    assert (columns < 0.75 * 256) == columns_only
    x, weight, delta, _ = setting(layout, 2 * GROUP, dtype)
    kept, _ = bytes_saved(lambda: linear(route, x, weight, delta, layout, True))
    mine = {t.untyped_storage().data_ptr() for t in (weight, delta)}
    found = sum(size for address, size in kept.items() if address not in mine)
    assert found == 2 * GROUP * columns + 2 * columns * 4


@pytest.mark.parametrize("route", ROUTES)
def test_nothing_is_kept_of_blocks_that_do_not_train(route):
    layout = random_layout(BlockGrid.fit((64, 64), 16), 3)
    x, weight, delta, _ = setting(layout, 40, torch.float32)
    kept, _ = bytes_saved(lambda: linear(route, x, weight, delta.detach(), layout, True))
    assert kept.keys() <= {t.untyped_storage().data_ptr() for t in (weight, delta)}
    kept, _ = bytes_saved(lambda: linear(route, x.detach(), weight, delta.detach(), layout, True))
    assert not kept


def test_layers_with_one_input_share_its_codes_until_it_is_written_or_gone():
    layout = random_layout(BlockGrid.fit((64, 64), 16), 14, seed=2)
    x, weight, delta, dy = setting(layout, 40, torch.float32)
    x = x.detach()[None]
    run = lambda x: linear("swap", x, weight, delta, layout, True)  # noqa: E731
    size = 40 * 64 + 64 * 4
    kept, (_, _, y) = bytes_saved(lambda: [run(x) for _ in range(3)])
    assert sum(kept.values()) == size
    # Another tensor with the same shape, another part of the same one, and the same one with other values.
    kept, _ = bytes_saved(lambda: [run(x), run(x.clone())])
    assert sum(kept.values()) == 2 * size
    both = torch.cat((x, x + 1), 1)
    kept, _ = bytes_saved(lambda: [run(both[:, :40]), run(both[:, 40:])])
    assert sum(kept.values()) == 2 * size
    before = run(x)
    x += 1
    after, fresh = run(x), run(x.clone())
    grads = [torch.autograd.grad(y, delta, dy[None])[0] for y in (before, after, fresh)]
    assert torch.equal(grads[1], grads[2]) and not torch.equal(grads[0], grads[1])
    del y, before, after, fresh
    gc.collect()
    assert saved._last[2]() is None


def test_the_same_shape_at_the_same_address_is_another_input():
    """An allocator hands a freed address out again; the codes of what was there must not be taken for the new."""
    layout = random_layout(BlockGrid.fit((64, 64), 16), 14, seed=2)
    _, weight, delta, dy = setting(layout, 40, torch.float32)
    for seed in range(20):
        x = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed))
        y = linear("swap", x, weight, delta, layout, True)
        truth = ops.block_gather(dy.double().T @ x.double(), layout)
        limit = bound(x, dy, layout) + 1e-4
        del x
        (found,) = torch.autograd.grad(y, delta, dy)
        assert bool(((found - truth).abs() <= limit).all())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("blocks", [3, 14])
def test_checkpointing_changes_nothing(reentrant, blocks):
    layout = random_layout(BlockGrid.fit((64, 64), 16), blocks, seed=2)
    x, weight, delta, dy = setting(layout, 40, torch.float32)
    run = lambda x: sum(linear("swap", x, weight, delta, layout, True) for _ in range(2)).tanh()  # noqa: E731
    plain = torch.autograd.grad(run(x), (x, delta), dy)
    delta.grad = x.grad = None
    checkpoint(run, x, use_reentrant=reentrant).backward(dy)
    assert torch.equal(x.grad, plain[0]) and torch.equal(delta.grad, plain[1])
    kept, _ = bytes_saved(lambda: checkpoint(run, x, use_reentrant=reentrant))
    assert kept.keys() <= {t.untyped_storage().data_ptr() for t in (x, weight, delta)}


@pytest.mark.parametrize("blocks", [3, 14])
def test_a_compiler_has_one_graph_and_the_numbers_of_eager_code(blocks):
    layout = random_layout(BlockGrid.fit((64, 64), 16), blocks, seed=2).prepare()
    _ = layout.columns, layout.packed
    x, weight, delta, dy = setting(layout, 40, torch.float32)
    run = lambda x: linear("swap", x, weight, delta, layout, True)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (40, 33, 290):
        x = torch.randn(tokens, 64, requires_grad=True)
        dy = torch.randn(tokens, 64)
        eager = torch.autograd.grad(run(x), (x, delta), dy)
        traced = torch.autograd.grad(compiled(x), (x, delta), dy)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(traced, eager, strict=True))


def test_groups_of_tokens_lose_less_to_outlier_channels_than_groups_of_columns():
    """Why groups lie along tokens: what is said in `saved`, and what it costs where tokens are the outliers."""
    torch.manual_seed(0)
    dy = torch.randn(512, 256, dtype=torch.float64)

    def error(x, by_token):
        truth, found = dy.T @ x, dy.T @ (back_and_forth(x) if by_token else back_and_forth(x.T).T)
        usual = torch.ones(1024, dtype=torch.bool)
        usual[::100] = False
        return float((found - truth)[:, usual].norm() / truth[:, usual].norm())

    plain = torch.randn(512, 1024, dtype=torch.float64)
    channels, tokens = plain.clone(), plain.clone()
    channels[:, ::100] *= 50
    tokens[::100] *= 50
    assert error(plain, True) == pytest.approx(error(plain, False), rel=0.02) == pytest.approx(0.0065, rel=0.02)
    assert error(channels, True) == pytest.approx(0.0065, rel=0.02) and error(channels, False) > 0.1
    assert error(tokens, True) == pytest.approx(0.024, rel=0.05) and error(tokens, False) < 0.007
