"""Which state of this repository a measurement was made from."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def commit() -> dict[str, Any]:
    """`{"hash", "dirty"}` of the repository, results and documents aside; both None where it is no checkout."""
    try:
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs", ":!*.md")
        return {"hash": _git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"hash": None, "dirty": None}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
