"""Tables of README.md and docs/results.md about cost, from the JSON of the suites."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .. import markdown
from . import tables
from .result import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "cost"
#: How each column of `tables` is shown; others are ratios.
FORMS = {"trained": ",d", "peak MiB": ".0f", "weights": ".0f", "training": ".0f", "transient": ".0f"}
#: Of the freezing suite, whose models are small.
FINE = {"saved": ".1f", "most saved": ".1f", "gradients": ".3f", "training": ".2f", "peak MiB": ".1f"}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def shown(table: tables.Table, forms: Mapping[str, str] = FORMS) -> str:
    head, rows = table
    return markdown.table(
        head, [[cell(value, forms.get(key, ".2f")) for key, value in zip(head, row, strict=True)] for row in rows]
    )


def cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, form)


def steps(name: str, point: str) -> str:
    return shown(tables.steps(read(name), point))


def first_look(names: Sequence[str]) -> str:
    """Of the plain suite: how long a step takes and what it holds, of these methods only."""
    head, rows = tables.steps(read("step_cpu"), "0.84%")
    columns = [head.index(key) for key in ("method", "trained", "x frozen", "p20", "p80", "peak MiB")]
    chosen = [[row[column] for column in columns] for row in rows if row[0].startswith(tuple(names))]
    return shown(([head[column] for column in columns], chosen))


def growth(axis: str, figure: str) -> str:
    return shown(tables.growth(read("growth_cpu"), axis, figure))


AXES = ("hidden", "tokens", "layers", "density", "targets", "block_size")
TABLES: dict[str, Callable[[], str]] = {
    "cost-first": partial(first_look, ("frozen", "smt matched", "smt clustered", "lora", "dora r16", "full")),
    "cost-step": partial(steps, "step_cpu", "0.84%"),
    "cost-step-checkpointed": partial(steps, "step_cpu", "0.84%, checkpointed"),
    "cost-step-dense": partial(steps, "step_cpu_0.049", "4.90%"),
    "cost-neighbours": partial(steps, "neighbours_cpu", "plain"),
    "cost-nf4": partial(steps, "fourbit_cpu", "nf4"),
    "cost-nf4-checkpointed": partial(steps, "fourbit_cpu", "nf4, checkpointed"),
    "cost-freezing": lambda: shown(tables.freezing(read("freezing_cpu")), FINE),
    "cost-runs": lambda: shown(tables.runs(read("warmup_cpu"))),
    "cost-warmup": lambda: shown(tables.warm_ups(read("warmup_cpu"))),
    **{f"cost-growth-{axis.replace('_', '-')}": partial(growth, axis, "ratio") for axis in AXES},
    **{f"cost-memory-{axis.replace('_', '-')}": partial(growth, axis, "peak_ratio") for axis in AXES},
}
