"""Scores of blocks: one number per block, the mean over the real elements of the block, padding not counted.

A *gradient score* sees the dense gradient of one batch at a time and keeps what it must between batches. With g_t the
gradient of batch t and the mean over batches written E:

| name           | score of an element | kept between batches   |
|----------------|---------------------|------------------------|
| `grad_abs`     | E abs(g_t)          | `(R, C)`               |
| `grad_sq`      | E g_t squared       | `(R, C)`               |
| `taylor`       | E abs(w g_t)        | `(R, C)`               |
| `mean_abs`     | abs of the block mean of E g_t: the released SMT code | `(R, C)` |
| `grad_sum_abs` | abs(E g_t): the SMT paper's text (arXiv 2405.15525) | a dense sum |
| a callable     | E callable(w, g_t)  | `(R, C)`               |

Shape suffixes: R row stripes, C column stripes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from ..blocks import BlockGrid
from .guard import seeded

FULL_SVD_SIDE = 256
_OVERSAMPLING = 8
# What `ops.block_scores` sums over a block for a score that needs nothing else of the dense gradient.
STATISTICS = {"grad_abs": "abs", "grad_sq": "square", "mean_abs": "sum"}


def block_means(matrix: Tensor, grid: BlockGrid) -> Tensor:
    """The mean over the real elements of each block of a `(rows, cols)` float matrix, `(R, C)`."""
    return ops.block_sums(matrix, grid) / grid.effective_sizes().to(matrix.device)


def magnitude(weight: Tensor, grid: BlockGrid) -> Tensor:
    """Mean |w| of each block, `(R, C)`, fp32 or fp64.

    Args:
        weight: `(out_features, in_features)`, any float dtype.
    """
    return block_means(_computed(weight).abs(), grid)


def low_rank_magnitude(weight: Tensor, grid: BlockGrid, seed: int) -> Tensor:
    """Mean |w_r| of each block, w_r the best approximation of the weight of rank r (LIFT, arXiv 2506.00772).

    r is an eighth of the shorter side, at least 1. Up to a side of 256 the decomposition is exact, above it is
    randomised with two power iterations, drawn from `seed`; the caller's random state stays as it is.
    """
    weight = _computed(weight)
    side = min(weight.shape)
    rank = max(1, side // 8)
    if side <= FULL_SVD_SIDE:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        right = right.mT
    else:
        with seeded([weight.device], seed):
            left, values, right = torch.svd_lowrank(weight, q=min(side, rank + _OVERSAMPLING), niter=2)
    return block_means(((left[:, :rank] * values[:rank]) @ right[:, :rank].mT).abs_(), grid)


def _computed(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight if weight.dtype == torch.float64 else weight.float()


class GradientScore:
    """The score of one module, gathered gradient by gradient.

    Args:
        name: the module, for messages.
        weight: `(out_features, in_features)` view, or a packed weight as it is stored.
        grid: its tiling.
        score: a gradient score's name, or a callable `(weight, grad) -> scores` of the weight's shape.
        accumulator_device: where the dense sum of `grad_sum_abs` is kept; None: with the weight.
        read: gives the weight's values, for `taylor` and callables; None: `weight` holds them.
    """

    NAMES = ("grad_abs", "grad_sq", "taylor", "mean_abs", "grad_sum_abs")

    def __init__(
        self,
        name: str,
        weight: Tensor,
        grid: BlockGrid,
        score: str | Callable,
        accumulator_device: torch.device | str | None = None,
        read: Callable[[], Tensor] | None = None,
    ):
        self.name, self.grid, self.score = name, grid, score
        self._read = read or (lambda: weight)
        self.sums = torch.zeros(grid.stripes, dtype=_dtype(weight), device=weight.device)
        self.dense: Tensor | None = None
        if score == "grad_sum_abs":
            device = weight.device if accumulator_device is None else accumulator_device
            self.dense = torch.zeros(grid.shape, dtype=_dtype(weight), device=device)

    @torch.no_grad()
    def add(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take in the gradient of one batch.

        Args:
            pairs: `(x, dY)` of every use of the module, `(..., in_features)` and `(..., out_features)`.
        """
        if statistic := STATISTICS.get(self.score):
            sums = ops.block_scores(pairs, self.grid, statistic)
            self.sums.add_(sums / self.grid.effective_sizes().to(sums.device))
            return
        self.add_dense(ops.dense_grad(pairs, self.grid.shape))

    def add_dense(self, grad: Tensor) -> None:
        """Take in the whole gradient of one batch, which is overwritten."""
        if self.dense is not None:
            self.dense.add_(grad.to(self.dense.device))
            return
        grad = grad.mul_(self._read().detach()).abs_() if self.score == "taylor" else self._custom(grad)
        self.sums.add_(block_means(grad, self.grid))

    def _custom(self, grad: Tensor) -> Tensor:
        try:
            scores = self.score(self._read().detach(), grad)
        except Exception as error:
            raise ValueError(
                f"{self.name}: the score function raised {type(error).__name__}: {error}; it is called with weight and "
                f"gradient, both of shape {tuple(grad.shape)}"
            ) from error
        if not isinstance(scores, Tensor) or scores.shape != grad.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"{self.name}: the score function returned {got}; it must return a tensor of the weight's "
                f"shape {tuple(grad.shape)}, one score per element"
            )
        return scores.detach().to(grad.dtype)

    @torch.no_grad()
    def state(self) -> Tensor:
        """What has to be summed over processes before `finish`."""
        return self.sums if self.dense is None else self.dense

    @torch.no_grad()
    def finish(self, num_batches: int) -> Tensor:
        """The score of each block over `num_batches` batches, fp32 `(R, C)` on the CPU.

        Raises:
            ValueError: a score is not finite.
        """
        if self.dense is not None:
            self.sums = block_means(self.dense.abs_(), self.grid)
        elif self.score == "mean_abs":
            self.sums.abs_()
        return checked(self.name, self.sums / num_batches)


