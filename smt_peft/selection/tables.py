"""Scores of an embedding table: its gradient has a row for every token id that a batch holds, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import ops
from .scores import STATISTICS, GradientScore


class TableScore(GradientScore):
    """`GradientScore` of a table. A dense gradient is made only for a score that needs every element of it.

    Args:
        table: the embedding layer; its `padding_idx` and `scale_grad_by_freq` count as in training.
    """

    def __init__(self, table: nn.Embedding, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rules = {"padding_idx": table.padding_idx, "scale_grad_by_freq": table.scale_grad_by_freq}

    @torch.no_grad()
    def add(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take in the gradient of one batch.

        Args:
            pairs: `(ids, dY)` of every look-up, `(...)` and `(..., embedding_dim)`, dY that of the rows looked up.
        """
        if statistic := STATISTICS.get(self.score):
            sums = ops.table_scores(pairs, self.grid, statistic, **self.rules)
            self.sums.add_(sums / self.grid.effective_sizes().to(sums.device))
        else:
            self.add_dense(ops.table_grad(pairs, self.grid, **self.rules))


@contextmanager
def look_ups_tapped(table: nn.Embedding, tap: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Passes the rows that `table` looks up through `tap(rows, ids)`, before a subclass scales or normalises them.

    The layer's `forward` is stood in for meanwhile and put back as it was, also one that had been replaced before.
    """
    forward, replaced = table.forward, "forward" in vars(table)

    def tapped(*args, **kwargs):
        with ops.LookUps(table, tap):
            return forward(*args, **kwargs)

    table.forward = tapped
    try:
        yield
    finally:
        if replaced:
            table.forward = forward
        else:
            del table.forward
