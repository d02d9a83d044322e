"""One suite's result: a JSON file of flat rows, written after each of them, that goes on where it was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from smt_peft.bench.environment import record
from smt_peft.bench.table import duration

from ..commit import commit
from .memory import UNSEEN

ROOT = Path(__file__).resolve().parents[2]
# Of the record: what differs from one moment to the next without making the rows before worthless.
_PASSING = ("load_average",)


class Result:
    """The rows of a suite, and what they were measured with.

    A file that is there already is gone on with if it comes from the same commit, machine, versions and settings;
    otherwise it is overwritten, also where uncommitted changes leave open what code it comes from.

    Args:
        path: of the JSON file; None: rows are printed only.
        settings: of the suite; JSON values.
        device: what is measured on.
    """

    def __init__(self, path: Path | None, suite: str, settings: dict[str, Any], device: str = "cpu"):
        self.path = path
        self.head = {
            **record(device),
            "commit": commit(),
            "environment": {
                key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GLIBC_TUNABLES")
            },
            "suite": suite,
            "settings": settings,
            "unseen_memory": UNSEEN[torch.device(device).type],
        }
        self.done: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self._take_up()

    def has(self, point: str) -> bool:
        """Whether this point has been measured to its end."""
        if point in self.done:
            print(f"{point}: measured already, see {self.path}")
        return point in self.done

    def add(self, point: str, rows: Iterable[dict[str, Any]]) -> None:
        """Take in the rows of a point as they come, and write and print each; `point` is done when they end."""
        self.rows = [row for row in self.rows if row["point"] != point]
        for row in rows:
            self.rows.append({"point": point, **row})
            self._write()
            print(line(self.rows[-1]), flush=True)
        self.done.append(point)
        self._write()

    def _write(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({**self.head, "done": self.done, "rows": self.rows}, indent=1) + "\n")

    def _take_up(self) -> None:
        try:
            found = json.loads(self.path.read_text())
        except (AttributeError, OSError, ValueError):
            return
        head = json.loads(json.dumps(self.head))
        same = all(found.get(key) == value for key, value in head.items() if key not in _PASSING)
        if same and head["commit"]["dirty"] is False:
            self.done, self.rows = found["done"], found["rows"]


def line(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    head = f"{row['point']:22s} {row['method']:36s}"
    if row.get("reason"):
        return f"{head} {row['reason']}"
    low, high = row["ratio_p20_p80"]
    text = f"{head} {duration(row['seconds']):>9s} {row['ratio']:8.3f}  {low:6.3f} - {high:6.3f}"
    if row.get("peak_bytes") is not None:
        text += f" {row['peak_bytes'] / 2**20:9.1f} MiB"
        text += f" {row['peak_ratio']:6.3f}" if row.get("peak_ratio") is not None else ""
    return text