class ActivationScore:
    """Mean |x| of each input column over the tokens of a batch, averaged over batches; a block has its columns' mean.

    Arguments as in `GradientScore`. Every row stripe has the same scores.
    """

    def __init__(self, name: str, weight: Tensor, grid: BlockGrid):
        self.name, self.grid = name, grid
        self.sums = torch.zeros(grid.cols, dtype=_dtype(weight), device=weight.device)
        self._batch, self._tokens = torch.zeros_like(self.sums), 0

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """Take in an input `(..., in_features)` of the module."""
        x = x.reshape(-1, self.grid.cols)
        self._batch += x.abs().sum(0, dtype=self._batch.dtype)
        self._tokens += x.shape[0]

    def close_batch(self) -> None:
        self.sums += self._batch / max(1, self._tokens)
        self._batch, self._tokens = torch.zeros_like(self.sums), 0

    def state(self) -> Tensor:
        return self.sums

    def finish(self, num_batches: int) -> Tensor:
        columns = ops.stripe_sums(self.sums[None, :], self.grid.block_cols)[0]
        means = columns / self.grid.widths().to(columns.device) / num_batches
        return checked(self.name, means.expand(self.grid.stripes).contiguous())


def checked(name: str, scores: Tensor) -> Tensor:
    """The scores as fp32 on the CPU.

    Raises:
        ValueError: a score is not finite; names the module.
    """
    scores = scores.to(device="cpu", dtype=torch.float32)
    if not bool(torch.isfinite(scores).all()):
        count = int((~torch.isfinite(scores)).sum())
        raise ValueError(
            f"{name}: {count} of {scores.numel()} block scores are not finite; the gradients or weights "
            "of this module overflow or hold NaN. Run the pass in fp32 or bf16, or look for a bad batch"
        )
    return scores


def random_scores(grid: BlockGrid, seed: int) -> Tensor:
    """Uniform in [0, 1), fp32 `(R, C)`."""
    return torch.rand(grid.stripes, generator=torch.Generator().manual_seed(seed))


def diagonal_scores(grid: BlockGrid, order: Tensor) -> Tensor:
    """1 on the wrapped diagonal, 0 elsewhere, less a tiny descent along `order` that spreads a part of it evenly.

    Args:
        order: all blocks of the grid, best first, int64 row-major numbers.

    Returns:
        fp64 `(R, C)`.
    """
    # fp64: neighbours differ by less than fp32 can tell next to 1.
    scores = torch.empty(grid.num_blocks, dtype=torch.float64)
    scores[order] = torch.linspace(0, -1e-3, grid.num_blocks, dtype=torch.float64)
    scores[order[: max(grid.stripes)]] += 1
    return scores.view(grid.stripes)


def _dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
