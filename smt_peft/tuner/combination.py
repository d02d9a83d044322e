"""Weighted sums of adapters: the union of their blocks, and on it the sum of their deltas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from numbers import Real

import torch
from torch import Tensor

from ..blocks import BlockGrid, BlockSelection
from ..config import SMTConfig
from .delta import SMTBlocks


def check_combination(
    configs: Mapping[str, SMTConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
) -> None:
    """Raise `ValueError` unless the adapters can be combined under the new name."""
    if combination_type != "linear":
        raise ValueError(
            f"combination_type={combination_type!r}: blocks are added as they are, so 'linear' is exact and the only "
            "one; leave it out"
        )
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights were given; give a weight for each")
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter not in configs:
            raise ValueError(f"Adapter {adapter} does not exist; the model has {', '.join(configs)}")
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"the weight of adapter {adapter} must be a finite number, got {weight!r}")
        for field in ("modules_to_save", "trainable_token_indices"):
            if value := getattr(configs[adapter], field):
                raise ValueError(
                    f"Adapter {adapter} has {field}={value}, which are no deltas of blocks and cannot be added; "
                    "combine adapters without them"
                )
        if rank := configs[adapter].lora_rank:
            raise ValueError(
                f"Adapter {adapter} has lora_rank={rank}: low-rank pairs are products, and their sum is no pair of "
                "that rank; combine adapters without lora_rank, or merge one after the other (merge_adapter)"
            )
    if adapter_name in configs:
        raise ValueError(f"there is an adapter {adapter_name} already; delete_adapter it first, or take another name")


def combined_config(
    config: SMTConfig, grids: Mapping[str, BlockGrid], blocks: Mapping[str, Tensor], parameters: Set[str]
) -> SMTConfig:
    """The config of an adapter of these blocks, in all else like `config`; `parameters` names bare parameters."""
    config = config.copy()
    config.selection = BlockSelection(dict(blocks), dict(grids))
    config.target_modules, config.target_parameters = blocks.keys() - parameters, sorted(blocks.keys() & parameters)
    config.init_weights, config.awaits_weights = True, False
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern", "density_pattern", "coupled"):
        setattr(config, field, None)
    config.block_pattern = config.base_fingerprint = config.filled_in = None
    return config


def weighted_sum(parts: Sequence[tuple[SMTBlocks, float]]) -> tuple[BlockGrid, Tensor, Tensor]:
    """The weighted sum of deltas of one weight.

    Deltas of different block sizes are cut into the largest blocks that tile all of them (the greatest common divisor
    of their sides), so that the sum is exact: computed in fp64 and rounded once.

    Args:
        parts: blocks over one weight, each with its factor.

    Returns:
        The tiling; the union of the blocks, int32 `(B, 2)`; the sum on them, fp32 `(B, r, c)`.
    """
    grids = [blocks.grid for blocks, _ in parts]
    rows, cols = (math.gcd(*sides) for sides in zip(*(grid.block_shape for grid in grids), strict=True))
    grid = BlockGrid(*grids[0].shape, rows, cols)
    pieces = [_cut(blocks, grid) for blocks, _ in parts]
    union = torch.unique(torch.cat([flat for flat, _ in pieces]))
    total = torch.zeros(len(union), rows, cols, dtype=torch.float64, device=union.device)
    for (flat, values), (_, factor) in zip(pieces, parts, strict=True):
        # No block occurs twice in a part, so nothing is added to one place at the same time.
        total[torch.searchsorted(union, flat)] += float(factor) * values.double()
    return grid, grid.unflatten(union), total.float()


def _cut(blocks: SMTBlocks, fine: BlockGrid) -> tuple[Tensor, Tensor]:
    """The blocks cut into those of a finer grid: their row-major numbers, int64 `(B,)`, and values, `(B, r, c)`."""
    coarse, (rows, cols) = blocks.grid, fine.block_shape
    down, across = coarse.block_rows // rows, coarse.block_cols // cols
    # The layout's index is one that has been checked.
    index, weight = blocks.layout().blocks.long(), blocks.weight.detach()
    row = index[:, 0, None, None] * down + torch.arange(down, device=index.device)[:, None]
    col = index[:, 1, None, None] * across + torch.arange(across, device=index.device)
    row, col = torch.broadcast_tensors(row, col)
    values = weight.unflatten(2, (across, cols)).unflatten(1, (down, rows)).transpose(2, 3)
    # Of a block at a ragged edge some pieces may be padding from end to end.
    inside = (row < fine.row_stripes) & (col < fine.col_stripes)
    return (row * fine.col_stripes + col)[inside], values[inside]
