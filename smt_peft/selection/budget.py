"""How many blocks are chosen, and among which modules the budget is spent."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from ..blocks import BlockGrid
from ..config import MIN_AUTO_SIDE, SMTConfig
from ..say import say
from .spread import SPREAD, Matrix, diagonal_order, fit, random_order, restrict

PATTERNS = ("random", "diagonal")


@dataclass(frozen=True)
class Scope:
    """Modules that share one budget.

    Args:
        label: what a message calls it.
        names: its modules, in the model's order.
        budget: what may be spent on them, in weights or in blocks.
        in_blocks: whether the budget counts blocks.
    """

    label: str
    names: list[str]
    budget: int
    in_blocks: bool

    def costs(self, grid: BlockGrid) -> np.ndarray:
        """What each block costs, int64 `(R, C)`."""
        return np.ones(grid.stripes, dtype=np.int64) if self.in_blocks else grid.effective_sizes().numpy()

    def total(self, grids: Mapping[str, BlockGrid]) -> int:
        return sum(grids[name].num_blocks if self.in_blocks else grids[name].numel for name in self.names)


def choose_blocks(
    scores: Mapping[str, Tensor],
    grids: Mapping[str, BlockGrid],
    config: SMTConfig,
    counts: Mapping[str, int] | None = None,
    blocked: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Tensor]:
    """The best blocks within the budget.

    Args:
        scores: per module the score of each block, `(R, C)`, finite; higher is better.
        grids: the tiling of each module in `scores`, in the model's order.
        config: its `density` or `num_blocks`, `budget`, `spread` and caps decide.
        counts: instead of the config's budget and caps, exactly so many blocks in these modules and none in others.
        blocked: per module which blocks may not be chosen, bool `(R, C)`; see `avoid.avoided_blocks`.

    Returns:
        Per module with a chosen block its blocks, int32 `(B, 2)`, sorted.

    Raises:
        ValueError: a scope asks for more blocks than it has, or than are left when some are avoided, a regex of the
            budget matches nothing, or a cap is below the size of a block.
    """
    blocked = blocked or {}
    chosen: dict[str, np.ndarray] = {}
    scopes, notes = make_scopes(grids, config, counts), _Notes()
    share, rank = (None, None) if counts is not None else (config.max_column_share, config.max_block_rank)
    for scope in scopes:
        whole = [
            Matrix.whole(name, grids[name], _as_array(scores[name]), scope.costs(grids[name]), blocked.get(name))
            for name in scope.names
        ]
        check_room(scope, grids, blocked)
        matrices = [restrict(matrix, share, rank) for matrix in whole]
        available = sum(matrix.open_cost for matrix in matrices)
        if available <= scope.budget:
            taken = [~matrix.closed for matrix in matrices]
            if available < scope.budget and available < scope.total(grids):
                notes.short.append(scope.label)
        else:
            taken = SPREAD[config.spread](matrices, scope.budget)
        if not any(mask.any() for mask in taken):
            _take_best(matrices, taken)
            notes.raised.append(scope.label)
        chosen |= {matrix.name: matrix.flat(mask) for matrix, mask in zip(matrices, taken, strict=True)}
    notes.say(grids, config, counts)
    return _as_blocks(chosen, grids)


def choose_pattern(
    pattern: str, grids: Mapping[str, BlockGrid], config: SMTConfig, counts: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Blocks on wrapped diagonals, or random ones, within the budget: no score grid is ever made.

    In a scope of several modules each gets its share by size. Arguments, result and errors are those of
    `choose_blocks`; the caps of the config are not looked at.
    """
    chosen: dict[str, np.ndarray] = {}
    scopes, notes = make_scopes(grids, config, counts), _Notes()
    for scope in scopes:
        spent = passed = 0
        total = scope.total(grids)
        for name in scope.names:
            grid = grids[name]
            passed += grid.num_blocks if scope.in_blocks else grid.numel
            chosen[name], cost = _take_pattern(
                pattern, name, grid, scope, scope.budget * passed // total - spent, config
            )
            spent += cost
        if spent == 0:
            chosen[scope.names[0]] = _order(pattern, scope.names[0], grids[scope.names[0]], 1, config)
            notes.raised.append(scope.label)
    notes.say(grids, config, counts)
    return _as_blocks(chosen, grids)


