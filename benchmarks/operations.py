"""Tables of docs/kernels.md, from the committed JSON of `smt bench`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from smt_peft.bench.table import duration

from .markdown import table

FILE = Path(__file__).resolve().parent / "results" / "ops_cpu.json"
LAYER = "1024 x 1024, 512 tokens, "
PATTERNS = {
    "matched 8": "128 blocks of 8, a matching",
    "matched 16": "64 blocks of 16, a matching",
    "matched 32": "32 blocks of 32, a matching",
    "matched 64": "16 blocks of 64, a matching",
    "clustered 128, 4.90%": "3 blocks of 128",
    "9 free of 256": "9 blocks of 256",
}
Key = tuple[str, str, str]


@cache
def rows() -> dict[Key, dict]:
    found = json.loads(FILE.read_text())["rows"]
    return {(row["operation"], row["case"], row["route"]): row for row in found if row["status"] == "ok"}


def seconds(*key: str) -> str:
    return duration(rows()[key]["seconds"])


def block_grad() -> str:
    """Seconds by route, and the rate of multiplications as a share of a dense `mm`'s."""
    lines = []
    for case, title in PATTERNS.items():
        at = ("block_grad", LAYER + case)
        times = [seconds(*at, route) for route in ("smt native", "smt reference", "addmm per block")]
        lines.append([title, *times, f"{rows()[(*at, 'smt native')]['rate_to_baseline']:.2f}"])
    return table(["1024 x 1024, 512 tokens", "native", "plain PyTorch", "loop over blocks", "rate of `mm`"], lines)


def blocks() -> str:
    lines = []
    for operation, case in (
        ("block_adamw_", "5000 blocks of 64 x 64"),
        ("block_scatter_", "5000 blocks of 64 x 64 in 8192 x 4096"),
        ("block_gather", "5000 blocks of 64 x 64 in 8192 x 4096"),
    ):
        times = [seconds(operation, case, route) for route in ("smt native", "smt reference", "loop over blocks")]
        lines.append([f"`{operation}`", *times])
    return table(["5,000 blocks of 64 x 64", "native", "plain PyTorch", "loop over blocks"], lines)


TABLES = {"block-grad": block_grad, "blocks": blocks}
