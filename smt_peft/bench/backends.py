"""Our own routes of an experiment: one per backend of an operation."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from .. import ops
from ..ops.dispatch import FASTER, parse, why_not
from .measure import Route


def ours(operation: str, call: Callable, *operands, also: tuple[str, ...] = ()) -> dict[str, Route | str]:
    """A route per backend of `operation`, or why it cannot run; with `SMT_BACKEND` set, only of the one it forces.

    Args:
        call: runs the operation on the operands of an experiment.
        operands: what `why_not` looks at.
        also: operations that `call` runs besides, of the same backends.
    """
    forced = forced_backend(operation)
    routes: dict[str, Route | str] = {}
    served = False
    for name in [forced] if forced else [*FASTER[operation], "reference"]:
        if reason := why_not(name, operation, *operands):
            routes[f"smt {name}"] = reason
            continue
        spec = ",".join(f"{each}={name}" for each in (operation, *also))
        routes[f"smt {name}"] = Route(call, backend=name, serves=not served, context=partial(ops.use_backend, spec))
        served = True
    return routes


def forced_backend(operation: str) -> str | None:
    """The backend that `SMT_BACKEND` forces for an operation, or None."""
    return parse(os.environ.get("SMT_BACKEND")).get(operation)
