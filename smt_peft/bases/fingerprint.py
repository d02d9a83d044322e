"""A fingerprint of base weights that survives a change of dtype: a few weights at fixed places, compared by rounding.

A hash of the bytes would refuse a bf16 copy of the fp32 checkpoint that an adapter was trained on; a handful of values
compared up to the rounding of the coarsest float format accepts it, and still tells two models apart.

Of a quantised weight the dequantised values are kept, each with how far quantising may have moved it, so that the float
original is accepted for its 4-bit copy and the other way round: hundreds of values within half a quantisation step of
another model's are no accident.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .sharded import why_absent

MAX_MODULES = 32
VALUES_PER_MODULE = 8
# bf16 keeps 8 significant bits: one rounding moves a value by at most 2**-9 of it; both sides may have been rounded.
RELATIVE_ROUNDING = 2.0**-7


@dataclass(frozen=True)
class Sampled:
    """A weight of which only the values that a fingerprint asks for have been read.

    Args:
        values: the weight at `places(shape)`.
    """

    values: Tensor


# A weight, 2-D; or, of a quantised one, what dequantises it: called when its turn comes, it gives the values and how
# far quantising may have moved each, which broadcasts to their shape.
Weight = Tensor | Sampled | Callable[[], tuple[Tensor, Tensor]]
# Per value kept: the value, or for a quantised weight `[value, half a quantisation step]`.
Sample = list[float] | list[list[float]]


def fingerprint(weights: Mapping[str, Weight]) -> dict[str, Sample]:
    """Sample weights.

    Args:
        weights: per module its weight. Weights on the meta device, sharded over processes, or packed without a way to
            dequantise them are passed over.

    Returns:
        For up to 32 modules spread evenly over the model, 8 values spread over the rows and columns of the weight.
    """
    usable = [name for name, weight in weights.items() if _is_readable(weight)]
    count = min(MAX_MODULES, len(usable))
    names = [usable[i * len(usable) // count] for i in range(count)]
    return {name: _as_json(*_sample(weights[name])) for name in names}


def mismatch(expected: Mapping[str, Sample], weights: Mapping[str, Weight]) -> str | None:
    """Name of the first module whose weights are not those of the fingerprint, or None when all agree.

    Only modules known to both sides, with a readable weight, are compared: up to rounding, and up to what quantising
    may have moved on either side.
    """
    for name, values in expected.items():
        weight = weights.get(name)
        if weight is None or not _is_readable(weight):
            continue
        if not _agree(_sample(weight), _from_json(values)):
            return name
    return None


def difference(one: Mapping[str, Sample], other: Mapping[str, Sample]) -> str | None:
    """Name of the first module that two fingerprints tell apart as `mismatch` does, or None when they agree."""
    common = (name for name in one if name in other)
    return next((name for name in common if not _agree(_from_json(one[name]), _from_json(other[name]))), None)


def _agree(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    (ours, our_step), (theirs, their_step) = one, other
    if ours.shape != theirs.shape:
        return False
    # The floor forgives values that fp16 flushes to zero.
    tolerance = RELATIVE_ROUNDING * torch.maximum(ours.abs(), theirs.abs()) + 1e-7 + our_step + their_step
    same = ((ours - theirs).abs() <= tolerance) | (ours.isnan() & theirs.isnan())
    return bool(same.all())


def _is_readable(weight: Weight) -> bool:
    if not isinstance(weight, Tensor):
        return True
    return weight.is_floating_point() and weight.numel() > 0 and why_absent(weight) is None


def _sample(weight: Weight) -> tuple[Tensor, Tensor]:
    """Values, and how far quantising may have moved them: fp64 on the CPU."""
    if isinstance(weight, Sampled):
        return weight.values.double(), torch.zeros_like(weight.values, dtype=torch.float64)
    weight, step = (weight, None) if isinstance(weight, Tensor) else weight()
    chosen = places(weight.shape)
    values = weight.detach()[chosen].to(device="cpu", dtype=torch.float64)
    if step is None:
        return values, torch.zeros_like(values)
    return values, step.detach().expand(weight.shape)[chosen].to(values)


def places(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows and columns of the values that a fingerprint keeps of a `(rows, cols)` weight, int64 `(8,)` each."""
    rows, cols = shape
    steps = torch.arange(min(VALUES_PER_MODULE, rows * cols))
    # Rows and columns step by different primes, so that the places lie in different rows and in different columns.
    return steps * 7919 % rows, steps * 104729 % cols


def _as_json(values: Tensor, step: Tensor) -> Sample:
    return torch.stack((values, step), 1).tolist() if bool(step.any()) else values.tolist()


def _from_json(sample: Sample) -> tuple[Tensor, Tensor]:
    table = torch.tensor(sample, dtype=torch.float64)
    return (table, torch.zeros_like(table)) if table.ndim == 1 else table.unbind(1)
