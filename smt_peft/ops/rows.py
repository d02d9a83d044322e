"""A block-sparse delta of an embedding table, at the rows that a batch looks up: no `(V, K)` delta is ever formed.

The blocks of one row stripe stand next to each other in a layout, since blocks are sorted by row. So the blocks that a
token id meets are the run `starts[stripe] .. starts[stripe + 1]`, and as many slots per token as the fullest stripe has
blocks make every shape static.

Shape suffixes: T looked-up ids, V rows and K columns of the table, B blocks of r rows and c columns, R and C row and
column stripes, M slots: the most blocks that a row stripe holds, E rows of all blocks, B * r.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..blocks import BlockGrid, BlockLayout
from .reference import accumulate_dtype, add_rounded
from .scores import stripe_sums


class LookUps(TorchFunctionMode):
    """While it is entered, what is looked up in the weight of `table` passes through `change`.

    An embedding layer may scale or normalise the rows it looks up; a delta of its table belongs before that.

    Args:
        table: the layer; its weight is asked for at each look-up, since hosts that shard or offload exchange it.
        change: `(rows, ids) -> rows`.

    Attributes:
        seen: how many look-ups there were.
    """

    def __init__(self, table: nn.Module, change: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.table, self.change, self.seen = table, change, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rows = func(*args, **kwargs)
        if func is not F.embedding:
            return rows
        ids, weight = (*args, *(kwargs[name] for name in ("input", "weight")[len(args) :]))[:2]
        if weight is not self.table.weight:
            return rows
        self.seen += 1
        return self.change(rows, ids)


def block_rows_add(
    rows: Tensor,
    ids: Tensor,
    delta_Brc: Tensor,
    layout: BlockLayout,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """The rows of `W + delta`, given those of `W`: added wide and rounded once, so exactly those of a merged table.

    Args:
        rows: `(..., K)`, `W[ids]`; any float dtype.
        ids: `(...)`, int32 or int64, in range.
        delta_Brc: `(B, r, c)`, any float dtype.
        layout: blocks of the `(V, K)` table, sorted by row.
        padding_idx: id whose row takes no gradient, as in `torch.nn.functional.embedding`.
        scale_grad_by_freq: divide an id's gradient by how often it occurs in `ids`, as there.

    Returns:
        `(..., K)` in the dtype of `rows`. The gradient of the blocks is summed in fp32 at least, in an order that does
        not vary.
    """
    rows_TK, ids_T = rows.reshape(-1, rows.shape[-1]), ids.reshape(-1)
    return _BlockRowsAdd.apply(rows_TK, ids_T, delta_Brc, layout, padding_idx, scale_grad_by_freq).view(rows.shape)


class _BlockRowsAdd(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rows_TK, ids_T, delta_Brc, layout, padding_idx, scale_grad_by_freq):
        return _add(rows_TK, ids_T, delta_Brc, layout)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ids_T, _, ctx.layout, ctx.padding_idx, ctx.scale_grad_by_freq = inputs
        ctx.save_for_backward(ids_T if ctx.needs_input_grad[2] else None)

    @staticmethod
    def backward(ctx, dy_TK):
        d_delta = None
        if ctx.needs_input_grad[2]:
            (ids_T,) = ctx.saved_tensors
            d_delta = block_rows_grad(dy_TK, ids_T, ctx.layout, ctx.padding_idx, ctx.scale_grad_by_freq)
        return dy_TK, None, d_delta, None, None, None


def _add(rows_TK: Tensor, ids_T: Tensor, delta_Brc: Tensor, layout: BlockLayout) -> Tensor:
    grid, tokens = layout.grid, len(ids_T)
    if tokens == 0:
        return rows_TK.clone()
    rows, cols = grid.block_shape
    stripe_T, within_T = ids_T // rows, ids_T % rows
    starts = layout.row_starts
    slot_TM = starts[stripe_T][:, None] + torch.arange(layout.max_blocks_in_row, device=ids_T.device)
    filled_TM = slot_TM < starts[stripe_T + 1][:, None]
    slot_TM = slot_TM.clamp(max=len(layout) - 1)
    # One stretch of `cols` columns more than there are: where the slots that are not filled read and write.
    stretches = F.pad(F.pad(rows_TK, (0, -grid.cols % cols)).reshape(-1, cols), (0, 0, 0, 1))
    places_TM = torch.arange(tokens, device=ids_T.device)[:, None] * grid.col_stripes + layout.block_cols[slot_TM]
    places = torch.where(filled_TM, places_TM, tokens * grid.col_stripes).reshape(-1)
    entries = (slot_TM * rows + within_T[:, None]).reshape(-1)
    delta = delta_Brc.reshape(-1, cols).index_select(0, entries)
    stretches.index_copy_(0, places, add_rounded(stretches.index_select(0, places), delta))
    return stretches[:-1].view(tokens, -1)[:, : grid.cols].contiguous()


def block_rows_grad(
    dy_TK: Tensor,
    ids_T: Tensor,
    layout: BlockLayout,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Gradient of the chosen blocks of a table whose rows `ids_T` were looked up.

    Returns:
        `(B, r, c)`, fp32 (fp64 for an fp64 `dy_TK`); the padding of ragged blocks is zero.
    """
    grid = layout.grid
    rows, cols = grid.block_shape
    dtype = accumulate_dtype(dy_TK)
    row_Br = layout.block_rows[:, None] * rows + torch.arange(rows, device=ids_T.device)
    if len(ids_T) == 0:
        return dy_TK.new_zeros(*row_Br.shape, cols, dtype=dtype)
    sums_TK, sorted_T, segment_T = row_sums(dy_TK, ids_T, padding_idx, scale_grad_by_freq)
    sums_TK = F.pad(sums_TK, (0, -grid.cols % cols))
    row_E = row_Br.reshape(-1)
    first_E = torch.searchsorted(sorted_T, row_E).clamp(max=len(ids_T) - 1)
    found_E = sorted_T[first_E] == row_E
    place_E = segment_T[first_E] * grid.col_stripes + layout.block_cols.repeat_interleave(rows, output_size=len(row_E))
    grad = sums_TK.reshape(-1, cols).index_select(0, place_E)
    return torch.where(found_E[:, None], grad, 0).view(*row_Br.shape, cols)


