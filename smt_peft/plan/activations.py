"""What one training step holds besides what lives from step to step: counted, operation by operation, without values.

The model is on the meta device. Forward and backward run there as they would with values, autograd saves what it would
save, and every storage that is made is counted for as long as it lives. So there is no formula per architecture.
PyTorch's own `torch.distributed._tools.mem_tracker` counts by the same principle, module by module; a step needs less.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .device import Device

_GROUPED = torch.ops.aten._grouped_mm.default
Batch = Callable[[], Mapping[str, Tensor]]
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


class Allocator(TorchDispatchMode):
    """Counts the bytes of storages on the meta device that are made within, for as long as each is alive.

    Attributes:
        alive: how many there are now.
    """

    def __init__(self):
        super().__init__()
        self.alive = 0
        self._gauges: list[Gauge] = []
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return _answer(args[0])
        run = _grouped_product if func is _GROUPED and args[0].is_meta else func
        made = run(*args, **(kwargs or {}))
        for tensor in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage())
        for gauge in self._gauges:
            gauge.peak = max(gauge.peak, self.alive)
        return made

    def gauge(self) -> Gauge:
        """Begins to watch for the most that is alive."""
        self._gauges.append(Gauge(self.alive, self.alive))
        return self._gauges[-1]

    def stop(self, gauge: Gauge) -> None:
        """Ends it, once or more often."""
        self._gauges = [other for other in self._gauges if other is not gauge]

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def released(_: weakref.ref) -> None:
            self.alive -= size
            del self._storages[key]

        # PyTorch keeps the one Python object of a storage for as long as the storage itself.
        self._storages[key] = weakref.ref(storage, released)
        self.alive += size

    def own(self, model: nn.Module) -> None:
        """Take the storages of a model for made before, and not count them."""
        for tensor in (*model.parameters(), *model.buffers()):
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = weakref.ref(storage)


@dataclass(eq=False)
class Gauge:
    """Bytes alive at its beginning, and at most until it is stopped."""

    start: int = 0
    peak: int = 0


def _grouped_product(left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """On the meta device PyTorch 2.13 knows it in bf16 only, its kernels know more; the shapes are the same."""
    operands = (torch.empty_strided(x.shape, x.stride(), dtype=torch.bfloat16, device="meta") for x in (left, right))
    shape = _GROUPED(*operands, *args, **kwargs)
    return torch.empty_strided(shape.shape, shape.stride(), dtype=left.dtype, device="meta")


def _answer(scalar: Tensor) -> bool | int:
    """What a model hears that asks for a value: yes where it asks whether all of a batch is plain, that is unpadded."""
    return scalar.dtype == torch.bool


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
) -> Step:
    """Run a training step on the meta device.

    Args:
        model: on the meta device, with something to train in it.
        batch: makes the batch, on the meta device.
        device: where the step is to run.
        loss: of model and batch; None: what the model itself calls `loss`.
        temporaries: bytes that the optimizer takes for the time of an update.
        accumulated: whether gradients of earlier batches are there already; their bytes are not in the peak then.
    """
    loss = loss or model_loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained if accumulated else ():
        parameter.grad = torch.empty_like(parameter)
    allocator = Allocator()
    allocator.own(model)
    with (device or Device()).pretended(), allocator, _head(model, allocator) as heads:
        forward = allocator.gauge()
        inputs = batch()
        value = loss(model, inputs)
        allocator.stop(forward)
        backward = allocator.gauge()
        value.backward()
    gradients = sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
    peaks = {"forward": forward.peak, "backward": backward.peak, "update": allocator.alive + temporaries}
    model.zero_grad(set_to_none=True)
    phase = max(peaks, key=peaks.get)
    head = max((gauge.peak - gauge.start for gauge in heads), default=0)
    return Step(backward.start, head, gradients, peaks[phase], phase)


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
