"""What one training step holds besides what lives from step to step: counted, operation by operation, without values.

The model is on the meta device. Forward and backward run there as they would with values, autograd saves what it would
save, and every storage that is made is counted for as long as it lives. So there is no formula per architecture.
PyTorch's own `torch.distributed._tools.mem_tracker` counts by the same principle, module by module; a step needs less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .allocator import Allocator, Gauge
from .device import Device
from .layers import Layers
from .watch import Watch

Batch = Callable[[], Mapping[str, Tensor]]
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Step:
    """Bytes of one step above what lives from step to step.

    Args:
        saved: the batch, the loss and what autograd keeps when backward begins.
        head: what logits and loss add at most to what the layers below them keep.
        gradients: of the trained parameters.
        peak: the most that is alive, gradients included.
        phase: when: `"forward"`, `"backward"` or `"update"`.
    """

    saved: int
    head: int
    gradients: int
    peak: int
    phase: str


def step(
    model: nn.Module,
    batch: Batch,
    device: Device | None = None,
    *,
    loss: Loss | None = None,
    temporaries: int = 0,
    accumulated: bool = False,
    layers: Layers | None = None,
    backward: bool = True,
) -> Step:
    """Run a training step on the meta device.

    Args:
        model: on the meta device, with something to train in it.
        batch: makes the batch, on the meta device.
        device: where the step is to run.
        loss: of model and batch; None: what the model itself calls `loss`.
        temporaries: bytes that the optimizer takes for the time of an update.
        accumulated: whether gradients of earlier batches are there already; their bytes are not in the peak then.
        layers: those that stand for others; None: there are none.
        backward: whether there is a backward pass; without, as of `MeZO`, a copy of what is trained lives instead.
    """
    loss, layers = loss or model_loss, layers or Layers()
    trained = layers.trained(model)
    for parameter in dict.fromkeys(trained) if accumulated and backward else ():
        parameter.grad = torch.empty_like(parameter)
    allocator = Allocator()
    allocator.own(model)
    with (
        (device or Device()).pretended(),
        allocator,
        _head(model, allocator) as heads,
        Watch(allocator, layers).installed() as watch,
    ):
        inputs = batch()
        with torch.set_grad_enabled(backward):
            value = loss(model, inputs)
        saved = watch.begin_backward()
        if backward:
            value.backward()
    gradients = _bytes_of_gradients(trained)
    in_forward, in_backward = watch.peaks()
    if not backward:
        in_forward, in_backward = in_forward + sum(parameter.nbytes for parameter in trained), 0
    # Of what a layer has taken its gradients alone are left.
    left_out = 0 if accumulated else gradients - _bytes_of_gradients(dict.fromkeys(trained))
    peaks = {"forward": in_forward, "backward": in_backward, "update": allocator.alive + left_out + temporaries}
    model.zero_grad(set_to_none=True)
    phase = max(peaks, key=peaks.get)
    head = max((gauge.peak - gauge.start for gauge in heads), default=0)
    return Step(saved, head, gradients, peaks[phase], phase)


def _bytes_of_gradients(trained: Iterable[nn.Parameter]) -> int:
    return sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)


def model_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss as the model computes it."""
    return model(**batch, use_cache=False).loss if _has_cache(model) else model(**batch).loss


def _has_cache(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "use_cache", None) is not None


@contextmanager
def _head(model: nn.Module, allocator: Allocator) -> Iterator[list[Gauge]]:
    """A gauge from where the model below the head is done to where the gradient of its output comes back."""
    gauges: list[Gauge] = []
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(whole, "base_model", whole)

    def done(module: nn.Module, args: tuple, output: Any) -> None:
        gauge = allocator.gauge()
        gauges.append(gauge)
        if output[0].requires_grad:
            output[0].register_hook(lambda grad: allocator.stop(gauge))

    handle = None if backbone is whole else backbone.register_forward_hook(done)
    try:
        yield gauges
    finally:
        if handle is not None:
            handle.remove()
