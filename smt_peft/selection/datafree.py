"""The choice that needs no data: by the weights alone, at random, or on the diagonal."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..bases.sharded import is_offloaded, present
from ..bases.target import Target
from ..blocks import BlockGrid, BlockSelection
from ..config import SMTConfig
from ..say import once
from .avoid import avoided_blocks
from .budget import PATTERNS, choose_blocks, choose_pattern, module_seed
from .coupled import choose_coupled
from .experts import joined, matrices
from .scores import checked, diagonal_scores, low_rank_magnitude, magnitude, random_scores
from .spread import diagonal_order


def select_without_data(
    targets: Mapping[str, Target],
    config: SMTConfig,
    counts: Mapping[str, int] | None = None,
    grids: Mapping[str, BlockGrid] | None = None,
    keep_scores: bool = False,
) -> BlockSelection:
    """Choose blocks by the config's score where that needs no data, else at random.

    `random` and `diagonal` never look at a weight, which may be on the meta device.

    Args:
        targets: the modules a config names, as from `find_targets`.
        config: its `score`, amounts, `budget`, `spread`, caps and `seed` decide.
        counts: instead of the config's budget and caps, exactly so many blocks in these modules and none in others.
        grids: tilings that replace the config's for the modules they name.
        keep_scores: whether the selection keeps the scores of a choice by weights.

    Raises:
        ValueError: as `choose_blocks`, or a score by weights meets a packed weight.
    """
    everything, targets = targets, matrices(targets) if counts is None else targets
    grids = {name: (grids or {}).get(name) or target.grid(config) for name, target in targets.items()}
    avoids = counts is None and config.avoid is not None
    blocked = avoided_blocks(config, everything, grids) if avoids else {}
    score = "random" if config.needs_data else config.score
    if score not in PATTERNS and any(_is_gone(target) for target in targets.values()):
        once(f"score={score!r} needs weights, but the model is on the meta device; blocks are chosen at random")
        score = "random"
    scores = {}
    capped = counts is None and (config.max_column_share is not None or config.max_lora_rank is not None)
    if config.coupled and counts is None:
        if score != "random":
            scores = {name: _scores(score, targets[name], grid, config) for name, grid in grids.items()}
        blocks = choose_coupled(scores, targets, config)
    elif score in PATTERNS and not capped and not blocked and (score == "diagonal" or config.spread != "capped"):
        blocks = choose_pattern(score, grids, config, counts)
    else:
        wanted = counts if counts is not None else targets
        scores = {name: _scores(score, targets[name], grid, config) for name, grid in grids.items() if name in wanted}
        blocks = choose_blocks(scores, grids, config, counts, blocked)
    keep = scores if keep_scores and score not in PATTERNS else {}
    return joined(BlockSelection(blocks, grids, keep, provenance(score, config, everything)), everything)


def _scores(score: str, target: Target, grid: BlockGrid, config: SMTConfig) -> torch.Tensor:
    seed = module_seed(config.seed, target.name)
    if score == "random":
        return random_scores(grid, seed)
    if score == "diagonal":
        return diagonal_scores(grid, torch.from_numpy(diagonal_order(grid, grid.num_blocks)))
    with present(target.module):
        check_readable(target, score)
        if score == "magnitude":
            return checked(target.name, magnitude(target.read(), grid))
        if score == "small_magnitude":
            return checked(target.name, -magnitude(target.read(), grid))
        return checked(target.name, low_rank_magnitude(target.read(), grid, seed))


def _is_gone(target: Target) -> bool:
    """Whether the weight is on the meta device for good, not only between calls."""
    return target.weight.is_meta and not is_offloaded(target.module)


def check_readable(target: Target, score: str) -> None:
    """Raise `ValueError`, naming the module, when a score that reads weights meets a packed one."""
    if not target.is_readable:
        weight = target.weight
        raise ValueError(
            f"{target.name}: score={score!r} reads the weight, which is stored as {weight.dtype} of shape "
            f"{tuple(weight.shape)} for a {' x '.join(map(str, target.shape))} matrix; take a score that needs no "
            "weight values, such as 'grad_abs' (with data) or 'diagonal' (without)"
        )


def provenance(score: str, config: SMTConfig, targets: Mapping[str, Target]) -> dict:
    """How a selection came about, in JSON values."""
    modules = config.target_modules
    found = [name for name, target in targets.items() if isinstance(target, Target)]
    return {
        "score": score,
        "block_size": config.block_size,
        "density": config.density,
        "num_blocks": config.num_blocks,
        "density_pattern": config.density_pattern,
        "budget": dict(config.budget) if isinstance(config.budget, Mapping) else config.budget,
        "spread": config.spread,
        "max_column_share": config.max_column_share,
        "max_lora_rank": config.max_lora_rank,
        "coupled": config.coupled,
        "seed": config.seed,
        "target_modules": modules if isinstance(modules, str) else sorted(found if modules is None else modules),
        "target_parameters": config.target_parameters,
        "num_targets": len(targets),
    }
