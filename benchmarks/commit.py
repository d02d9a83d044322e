"""Which state of this repository a measurement was made from."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str | None:
    """The commit's hash, `+` behind it when files of the package differ from it; None outside of a repository."""
    try:
        found = _git("rev-parse", "--short=12", "HEAD")
        return found + "+" * bool(_git("status", "--porcelain", "--", "smt_peft", "csrc"))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
