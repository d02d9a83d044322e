"""Layer sampling: the blocks of a few layers train at a time (LISA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from .moments import Keeping, Moments, check_keeping
from .schedule import Schedule
from .trained import by_layer, train_only, trained_blocks


@dataclass
class LayerSampling(Schedule):
    """Trains the blocks of some layers at a time, others after a while (LISA: Pan et al., arXiv 2403.17919).

    Blocks outside of the layers, as of embeddings and the head, always train.

    Args:
        layers: how many layers train at a time.
        every: updates until others do.
        moments: of layers that rest: `"drop"` them, or `"move"` them to the memory of the CPU.
        seed: of the draw, which hangs on nothing else but the number of the period.
    """

    name: ClassVar[str] = "layer_sampling"

    layers: int = 2
    every: int = 20
    moments: Keeping = "drop"
    seed: int = 0

    def __post_init__(self):
        for name in ("layers", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_keeping(self.moments)

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._blocks = trained_blocks(model)
        self._layers = by_layer(self._blocks)
        if self.layers > len(self._layers):
            raise ValueError(
                f"layers={self.layers} train at a time, but only {len(self._layers)} have blocks; lower it, or leave "
                "the layer sampling out"
            )
        self._moments = Moments(optimizer, self.moments)
        if state is not None:
            self._moments.load_state_dict(state["moments"])
        self._train(0 if state is None else state["period"])

    def after_update(self, step: int) -> None:
        if step // self.every != self._period:
            self._train(step // self.every)

    def end(self) -> None:
        names = self._blocks.keys()
        self._moments.wake((name, self._blocks[name].weight) for name in names)
        train_only(self._blocks, set(names))

    def state_dict(self) -> dict[str, Any]:
        return {"period": self._period, "moments": self._moments.state_dict()}

    def active(self, period: int) -> set[str]:
        """The modules that train in a period, counted from 0."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + period)
        layers = list(self._layers)
        drawn = [layers[i] for i in torch.randperm(len(layers), generator=generator)[: self.layers].tolist()]
        resting = {name for layer in layers if layer not in drawn for name in self._layers[layer]}
        return self._blocks.keys() - resting

    def _train(self, period: int) -> None:
        self._period = period
        active = self.active(period)
        self._moments.rest((name, blocks.weight) for name, blocks in self._blocks.items() if name not in active)
        train_only(self._blocks, active)
        self._moments.wake((name, self._blocks[name].weight) for name in active)
