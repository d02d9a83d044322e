"""Settings of papers, by name: one YAML each, in the keys of a run, with the source of every number.

A run names one (`preset: paca`) and may change any of its keys; in Python `SMTConfig(**preset("paca")["smt"])` is the
same.
"""

from __future__ import annotations

import copy
import difflib
from functools import cache
from pathlib import Path
from typing import Any

# Comes with Transformers, whose hub client reads model cards with it.
import yaml

_HERE = Path(__file__).parent


def presets() -> list[str]:
    """The names there are."""
    return sorted(file.stem for file in _HERE.glob("*.yaml"))


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset, a copy: flat keys of a run, and blocks such as `smt`.

    Raises:
        ValueError: there is no such preset; names the nearest.
    """
    if name not in presets():
        near = difflib.get_close_matches(str(name), presets(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown preset {name!r}; {hint}known are {', '.join(presets())}")
    return copy.deepcopy(_read(name))


@cache
def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((_HERE / f"{name}.yaml").read_text(encoding="utf-8"))