def _take_pattern(
    pattern: str, name: str, grid: BlockGrid, scope: Scope, budget: int, config: SMTConfig
) -> tuple[np.ndarray, int]:
    if scope.in_blocks or not grid.is_ragged:
        cost = 1 if scope.in_blocks else grid.block_rows * grid.block_cols
        order = _order(pattern, name, grid, budget // cost, config)
        return order, len(order) * cost
    order = _order(pattern, name, grid, grid.num_blocks, config)
    taken, left = fit(scope.costs(grid).ravel()[order], budget)
    return order[taken], budget - left


def _order(pattern: str, name: str, grid: BlockGrid, count: int, config: SMTConfig) -> np.ndarray:
    if pattern == "diagonal":
        return diagonal_order(grid, count)
    return random_order(grid, count, config.spread, module_seed(config.seed, name))


def module_seed(seed: int, name: str) -> int:
    """One seed per module that does not hang on the order of the modules or on Python's hash."""
    return zlib.crc32(f"{seed}:{name}".encode())


def make_scopes(
    grids: Mapping[str, BlockGrid], config: SMTConfig, counts: Mapping[str, int] | None = None
) -> list[Scope]:
    """Who shares a budget with whom, and how large it is.

    A module that `density_pattern` matches stands alone, and what follows is said of the others. `"per_layer"` groups
    modules by the path up to its first number, `model.layers.3`; a module without a number stands alone. A
    `{regex: share}` map divides the whole budget; the first regex that is found in a name wins.

    Raises:
        ValueError: a scope asks for more than it has, a regex matches nothing, or `counts` names an unknown module.
    """
    if counts is not None:
        if unknown := [name for name in counts if name not in grids]:
            raise ValueError(
                f"block_pattern names the module {unknown[0]!r}, which is not among the {len(grids)} "
                "targeted modules; the adapter belongs to another model or other target_modules"
            )
        scopes = [Scope(f"module {name}", [name], counts[name], True) for name in grids if name in counts]
    else:
        alone = _pattern_scopes(grids, config)
        shared = {name: grid for name, grid in grids.items() if name not in alone}
        if isinstance(config.budget, Mapping):
            scopes = _map_scopes(shared, config, alone)
        else:
            groups = _groups(list(shared), config.budget) if shared else {}
            scopes = [_scope(label, names, names, Fraction(1), grids, config) for label, names in groups.items()]
        scopes += {id(scope): scope for scope in alone.values()}.values()
    for scope in scopes:
        if scope.budget > (available := scope.total(grids)):
            unit = "blocks" if scope.in_blocks else "weights"
            raise ValueError(
                f"{scope.label}: {scope.budget:,} {unit} are asked for, but it has only {available:,}; "
                "lower num_blocks, density or its share of the budget, or make block_size smaller"
            )
    return scopes


def _scope(
    label: str,
    names: list[str],
    measured: list[str],
    share: Fraction,
    grids: Mapping[str, BlockGrid],
    config: SMTConfig,
) -> Scope:
    if config.num_blocks is not None:
        return Scope(label, names, math.floor(share * config.num_blocks), True)
    weights = sum(grids[name].numel for name in measured)
    return Scope(label, names, math.floor(_exact(config.density) * share * weights), False)


def _exact(share: float) -> Fraction:
    """The decimal number a user wrote: 0.29 of 100 is 29, not 28.999."""
    return Fraction(repr(float(share)))


def _groups(names: list[str], budget: str) -> dict[str, list[str]]:
    if budget == "global":
        return {"the whole model": names}
    groups: dict[str, list[str]] = {}
    for matrix in names:
        # The experts in one parameter share its budget.
        name = matrix.partition("[")[0]
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        in_layer = budget == "per_layer" and number is not None
        label = f"layer {'.'.join(parts[: number + 1])}" if in_layer else f"module {name}"
        groups.setdefault(label, []).append(matrix)
    return groups


def _pattern_scopes(grids: Mapping[str, BlockGrid], config: SMTConfig) -> dict[str, Scope]:
    """One scope for each module with a density of its own; the experts in one parameter share theirs."""
    owners = {name: pattern for name in grids if (pattern := config.density_key(name)) is not None}
    for pattern in config.density_pattern or ():
        if pattern not in owners.values():
            raise ValueError(
                f"density_pattern[{pattern!r}] is the first to match none of the {len(grids)} targeted modules, such "
                f"as {', '.join(list(grids)[:3])}; change the pattern or its place, or take the entry out"
            )
    scopes: dict[str, Scope] = {}
    for module in dict.fromkeys(name.partition("[")[0] for name in owners):
        names = [name for name in owners if name.partition("[")[0] == module]
        pattern = owners[names[0]]
        budget = math.floor(_exact(config.density_pattern[pattern]) * sum(grids[name].numel for name in names))
        scopes |= dict.fromkeys(names, Scope(f"density_pattern[{pattern!r}], module {module}", names, budget, False))
    return scopes


def _map_scopes(grids: Mapping[str, BlockGrid], config: SMTConfig, alone: Mapping[str, Scope]) -> list[Scope]:
    owners = {name: next((pattern for pattern in config.budget if re.search(pattern, name)), None) for name in grids}
    scopes = []
    for pattern, share in config.budget.items():
        names = [name for name, owner in owners.items() if owner == pattern]
        if not names:
            found = [name for name in (*grids, *alone) if re.search(pattern, name)]
            taker = "density_pattern" if found and found[0] in alone else "an earlier entry"
            reason = (
                f"matches only modules that {taker} has taken, such as {found[0]}"
                if found
                else f"matches none of the {len(grids)} targeted modules, such as {', '.join(list(grids)[:3])}"
            )
            raise ValueError(f"budget[{pattern!r}] {reason}; change the regex or take the entry out")
        scopes.append(_scope(f"budget[{pattern!r}]", names, list(grids), _exact(share), grids, config))
    return scopes


def check_room(scope: Scope, grids: Mapping[str, BlockGrid], blocked: Mapping[str, np.ndarray]) -> None:
    """Raise `ValueError`, naming the scope, when the blocks to be avoided leave too few for its budget.

    Args:
        blocked: as `choose_blocks` takes them.
    """
    lost = sum(int(scope.costs(grids[name])[blocked[name]].sum()) for name in scope.names if name in blocked)
    left, wanted = scope.total(grids) - lost, max(1, scope.budget)
    if left < wanted:
        unit = "blocks" if scope.in_blocks else "weights"
        raise ValueError(
            f"{scope.label}: {wanted:,} {unit} are asked for, but of its {left + lost:,} only {left:,} are not among "
            "those to avoid; lower density or num_blocks, take a selection out of avoid, set block_size to what "
            "that has, or budget='global', which may spend elsewhere"
        )


def _take_best(matrices: list[Matrix], taken: list[np.ndarray]) -> None:
    scores = [np.where(matrix.closed, -np.inf, matrix.scores) for matrix in matrices]
    best = max(range(len(matrices)), key=lambda i: (scores[i].max(), -i))
    taken[best].flat[int(scores[best].argmax())] = True


def _as_array(scores: Tensor) -> np.ndarray:
    return scores.detach().to(device="cpu", dtype=torch.float64).numpy()


def _as_blocks(chosen: Mapping[str, np.ndarray], grids: Mapping[str, BlockGrid]) -> dict[str, Tensor]:
    return {
        name: grids[name].unflatten(torch.from_numpy(chosen[name]))
        for name in grids
        if name in chosen and len(chosen[name])
    }


class _Notes:
    """What the user should know about a choice, one line per kind."""

    def __init__(self):
        self.raised: list[str] = []
        self.short: list[str] = []

    def say(self, grids: Mapping[str, BlockGrid], config: SMTConfig, counts: Mapping[str, int] | None) -> None:
        if self.raised:
            say(f"the budget is below one block in {_some(self.raised)}; one block is taken there")
        if self.short:
            caps = f"max_column_share={config.max_column_share}, max_lora_rank={config.max_lora_rank}"
            say(
                f"the caps ({caps}) leave fewer blocks than the budget wants in {_some(self.short)}; all of them are "
                "taken"
            )
        clipped = [] if counts is not None else [name for name, grid in grids.items() if _is_clipped(grid, config)]
        if clipped:
            say(
                f"block_size={config.block_size} is larger than a side of the matrix in {_some(clipped)} "
                f"({grids[clipped[0]]}) and is clipped to it"
            )


def _some(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{len(labels)} places (the first: {labels[0]})"


def _is_clipped(grid: BlockGrid, config: SMTConfig) -> bool:
    size = MIN_AUTO_SIDE if config.block_size == "auto" else config.block_size
    sides = (size, size) if isinstance(size, int) else size
    return any(side > full for side, full in zip(sides, grid.shape, strict=True))
