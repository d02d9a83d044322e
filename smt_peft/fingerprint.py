"""A fingerprint of base weights that survives a change of dtype: a few weights at fixed places, compared by rounding.

A hash of the bytes would refuse a bf16 copy of the fp32 checkpoint that an adapter was trained on; a handful of values
compared up to the rounding of the coarsest float format accepts it, and still tells two models apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MAX_MODULES = 32
VALUES_PER_MODULE = 8
# bf16 keeps 8 significant bits: one rounding moves a value by at most 2**-9 of it; both sides may have been rounded.
RELATIVE_ROUNDING = 2.0**-7


def fingerprint(weights: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Sample float weights.

    Args:
        weights: per module its weight, 2-D. Weights on the meta device, sharded to nothing, or not floating point
            (packed quantised bases) are passed over.

    Returns:
        For up to 32 modules spread evenly over the model, 8 values spread over the rows and columns of the weight.
    """
    usable = [
        name
        for name, weight in weights.items()
        if weight.is_floating_point() and not weight.is_meta and weight.numel() > 0
    ]
    count = min(MAX_MODULES, len(usable))
    names = [usable[i * len(usable) // count] for i in range(count)]
    return {name: _sample(weights[name]).tolist() for name in names}


def mismatch(expected: Mapping[str, list[float]], weights: Mapping[str, Tensor]) -> str | None:
    """Name of the first module whose weights are not those of the fingerprint, or None when all agree.

    Only modules known to both sides, with a readable float weight, are compared.
    """
    for name, values in expected.items():
        weight = weights.get(name)
        if weight is None or not weight.is_floating_point() or weight.is_meta or weight.numel() == 0:
            continue
        ours, theirs = _sample(weight), torch.tensor(values, dtype=torch.float64)
        if ours.shape != theirs.shape:
            return name
        # The floor forgives values that fp16 flushes to zero.
        tolerance = RELATIVE_ROUNDING * torch.maximum(ours.abs(), theirs.abs()) + 1e-7
        same = ((ours - theirs).abs() <= tolerance) | (ours.isnan() & theirs.isnan())
        if not bool(same.all()):
            return name
    return None


def _sample(weight: Tensor) -> Tensor:
    rows, cols = weight.shape
    steps = torch.arange(min(VALUES_PER_MODULE, weight.numel()))
    # Rows and columns step by different primes, so that the places lie in different rows and in different columns.
    return weight.detach()[steps * 7919 % rows, steps * 104729 % cols].to(device="cpu", dtype=torch.float64)
