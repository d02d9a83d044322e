"""What the warm-up pass holds: the real taps and scores, on a model without values."""

from __future__ import annotations

import torch
from torch import nn

from ..bases.targets import find_targets
from ..config import SMTConfig
from ..selection.experts import matrices, tappable_experts
from ..selection.guard import borrowed
from ..selection.scores import low_rank_magnitude, magnitude
from ..selection.taps import ActivationTaps
from ..selection.warmup import make_taps
from .activations import Allocator, Batch, Loss, model_loss
from .device import Device

_OF_WEIGHTS = {"magnitude": magnitude, "low_rank_magnitude": lambda weight, grid: low_rank_magnitude(weight, grid, 0)}


def warm_up(
    model: nn.Module, config: SMTConfig, batch: Batch, device: Device | None = None, loss: Loss = model_loss
) -> int:
    """The most bytes that choosing blocks by `config.score` takes above the weights.

    Args:
        model: the frozen model, on the meta device, without an adapter.
        batch: makes a batch, on the meta device.
        device: where the pass is to run.
        loss: of model and batch.
    """
    targets = matrices(find_targets(model, config))
    allocator = Allocator()
    allocator.own(model)
    peak = allocator.gauge()
    with (device or Device()).pretended(), allocator:
        if not config.needs_data:
            if config.score in _OF_WEIGHTS:
                largest = max(targets.values(), key=lambda target: target.weight.numel())
                _OF_WEIGHTS[config.score](largest.weight, largest.grid(config))
            return peak.peak
        grids = {name: target.grid(config) for name, target in targets.items()}
        taps = make_taps(targets, grids, config, None, shapes_only=True)
        checkpointing = not isinstance(taps, ActivationTaps)
        with borrowed(model, 0, checkpointing) as base, tappable_experts(targets), taps.installed():
            if isinstance(taps, ActivationTaps):
                with torch.no_grad():
                    loss(base, batch())
                taps.close_batch()
            else:
                taps.backward(loss(base, batch()))
    return peak.peak
