"""A plan as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .memory import Memory
from .plan import Plan
from .state import State

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size(text: str) -> int:
    """Bytes of `24GiB`, `24GB` or `24`, which are GiB.

    Raises:
        ValueError: it is no size.
    """
    number = text.strip().rstrip("BGKMTibgkmt ")
    unit = text.strip()[len(number) :].strip() or "GiB"
    units = {name.lower(): factor for name, factor in (UNITS | _DECIMAL).items()}
    try:
        bytes_ = float(number) * units[unit.lower()]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{text!r} is no size of memory; say 24GiB, or 24 for the same") from error
    if not bytes_ > 0:
        raise ValueError(f"{text!r} is no size of memory; it must be above 0, as 24GiB is")
    return int(bytes_)


def shown(number: int) -> str:
    """Bytes in the unit that leaves one to four digits before the point."""
    name = next((name for name, factor in reversed(UNITS.items()) if number >= factor), "B")
    return f"{number / UNITS[name]:.0f} B" if name == "B" else f"{number / UNITS[name]:.1f} {name}"


def table(plan: Plan) -> str:
    """The plan in lines of text."""
    return "\n".join([*_head(plan), "", *_columns(plan), "", *_verdict(plan), "", *_assumptions(plan)])


def _head(plan: Plan) -> Iterator[str]:
    setting = plan.setting
    yield plan.title
    yield f"blocks: {plan.selection}"
    spread = "" if setting.processes == 1 else f" on each of {setting.processes} devices"
    shared = ", weights shared among them" if setting.sharded and setting.processes > 1 else ""
    yield f"memory{spread}{shared}; lines of one step are not all there at the same moment, the peak is"


def _columns(plan: Plan) -> list[str]:
    methods = plan.methods
    rows: list[tuple[str, Sequence[str]]] = [("", [each.method for each in methods])]
    rows.append(("trained parameters", [f"{each.trainable:,}" for each in methods]))
    for kind in dict.fromkeys(kind for each in methods for kind in each.state.weights):
        rows.append((f"weights, {kind}", [shown(each.state.weights.get(kind, 0)) for each in methods]))
    for name, of in _lines():
        if any(map(of, methods)):
            rows.append((name, [shown(of(each)) for each in methods]))
    rows.append(("peak of a step", [shown(each.peak()) for each in methods]))
    if plan.smt.other is not None:
        word = "without" if plan.setting.checkpointing else "with"
        saved = [each.other and each.other.saved for each in methods]
        peaks = [each.other and each.peak(each.other) for each in methods]
        rows.append((f"{word} checkpointing: saved", [_if(size) for size in saved]))
        rows.append((f"{word} checkpointing: peak", [_if(size) for size in peaks]))
    if plan.score:
        rows.append((f"peak of the warm-up, {plan.score}", [shown(plan.warm_up), *["-"] * (len(methods) - 1)]))
    left = max(len(name) for name, _ in rows)
    widths = [max(len(cells[column]) for _, cells in rows) for column in range(len(methods))]
    return [
        f"{name:{left}s}  " + "  ".join(f"{cell:>{width}s}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    ]


def _lines() -> Iterator[tuple[str, Callable[[Memory], int]]]:
    def of_state(name: str) -> Callable[[Memory], int]:
        return lambda memory: getattr(_state(memory), name)

    yield "trained, beside the weights", of_state("trained")
    yield "tables of the blocks", of_state("tables")
    yield "optimizer state", of_state("moments")
    yield "gradients", lambda memory: memory.gradients
    yield "saved for backward", lambda memory: memory.step.saved
    yield "logits and loss, at most", lambda memory: memory.step.head
    yield "gathered and exchanged", lambda memory: memory.gathered
    yield "CUDA context, assumed", lambda memory: memory.setting.runtime


def _state(memory: Memory) -> State:
    return memory.state


def _if(size: int | None) -> str:
    return "-" if size is None else shown(size)


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.limit is None:
        yield f"SMT takes {shown(plan.peak)}; name the memory there is (--memory 24GiB) to learn whether that fits"
        return
    if plan.fits:
        yield f"fits: {shown(plan.peak)} of {shown(plan.limit)}"
        return
    guilty = "choosing the blocks" if plan.warm_up > plan.smt.peak() else "a step"
    yield f"does not fit: {guilty} takes {shown(plan.peak)} of {shown(plan.limit)}"
    for change in plan.changes:
        fits = "fits" if change.peak <= plan.limit else "still too much"
        yield f"  {change.keys}: {shown(change.peak)}, {fits}; costs {change.cost}"


def _assumptions(plan: Plan) -> Iterator[str]:
    yield from (f"assumed: {line}" for line in plan.assumed)
