"""Do two warm-up passes choose the same blocks? Overlap between seeds, lengths of the warm-up, and tasks.

    python -m benchmarks.quality.agreement         # writes benchmarks/results/quality_agreement.json

Overlap is the share of trained weights that two selections of one size have in common. Two that are drawn at random
have the trained share of the weights in common, which stands beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from smt_peft import BlockSelection, SMTConfig, select_blocks
from smt_peft.bench.environment import record
from smt_peft.selection.budget import choose_blocks

from ..commit import commit
from .methods import per_rank
from .studies import CHOSEN, SKILLS, TASKS
from .task import Task

FILE = Path(__file__).resolve().parents[1] / "results" / "quality_agreement.json"
SCORES = ("grad_abs", "mean_abs")
SPREADS = ("free", "assignment")
LENGTHS = (1, 4, 16, 64, 200)
BUDGET, SEEDS = 2, 3


def overlap(first: BlockSelection, second: BlockSelection) -> float:
    """Weights that both train as a share of those that the smaller one trains."""
    common = 0
    for name in first.blocks.keys() & second.blocks.keys():
        grid = first.grids[name]
        shared = set(grid.flatten(first.blocks[name]).tolist()) & set(grid.flatten(second.blocks[name]).tolist())
        if shared:
            common += grid.effective_numel(grid.unflatten(torch.tensor(sorted(shared))))
    return common / min(first.effective_numel, second.effective_numel)


def selections(task: Task, score: str, count: int, seed: int) -> dict[str, BlockSelection]:
    """By spread, from one warm-up pass."""
    torch.manual_seed(seed)
    model = task.base()
    rank, weights = per_rank(model)
    settings = CHOSEN | {"score": score, "density": BUDGET * rank / weights, "seed": seed}
    rows = islice(task.batches(seed + 1000), count)
    scored = select_blocks(model, SMTConfig(**settings), rows, count, progress=False)
    found = {}
    for spread in SPREADS:
        blocks = choose_blocks(scored.scores, scored.grids, SMTConfig(**(settings | {"spread": spread})))
        found[spread] = BlockSelection(blocks, scored.grids)
    return found


def measured(tasks: dict[str, Task], scores: tuple[str, ...], lengths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Rows of the result, once every selection has been made."""
    made: dict[tuple, BlockSelection] = {}
    todo = [
        (name, score, count, seed) for name in tasks for score in scores for count in lengths for seed in range(SEEDS)
    ]
    for name, score, count, seed in tqdm(todo, unit="warm-up", mininterval=10):
        for spread, selection in selections(tasks[name], score, count, seed).items():
            made[name, score, spread, count, seed] = selection
    for score in scores:
        for spread in SPREADS:
            for count in lengths:
                yield row("seeds", score, spread, count, [
                    overlap(made[name, score, spread, count, a], made[name, score, spread, count, b])
                    for name in tasks for a, b in combinations(range(SEEDS), 2)
                ])  # fmt: skip
                yield row("longest", score, spread, count, [
                    overlap(made[name, score, spread, count, seed], made[name, score, spread, lengths[-1], other])
                    for name in tasks for seed in range(SEEDS) for other in range(SEEDS) if seed != other
                ])  # fmt: skip
                yield row("tasks", score, spread, count, [
                    overlap(made[a, score, spread, count, seed], made[b, score, spread, count, seed])
                    for a, b in combinations(tasks, 2) for seed in range(SEEDS)
                ])  # fmt: skip


def row(between: str, score: str, spread: str, count: int, overlaps: list[float]) -> dict[str, Any]:
    """`between`: two seeds, a length and the longest one, or two tasks; `overlap` from its least to its most."""
    return {
        "between": between,
        "score": score,
        "spread": spread,
        "batches": count,
        "overlap": round(statistics.mean(overlaps), 4),
        "least": round(min(overlaps), 4),
        "most": round(max(overlaps), 4),
        "pairs": len(overlaps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="batches of a warm-up (%(default)s)")
    args = parser.parse_args()
    tasks = {name: TASKS[name]() for name in SKILLS}
    rank, weights = per_rank(next(iter(tasks.values())).base())
    rows = list(measured(tasks, SCORES, tuple(args.lengths)))
    result = {**record("cpu"), "commit": commit(), "by_chance": BUDGET * rank / weights, "rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