def row_sums(
    dy_TK: Tensor, ids_T: Tensor, padding_idx: int | None = None, scale_grad_by_freq: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a table, one row for every id that occurs.

    Returns:
        The sums of `dy_TK` over equal ids, `(T, K)`, fp32 at least, ids in ascending order, zero below the last id
        that occurs; the ids sorted, int64 `(T,)`; the number of the row of sums of each sorted id, int64 `(T,)`.
    """
    dy_TK = dy_TK.to(accumulate_dtype(dy_TK))
    if padding_idx is not None:
        dy_TK = torch.where((ids_T == padding_idx)[:, None], 0, dy_TK)
    sorted_T, order_T = ids_T.long().sort(stable=True)
    segment_T = F.pad((sorted_T.diff() != 0).long().cumsum(0), (1, 0))[: len(ids_T)]
    # Sorted by segment on an accelerator, walked through in turn on a CPU: no atomics on floats either way.
    sums_TK = torch.ops.aten.embedding_dense_backward(
        dy_TK.index_select(0, order_T), segment_T, len(ids_T), -1, scale_grad_by_freq
    )
    return sums_TK, sorted_T, segment_T


def table_scores(
    pairs: list[tuple[Tensor, Tensor]],
    grid: BlockGrid,
    statistic: str,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """`block_scores` for a table: sums over each block of its gradient, of `|g|` or of `g^2`, without a dense gradient.

    Args:
        pairs: `(ids, dY)` of every use of the table, `(...)` and `(..., K)`.
        statistic: `"sum"`, `"abs"` or `"square"`.

    Returns:
        `(R, C)`, fp32 (fp64 for an fp64 `dY`).
    """
    sums_TK, sorted_T, segment_T = _sums_of(pairs, grid, padding_idx, scale_grad_by_freq)
    if statistic != "sum":
        sums_TK = sums_TK.abs_() if statistic == "abs" else sums_TK.square_()
    sums_TC = stripe_sums(sums_TK, grid.block_cols)
    stripe_T = _first_of_segment(sorted_T, segment_T) // grid.block_rows
    # In fp64, as a stripe may hold every token of the batch, and they are added one after the other.
    sums_RC = torch.ops.aten.embedding_dense_backward(sums_TC.double(), stripe_T, grid.row_stripes, -1, False)
    return sums_RC.to(sums_TC.dtype)


def table_grad(
    pairs: list[tuple[Tensor, Tensor]],
    grid: BlockGrid,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """The whole gradient of a table, `(V, K)`; arguments as in `table_scores`."""
    sums_TK, sorted_T, segment_T = _sums_of(pairs, grid, padding_idx, scale_grad_by_freq)
    row_T = _first_of_segment(sorted_T, segment_T)
    return torch.ops.aten.embedding_dense_backward(sums_TK, row_T, grid.rows, -1, False)


def _sums_of(pairs, grid: BlockGrid, padding_idx: int | None, scale_grad_by_freq: bool) -> tuple[Tensor, ...]:
    scaled = []
    for ids, dy in pairs:
        ids_T, dy_TK = ids.reshape(-1), dy.reshape(-1, grid.cols)
        if scale_grad_by_freq and len(pairs) > 1:
            # By how often an id occurs in its own look-up, not in all of them.
            count_T = (ids_T.long().bincount(minlength=grid.rows))[ids_T.long()]
            dy_TK = dy_TK.to(accumulate_dtype(dy_TK)) / count_T[:, None]
        scaled.append((ids_T, dy_TK))
    ids_T, dy_TK = (torch.cat(parts) for parts in zip(*scaled, strict=True))
    return row_sums(dy_TK, ids_T, padding_idx, scale_grad_by_freq and len(pairs) == 1)


def _first_of_segment(sorted_T: Tensor, segment_T: Tensor) -> Tensor:
    """The id that each row of sums belongs to; 0 below the last, where the sums are zero."""
    return torch.zeros_like(sorted_T).index_copy_(0, segment_T, sorted_T)
