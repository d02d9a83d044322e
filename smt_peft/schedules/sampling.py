"""Layer sampling: the blocks of a few layers train at a time (LISA, BAdam)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from .inputs import end_above_input
from .moments import Keeping, Moments, check_keeping
from .schedule import SEEDS, Schedule, check_whole
from .trained import by_layer, train_only, trained_blocks

Order = Literal["draw", "shuffle", "ascending", "descending", "fixed"]


@dataclass
class LayerSampling(Schedule):
    """Trains the blocks of some layers at a time, others after a while (LISA: arXiv 2403.17919; BAdam: 2404.02827).

    Blocks outside of the layers, as of embeddings and the head, always train, and so does what is trained besides
    blocks (`modules_to_save`, trainable tokens).

    Args:
        layers: how many layers train at a time.
        every: updates until others do.
        order: `"draw"`: every period draws its layers, whatever came before (LISA, Algorithm 1); `"shuffle"`: every
            round goes through all layers once, in an order of its own (BAdam, Algorithm 1), the last period of a round
            with those that are left; `"ascending"`, `"descending"`: every round from the input up, or from the output
            down (BAdam's other modes); `"fixed"`: those of the first draw, to compare with.
        moments: of layers that rest: `"drop"` them, so that every period begins with fresh moments in all layers, as
            both papers do; or `"move"` them to the memory of the CPU, and go on from there. Of what always trains they
            stay as they are.
        seed: of what is drawn, which hangs on nothing else but the number of the period, or of the round.
    """

    name: ClassVar[str] = "layer_sampling"
    decides_what_trains: ClassVar[bool] = True
    lets_rest: ClassVar[bool] = True

    layers: int = 2
    every: int = 20
    order: Order = "draw"
    moments: Keeping = "drop"
    seed: int = 0

    def __post_init__(self):
        check_whole(self, layers=1, every=1, seed=None)
        if self.order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, got {self.order!r}")
        check_keeping(self.moments)
        self._begun = False

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        if self._begun:
            # An earlier training was cut off.
            self.end()
        blocks = trained_blocks(model)
        layers = by_layer(blocks)
        if self.layers > len(layers):
            raise ValueError(
                f"layers={self.layers} train at a time, but only {len(layers)} have blocks; lower it, or leave "
                "the layer sampling out"
            )
        moments = Moments(optimizer, self.moments, {name: module.weight for name, module in blocks.items()})
        self._blocks, self._layers, self._moments = blocks, layers, moments
        if state is not None:
            self._moments.load_state_dict(state["moments"])
        self._input, self._begun = end_above_input(model), True
        self._train(0 if state is None else state["period"])

    def before_update(self, step: int) -> None:
        # Whoever switches adapters meanwhile lets all blocks of the active one train, and DDP hands out zeros.
        train_only(self._blocks, self._active)

    def after_update(self, step: int) -> None:
        if step // self.every != self._period:
            if self.moments == "drop":
                self._moments.rest(self._named(name for names in self._layers.values() for name in names))
            self._train(step // self.every)

    def end(self) -> None:
        """All blocks train again. The moments of resting layers are given up: on the device they may have no room."""
        train_only(self._blocks, set(self._blocks))
        if self._input is not None:
            self._input.remove()
        self._moments.release()
        self._blocks, self._layers, self._input, self._begun = {}, {}, None, False

    def state_dict(self) -> dict[str, Any]:
        return {"period": self._period, "moments": self._moments.state_dict()}

    def active(self, period: int) -> set[str]:
        """The modules that train in a period, counted from 0; known once the training has begun."""
        layers = self.turn(list(self._layers), period)
        resting = {name for layer in self._layers if layer not in layers for name in self._layers[layer]}
        return self._blocks.keys() - resting

    def turn(self, layers: list[str], period: int) -> list[str]:
        """The layers, of all that there are, that train in a period, counted from 0."""
        if self.order in ("draw", "fixed"):
            return self._shuffled(layers, 0 if self.order == "fixed" else period)[: self.layers]
        number, place = divmod(period, -(-len(layers) // self.layers))
        if self.order == "shuffle":
            layers = self._shuffled(layers, number)
        elif self.order == "descending":
            layers = layers[::-1]
        return layers[place * self.layers :][: self.layers]

    def _shuffled(self, layers: list[str], number: int) -> list[str]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) & SEEDS)
        return [layers[i] for i in torch.randperm(len(layers), generator=generator).tolist()]

    def _train(self, period: int) -> None:
        self._period, self._active = period, self.active(period)
        self._moments.rest(self._named(self._blocks.keys() - self._active))
        train_only(self._blocks, self._active)
        self._moments.wake(self._named(self._active))

    def _named(self, names: Iterable[str]) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, self._blocks[name].weight) for name in names)
