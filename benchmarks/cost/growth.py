"""How time and memory grow: one property of the model, the batch or the blocks at a time, around one centre.

Every point has a frozen pass of its own, and each method's figures are ratios to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import methods
from .methods import Method, equal_rank, lora, smt
from .model import Case
from .result import Result
from .step import compare

CENTRE = Case(hidden=512, layers=2, tokens=512)
# Multiples of the centre's value.
FACTORS = {"hidden": (0.5, 1, 2, 4), "tokens": (0.125, 0.5, 2, 8), "layers": (0.5, 1, 2, 4, 8)}
DENSITIES = (0.002, 0.0084, 0.02, 0.049, 0.1)
TARGETS = {
    "q and v": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "all": "all-linear",
}
AXES = (*FACTORS, "density", "targets", "block_size")
BLOCK_SIZES = (4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Point:
    """A place on an axis."""

    axis: str
    value: object
    case: Case
    block_sizes: tuple[int | str, ...] = ("auto", 32, 128)

    def __str__(self) -> str:
        return f"{self.axis}={self.value}"

    def methods(self) -> dict[str, Method]:
        """SMT with each size of blocks, and LoRA at equal parameters.

        Blocks of a given size share one budget, as large ones would come to more than it with one in every matrix.
        """
        case = self.case
        rank = equal_rank(case.build(), case.density, case.targets)
        own = {size: {} if size == "auto" else {"budget": "global"} for size in self.block_sizes}
        return {
            "frozen": methods.frozen(),
            **{f"smt {size}": smt(case.density, case.targets, block_size=size, **own[size]) for size in own},
            "lora, equal parameters": lora(rank, case.targets),
        }


def points(centre: Case = CENTRE) -> Iterator[Point]:
    for axis, factors in FACTORS.items():
        # Many layers in a narrow model are quick.
        base = replace(centre, hidden=centre.hidden // 2) if axis == "layers" else centre
        for factor in factors:
            value = max(1, int(factor * getattr(base, axis)))
            yield Point(axis, value, replace(base, **{axis: value}))
    for density in DENSITIES:
        yield Point("density", density, replace(centre, density=density))
    for name, targets in TARGETS.items():
        yield Point("targets", name, replace(centre, targets=targets))
    # One point for all: they share the frozen pass.
    yield Point("block_size", "4 to 256", centre, BLOCK_SIZES)


def suite(result: Result, rounds: int, warmup: int, axes: list[str] | None = None, centre: Case = CENTRE) -> None:
    """Every point of the axes named, or of all."""
    for point in points(centre):
        if (not axes or point.axis in axes) and not result.has(str(point)):
            facts = {"axis": point.axis, "value": point.value}
            result.add(str(point), ({**row, **facts} for row in compare(point.methods(), point.case, rounds, warmup)))
