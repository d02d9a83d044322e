"""`smt bench` and `smt env`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import products, updates
from .cases import size_of
from .environment import record, report
from .measure import Budget, peaks, run
from .table import duration, write

# In the order in which they run, those that matter most first.
EXPERIMENTS = {
    "block_grad": products.block_grad,
    "block_adamw_": updates.block_adamw_,
    "swap_linear": products.swap,
    "block_scatter_": updates.block_scatter_,
    "block_gather": updates.block_gather,
    "block_matmul_": products.block_matmul_,
    "block_scores": products.block_scores,
}
ROUNDS, QUICK_ROUNDS = 21, 3
# Copies of the operands stay below this; without a GPU, a share of what a small machine has.
OPERAND_BYTES = {"cuda": 16 << 30, "cpu": 1 << 30}


def bench(
    operations: Sequence[str] | None = None,
    device: str | None = None,
    quick: bool = False,
    rounds: int | None = None,
    out: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Check every route to every chosen operation, time those that are right, print a table, and write JSON.

    Args:
        operations: names; None: all. `swap_linear` is timed together with `swap_matmul`.
        device: `"cpu"` or `"cuda"`; None: the GPU where there is one.
        quick: matrices so small that all of it takes seconds; its times say nothing.
        rounds: timed calls per route; 21, in quick mode 3.
        out: file for the JSON, rewritten after every experiment, so that what is stopped leaves what it has.

    Returns:
        The rows, one per route; `status` is `"ok"`, `"wrong"` or `"cannot run"`.

    Raises:
        ValueError: no such operation, no such device, fewer than one round.
    """
    names = list(operations or EXPERIMENTS)
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise ValueError(f"there is no benchmark of {unknown[0]!r}; known are {', '.join(EXPERIMENTS)}")
    place = _device(device)
    rounds = (QUICK_ROUNDS if quick else ROUNDS) if rounds is None else rounds
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    facts = record(place)
    cache = facts["device"]["cache_bytes"]
    budget = Budget(rounds, 1 << 20, 1 << 18) if quick else Budget(rounds, OPERAND_BYTES[place.type], cache)
    limits = {"copy_bytes": 1 << 22, "side": 128} if quick else _peak_sizes(place, cache)
    result = {
        **facts,
        "settings": {"operations": names, "quick": quick, "rounds": rounds, **vars(budget), **limits},
        "peaks": peaks(place, **limits),
        "rows": [],
    }
    print(_heading(result))
    for name in names:
        for experiment in EXPERIMENTS[name](size_of(place, quick), place):
            rows = run(experiment, budget, result["peaks"])
            result["rows"] += rows
            print(write(rows), flush=True)
            if out is not None:
                _save(result, Path(out))
    print(_summary(result["rows"]))
    return result["rows"]


def env() -> None:
    """Print versions, devices, compiled libraries, and which backend serves which operation and why."""
    print(report())


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in OPERAND_BYTES:
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds no CUDA device here; use --device cpu")
    return torch.device(name)


def _peak_sizes(device: torch.device, cache: int) -> dict[str, int]:
    if device.type == "cuda":
        return {"copy_bytes": 2 << 30, "side": 8192}
    return {"copy_bytes": max(256 << 20, cache), "side": 2048}


def _heading(result: Mapping[str, Any]) -> str:
    facts, settings, rates = result["device"], result["settings"], result["peaks"]
    return (
        f"{facts['name']}, {result['threads']} threads, torch {result['versions']['torch']}; "
        f"copy {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s, mm {rates['mm_flops_per_second'] / 1e12:.3f} TFLOP/s; "
        f"median of {settings['rounds']} rounds; * serves an ordinary call\n"
    )


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per experiment: our route, and the best of the others."""
    lines = ["", f"{'ours against the best other route':82s} {'ours':>10s} {'other':>10s} {'faster':>7s}"]
    for row in rows:
        others = [r for r in rows if r["case"] == row["case"] and r["operation"] == row["operation"] and "seconds" in r]
        others = [r for r in others if not r["route"].startswith("smt ")]
        if not row.get("times_as_fast_as") or not others:
            continue
        best = min(others, key=lambda r: r["seconds"])
        name = f"{row['operation']}: {row['case']} ({row['backend']} against {best['route']})"
        times = f"{duration(row['seconds']):>10s} {duration(best['seconds']):>10s}"
        lines.append(f"{name:82s} {times} {row['times_as_fast_as'][best['route']]:6.2f}x")
    wrong = [f"{row['operation']}: {row['case']}: {row['route']}" for row in rows if row["status"] == "wrong"]
    return "\n".join(lines + [f"WRONG: {name}" for name in wrong])


def _save(result: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
