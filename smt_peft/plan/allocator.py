"""An allocator of nothing: the storages of the meta device, counted for as long as they live."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_GROUPED = torch.ops.aten._grouped_mm.default


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
