"""Scores against dense tensors in plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smt_peft.blocks import BlockGrid, BlockLayout
from smt_peft.config import SMTConfig
from smt_peft.selection.budget import choose_blocks
from smt_peft.selection.scores import (
    ActivationScore,
    GradientScore,
    block_means,
    low_rank_magnitude,
    magnitude,
)

GRID = BlockGrid(10, 14, 4, 5)


def use_of(grad):
    """The one use of a module, `[(x, dY)]`, whose gradient is `grad`."""
    return [(torch.eye(grad.shape[1], dtype=grad.dtype), grad.t())]


def dense_means(matrix, grid):
    """Mean over the real elements of each block, one slice at a time."""
    rows, cols = grid.block_shape
    return torch.stack(
        [
            torch.stack(
                [matrix[r * rows : (r + 1) * rows, c * cols : (c + 1) * cols].mean() for c in range(grid.col_stripes)]
            )
            for r in range(grid.row_stripes)
        ]
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_block_means(rows, cols, height, width, transposed):
    grid = BlockGrid(rows, cols, min(height, rows), min(width, cols))
    matrix = torch.randn(cols, rows, dtype=torch.float64).t() if transposed else torch.randn(rows, cols).double()
    torch.testing.assert_close(block_means(matrix, grid), dense_means(matrix, grid), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("score", ["grad_abs", "grad_sq", "taylor", "mean_abs", "grad_sum_abs"])
@pytest.mark.parametrize("grid", [GRID, BlockGrid(10, 14, 10, 1), BlockGrid(10, 14, 1, 14), BlockGrid(10, 14, 5, 7)])
def test_gradient_scores(score, grid):
    torch.manual_seed(0)
    weight, grads = torch.randn(10, 14), [torch.randn(10, 14) for _ in range(3)]
    mean = torch.stack(grads).mean(0)
    truth = {
        "grad_abs": dense_means(torch.stack([g.abs() for g in grads]).mean(0), grid),
        "grad_sq": dense_means(torch.stack([g**2 for g in grads]).mean(0), grid),
        "taylor": dense_means(torch.stack([(weight * g).abs() for g in grads]).mean(0), grid),
        "mean_abs": dense_means(mean, grid).abs(),
        "grad_sum_abs": dense_means(mean.abs(), grid),
    }[score]
    state = GradientScore("m", weight, grid, score)
    for grad in grads:
        state.add(use_of(grad))
    torch.testing.assert_close(state.finish(3), truth, rtol=1e-5, atol=1e-6)


def test_only_grad_sum_abs_keeps_a_dense_sum():
    weight = torch.randn(10, 14)
    for score in GradientScore.NAMES:
        state = GradientScore("m", weight, GRID, score).state()
        assert tuple(state.shape) == (GRID.shape if score == "grad_sum_abs" else GRID.stripes)


def test_callable_score():
    weight, grad = torch.randn(10, 14), torch.randn(10, 14)
    state = GradientScore("m", weight, GRID, lambda w, g: (w - g) ** 2)
    state.add(use_of(grad))
    torch.testing.assert_close(state.finish(1), dense_means((weight - grad) ** 2, GRID), rtol=1e-5, atol=1e-6)
    for wrong in (lambda w, g: g.sum(), lambda w, g: 3.0):
        with pytest.raises(ValueError, match=r"m: the score function returned .*\(10, 14\)"):
            GradientScore("m", weight, GRID, wrong).add(use_of(grad))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_name_the_module(value):
    state = GradientScore("layers.3.up", torch.zeros(10, 14), GRID, "grad_abs")
    grad = torch.zeros(10, 14)
    grad[0, 0] = value
    state.add(use_of(grad))
    with pytest.raises(ValueError, match=r"layers.3.up: \d of 9 block scores are not finite"):
        state.finish(1)


def test_activation_score():
    torch.manual_seed(0)
    state = ActivationScore("m", torch.zeros(10, 14), GRID)
    batches = [[torch.randn(2, 3, 14), torch.randn(4, 14)], [torch.randn(14)], []]
    means = []
    for batch in batches:
        for x in batch:
            state.see(x)
        state.close_batch()
        tokens = torch.cat([x.reshape(-1, 14) for x in batch]) if batch else torch.zeros(1, 14)
        means.append(tokens.abs().mean(0))
    truth = dense_means(torch.stack(means).mean(0).expand(10, 14), GRID)
    torch.testing.assert_close(state.finish(3), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_magnitude(dtype):
    weight = torch.randn(10, 14).to(dtype)
    torch.testing.assert_close(magnitude(weight, GRID).double(), dense_means(weight.double().abs(), GRID))


@pytest.mark.parametrize("shape", [(10, 14), (7, 3), (40, 64)])
def test_low_rank_magnitude_is_the_best_approximation(shape):
    torch.manual_seed(0)
    weight, grid = torch.randn(shape, dtype=torch.float64), BlockGrid(*shape, 2, 3)
    rank = max(1, min(shape) // 8)
    left, values, right = torch.linalg.svd(weight)
    truth = (left[:, :rank] * values[:rank]) @ right[:rank]
    torch.testing.assert_close(low_rank_magnitude(weight, grid, 0), dense_means(truth.abs(), grid))


def test_low_rank_magnitude_of_a_large_weight():
    torch.manual_seed(0)
    scale = 0.9 ** torch.arange(300.0)
    weight = torch.linalg.qr(torch.randn(300, 300))[0] * scale @ torch.linalg.qr(torch.randn(300, 300))[0]
    grid = BlockGrid(300, 300, 50, 60)
    left, values, right = torch.linalg.svd(weight)
    truth = dense_means(((left[:, :37] * values[:37]) @ right[:37]).abs(), grid)
    before = torch.get_rng_state()
    torch.testing.assert_close(low_rank_magnitude(weight, grid, 0), truth, rtol=1e-3, atol=1e-6)
    assert torch.equal(low_rank_magnitude(weight, grid, 0), low_rank_magnitude(weight, grid, 0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("score", "formula"),
    [
        ("mean_abs", lambda block: block.mean().abs()),
        ("grad_sum_abs", lambda block: block.abs().mean()),
    ],
)
def test_same_choice_as_the_release_for_the_same_summed_gradient(score, formula):
    """The released method sums signed gradients over its warm-up and ranks blocks of the sum, over all matrices."""
    torch.manual_seed(0)
    names, count = ["layers.0.v", "layers.1.v"], 21
    grads = {name: [torch.randn(256, 256) for _ in range(4)] for name in names}
    config = SMTConfig(block_size=32, num_blocks=count, budget="global", spread="free", score=score)
    grids = {name: config.grid((256, 256)) for name in names}
    scores = {}
    for name in names:
        state = GradientScore(name, torch.zeros(256, 256), grids[name], score)
        for grad in grads[name]:
            state.add(use_of(grad))
        scores[name] = state.finish(4)
    ranked = []
    for name in names:
        total = torch.stack(grads[name]).sum(0)
        ranked += [
            (formula(total[r * 32 : r * 32 + 32, c * 32 : c * 32 + 32]).item(), name, r, c)
            for r in range(8)
            for c in range(8)
        ]
    best = {(name, r, c) for _, name, r, c in sorted(ranked, reverse=True)[:count]}
    chosen = choose_blocks(scores, grids, config)
    assert {(name, *block) for name, blocks in chosen.items() for block in blocks.tolist()} == best


def test_the_chosen_blocks_cover_the_best_scores():
    """A layout made of the chosen blocks covers exactly the elements whose score was taken."""
    torch.manual_seed(0)
    score = torch.rand(GRID.stripes)
    chosen = choose_blocks({"m": score}, {"m": GRID}, SMTConfig(block_size=[4, 5], num_blocks=4, spread="free"))["m"]
    layout = BlockLayout(GRID, chosen)
    wanted = score >= score.flatten().sort(descending=True).values[3]
    assert torch.equal(layout.mask(), wanted.repeat_interleave(4, 0).repeat_interleave(5, 1)[:10, :14])
