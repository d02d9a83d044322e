"""Which layers train in the step that is counted, where they take turns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..blocks import BlockSelection
from ..schedules import LayerSampling
from ..schedules.inputs import end_above_input
from ..schedules.trained import by_layer, train_only
from ..tuner.layer import SMTLayer


@dataclass(frozen=True)
class Turn:
    """The step that takes most: the lower the lowest layer that trains, the more is kept for backward."""

    sampling: LayerSampling

    @property
    def assumed(self) -> str:
        lowest = "those that are drawn" if self.sampling.order == "fixed" else "the lowest, with which most is saved"
        away = "; moments that were moved to the CPU are not counted" if self.sampling.moments == "move" else ""
        return f"layer_sampling: a step in which {self.sampling.layers} layers train, {lowest}{away}"

    def layers(self, selection: BlockSelection) -> list[str]:
        """Their names, in a model whose whole selection this is."""
        layers = list(by_layer(selection.blocks))
        return self.sampling.turn(layers, 0) if self.sampling.order == "fixed" else layers[: self.sampling.layers]

    def settle(self, model: nn.Module, selection: BlockSelection) -> None:
        """Let all other layers of a model with the adapter rest; called again, it changes nothing."""
        blocks = {
            layer.smt_name: each
            for layer in model.modules()
            if isinstance(layer, SMTLayer)
            for each in layer.smt_blocks.values()
        }
        active, layers = self.layers(selection), by_layer(blocks)
        resting = {name for layer in layers if layer not in active for name in layers[layer]}
        train_only(blocks, blocks.keys() - resting)
        end_above_input(model)
