"""A pass through a model, layer by layer: what is alive at most, with the layers that are left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .allocator import Allocator, Gauge
from .layers import Layers

# Where in a pass there is no layer yet, and where the gradient has not come to one.
BEFORE, END = -1, 1 << 30


@dataclass
class Moments:
    """The most that is alive from one layer to the next.

    Args:
        forward: before the layers, and from where each begins; the last one: until backward begins.
        backward: from its beginning, and from where the gradient of a layer's output arrives, by the layer.
    """

    forward: dict[int, Gauge] = field(default_factory=dict)
    backward: dict[int, Gauge] = field(default_factory=dict)


@dataclass
class Watch:
    """Notes the moments of a pass, and says what they are with the layers that are left out."""

    allocator: Allocator
    layers: Layers
    moments: Moments = field(default_factory=Moments)
    _open: Gauge | None = None

    @contextmanager
    def installed(self) -> Iterator[Watch]:
        self._note(self.moments.forward, BEFORE)
        hooks = []
        for number, layer in enumerate(self.layers.stack or ()):
            hooks.append(layer.register_forward_pre_hook(self._entered(number)))
            hooks.append(layer.register_forward_hook(self._left(number)))
        try:
            yield self
        finally:
            self.stop()
            for hook in hooks:
                hook.remove()

    def begin_backward(self) -> int:
        """Bytes alive at this moment, in the model that is meant."""
        self._note(self.moments.backward, END)
        return self.allocator.alive + self.layers.copies * self._rise()

    def stop(self) -> None:
        if self._open is not None:
            self.allocator.stop(self._open)

    def _note(self, moments: dict[int, Gauge], key: int) -> None:
        self.stop()
        self._open = moments[key] = self.allocator.gauge()

    def _entered(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            # Recomputed in backward, a layer begins once more.
            if not self.moments.backward and number not in self.moments.forward:
                self._note(self.moments.forward, number)

        return hook

    def _left(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            made = output if isinstance(output, Tensor) else output[0]
            if not self.moments.backward and made.requires_grad:
                made.register_hook(lambda gradient: self._note(self.moments.backward, number))

        return hook

    def peaks(self, early: int = 0) -> tuple[int, int]:
        """The most that is alive in forward and in backward, in the model that is meant; 0: there was no such pass.

        Args:
            early: bytes that the layers that stand for others took before forward.
        """
        layers, rise, fall = self.layers, self._rise(), self._fall()
        copies, middle = layers.copies, layers.first + layers.length
        forward = [gauge.peak + copies * (early + rise * (n >= middle)) for n, gauge in self.moments.forward.items()]
        backward = [
            gauge.peak + copies * (early + rise + fall * (n < layers.first))
            for n, gauge in self.moments.backward.items()
        ]
        # The last of those that are left out; the first one is as the one that stands for it.
        forward += [self.moments.forward[n].peak + copies * (early + rise) for n in self._within(self.moments.forward)]
        backward += [
            self.moments.backward[n].peak + copies * (early + rise + fall) for n in self._within(self.moments.backward)
        ]
        return max(forward), max(backward, default=0)

    def _within(self, moments: dict[int, Gauge]) -> list[int]:
        layers = self.layers
        return [n for n in range(layers.first, layers.first + layers.length) if layers.copies and n in moments]

    def _rise(self) -> int:
        """What one round adds in forward."""
        if not self.layers.copies:
            return 0
        begun, first = self.moments.forward, self.layers.first
        return begun[first + self.layers.length].start - begun[first].start

    def _fall(self) -> int:
        """What one round adds in backward: gradients come, what was saved goes."""
        within = self._within(self.moments.backward)
        if not within:
            return 0
        arrived = self.moments.backward
        return arrived[within[0] - 1].start - arrived[within[-1]].start
