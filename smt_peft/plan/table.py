"""A plan as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from .memory import Memory
from .plan import Plan
from .plan import plan as make_plan

if TYPE_CHECKING:
    from ..training.yaml.schema import Run

WIDTH = 80
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
    """The plan in lines of text, of 80 columns where the names of models and methods let them."""
    sections = (_head(plan), _columns(plan), _verdict(plan), _assumptions(plan))
    return "\n\n".join("\n".join(section) for section in sections)


def plan_or_why_not(run: Run) -> str:
    """The plan of a run as text, or in one line why there is none."""
    try:
        return table(make_plan(run))
    # Whatever a model does that cannot be counted without values: what is told besides is worth reading.
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        return f"memory: cannot be told beforehand: {type(error).__name__}: {first}"


def _head(plan: Plan) -> Iterator[str]:
    setting = plan.setting
    where = "on one device" if setting.processes == 1 else f"on each of {setting.processes} devices"
    shared = ", which share the weights" if setting.shares else ""
    yield plan.title
    yield from _wrapped(f"blocks: {plan.selection}")
    yield from _wrapped(
        f"memory {where}{shared}; lines do not add up to a peak, as they are not all there at one moment, and "
        "temporaries are"
    )


def _columns(plan: Plan) -> list[str]:
    methods = plan.methods
    rows: list[tuple[str, Sequence[str]]] = [("", [each.method for each in methods])]
    rows.append(("trained parameters", [_millions(each.trainable) for each in methods]))
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
        rows.append(("peak of choosing blocks", [shown(plan.warm_up), *["-"] * (len(methods) - 1)]))
    left = max(len(name) for name, _ in rows)
    widths = [max(len(cells[column]) for _, cells in rows) for column in range(len(methods))]
    return [
        f"{name:{left}s}  " + "  ".join(f"{cell:>{width}s}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    ]


def _lines() -> Iterator[tuple[str, Callable[[Memory], int]]]:
    yield "trained, beside the weights", lambda memory: memory.state.trained
    yield "tables of the blocks", lambda memory: memory.state.tables
    yield "optimizer state", lambda memory: memory.state.moments
    yield "gradients", lambda memory: memory.gradients
    yield "saved for backward", lambda memory: memory.step.saved
    yield "logits and loss, at most", lambda memory: memory.step.head
    yield "gathered and exchanged", lambda memory: memory.gathered
    yield "CUDA context, assumed", lambda memory: memory.setting.runtime


def _millions(number: int) -> str:
    return f"{number / 10**6:,.1f} M" if number >= 10**5 else f"{number:,}"


def _if(size: int | None) -> str:
    return "-" if size is None else shown(size)


def _verdict(plan: Plan) -> Iterator[str]:
    choosing = f"choosing the blocks by {plan.score}" if plan.warm_up > plan.smt.peak() else "a training step"
    if plan.limit is None:
        yield f"SMT takes {shown(plan.peak)}, in {choosing}"
        yield "add --memory 24GiB (what a device has) to learn whether that fits"
        return
    if plan.fits:
        yield f"fits: {shown(plan.peak)} of {shown(plan.limit)}, in {choosing}"
        return
    yield f"does not fit: {choosing} takes {shown(plan.peak)} of {shown(plan.limit)}"
    if not plan.changes:
        yield "nothing in this run could be changed to take less"
        return
    if plan.changes[0].peak > plan.limit:
        yield "nor does anything that could be changed; all of it together comes to:"
    else:
        yield "what would, the cheapest first; add the keys of one line to the run:"
    for change in plan.changes:
        yield from _wrapped(f"{shown(change.peak)} with {change.keys}", "  ")
        yield from _wrapped(f"costs {change.cost}", "      ")


def _assumptions(plan: Plan) -> Iterator[str]:
    for line in plan.assumed:
        yield from _wrapped(f"assumed: {line}")


def _wrapped(text: str, indent: str = "") -> list[str]:
    return wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
