"""Freezing by training dynamics: what changes least rests for the interval to come (SlimFit)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ..tuner.delta import SMTBlocks
from ..tuner.effective import covered_weights
from ..tuner.layer import SMTLayer
from .inputs import end_above_input
from .moments import Moments, check_held
from .schedule import SEEDS, Schedule, check_share, check_whole
from .trained import by_layer, train_only, trained_blocks

MAX_SHARE = 0.95
Unit = Literal["module", "layer"]
Kept = Literal["keep", "drop", "move"]


@dataclass
class Freezing(Schedule):
    """Freezes the share of the modules that changes least, interval by interval (SlimFit: arXiv 2305.18513).

    Their inter-layer scheduling: what trains is measured at the end of each interval, what rests keeps the
    change that it was last seen with, and those with the greatest train next. So a module comes back once those that
    train change less than it did, as they do while the learning rate falls. At the start, when no change is known,
    modules take turns in an order drawn at random until each has trained once.

    The change of a module is `|delta now - delta before|_1 / |W|_1`, over the weights that its blocks cover, `W` as the
    base has them. The mean of the weights' own ratios, which the paper's code takes, is infinite where a weight is
    zero, as pruned ones and padding rows are, and hangs on the smallest weights elsewhere; relative to the delta, which
    starts at zero, whatever trains first would seem to change most.

    Args:
        share: of the units that are frozen, rounded down; above 0, at most 0.95.
        every: updates in an interval.
        unit: what is frozen as one: `"module"`, each that has blocks, or `"layer"`, all of a layer; modules outside of
            the layers, as embeddings and the head, are units of their own.
        moments: of the optimizer, for what is frozen: `"keep"` them where they are, as the paper does, `"drop"` them,
            or `"move"` them to the memory of the CPU.
        rest: intervals after which a unit trains again however little it had changed, so that none starves; None: as
            in the paper, there is no such bound.
        seed: of the order at the start.
    """

    name: ClassVar[str] = "freezing"
    decides_what_trains: ClassVar[bool] = True
    lets_rest: ClassVar[bool] = True
    uncounted: ClassVar[str] = "freezing: a step in which nothing is frozen, without the copies to measure changes by"

    share: float = 0.9
    every: int = 1
    unit: Unit = "module"
    moments: Kept = "keep"
    rest: int | None = 100
    seed: int = 0

    def __post_init__(self):
        check_share(self, MAX_SHARE)
        check_whole(self, every=1, seed=None)
        if self.rest is not None:
            check_whole(self, rest=1)
        for name, known in (("unit", get_args(Unit)), ("moments", get_args(Kept))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        self._begun = False

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        if self._begun:
            # An earlier training was cut off; its moments are no longer those of the optimizer.
            self._let_go()
        self._blocks = trained_blocks(model)
        self._units = self._grouped()
        self._check()
        check_held(optimizer, {name: module.weight for name, module in self._blocks.items()})
        self._order = self._drawn()
        self._norms = base_norms(model, self._blocks)
        self._moments = None if self.moments == "keep" else Moments(optimizer, self.moments)
        # Before anything rests: an embedding that does may train again.
        self._input, self._begun = end_above_input(model), True
        if state is None:
            #: By unit: its change when it last trained, and for how many intervals it has rested.
            self._changes: dict[str, float] = {}
            self._rested = dict.fromkeys(self._units, 0)
            self._start_interval(self.chosen())
        else:
            self._go_on(state)

    def _grouped(self) -> dict[str, list[str]]:
        layers = by_layer(self._blocks) if self.unit == "layer" else {}
        inside = {name for names in layers.values() for name in names}
        return layers | {name: [name] for name in self._blocks if name not in inside}

    def _check(self) -> None:
        units, frozen = len(self._units), self._frozen()
        if not frozen:
            raise ValueError(
                f"share={self.share} of {units} {self.unit}s with blocks is less than one, so none would be frozen; "
                "raise it, or leave the freezing out"
            )
        turns = math.ceil(units / (units - frozen))
        if self.rest is not None and self.rest < turns:
            raise ValueError(
                f"rest={self.rest}, but with share={self.share} it takes {turns} intervals until each of {units} "
                f"{self.unit}s has trained; set rest to {turns} or more, or lower share"
            )

    def _frozen(self) -> int:
        # 0.9 of ten is nine, whatever floats say.
        return math.floor(self.share * len(self._units) + 1e-9)

    def _drawn(self) -> list[str]:
        units = list(self._units)
        generator = torch.Generator().manual_seed(self.seed & SEEDS)
        return [units[i] for i in torch.randperm(len(units), generator=generator).tolist()]

    def before_update(self, step: int) -> None:
        # Whoever switches adapters meanwhile lets all blocks of the active one train.
        train_only(self._blocks, self._names(self._active))

    def after_update(self, step: int) -> None:
        if step % self.every == 0:
            self._measure()
            self._start_interval(self.chosen())

    def end(self) -> None:
        if self._moments:
            self._moments.wake((name, blocks.weight) for name, blocks in self._blocks.items())
        self._let_go()

    def _let_go(self) -> None:
        if self._moments:
            self._moments.release()
        train_only(self._blocks, set(self._blocks))
        if self._input is not None:
            self._input.remove()
        self._blocks, self._before, self._input, self._begun = {}, {}, None, False

    def state_dict(self) -> dict[str, Any]:
        return {
            "changes": dict(self._changes),
            "rested": dict(self._rested),
            "active": list(self._active),
            "before": dict(self._before),
            "moments": self._moments.state_dict() if self._moments else {},
        }

    def _go_on(self, state: Mapping[str, Any]) -> None:
        if state["rested"].keys() != self._units.keys():
            raise ValueError(
                f"the checkpoint was saved with other modules or another unit than unit={self.unit!r} gives; resume "
                "with the same settings, or start anew"
            )
        self._changes, self._rested = dict(state["changes"]), dict(state["rested"])
        if self._moments:
            self._moments.load_state_dict(state["moments"])
        self._train(state["active"])
        self._before = {name: tensor.to(self._blocks[name].weight.device) for name, tensor in state["before"].items()}

    def chosen(self) -> list[str]:
        """The units that train in the interval to come: those not known yet, those overdue, then by their change."""

        def rank(unit: str) -> tuple[float, float]:
            if unit not in self._changes:
                return 0, 0
            overdue = self.rest is not None and self._rested[unit] >= self.rest
            return (1, -self._rested[unit]) if overdue else (2, -self._changes[unit])

        # Ties, as at the start, go by the order that was drawn.
        return sorted(self._order, key=rank)[: len(self._order) - self._frozen()]

    def _start_interval(self, active: list[str]) -> None:
        for unit in self._units:
            self._rested[unit] = 0 if unit in active else self._rested[unit] + 1
        self._train(active)
        self._before = {name: self._blocks[name].weight.detach().clone() for name in self._names(active)}

    def _train(self, active: list[str]) -> None:
        self._active, names = active, self._names(active)
        if self._moments:
            self._moments.rest((name, blocks.weight) for name, blocks in self._blocks.items() if name not in names)
        train_only(self._blocks, names)
        if self._moments:
            self._moments.wake((name, self._blocks[name].weight) for name in names)

    def _names(self, units: list[str]) -> set[str]:
        return {name for unit in units for name in self._units[unit]}

    @torch.no_grad()
    def _measure(self) -> None:
        """Take in how far what trains has moved: one sum per module, and one look at them all."""
        moved = {name: torch.dist(self._blocks[name].weight, before, 1) for name, before in self._before.items()}
        sums = dict(zip(moved, _on_host(moved.values()), strict=True))
        if not any(sums.values()):
            # A learning rate of zero, or an update that was skipped: nothing is learned about anything.
            return
        for unit in self._active:
            names = self._units[unit]
            self._changes[unit] = sum(sums[name] for name in names) / sum(self._norms[name] for name in names)


def base_norms(model: nn.Module, blocks: Mapping[str, SMTBlocks]) -> dict[str, float]:
    """`|W|_1` of the weights that each module's blocks cover, as the base has them.

    Raises:
        ValueError: weights that cannot be read; names the module.
    """
    norms = {}
    for layer in model.modules():
        if not isinstance(layer, SMTLayer) or layer.smt_name not in blocks:
            continue
        adapter = next(name for name, each in layer.smt_blocks.items() if each is blocks[layer.smt_name])
        norms[layer.smt_name] = covered_weights(layer, adapter).abs().sum(dtype=torch.float64)
    # Of a base of zeros any change is large.
    smallest = torch.finfo(torch.float32).tiny
    return {name: max(norm, smallest) for name, norm in zip(norms, _on_host(norms.values()), strict=True)}


def _on_host(values: Any) -> list[float]:
    """Of scalars on one device or several, waiting for each device once."""
    values: list[Tensor] = list(values)
    if len({value.device for value in values}) == 1:
        return torch.stack(values).double().tolist()
    return [value.item() for value in values]
