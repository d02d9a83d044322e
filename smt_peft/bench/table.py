"""The rows of a benchmark as a table in plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HEAD = (
    f"  {'route':28s} {'time':>10s}  {'p20 - p80':>21s} {'x base':>7s} {'TFLOP/s':>8s} {'% mm':>5s} {'GB/s':>7s}"
    f" {'% copy':>6s}"
)


def write(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of one experiment: a heading, and a line per route; `*` marks the one that an ordinary call takes."""
    return "\n".join([f"{rows[0]['operation']}: {rows[0]['case']}", HEAD, *map(_line, _fastest_first(rows)), ""])


def duration(seconds: float) -> str:
    """In a unit that leaves three or four digits."""
    for unit, size in (("s ", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds * 1e6:.4g} us"


def _fastest_first(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: row.get("seconds", float("inf")))


def _line(row: Mapping[str, Any]) -> str:
    name = f"{'*' if row.get('serves') else ' '} {row['route']:28s}"
    if row["status"] == "cannot run":
        return f"{name} cannot run: {row['reason']}"
    if row["status"] == "wrong":
        return f"{name} WRONG, not timed: error {row['error']:.3g}, allowed {row['allowed']:.3g}"
    low, high = map(duration, row["seconds_p20_p80"])
    rate = f"{row['flops_per_second'] / 1e12:8.3f} {row['percent_of_mm']:5.1f}" if "flops" in row else f"{'':14s}"
    ratio = f"{row['ratio']:7.3f}" if "ratio" in row else f"{'':7s}"
    bandwidth = f"{row['bytes_per_second'] / 1e9:7.1f} {row['percent_of_copy']:6.1f}"
    return f"{name} {duration(row['seconds']):>10s}  {low:>9s} - {high:>9s} {ratio} {rate} {bandwidth}"
