"""The table of README.md about the quickstart, from a committed run of `make demo`."""

from __future__ import annotations

import json
from pathlib import Path

from .markdown import table

FILE = Path(__file__).resolve().parent / "results" / "quickstart_cpu.json"


def demo() -> str:
    found = json.loads(FILE.read_text())
    before, after, lora = found["before"], found["after"], found["lora"]
    return table(
        ["", "exact match", "trained weights"],
        [
            ["frozen", f"{before['exact_match']:.1%}", ""],
            ["SMT, 4 % of the linear weights", f"{after['exact_match']:.1%}", f"{found['trainable_parameters']:,}"],
            [f"LoRA, rank {lora['rank']}", f"{lora['exact_match']:.1%}", f"{lora['trainable_parameters']:,}"],
        ],
    )


TABLES = {"quickstart": demo}
