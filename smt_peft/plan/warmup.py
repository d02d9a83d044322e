"""What the warm-up pass holds: the real taps and scores, on a model without values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bases.target import Target
from ..bases.targets import find_targets
from ..config import SMTConfig
from ..selection.experts import Targets, matrices, tappable_experts
from ..selection.guard import borrowed
from ..selection.scores import low_rank_magnitude, magnitude
from ..selection.taps import ActivationTaps
from ..selection.warmup import make_taps
from .activations import Batch, Loss, model_loss
from .allocator import Allocator, Gauge
from .device import Device
from .layers import Layers
from .watch import Watch

_OF_WEIGHTS = {
    "magnitude": magnitude,
    "small_magnitude": lambda weight, grid: -magnitude(weight, grid),
    "low_rank_magnitude": lambda weight, grid: low_rank_magnitude(weight, grid, 0),
}


def warm_up(
    model: nn.Module,
    config: SMTConfig,
    batch: Batch,
    device: Device | None = None,
    loss: Loss = model_loss,
    layers: Layers | None = None,
) -> int:
    """The most bytes that choosing blocks by `config.score` takes above the weights.

    Args:
        model: the frozen model, on the meta device, without an adapter.
        batch: makes a batch, on the meta device.
        device: where the pass is to run.
        loss: of model and batch.
        layers: those of the model that stand for others; None: there are none.
    """
    layers = layers or Layers()
    targets = matrices(find_targets(model, config))
    allocator = Allocator()
    allocator.own(model)
    with (device or Device()).pretended(), allocator:
        if not config.needs_data:
            return _by_weights(allocator, targets, config, layers) if config.score in _OF_WEIGHTS else 0
        grids = {name: target.grid(config) for name, target in targets.items()}
        taps = make_taps(targets, grids, config, None, shapes_only=True)
        early = _scores_bytes(allocator, targets, config, layers)
        checkpointing = not isinstance(taps, ActivationTaps)
        with (
            borrowed(model, 0, checkpointing) as base,
            tappable_experts(targets),
            taps.installed(),
            Watch(allocator, layers).installed() as watch,
        ):
            if isinstance(taps, ActivationTaps):
                with torch.no_grad():
                    loss(base, batch())
                taps.close_batch()
            else:
                value = loss(base, batch())
                watch.begin_backward()
                taps.backward(value)
    return max(watch.peaks(early))


def _by_weights(allocator: Allocator, targets: Targets, config: SMTConfig, layers: Layers) -> int:
    """The most that is alive while matrix after matrix is scored; the scores of all are there until the choice."""
    repeated = _inside(layers, targets)
    kept: dict[str, Tensor] = {}
    moments: dict[str, Gauge] = {}
    for name, target in targets.items():
        moments[name] = allocator.gauge()
        kept[name] = _OF_WEIGHTS[config.score](target.weight, target.grid(config))
        allocator.stop(moments[name])
    peak, begun = 0, set()
    for name, target in targets.items():
        # Modules come first and bare parameters after them, each in the order of the layers.
        begun |= {isinstance(target, Target)} if name in repeated else set()
        before = sum(kept[other].nbytes for other, each in repeated.items() if isinstance(each, Target) in begun)
        peak = max(peak, moments[name].peak + layers.copies * before)
    return peak


def _inside(layers: Layers, targets: Targets) -> Targets:
    """The targets in layers that stand for others."""
    modules = {id(module) for layer in layers.repeated for module in layer.modules()}
    return {name: target for name, target in targets.items() if id(target.module) in modules}


def _scores_bytes(allocator: Allocator, targets: Targets, config: SMTConfig, layers: Layers) -> int:
    """What the scores of the layers that stand for others take before the pass."""
    repeated = _inside(layers, targets)
    before = allocator.alive
    taps = make_taps(repeated, {name: t.grid(config) for name, t in repeated.items()}, config, None, shapes_only=True)
    taken = allocator.alive - before
    del taps
    return taken
